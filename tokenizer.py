"""A small VQ tokenizer: images to a grid of discrete tokens and back.

The network is the purely convolutional VQGAN that RAR's authors use frozen (Sec. 4.1), at small sizes by default and
without its GAN and perceptual losses; parameter names and shapes are those of the released MaskGIT-VQGAN weights. The
codebook follows the encoder by exponential moving averages, starts from real encoder outputs and revives dead codes.

Letters in the right margin: B batch, H and W pixels, h and w grid cells, T = h * w tokens, D code width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rar import InputError, blaming, is_size, load_strictly, read_weights


@dataclass
class VQConfig:
    """Sizes of a tokenizer; the grid side is image_size / 2 ** (len(multipliers) - 1).

    released_shortcut puts the 1x1 shortcut of a block on its own output, a quirk the authors' weights depend on. A
    tokenizer trained here uses the ordinary one, which learns faster.
    """

    image_size: int = 32
    codebook_size: int = 512
    code_dim: int = 16
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    res_blocks: int = 1
    groups: int = 4
    released_shortcut: bool = False

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        sizes = [self.image_size, self.codebook_size, self.code_dim, self.channels, self.res_blocks, self.groups]
        if not all(map(is_size, [*sizes, *self.multipliers])) or max(self.res_blocks, len(self.multipliers)) > 100:
            raise InputError("VQConfig: sizes must be 1..2^20, res_blocks and the count of multipliers up to 100")
        if self.image_size % self.downsampling:
            raise InputError(f"image size {self.image_size}: this tokenizer takes multiples of {self.downsampling}")
        if any(self.channels * m % self.groups for m in self.multipliers):
            raise InputError(f"{self.channels} channels x {self.multipliers} must be multiples of {self.groups} groups")

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsampling

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


def group_norm(channels: int, config: VQConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; a 1x1 shortcut where the channel count changes."""

    def __init__(self, channels_in: int, channels_out: int, config: VQConfig) -> None:
        super().__init__()
        self.released_shortcut = config.released_shortcut
        self.norm1 = group_norm(channels_in, config)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels_out, config)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            source = channels_out if config.released_shortcut else channels_in
            self.nin_shortcut = nn.Conv2d(source, channels_out, 1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(h if self.released_shortcut else x)
        return x + h


class Level(nn.Module):
    """The residual blocks of one resolution; the decoder's levels but the last end in an upsampling convolution."""

    def __init__(self, channels_in: int, channels_out: int, config: VQConfig, upsample: bool = False) -> None:
        super().__init__()
        sizes = [channels_in] + [channels_out] * config.res_blocks
        self.block = nn.Sequential(*(ResBlock(a, b, config) for a, b in pairwise(sizes)))
        if upsample:
            self.upsample_conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, D, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, config) for a, b in pairwise([config.channels, *widths]))
        self.mid = nn.Sequential(*(ResBlock(widths[-1], widths[-1], config) for _ in range(config.res_blocks)))
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else F.avg_pool2d(x, 2))  # halved before all levels but the first
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  #                               B, D, h, w


class Decoder(nn.Module):
    """Codes (B, D, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(*(ResBlock(widths[-1], widths[-1], config) for _ in range(config.res_blocks)))
        pairs = zip([*widths[1:], widths[-1]], widths)  # stored by level, run from the last to the first
        self.up = nn.ModuleList(Level(a, b, config, upsample=i > 0) for i, (a, b) in enumerate(pairs))
        self.norm_out = group_norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.mid(self.conv_in(codes))
        for up in reversed(self.up):
            x = up(x)
        return self.conv_out(F.silu(self.norm_out(x)))  #                                         B, 3, H, W


def as_rows(latents: Tensor) -> Tensor:
    """Latents (B, D, h, w) -> (B*T, D), row-major."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class Quantizer(nn.Module):
    """Nearest row of the codebook by Euclidean distance, with straight-through gradients."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        codes = nn.init.trunc_normal_(torch.empty(config.codebook_size, config.code_dim))
        self.embedding = nn.Embedding.from_pretrained(codes)  # without gradient: CodebookEMA moves it

    def nearest(self, latents: Tensor) -> Tensor:
        """Nearest code of latents (N, D): (N,) int64; ||e||^2 - 2 z.e ranks codes e as the distance to z does."""
        codes = self.embedding.weight
        return torch.addmm(codes.square().sum(1), latents, codes.t(), alpha=-2).argmin(1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, h, w) -> codes, whose gradient goes straight to the latents, and tokens (B, T)."""
        B, _, h, w = latents.shape
        tokens = self.nearest(as_rows(latents.detach())).view(B, h * w)  #                                    B, T
        codes = self.lookup(tokens, h)  #                                                         B, D, h, w
        return latents + (codes - latents).detach(), tokens

    def lookup(self, tokens: Tensor, grid_size: int) -> Tensor:
        """Tokens (B, T) -> codes (B, D, h, w)."""
        return self.embedding(tokens).unflatten(1, (grid_size, -1)).permute(0, 3, 1, 2)


