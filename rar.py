"""RAR: randomized autoregressive image generation, in one file.

Yu, He, Deng, Shen, Chen, "Randomized Autoregressive Visual Generation", arXiv 2411.00776 (ICCV 2025). An image is T
tokens on a square grid. A plain causal transformer predicts them one after another, in an order that is random with
probability r; r starts at 1 and falls to 0, so that training ends in raster order (Sec. 3). A second position table
tells each element which position is to be predicted next (Eq. 4).

A worked example on a 2x2 image, tokens in raster layout [a, b, c, d], order [2, 0, 3, 1]:

    element            cls     class    c            a            d
    its position       cls     class    2            0            3
    target-aware       -       2        0            3            1
    predicts           -       c        a            d            b

`python rar.py` prints it with numbers, computed by the functions below. The parameters have the names and shapes of
the authors' published weights, so that those load strictly.

Letters in the right margin: B batch, T tokens, N elements in this call, D width, H heads, V codes, C classes,
U distinct conditions.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkl
from tqdm import tqdm

SPARE_POSITIONS, SPARE_STEPS = 1024, 100  # the released tables have T + these rows; T + 2 and T + 1 of them are used
MODULATION_CHUNK = 32  # places whose modulations sampling holds at once: less memory, at a pass over adaLN's weights


class InputError(ValueError):
    """What a user handed over cannot be used; the message says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# What makes RAR RAR: the ratio, the orders, and (in RAR.position_embeddings) the target-aware table
# ---------------------------------------------------------------------------------------------------------------------


def random_ratio(step: float, anneal_start: float, anneal_end: float) -> float:
    """Probability r in [0, 1] that a sample is trained in a random order (Sec. 3.3, Eq. 5); all three in one unit.

    start = end = 0 is raster training throughout, start = end = (total steps) random training throughout.
    """
    if step >= anneal_end:
        return 0.0
    if step <= anneal_start:
        return 1.0
    return 1.0 - (step - anneal_start) / (anneal_end - anneal_start)  # Eq. (5)


