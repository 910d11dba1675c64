"""A small VQ tokenizer: images to a grid of discrete tokens and back.

The network is the purely convolutional VQGAN that RAR's authors use frozen (Sec. 4.1), at small sizes by default and
trained with mean squared error only, without GAN and perceptual losses. Parameters have the names and shapes of the
released MaskGIT-VQGAN weights. The codebook is not trained by gradients: it starts from real encoder outputs, follows
them by exponential moving averages, and unused codes are restarted.

Letters in the right margin: B batch, H and W pixels, h and w grid cells, T = h * w tokens, D code width, V codes,
N latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rar import load_weights, read_weights, reading, require


@dataclass
class VQConfig:
    """Sizes of a tokenizer. The side of its grid is image_size / 2 ** (len(multipliers) - 1).

    released_shortcut applies the 1x1 shortcut of a block to the block's output, a quirk that the authors' weights
    depend on. A tokenizer trained here uses the ordinary shortcut, which learns faster.
    """

    image_size: int = 32
    codebook_size: int = 512
    code_dim: int = 16
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    res_blocks: int = 1
    groups: int = 4
    released_shortcut: bool = False

    def __post_init__(self):
        factor = 2 ** (len(self.multipliers) - 1)
        require(self.image_size % factor == 0, f"image size must be a multiple of {factor}, got {self.image_size}")
        fits = self.channels % self.groups == 0
        require(fits, f"channels must be a multiple of {self.groups}, got {self.channels}")

    @property
    def grid_size(self) -> int:
        return self.image_size // 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.channels * m for m in self.multipliers]


def group_norm(channels: int, config: VQConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice; a 1x1 shortcut where the channel count changes."""

    def __init__(self, channels_in: int, channels_out: int, config: VQConfig):
        super().__init__()
        self.released_shortcut = config.released_shortcut
        self.norm1 = group_norm(channels_in, config)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels_out, config)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut
        self.nin_shortcut = nn.Identity()
        if channels_in != channels_out:
            shortcut_in = channels_out if config.released_shortcut else channels_in
            self.nin_shortcut = nn.Conv2d(shortcut_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.released_shortcut and h.shape != x.shape:
            return self.nin_shortcut(h) + h
        return self.nin_shortcut(x) + h


def res_blocks(channels_in: int, channels_out: int, config: VQConfig) -> nn.Sequential:
    """The residual blocks of one resolution; the first one changes the channel count."""
    later = [ResBlock(channels_out, channels_out, config) for _ in range(config.res_blocks - 1)]
    return nn.Sequential(ResBlock(channels_in, channels_out, config), *later)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, D, h, w)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths, channels = config.widths, config.channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for width in widths:
            self.down.append(nn.ModuleDict({"block": res_blocks(channels, width, config)}))
            channels = width
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level, down in enumerate(self.down):
            if level > 0:
                x = F.avg_pool2d(x, 2)
            x = down["block"](x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  #                               B, D, h, w


class Decoder(nn.Module):
    """Codes (B, D, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.up = nn.ModuleList()  # stored by level, run from the last to the first
        for i, width in enumerate(widths):
            level = nn.ModuleDict({"block": res_blocks(widths[min(i + 1, len(widths) - 1)], width, config)})
            if i > 0:
                level["upsample_conv"] = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.mid(self.conv_in(codes))
        for level in reversed(self.up):
            x = level["block"](x)
            if "upsample_conv" in level:
                x = level["upsample_conv"](F.interpolate(x, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(x)))  #                                         B, 3, H, W


def flatten_latents(latents: Tensor) -> Tensor:
    """Latents (B, D, h, w) -> (B*T, D), row-major."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class Quantizer(nn.Module):
    """Nearest row of the codebook by Euclidean distance, with straight-through gradients."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.embedding.requires_grad_(False)  # CodebookEMA moves the codes

    def nearest_codes(self, latents: Tensor) -> Tensor:
        """Index of the nearest code for latents (N, D): (N,) int64. cdist stays in float32 under autocast."""
        return torch.cdist(latents.float(), self.embedding.weight.float()).argmin(1)

    def lookup(self, tokens: Tensor, grid_size: int) -> Tensor:
        """Tokens (B, T) -> codes (B, D, h, w)."""
        return self.embedding(tokens).unflatten(1, (grid_size, -1)).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, h, w) -> codes of the same shape and tokens (B, T). Gradients skip the search."""
        tokens = self.nearest_codes(flatten_latents(latents.detach())).view(len(latents), -1)  #  B, T
        codes = self.lookup(tokens, latents.shape[2])  #                                          B, D, h, w
        return latents + (codes - latents).detach(), tokens


class VQTokenizer(nn.Module):
    """Encoder, quantizer, decoder: images float (B, 3, H, W) in [0, 1], tokens int64 (B, T) in row-major order."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_released(
        cls, source: str | Path | dict, dtype: torch.dtype | None = None, image_size: int = 256
    ) -> VQTokenizer:
        """Build the tokenizer that a state dict in the released layout (or a file of one) describes by its shapes.

        Convolutions fit any image size, so it has to be given. Raises InputError as RAR.from_released does.
        """
        weights, name = read_weights(source, dtype)
        with reading(name, "are these the weights of a tokenizer?"):
            V, code_dim = weights["quantize.embedding.weight"].shape
            channels = len(weights["encoder.conv_in.weight"])
            levels = len({key.split(".")[2] for key in weights if key.startswith("encoder.down.")})
            blocks = len({key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")})
            widths = [len(weights[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
            multipliers = tuple(width // channels for width in widths)
        config = VQConfig(image_size, V, code_dim, channels, multipliers, blocks, groups=32, released_shortcut=True)
        return load_weights(cls, config, weights, name)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> tokens. Raises InputError if the images do not have the configured size."""
        size, shape = self.config.image_size, tuple(images.shape)
        require(shape[1:] == (3, size, size), f"the tokenizer takes images (B, 3, {size}, {size}), got {shape}")
        return self.quantize(self.encoder(images.to(self.quantize.embedding.weight.dtype)))[1]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images in [0, 1]."""
        return self.decoder(self.quantize.lookup(tokens, self.config.grid_size)).float().clamp(0, 1)

    def forward(self, images: Tensor, ema: CodebookEMA | None = None, quantize: bool = True) -> tuple[Tensor, dict]:
        """Reconstruction, not clamped, and two loss terms: `reconstruction` (mean squared error) and `commitment`.

        With `ema` the codes follow this batch of latents. quantize=False runs a plain autoencoder.
        """
        latents = self.encoder(images).float()  #                                                 B, D, h, w
        codes, commitment = latents, latents.new_zeros(())
        if quantize:
            codes, tokens = self.quantize(latents)
            commitment = F.mse_loss(latents, codes.detach())  # pulls the encoder towards the codes
            if ema is not None:
                ema.update(self.quantize.embedding.weight, flatten_latents(latents.detach()), tokens.flatten())
        reconstruction = self.decoder(codes).float()  #                                           B, 3, H, W
        return reconstruction, {"reconstruction": F.mse_loss(reconstruction, images), "commitment": commitment}


@dataclass
class CodebookEMA:
    """Moves each code to the moving average of the latents that chose it, and restarts unused codes.

    Its state is `counts` (V,) and `sums` (V, D) of the latents that chose each code. Both are relative to uniform use,
    so a count of 1.0 is average. A code whose count falls below `dead_below` restarts at a random latent.
    """

    counts: Tensor
    sums: Tensor
    decay: float = 0.98
    dead_below: float = 0.02

    @classmethod
    @torch.no_grad()
    def from_latents(cls, quantizer: Quantizer, latents: Tensor, rounds: int = 10) -> CodebookEMA:
        """Move the codebook to k-means centres of encoder outputs (N, D) and return statistics that agree with it."""
        codes = quantizer.embedding.weight
        V = len(codes)
        picks = torch.randperm(len(latents), device=latents.device).repeat(V // len(latents) + 1)
        codes.copy_(latents[picks[:V]])
        for _ in range(rounds):  # a round of k-means is an update that remembers nothing
            cls(codes.new_ones(V), codes.clone(), decay=0.0).update(codes, latents, quantizer.nearest_codes(latents))
        return cls(codes.new_ones(V), codes.clone())

    @torch.no_grad()
    def update(self, codes: Tensor, latents: Tensor, tokens: Tensor):
        """Move codes (V, D), in place, towards the latents (N, D) assigned to them by tokens (N,)."""
        counts = torch.bincount(tokens, minlength=len(codes)).to(codes.dtype)  #                  V
        sums = torch.zeros_like(codes).index_add_(0, tokens, latents)  #                          V, D
        restarts = latents[torch.randint(len(latents), (len(codes),), device=latents.device)]
        if dist.is_available() and dist.is_initialized():  # all processes move their codes alike
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(restarts, 0)
        average = counts.sum() / len(codes)  # latents per code if all codes were used equally
        self.counts.lerp_(counts / average, 1 - self.decay)
        self.sums.lerp_(sums / average, 1 - self.decay)
        dead = self.counts < self.dead_below  #                                                   V
        self.counts[dead] = 1.0
        self.sums[dead] = restarts[dead]
        codes.copy_(self.sums / self.counts[:, None])


def codes_used(tokens: Tensor, codebook_size: int) -> float:
    """Share of the codebook that occurs in tokens of any shape, in 0..1; count it over a whole data set."""
    return torch.bincount(tokens.flatten(), minlength=codebook_size).count_nonzero().item() / codebook_size
