"""A small VQ tokenizer: images to a grid of discrete tokens and back.

The network is, but for one shortcut (see VQConfig), the purely convolutional VQGAN that RAR's authors use frozen
(Sec. 4.1), at small sizes by default and trained with squared errors only, without GAN and perceptual losses.
Parameters have the names and shapes of the released MaskGIT-VQGAN weights. The codebook is not trained by gradients: it
starts from k-means of encoder outputs, follows them by exponential moving averages, and unused codes are restarted.

Letters in the right margin: B batch, H and W pixels, h and w grid cells, T = h * w tokens, D code width, V codes,
N latents.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rar import load_weights, read_weights, reading, require


@dataclass
class VQConfig:
    """Sizes of a tokenizer. The side of its grid is image_size / 2 ** (len(multipliers) - 1).

    released_shortcut applies the 1x1 shortcut of a block to the output of its second convolution, a quirk that the
    authors' weights depend on. A tokenizer trained here uses the ordinary shortcut, which learns faster.
    """

    image_size: int = 32
    codebook_size: int = 512
    code_dim: int = 16
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 1
    groups: int = 4
    released_shortcut: bool = False

    def __post_init__(self):
        factor = 2 ** (len(self.multipliers) - 1)
        require(self.image_size % factor == 0, f"image size must be a multiple of {factor}, got {self.image_size}")
        require(self.channels % self.groups == 0, f"channels must be a multiple of {self.groups}, got {self.channels}")
        self.grid_size = self.image_size // factor
        self.widths = [self.channels * m for m in self.multipliers]  # the number of channels at each level


GroupNorm = partial(nn.GroupNorm, eps=1e-6)
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice; a 1x1 shortcut where the channel count changes."""

    def __init__(self, channels_in: int, channels_out: int, config: VQConfig):
        super().__init__()
        self.released_shortcut = config.released_shortcut
        self.norm1 = GroupNorm(config.groups, channels_in)
        self.conv1 = conv3x3(channels_in, channels_out, bias=False)
        self.norm2 = GroupNorm(config.groups, channels_out)
        self.conv2 = conv3x3(channels_out, channels_out, bias=False)
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut
        if channels_in != channels_out:
            shortcut_in = channels_out if config.released_shortcut else channels_in
            self.nin_shortcut = nn.Conv2d(shortcut_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if h.shape != x.shape:
            x = self.nin_shortcut(h if self.released_shortcut else x)
        return x + h


def res_blocks(channels_in: int, channels_out: int, config: VQConfig) -> nn.Sequential:
    """The residual blocks of one resolution; the first one changes the channel count."""
    blocks = nn.Sequential()
    for _ in range(config.res_blocks):
        blocks.append(ResBlock(channels_in, channels_out, config))
        channels_in = channels_out
    return blocks


class Encoder(nn.Sequential):
    """Images (B, 3, H, W) -> latents (B, D, h, w). nn.Sequential runs the layers in the order given here."""

    def __init__(self, config: VQConfig):
        super().__init__()
        before = [config.channels, *config.widths]  # the number of channels that enters each level
        self.conv_in = conv3x3(3, config.channels, bias=False)
        self.down = nn.Sequential()
        for i, width in enumerate(config.widths):
            level = nn.Sequential()
            if i > 0:
                level.pool = nn.AvgPool2d(2)
            level.block = res_blocks(before[i], width, config)
            self.down.append(level)
        top = config.widths[-1]
        self.mid = res_blocks(top, top, config)
        self.norm_out = GroupNorm(config.groups, top)
        self.silu = nn.SiLU()
        self.conv_out = nn.Conv2d(top, config.code_dim, 1)


class Decoder(nn.Module):
    """Codes (B, D, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.widths
        top = widths[-1]
        before = [*widths[1:], top]  # the number of channels that enters each level
        self.conv_in = conv3x3(config.code_dim, top)
        self.mid = res_blocks(top, top, config)
        self.up = nn.ModuleList()  # stored by level, run from the last to the first
        for i, width in enumerate(widths):
            level = nn.Sequential()
            level.block = res_blocks(before[i], width, config)
            if i > 0:
                level.upsample = nn.Upsample(scale_factor=2)
                level.upsample_conv = conv3x3(width, width)
            self.up.append(level)
        self.norm_out = GroupNorm(config.groups, widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.mid(self.conv_in(codes))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  #                                         B, 3, H, W


def flatten_latents(latents: Tensor) -> Tensor:
    """Latents (B, D, h, w) -> (B*T, D), row-major."""
    return latents.movedim(1, -1).flatten(0, 2)


class Quantizer(nn.Module):
    """Nearest row of the codebook by Euclidean distance, with straight-through gradients."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.requires_grad_(False)  # CodebookEMA moves the codes

    def nearest_codes(self, latents: Tensor) -> Tensor:
        """The index of the nearest code of each latent (N, D): (N,) int64. Distances are always in float32."""
        return torch.cdist(latents.float(), self.embedding.weight.float()).argmin(1)

    def lookup(self, tokens: Tensor, grid_size: int) -> Tensor:
        """Tokens (B, T) -> codes (B, D, h, w)."""
        return self.embedding(tokens).unflatten(1, (grid_size, -1)).movedim(-1, 1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, h, w) -> codes of the same shape and tokens (B, T). Gradients go straight to the latents."""
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
        """Build a tokenizer from a state dict in the released layout, or a file of one: its shapes give the sizes.

        The weights fit images of any size, so `image_size` must be given. Raises InputError as RAR.from_released does.
        """
        weights, name = read_weights(source, dtype)
        with reading(name, "are these the weights of a tokenizer?"):
            V, code_dim = weights["quantize.embedding.weight"].shape
            channels = len(weights["encoder.conv_in.weight"])
            levels = sorted(fnmatch.filter(weights, "encoder.down.*.block.0.conv1.weight"))
            multipliers = tuple(len(weights[key]) // channels for key in levels)
            blocks = len(fnmatch.filter(weights, "encoder.down.0.block.*.conv1.weight"))
        config = VQConfig(image_size, V, code_dim, channels, multipliers, blocks, groups=32, released_shortcut=True)
        return load_weights(cls, config, weights, name)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> tokens. Raises InputError if the images do not have the configured size."""
        S = self.config.image_size
        require(images.shape[1:] == (3, S, S), f"images must be (B, 3, {S}, {S}), got {tuple(images.shape)}")
        _, tokens = self.quantize(self.encoder(images.to(self.quantize.embedding.weight)))
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images in [0, 1]."""
        return self.decoder(self.quantize.lookup(tokens, self.config.grid_size)).float().clamp(0, 1)

    def forward(self, images: Tensor, ema: CodebookEMA | None = None, quantize: bool = True) -> tuple[Tensor, dict]:
        """Reconstruction, not clamped, and two loss terms: `reconstruction` (mean squared error) and `commitment`.

        With `ema` the codes move towards the latents of this batch. quantize=False runs a plain autoencoder, whose
        commitment loss is 0.
        """
        latents = self.encoder(images).float()  #                                                 B, D, h, w
        codes = latents
        if quantize:
            codes, tokens = self.quantize(latents)
            if ema:
                ema.update(self.quantize.embedding.weight, flatten_latents(latents), tokens.flatten())
        reconstruction = self.decoder(codes).float()  #                                           B, 3, H, W
        commitment = F.mse_loss(latents, codes.detach())  # pulls the encoder towards the codes
        return reconstruction, {"reconstruction": F.mse_loss(reconstruction, images), "commitment": commitment}


@dataclass
class CodebookEMA:
    """Moves each code to the moving average of the latents that chose it, and restarts unused codes.

    Its state is `counts` (V,) and `sums` (V, D) of the latents that chose each code. Both are relative to uniform use,
    so a count of 1.0 is average. A code whose count falls below 0.02 restarts at a random latent.
    """

    counts: Tensor
    sums: Tensor
    decay: float = 0.98

    @classmethod
    @torch.no_grad()
    def from_latents(cls, quantizer: Quantizer, latents: Tensor) -> CodebookEMA:
        """Move the codebook to k-means centres of encoder outputs (N, D) and return the counts and sums that fit it."""
        codes = quantizer.embedding.weight
        V = len(codes)
        picks = torch.randperm(len(latents), device=latents.device).repeat(V // len(latents) + 1)
        codes.copy_(latents[picks[:V]])
        kmeans = cls(codes.new_ones(V), codes.clone(), decay=0.0)
        for _ in range(10):  # a round of k-means is an update that remembers nothing
            kmeans.update(codes, latents, quantizer.nearest_codes(latents))
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
        average = counts.mean()  # latents per code if all codes were used equally
        self.counts.lerp_(counts / average, 1 - self.decay)
        self.sums.lerp_(sums / average, 1 - self.decay)
        dead = self.counts < 0.02  #                                                              V
        self.counts[dead] = 1.0
        self.sums[dead] = restarts[dead]
        codes.copy_(self.sums / self.counts[:, None])


def codes_used(tokens: Tensor, codebook_size: int) -> float:
    """The share of the codebook, from 0 to 1, that occurs in tokens of any shape. More tokens use more of it."""
    return len(tokens.unique()) / codebook_size