def sample_orders(
    batch_size: int,
    seq_len: int,
    ratio: float,
    *,
    base_order: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one prediction order per sample (Sec. 3.2): uniformly random with probability `ratio`, else `base_order`.

    Returns (B, T) int64; orders[b, t] is the raster index predicted at step t. `base_order` (T,) defaults to raster.
    Draws come from `generator` (on its own device) and are moved to `device`.
    """
    source = generator.device if generator is not None else device
    base = torch.arange(seq_len, device=source) if base_order is None else base_order.to(source)
    shuffled = torch.rand(batch_size, seq_len, generator=generator, device=source).argsort(1)  # uniform over all T!
    is_random = torch.rand(batch_size, 1, generator=generator, device=source) < ratio  # per sample, not per batch
    return torch.where(is_random, shuffled, base).to(device if device is not None else source)


def position_rows(orders: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the two position tables for orders (B, T): own (B, T+1) for all elements; following (B, T), not for cls.

    Row 0 is cls, row 1 the class, row 2 + i raster position i. Elements are cls, class, and all tokens but the last.
    """
    own = F.pad(orders[:, :-1] + 2, (2, 0))  # a token takes its position along                   B, T+1
    own[:, 1] = 1  #                                                                              [0, 1, 2 + tau]
    following = orders + 2  # Eq. (4): the element before tau_t, from the class on, gets tau_t    B, T
    return own, following


def scan_order(name: str, grid_size: int) -> Tensor:
    """One of the six fixed orders of Fig. 6 and Tab. 3 on a square grid: (T,) int64, the raster index visited at t.

    Raises InputError for an unknown name, and for `subsample` on an odd grid.
    """
    grid = torch.arange(grid_size**2).view(grid_size, grid_size)
    if name == "alternate":
        grid[1::2] = grid[1::2].flip(1)
    if name in ("row-major", "alternate"):
        return grid.flatten()
    if name in ("spiral-in", "spiral-out"):
        path = []
        while grid.numel():  # take the left column downwards, then turn the rest so that its bottom row comes next
            path.append(grid[:, 0])
            grid = grid[:, 1:].rot90(-1)
        inwards = torch.cat(path)
        return inwards if name == "spiral-in" else inwards.flip(0)
    if name == "z-curve":  # Morton: visit in the order of the interleaved bits of row and column, the column's first
        row, column = grid // grid_size, grid % grid_size
        key = sum(((column >> b & 1) + 2 * (row >> b & 1)) << 2 * b for b in range(grid_size.bit_length()))
        return key.flatten().argsort()
    if name == "subsample":
        if grid_size % 2:
            raise InputError(f"the subsample order needs an even grid, this one is {grid_size}x{grid_size}")
        return grid.view(2, grid_size // 2, 2, -1).permute(1, 3, 0, 2).flatten()
    raise InputError(f"unknown order {name!r}: choose one of {', '.join(SCANS)}")


SCANS = ("row-major", "spiral-in", "spiral-out", "z-curve", "subsample", "alternate")


def inpainting_order(known: Tensor) -> tuple[Tensor, int]:
    """Order (T,) that visits the cells that known (T,) bool marks first, then the others; and how many it marks."""
    return known.int().argsort(descending=True, stable=True), int(known.sum())


def drop_labels(labels: Tensor, null_label: int, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label (B,) by the null class with probability `rate`, for classifier-free guidance (Sec. 4.1)."""
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
    return labels.masked_fill(dropped, null_label)


def guidance_at(step: int, seq_len: int, scale: float, power: float) -> float:
    """Classifier-free guidance scale at a step: power-cosine from 1 up to `scale` (Sec. 4.1); power 0 is constant."""
    return 1.0 + (scale - 1.0) * (1.0 - math.cos(math.pi * (step / seq_len) ** power)) / 2.0


# ---------------------------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------------------------


TABLE_1 = {  # Tab. 1's sizes and Tab. 6's sampling settings; all have 16 heads, 256 tokens, 1024 codes, 1000 classes
    "rar_b": {"dim": 768, "depth": 24, "mlp_dim": 3072, "scale": 16.0, "power": 2.75, "temperature": 1.0},
    "rar_l": {"dim": 1024, "depth": 24, "mlp_dim": 4096, "scale": 15.5, "power": 2.5, "temperature": 1.02},
    "rar_xl": {"dim": 1280, "depth": 32, "mlp_dim": 5120, "scale": 6.9, "power": 1.5, "temperature": 1.02},
    "rar_xxl": {"dim": 1408, "depth": 40, "mlp_dim": 6144, "scale": 8.0, "power": 1.2, "temperature": 1.02},
}


@dataclass
class RARConfig:
    """Sizes of a RAR transformer (Tab. 1). adaln=False is the paper's plain ViT; target_aware=False drops Eq. (4)."""

    codebook_size: int
    num_classes: int
    seq_len: int
    dim: int = 128
    depth: int = 4
    heads: int = 4
    mlp_dim: int = 512
    dropout: float = 0.0
    attn_dropout: float = 0.0
    adaln: bool = True
    target_aware: bool = True

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in list(vars(self).items())[:7] if is_size(v)}  # all but the rates and switches
        if len(sizes) < 7 or self.depth > 1000 or self.dim % self.heads:
            raise InputError(f"RARConfig: sizes must be 1..2^20, depth up to 1000, dim a multiple of heads: {sizes}")


def is_size(value: object) -> bool:
    """Whether a network can be of this size: what a file says is not to be trusted, and a layer takes time to build."""
    return type(value) is int and 1 <= value <= 1 << 20


class Modulation(nn.Sequential):
    """The adaLN layer: condition (..., D) -> shifts, 1 + scales and gates, each (..., D), in the order of `kinds`."""

    def __init__(self, dim: int, kinds: tuple[str, ...]) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, len(kinds) * dim))
        self.kinds = kinds

    def forward(self, condition: Tensor) -> list[Tensor]:
        pieces = super().forward(condition).chunk(len(self.kinds), dim=-1)  #                     each (..., D)
        return [1 + piece if kind == "scale" else piece for kind, piece in zip(self.kinds, pieces)]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer, (..., D) -> (..., E); large weights times few rows on a CPU in slices of 64 outputs.

    MKL would repack all weights for 3 to 8 rows, and sampling a few images with RAR-B waits for little else.
    """
    shape, rows = x.shape[:-1], x.shape[:-1].numel()
    few = 2 < rows <= 8 and weight.numel() >= 1 << 19 and len(weight) % 64 == 0
    if not few or (x.device.type, x.dtype) != ("cpu", torch.float32) or not mkl.is_available():
        return F.linear(x, weight, bias)
    slices = weight.unflatten(0, (-1, 64)).transpose(1, 2)  #                                     E/64, D, 64
    x = x.reshape(1, rows, weight.shape[1]).expand(len(slices), -1, -1)  #                        E/64, rows, D
    y = torch.baddbmm(bias.view(-1, 1, 64), x, slices)  #                                         E/64, rows, 64
    return y.transpose(0, 1).reshape(*shape, len(weight))  #                                      ..., E


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention with QK-LayerNorm (Sec. 4.1)."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.heads, self.attn_dropout = config.heads, config.attn_dropout
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(config.dim // config.heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(config.dim // config.heads, eps=1e-6)
        self.proj = Linear(config.dim, config.dim)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Attend from N elements at place `start` on (N = 1 if it is not 0) to themselves and to those in `cache`."""
        B, N, D = x.shape
        parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))  # three products, so that the norms need no copy
        q, k, v = (linear(x, *part).view(B, N, self.heads, D // self.heads) for part in parts)  # 3 x (B, N, H, D/H)
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))  #       3 x (B, H, N, D/H)
        if cache is not None:  #                                                                  2, B, H, T+1, D/H
            cache[0, :, :, start : start + N], cache[1, :, :, start : start + N] = k, v
            k, v = cache[:, :, :, : start + N]  #                                           2 x (B, H, start+N, D/H)
        dropout = self.attn_dropout if self.training else 0.0
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may leave the norms' outputs in fp32
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=N > 1)  #        B, H, N, D/H
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))  #                   B, N, D


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A transformer block whose two branches are modulated by adaLN, or left plain."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        if config.adaln:
            self.adaLN_modulation = Modulation(config.dim, ("shift", "scale", "gate") * 2)

    def forward(self, x: Tensor, modulation: list[Tensor], cache: Tensor | None = None, start: int = 0) -> Tensor:
        """x and the result (B, N, D); modulation 6 x (B, N, D), empty for the plain ViT."""
        if not modulation:
            x = x + self.attn(self.norm1(x), cache, start)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(shift1 + scale1 * self.norm1(x), cache, start)  #               B, N, D
        return x + gate2 * self.mlp(shift2 + scale2 * self.norm2(x))  #                           B, N, D


