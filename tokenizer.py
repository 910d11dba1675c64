"""A small VQ tokenizer: images to a grid of discrete tokens and back.

The network is, but for one shortcut (see VQConfig), the purely convolutional VQGAN that RAR's authors use frozen
(Sec. 4.1), at small sizes by default and trained with squared errors only, without GAN and perceptual losses.
Parameters have the names and shapes of the released MaskGIT-VQGAN weights. The codebook is not trained by gradients: it
starts from k-means of encoder outputs, follows them by exponential moving averages, and unused codes are restarted.

Letters: B batch, S pixels of an image's side, s cells of the grid's side, T = s * s tokens, D code width, V codes,
N latents.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rar import build_model, load_file


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
        assert self.image_size % factor == 0, f"image size {self.image_size} is not a multiple of {factor}"
        assert self.channels % self.groups == 0, f"channels {self.channels} are not a multiple of {self.groups}"
        self.grid_size = self.image_size // factor
        self.widths = [self.channels * m for m in self.multipliers]  # the number of channels at each level


class ResBlock(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice; a 1x1 shortcut where the channel count changes."""

    def __init__(self, channels_in, channels_out, config):
        super().__init__()
        self.released_shortcut = config.released_shortcut
        self.norm1 = nn.GroupNorm(config.groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(config.groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut
        if channels_in != channels_out:
            shortcut_in = channels_out if config.released_shortcut else channels_in
            self.nin_shortcut = nn.Conv2d(shortcut_in, channels_out, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if h.shape != x.shape:
            x = self.nin_shortcut(h if self.released_shortcut else x)
        return x + h


def res_blocks(channels_in, channels_out, config):
    """The residual blocks of one level; the first one changes the channel count."""
    first = ResBlock(channels_in, channels_out, config)
    others = [ResBlock(channels_out, channels_out, config) for _ in range(config.res_blocks - 1)]
    return nn.Sequential(first, *others)


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> latents (B, D, s, s)."""

    def __init__(self, config):
        super().__init__()
        top = config.widths[-1]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        before = [config.channels, *config.widths]  # the number of channels that enters each level
        for i, width in enumerate(config.widths):
            self.down.append(nn.ModuleDict({"block": res_blocks(before[i], width, config)}))
        self.mid = res_blocks(top, top, config)
        self.norm_out = nn.GroupNorm(config.groups, top, eps=1e-6)
        self.conv_out = nn.Conv2d(top, config.code_dim, 1)

    def forward(self, images):
        x = self.conv_in(images)  #                                                               B, channels, S, S
        for i, level in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)
            x = level["block"](x)
        x = self.mid(x)  #                                                                        B, widths[-1], s, s
        return self.conv_out(F.silu(self.norm_out(x)))  #                                         B, D, s, s


class Decoder(nn.Module):
    """Codes (B, D, s, s) -> images (B, 3, S, S), not clamped."""

    def __init__(self, config):
        super().__init__()
        bottom, top = config.widths[0], config.widths[-1]
        self.conv_in = nn.Conv2d(config.code_dim, top, 3, padding=1)
        self.mid = res_blocks(top, top, config)
        self.up = nn.ModuleList()  # stored by level, run from the last to the first
        before = [*config.widths[1:], top]  # the number of channels that enters each level
        for i, width in enumerate(config.widths):
            self.up.append(nn.ModuleDict({"block": res_blocks(before[i], width, config)}))
            if i > 0:
                self.up[i]["upsample_conv"] = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(config.groups, bottom, eps=1e-6)
        self.conv_out = nn.Conv2d(bottom, 3, 3, padding=1)

    def forward(self, codes):
        x = self.mid(self.conv_in(codes))  #                                                      B, widths[-1], s, s
        for i in reversed(range(len(self.up))):
            x = self.up[i]["block"](x)
            if i > 0:
                x = self.up[i]["upsample_conv"](F.interpolate(x, scale_factor=2))
        return self.conv_out(F.silu(self.norm_out(x)))  #                                         B, 3, S, S


def flatten_latents(latents):
    """Latents (B, D, s, s) -> (B*T, D), row-major."""
    return latents.movedim(1, -1).flatten(0, 2)


class Quantizer(nn.Module):
    """Nearest row of the codebook by Euclidean distance, with straight-through gradients."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.embedding.weight.requires_grad_(False)  # CodebookEMA moves the codes

    def nearest_codes(self, latents):
        """The index of the nearest code of each latent (N, D): (N,) int64.

        Distances are computed in float32 also under autocast. On GPUs that are allowed TF32, as train_tiny.py does,
        products inside them are rounded to it, and a few latents that lie between two codes choose the other one.
        """
        return torch.cdist(latents.float(), self.embedding.weight.float()).argmin(1)

    def lookup(self, tokens, grid_size):
        """Tokens (B, T) -> codes (B, D, s, s)."""
        return self.embedding(tokens).unflatten(1, (grid_size, grid_size)).movedim(-1, 1)

    def forward(self, latents):
        """Latents (B, D, s, s) -> codes of the same shape and tokens (B, T). Gradients go straight to the latents."""
        tokens = self.nearest_codes(flatten_latents(latents.detach())).view(len(latents), -1)  #  B, T
        codes = self.lookup(tokens, latents.shape[2])  #                                          B, D, s, s
        return latents + (codes - latents).detach(), tokens


class VQTokenizer(nn.Module):
    """Encoder, quantizer, decoder: images float (B, 3, S, S) in [0, 1], tokens int64 (B, T) in row-major order."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_released(cls, source: str | Path | dict, image_size: int = 256) -> VQTokenizer:
        """A tokenizer from a state dict in the released layout, or a file of one: its shapes give the sizes.

        The weights fit images of any size; `image_size` says which. Raises errors as RAR.from_released does.
        """
        weights = source if isinstance(source, dict) else load_file(source)
        V, code_dim = weights["quantize.embedding.weight"].shape
        channels = len(weights["encoder.conv_in.weight"])
        levels = sorted(fnmatch.filter(weights, "encoder.down.*.block.0.conv1.weight"))
        multipliers = tuple(len(weights[key]) // channels for key in levels)
        blocks = len(fnmatch.filter(weights, "encoder.down.0.block.*.conv1.weight"))
        config = VQConfig(image_size, V, code_dim, channels, multipliers, blocks, groups=32, released_shortcut=True)
        return build_model(cls, config, weights)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> tokens."""
        _, tokens = self.quantize(self.encoder(images.to(self.quantize.embedding.weight.dtype)))
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images in [0, 1]."""
        return self.decoder(self.quantize.lookup(tokens, self.config.grid_size)).float().clamp(0, 1)

    def forward(
        self, images: Tensor, codebook: CodebookEMA | None = None, quantize: bool = True
    ) -> tuple[Tensor, dict]:
        """Reconstruction, not clamped, and two loss terms: `reconstruction` (mean squared error) and `commitment`.

        With `codebook` the codes move towards the latents of this batch. quantize=False runs a plain autoencoder, whose
        commitment loss is 0.
        """
        latents = self.encoder(images).float()  #                                                 B, D, s, s
        codes = latents
        if quantize:
            codes, tokens = self.quantize(latents)
            if codebook is not None:
                codebook.update(self.quantize.embedding.weight, flatten_latents(latents), tokens.flatten())
        reconstruction = self.decoder(codes).float()  #                                           B, 3, S, S
        commitment = F.mse_loss(latents, codes.detach())  # pulls the encoder towards the codes
        return reconstruction, {"reconstruction": F.mse_loss(reconstruction, images), "commitment": commitment}


@dataclass
class CodebookEMA:
    """Moves each code to the moving average of the latents that chose it, and restarts unused codes.

    Its state is `counts` (V,) and `sums` (V, D) of the latents that chose each code. Both are relative to uniform use,
    so a count of 1.0 is average. A code whose count falls below 0.02 restarts at a random latent, with a count of 1.
    """

    counts: Tensor
    sums: Tensor
    decay: float = 0.98

    @classmethod
    @torch.no_grad()
    def from_latents(cls, quantizer: Quantizer, latents: Tensor) -> CodebookEMA:
        """Move the codebook to k-means centres of encoder outputs (N, D) and return the counts and sums that fit it."""
        latents = latents[latents.isfinite().all(1)]  # float16 may have overflowed
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
        """Move codes (V, D), in place, towards the latents (N, D) assigned to them by tokens (N,).

        Does nothing if a latent is not finite: in float16 the optimizer skips such a step as well.
        """
        if not latents.isfinite().all():
            return
        counts = torch.bincount(tokens, minlength=len(codes)).to(codes.dtype)  #                  V
        sums = torch.zeros_like(codes).index_add_(0, tokens, latents)  #                          V, D
        average = counts.mean()  # latents per code if all codes were used equally
        self.counts.lerp_(counts / average, 1 - self.decay)
        self.sums.lerp_(sums / average, 1 - self.decay)
        dead = self.counts < 0.02  #                                                              V
        restarts = latents[torch.randint(len(latents), (len(codes),), device=latents.device)]  #  V, D
        self.counts[dead] = 1.0
        self.sums[dead] = restarts[dead]
        codes.copy_(self.sums / self.counts[:, None])


def codes_used(tokens: Tensor, codebook_size: int) -> float:
    """The share of the codebook, from 0 to 1, that occurs in tokens of any shape. More tokens use more of it."""
    return len(tokens.unique()) / codebook_size