class VQTokenizer(nn.Module):
    """Encoder, quantizer, decoder: images float (B, 3, H, W) in [0, 1], tokens int64 (B, T) in row-major order."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_released(
        cls, source: str | Path | dict, dtype: torch.dtype | None = None, image_size: int = 256
    ) -> VQTokenizer:
        """Build the tokenizer that a state dict in the released layout, or a file of one, describes by its shapes.

        Convolutions do not know the image size, so it is given. Raises InputError as RAR.from_released does.
        """
        weights = read_weights(source, dtype)
        with blaming("this" if isinstance(source, dict) else source, "are these the weights of a tokenizer?"):
            V, code_dim = weights["quantize.embedding.weight"].shape
            channels = len(weights["encoder.conv_in.weight"])
            levels = len({name.split(".")[2] for name in weights if name.startswith("encoder.down.")})
            blocks = len({name.split(".")[4] for name in weights if name.startswith("encoder.down.0.block.")})
            widths = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
            multipliers = tuple(width // channels for width in widths)
            config = VQConfig(image_size, V, code_dim, channels, multipliers, blocks, 32, released_shortcut=True)
        return load_strictly(cls, config, weights, dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> tokens. Raises InputError if their size is not the configured one."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise InputError(f"the tokenizer takes images (B, 3, {size}, {size}), got {tuple(images.shape)}")
        return self.quantize(self.encoder(images).float())[1]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images in [0, 1]."""
        return self.decoder(self.quantize.lookup(tokens, self.config.grid_size)).float().clamp(0, 1)

    def forward(self, images: Tensor, ema: CodebookEMA | None = None, quantize: bool = True) -> tuple[Tensor, dict]:
        """Reconstruction, not clamped, and the loss terms `reconstruction` (mean squared error) and `commitment`.

        With `ema` the codes follow this batch of latents. quantize=False runs a plain autoencoder.
        """
        latents = self.encoder(images).float()  #                                                 B, D, h, w
        codes, commitment = latents, latents.new_zeros(())
        if quantize:
            codes, tokens = self.quantize(latents)
            commitment = F.mse_loss(latents, self.quantize.lookup(tokens, latents.shape[2]).detach())
            if ema is not None:
                seen = gather_rows(as_rows(latents.detach())), gather_rows(tokens.flatten())
                ema.update(self.quantize.embedding.weight, *seen)
        reconstruction = self.decoder(codes).float()  #                                           B, 3, H, W
        return reconstruction, {"reconstruction": F.mse_loss(reconstruction, images), "commitment": commitment}


class CodebookEMA:
    """Moves each code to the moving average of the latents that chose it, and revives codes that none chooses.

    Its state is `counts` (V,), 1 for a code that gets its fair share of latents, and `sums` (V, D), of latents on the
    same scale: plain tensors that a checkpoint holds, so that a run can be resumed. A code whose count falls below
    `dead_below` is dead.
    """

    def __init__(self, counts: Tensor, sums: Tensor, decay: float = 0.98, dead_below: float = 0.02) -> None:
        self.counts, self.sums, self.decay, self.dead_below = counts, sums, decay, dead_below

    @classmethod
    @torch.no_grad()
    def from_latents(cls, quantizer: Quantizer, latents: Tensor, rounds: int = 10) -> CodebookEMA:
        """Move the codebook to k-means centres of encoder outputs (N, D) and return statistics consistent with it."""
        codes = quantizer.embedding.weight
        picks = torch.randperm(len(latents), device=latents.device)
        codes.copy_(latents[picks[torch.arange(len(codes), device=latents.device) % len(latents)]])
        for _ in range(rounds):  # a round of k-means is an update that forgets everything before it
            cls(codes.new_ones(len(codes)), codes.clone(), decay=0.0).update(codes, latents, quantizer.nearest(latents))
        return cls(codes.new_ones(len(codes)), codes.clone())

    @torch.no_grad()
    def update(self, codes: Tensor, latents: Tensor, tokens: Tensor) -> None:
        """Move codes (V, D), in place, towards the latents (N, D) assigned to them by tokens (N,)."""
        fair_share = len(latents) / len(codes)
        counts = torch.bincount(tokens, minlength=len(codes)).to(codes.dtype)  #                  V
        sums = torch.zeros_like(codes).index_add_(0, tokens, latents)  #                          V, D
        self.counts.lerp_(counts / fair_share, 1 - self.decay)
        self.sums.lerp_(sums / fair_share, 1 - self.decay)
        replacements = latents[torch.randint(len(latents), (len(codes),), device=latents.device)]
        dead = self.counts < self.dead_below  #                                                   V
        self.counts[dead] = 1.0
        self.sums[dead] = replacements[dead]
        codes.copy_(self.sums / self.counts[:, None])


def process() -> tuple[int, int]:
    """Rank of this process and how many train together; (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather_rows(part: Tensor, share: slice | None = None, count: int | None = None) -> Tensor:
    """All processes' rows in one tensor (count, ...); `share` says which of them `part` is, by default the rank's."""
    rank, world = process()
    if world == 1:
        return part
    n = len(part)
    whole = part.new_zeros(count or world * n, *part.shape[1:])
    whole[share or slice(rank * n, (rank + 1) * n)] = part
    dist.all_reduce(whole)  # a sum: every row is zero everywhere but where it was made
    return whole


def codes_used(tokens: Tensor, codebook_size: int) -> float:
    """Share of the codebook that occurs in tokens of any shape, in 0..1; count it over a whole data set."""
    return torch.bincount(tokens.flatten(), minlength=codebook_size).count_nonzero().item() / codebook_size