class Head(nn.Module):
    """The adaLN layer in front of the output projection; its LayerNorm has no parameters of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(dim, ("scale", "shift"))  # unlike in the blocks: the released layout

    def forward(self, x: Tensor, modulation: list[Tensor]) -> Tensor:
        scale, shift = modulation
        return shift + scale * F.layer_norm(x, x.shape[-1:], eps=1e-6)


class RAR(nn.Module):
    """A causal transformer over [cls, class, tokens in some order] (Sec. 3.2).

    A label is a class 0..C-1, or C for the null class of classifier-free guidance.
    """

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.config = config
        D, T, V, C = config.dim, config.seq_len, config.codebook_size, config.num_classes
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        # V codes, a mask token (never used), C classes, the null class
        self.embeddings = nn.Embedding.from_pretrained(torch.empty(V + C + 2, D), freeze=False)
        self.pos_embed = nn.Parameter(torch.empty(1, T + SPARE_POSITIONS, D))  # rows: cls, class, raster positions
        if config.target_aware:
            self.target_aware_pos_embed = nn.Parameter(torch.empty(1, T + SPARE_POSITIONS, D))  # row 2 + i: i is next
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.adaln:
            self.timesteps_embeddings = nn.Parameter(torch.empty(1, T + SPARE_STEPS, D))  # row j: place j, unpermuted
            self.adaln_before_head = Head(D)
        else:
            self.norm = nn.LayerNorm(D, eps=1e-6)
        self.lm_head = Linear(D, V)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of deviation 0.02; biases and adaLN layers zero, so that a block starts as the identity."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)

    def position_embeddings(self, orders: Tensor) -> Tensor:
        """What is added to cls, class and all tokens but the last, in orders (B, T): (B, T+1, D) (Sec. 3.2)."""
        own, following = position_rows(orders)
        positions = F.embedding(own, self.pos_embed[0])  #                                        B, T+1, D
        if not self.config.target_aware:
            return positions
        target_aware = F.embedding(following, self.target_aware_pos_embed[0])  # Eq. (4)          B, T, D
        return positions + F.pad(target_aware, (0, 0, 1, 0))  # none for the cls element          B, T+1, D

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """cls, then rows ids (B, N-1) of the table, the class and tokens in their order, plus their positions."""
        cls = self.cls_token.expand(len(ids), -1, -1)  #                                          B, 1, D
        return torch.cat([cls, self.embeddings(ids)], dim=1) + positions  #                       B, N, D

    def class_ids(self, labels: Tensor) -> Tensor:
        """Rows of the embedding table for labels (B,) in 0..C, the null class C included."""
        return labels + self.config.codebook_size + 1

    def modulations(self, labels: Tensor, first: int, last: int) -> list[list[Tensor]]:
        """AdaLN outputs at places first..last-1 for labels (U,): depth x 6, then 2 for the head, each (U, N, D).

        They depend on class and place alone, so run_blocks hands the same ones to all images of a class.
        """
        if not self.config.adaln:
            return [[]] * (self.config.depth + 1)
        places = self.timesteps_embeddings[:, first:last]  #                                      1, N, D
        condition = self.embeddings(self.class_ids(labels))[:, None] + places  #                  U, N, D
        return [layer.adaLN_modulation(condition) for layer in [*self.blocks, self.adaln_before_head]]

    def run_blocks(
        self, x: Tensor, modulations: list, rows: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Blocks and last norm on elements (B, N, D); rows (B,) says which of the U conditions each image has."""
        for i, (block, pieces) in enumerate(zip(self.blocks, modulations)):
            of_images = [piece.index_select(0, rows) for piece in pieces]  #                      6 x (B, N, D)
            x = block(x, of_images, None if cache is None else cache[i], start)  #                B, N, D
        if not self.config.adaln:
            return self.norm(x)
        return self.adaln_before_head(x, [piece.index_select(0, rows) for piece in modulations[-1]])

    def forward(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Logits of every token given those before it in its image's order (Eq. 3; Eq. 1 in raster order).

        tokens (B, T) int64 in raster layout, labels (B,) in 0..C, orders (B, T) or None for raster. Returns
        (B, T, V) where logits[b, t] predicts tokens[b, orders[b, t]].
        """
        C, T = self.config.num_classes, self.config.seq_len
        if orders is None:
            orders = torch.arange(T, device=tokens.device).expand(len(tokens), T)  #              B, T
        shuffled = tokens.gather(1, orders)  # the prefix is never permuted                       B, T
        ids = torch.cat([self.class_ids(labels)[:, None], shuffled[:, :-1]], dim=1)  #            B, T
        x = self.embed(ids, self.position_embeddings(orders))  #                                  B, T+1, D
        if len(labels) > C:  # fewer classes than images: one condition per class, else one per image
            distinct, rows = torch.arange(C + 1, device=labels.device), labels
        else:
            distinct, rows = labels, torch.arange(len(labels), device=labels.device)
        x = self.run_blocks(x, self.modulations(distinct, 0, T + 1), rows)  #                     B, T+1, D
        return self.lm_head(x[:, 1:])  # the cls element predicts nothing                         B, T, V

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        guidance_scale: float = 1.0,
        guidance_power: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        order: Tensor | None = None,
        prefix: Tensor | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample tokens (B, T) int64, in raster layout, for labels (B,), along `order` (T,), default raster.

        `prefix` (B, K) holds known tokens for the first K places of the order: inpainting. Guidance is power-cosine
        (Sec. 4.1), at scale 1 the null branch is not run. use_cache=False runs the whole prefix at every step.
        Raises InputError for an order that is no permutation and for values outside their ranges.
        """
        B, T, device = len(labels), self.config.seq_len, labels.device
        order = torch.arange(T, device=device) if order is None else order.to(device)
        prefix = labels.new_empty(B, 0) if prefix is None else prefix.to(device)
        self.check_inputs(labels, order, prefix, top_k)
        if not (temperature >= 1e-6 and math.isfinite(guidance_scale) and 0 <= guidance_power < math.inf):
            found = f"temperature {temperature}, guidance {guidance_scale}, power {guidance_power}"
            raise InputError(f"{found}: they must be at least 1e-6, finite, and not below 0")
        branches = 1 if guidance_scale == 1.0 else 2
        rows = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])[: branches * B]
        K = prefix.shape[1]
        ids = rows.new_zeros(branches * B, T)
        ids[:, :K] = prefix.repeat(branches, 1)
        stream = self.stream_logits(ids, rows, order, K, use_cache)  # reads ids[:, t] when asked for step t + 1
        for t, logits in zip(tqdm(range(K, T), desc="tokens", disable=not progress), stream):
            if branches == 2:
                conditional, null = logits.chunk(2)  #                                            2 x (B, V)
                logits = null + guidance_at(t, T, guidance_scale, guidance_power) * (conditional - null)
            ids[:, t] = draw(logits / temperature, top_k, generator).repeat(branches)
        if (ids == self.config.codebook_size).any():  # draw met a NaN; asking at every step would wait for the GPU
            raise InputError("the model gives no numbers: its weights are damaged or the guidance is too strong")
        return torch.empty_like(ids[:B]).scatter_(1, order.expand(B, T), ids[:B])  # unshuffled   B, T

    def stream_logits(self, ids: Tensor, labels: Tensor, order: Tensor, K: int, use_cache: bool) -> Iterator[Tensor]:
        """Yield logits (B, V) of steps K..T-1; ids (B, T), in order, must hold the token of a step before the next.

        Without cache every step runs the whole prefix: slower, the same numbers, and the oracle of the tests.
        """
        T = self.config.seq_len
        distinct, rows = labels.unique(return_inverse=True)
        positions = self.position_embeddings(order[None])  #                                      1, T+1, D
        cache = self.new_cache(len(ids)) if use_cache else None
        start = held = stop_held = 0  # places before start are in the cache; modulations are those of held..stop_held
        for t in range(K, T):
            stop = t + 2  # the element at place t + 1 predicts the token at order[t]
            if stop > stop_held:
                held, stop_held = start, min(max(stop, start + MODULATION_CHUNK), T + 1)
                modulations = self.modulations(distinct, held, stop_held)
            if start == 0:
                x = self.embed(torch.cat([self.class_ids(labels)[:, None], ids[:, :t]], 1), positions[:, :stop])
            else:
                x = self.embeddings(ids[:, t - 1 : t]) + positions[:, start:stop]  #              B, 1, D
            here = [[piece[:, start - held : stop - held] for piece in pieces] for pieces in modulations]
            yield self.lm_head(self.run_blocks(x, here, rows, cache, start)[:, -1]).float()  #    B, V
            start = stop if use_cache else 0

    def new_cache(self, batch_size: int) -> Tensor:
        """Keys and values of all T+1 elements, allocated once: depth, 2, B, H, T+1, D/H."""
        c = self.config
        return self.lm_head.weight.new_empty(c.depth, 2, batch_size, c.heads, c.seq_len + 1, c.dim // c.heads)

    def check_inputs(self, labels: Tensor, order: Tensor, prefix: Tensor, top_k: int | None) -> None:
        """Raise InputError if generate cannot run on these."""
        T, V, C = self.config.seq_len, self.config.codebook_size, self.config.num_classes
        if top_k is not None and not 1 <= top_k <= V:
            raise InputError(f"top_k must lie in 1..{V}, got {top_k}")
        if not ((labels >= 0) & (labels <= C)).all():
            raise InputError(f"labels must lie in 0..{C - 1}, or be {C} for the null class")
        if not torch.equal(order.sort().values, torch.arange(T, device=order.device)):
            raise InputError(f"the order must be a permutation of 0..{T - 1}")
        if prefix.dim() != 2 or len(prefix) != len(labels) or prefix.shape[1] > T:
            raise InputError(f"the prefix must be ({len(labels)}, K) with K <= {T}, got {tuple(prefix.shape)}")
        if not ((prefix >= 0) & (prefix < V)).all():
            raise InputError(f"prefix tokens must lie in 0..{V - 1}")

    @classmethod
    def from_released(
        cls, source: str | Path | dict, dtype: torch.dtype | None = None, adaln: bool = True, target_aware: bool = True
    ) -> RAR:
        """Build the model that a state dict in the authors' layout, or a file of one, describes by its shapes.

        A file is memory-mapped; `dtype` converts tensor by tensor. adaln and target_aware are True in all published
        files. Raises InputError naming any tensor that is missing, unknown or misshapen. The way back is
        `torch.save(model.state_dict(), path)`.
        """
        weights = read_weights(source, dtype)
        with blaming("this" if isinstance(source, dict) else source, "are these the weights of an RAR?"):
            (V, D), T = weights["lm_head.weight"].shape, weights["pos_embed"].shape[1] - SPARE_POSITIONS
            C = len(weights["embeddings.weight"]) - V - 2
            depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
            heads, mlp_dim = D // len(weights["blocks.0.attn.q_norm.weight"]), len(weights["blocks.0.mlp.fc1.bias"])
            config = RARConfig(V, C, T, D, depth, heads, mlp_dim, adaln=adaln, target_aware=target_aware)
        return load_strictly(cls, config, weights, dtype)

    @torch.no_grad()
    def merge_position_embeddings(self, order: Tensor | None = None) -> RAR:
        """Fold the target-aware table into the position table, in place, for one fixed order (T,), default raster.

        Outputs in that order stay the same and cost what a plain autoregressive model costs (Sec. 3.2); other orders
        no longer make sense. Returns self.
        """
        if self.config.target_aware:
            order = torch.arange(self.config.seq_len) if order is None else order.cpu()
            own, following = position_rows(order[None])
            self.pos_embed[0, own[0, 1:]] += self.target_aware_pos_embed[0, following[0]]  # Eq. (4), once and for all
            del self.target_aware_pos_embed
            self.config = replace(self.config, target_aware=False)
        return self


def draw(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Sample one code per row of logits (B, V), among the top_k likeliest if given: (B,) int64; V where one is NaN."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1)  # multinomial would draw V numbers a row, and wait for a GPU
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn, right=True)[:, 0]  # the first with a sum above, so none of p = 0


def read_weights(source: str | Path | dict, dtype: torch.dtype | None) -> dict:
    """A state dict, not yet checked; a file is mapped into memory, not read, unless it must be converted anyway."""
    if isinstance(source, dict):
        return dict(source)
    if not Path(source).is_file():
        raise InputError(f"{source} is not there: check the path")
    return load_data(source, mapped=dtype is None)  # converted, a mapping costs more: it keeps its pages


@contextmanager
def blaming(file: object, hint: str) -> Iterator[None]:
    """What cannot be done with the content of a file is the fault of the file; zipfile alone raises a dozen kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{file} cannot be used ({reason}): {hint}") from error


def checked_zip(path: str | Path) -> zipfile.ZipFile:
    """A zip archive, refused if it says that it unpacks to far more than it weighs: it would fill the memory."""
    archive = zipfile.ZipFile(path)
    if sum(member.file_size for member in archive.infolist()) > (1 << 24) + 20 * os.path.getsize(path):
        raise InputError("it would unpack to more than 20 times its size")
    return archive


PLAIN = "torch [A-Za-z0-9]+Storage|torch._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"


def load_data(path: str | Path, mapped: bool = False) -> object:
    """A file of torch.save, without unpickling more than plain data: of a few bytes torch would make huge objects."""
    with blaming(path, "it is damaged, incomplete or no file of this program"):
        if zipped := zipfile.is_zipfile(path):
            with checked_zip(path) as archive:
                pickles = [archive.open(m) for m in archive.infolist() if "data.pkl" in m.filename.lower()]
        else:  # the old format, five pickles and numbers; as bytes, since torch would unpack a tar archive on the disk
            content = Path(path).read_bytes()
            pickles = [io.BytesIO(content)] * 5
        for operation, name, _ in itertools.chain.from_iterable(map(pickletools.genops, pickles)):
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not re.fullmatch(PLAIN, str(name)):
                raise InputError(f"it holds more than plain data: {name}")
        file = path if zipped else io.BytesIO(content)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and zipped)


def load_strictly(kind: type[nn.Module], config: object, weights: dict, dtype: torch.dtype | None) -> nn.Module:
    """Build a model of this kind of exactly these tensors, without a second copy."""
    with torch.device("meta"):
        model = kind(config)
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        w, shape = weights[name], expected[name].shape  # with strides of 0 a small file could claim any shape
        whole = isinstance(w, Tensor) and w.numel() * w.element_size() <= w.untyped_storage().nbytes()
        if not whole or w.shape != shape or not w.is_floating_point() or w.element_size() < 2:
            wrong.append(f"{name} is {tuple(getattr(w, 'shape', ()))}, not {tuple(shape)} floats")
    if not wrong and dtype is None and len({w.dtype for w in weights.values()}) > 1:
        wrong.append("they are of several types, name one")
    if wrong:
        raise InputError(f"these weights do not fit a {kind.__name__}: {min(wrong)} ({len(wrong)} in all)")
    for name in weights:  # one by one, so that a converted tensor's original can go at once
        weights[name] = weights[name].to(dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def worked_example(seed: int = 27) -> str:
    """Fig. 3 in numbers: what enters and leaves each element of a 2x2 image, computed by the functions that train."""
    generator = torch.Generator().manual_seed(seed)
    tokens, label = torch.randint(10, 100, (1, 4), generator=generator), 7
    ratio = random_ratio(step=60, anneal_start=50, anneal_end=75)
    order = sample_orders(1, 4, ratio, generator=generator)
    own, following = ((rows[0] - 2).tolist() for rows in position_rows(order))  # positions, from the third element on
    shuffled = tokens.gather(1, order)[0].tolist()
    inputs = ["cls", f"class {label}", *(f"token {token}" for token in shuffled[:-1])]
    positions = ["cls", "class", *(f"p[{i}]" for i in own[2:])]
    targets = ["-", *(f"q[{i}]" for i in following)]  # q: the second table, Eq. (4)
    predicts = ["nothing", *(f"token {token} at {i}" for token, i in zip(shuffled, order[0].tolist()))]
    lines = [
        f"a 2x2 image, tokens in raster layout: {tokens[0].tolist()}, class {label}",
        f"step 60 of 100, annealing from 50 to 75: r = {ratio:.2f} (Eq. 5)",
        f"order drawn: {order[0].tolist()} (the raster index predicted at each step)",
        "",
        f"{'element':>8} {'goes in':>10} {'+ position':>12} {'+ target-aware':>16}   predicts",
    ]
    for element, (name, position, target, predicted) in enumerate(zip(inputs, positions, targets, predicts)):
        lines.append(f"{element:>8} {name:>10} {position:>12} {target:>16}   {predicted}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(worked_example())
