"""RAR: the method and the transformer of randomized autoregressive image generation, in one file.

Yu, He, Deng, Shen, Chen, "Randomized Autoregressive Visual Generation", arXiv 2411.00776 (ICCV 2025). An image is T
tokens on a square grid. A causal transformer predicts them one after another, in an order that is random with
probability r. The probability starts at 1 and falls to 0, so training ends in raster order (Sec. 3). A second position
table tells each element of the sequence which position has to be predicted next (Eq. 4).

A worked example: a 2x2 image with the tokens [a, b, c, d] in raster layout, and the order [2, 0, 3, 1].

    input                    cls     class    c    a    d
    own position             cls     class    2    0    3
    target-aware position    -       2        0    3    1
    predicts                 -       c        a    d    b

`python rar.py` prints this with numbers. Parameters have the names and shapes of those in the authors' code, so that
the authors' files should load without conversion (README.md says what was tested).

Letters: B batch, T tokens of an image, n or K tokens given, N elements of this call, D width, H heads, V codes,
C classes, U distinct classes in the batch, S elements that attention can see.
"""

from __future__ import annotations

import fnmatch
import math
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

LEADING = 2  # elements in front of all image tokens: a learned cls, then the class
LOOKAHEAD = 32  # sampling computes the adaLN outputs of this many elements at once
SPARE_POSITIONS = 1024  # rows that the released position tables have beyond T


class InputError(Exception):
    """Bad input from the user. The scripts print it as one line and exit with code 2."""


def require(condition: object, message: str):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------------
# The method: how often orders are random, the orders, and which position comes next
# ---------------------------------------------------------------------------------------------------------------------


def random_ratio(step: float, anneal_start: float, anneal_end: float) -> float:
    """The probability r that an image is trained in a random order (Sec. 3.3, Eq. 5).

    All arguments are in the same unit, such as steps. If start = end = 0, the order is always the base order. If start
    and end are both the total number of steps, it is always random.
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
    """Draw an order per sample: uniformly random with probability `ratio`, otherwise `base_order` (Sec. 3.2, Eq. 3).

    Returns (B, T) int64; orders[b, t] is the raster index that is predicted at step t. `base_order` (T,) is raster by
    default. Random numbers come from `generator`, on its own device; the result is on `device`.
    """
    base = torch.arange(seq_len) if base_order is None else base_order
    source = generator.device if generator else device
    permutations = torch.rand(batch_size, seq_len, generator=generator, device=source).argsort(1)  # all equally likely
    is_random = torch.rand(batch_size, 1, generator=generator, device=source) < ratio  # per sample, not per batch
    return torch.where(is_random, permutations, base.to(permutations.device)).to(device)


def position_rows(orders: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers in the two position tables for orders (B, T): own (B, T+1) and upcoming (B, T), both int64.

    Row 0 belongs to cls, row 1 to the class, row 2 + i to raster position i. own[:, j] is for element j; upcoming[:, j]
    is for element j + 1, because cls has none. The last token is never an input, so own stops before it.
    """
    upcoming = orders + LEADING  # Eq. (4): the element before a token gets the token's row       B, T
    own = F.pad(upcoming[:, :-1], (LEADING, 0))  # in front: cls (0), class (1, see below)        B, T+1
    own[:, 1] = 1
    return own, upcoming


SCANS = ("row-major", "spiral-in", "spiral-out", "z-curve", "subsample", "alternate")


def scan_order(name: str, grid_size: int) -> Tensor:
    """One of the six fixed orders of Fig. 6 and Tab. 3 on a square grid: (T,) int64, the raster index at step t.

    `row-major` is raster order. Raises InputError for an unknown name, and for `subsample` on an odd grid.
    """
    require(name in SCANS, f"unknown order {name!r}: choose one of {', '.join(SCANS)}")
    grid = torch.arange(grid_size**2).view(grid_size, grid_size)
    if name == "alternate":
        grid[1::2] = grid[1::2].flip(1)
    if name.startswith("spiral"):
        path = []
        while grid.numel():  # take the left column downwards, then turn the rest so that its bottom row is on the left
            path.append(grid[:, 0])
            grid = grid[:, 1:].rot90(-1)
        inwards = torch.cat(path)
        return inwards if name == "spiral-in" else inwards.flip(0)
    if name == "z-curve":  # Morton order: sorted by a number whose bits alternate between row and column, row first
        spread = torch.tensor([int(f"{i:b}", 4) for i in range(grid_size)])  # 0b11 becomes 0b0101, bits with gaps
        return (2 * spread[:, None] + spread).flatten().argsort()
    if name == "subsample":  # the same cell of each quadrant in turn
        require(grid_size % 2 == 0, f"the subsample order needs an even grid, this one is {grid_size}x{grid_size}")
        grid = grid.view(2, grid_size // 2, 2, -1).permute(1, 3, 0, 2)
    return grid.flatten()


def inpainting_order(known: Tensor) -> tuple[Tensor, int]:
    """For known (T,) bool: an order (T,) with the known cells first, and the number of these cells."""
    return known.int().argsort(descending=True, stable=True), int(known.sum())


def drop_labels(labels: Tensor, null_label: int, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label (B,) by the null class with probability `rate`, for classifier-free guidance (Sec. 4.1)."""
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
    return labels.masked_fill(dropped, null_label)


def guidance_at(step: int, seq_len: int, scale: float, power: float) -> float:
    """Classifier-free guidance scale at a step: power-cosine from 1 up to `scale` (Sec. 4.1); power 0 is constant."""
    return 1.0 + (scale - 1.0) * (1.0 - math.cos(math.pi * (step / seq_len) ** power)) / 2.0


# ---------------------------------------------------------------------------------------------------------------------
# The transformer (Sec. 4.1)
# ---------------------------------------------------------------------------------------------------------------------


TABLE_1 = {  # the published models; all have 16 heads, 256 tokens, 1024 codes, 1000 classes
    "rar_b": {"dim": 768, "depth": 24, "mlp_dim": 3072},
    "rar_l": {"dim": 1024, "depth": 24, "mlp_dim": 4096},
    "rar_xl": {"dim": 1280, "depth": 32, "mlp_dim": 5120},
    "rar_xxl": {"dim": 1408, "depth": 40, "mlp_dim": 6144},
}


@dataclass
class RARConfig:
    """Sizes of a RAR transformer (Tab. 1). adaln=False is the paper's plain ViT; target_aware=False omits Eq. (4)."""

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

    def __post_init__(self):
        require(self.dim % self.heads == 0, f"--dim {self.dim} is not a multiple of --heads {self.heads}")


class Cache:
    """What sampling keeps between steps: keys and values of all layers, and modulations computed ahead of time."""

    def __init__(self, model: RAR, batch_size: int):
        c = model.config
        shape = (c.depth, 2, batch_size, c.heads, c.seq_len + 1, c.dim // c.heads)
        self.keys_values = model.lm_head.weight.new_empty(shape)
        self.length = 0  # elements that are stored in all layers; RAR.forward advances it
        self.modulations = []  # those of the next elements: a tensor for each block, then one for the final norm

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, N, D/H) after those stored for `layer`; return all of them (2, B, H, S, D/H)."""
        stop = self.length + k.shape[2]
        stored = self.keys_values[layer, ..., :stop, :]  # a view                                 2, B, H, S, D/H
        stored[..., self.length :, :] = torch.stack([k, v])
        return stored


LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # as in the authors' code


class Attention(nn.Module):
    """Causal self-attention with QK-LayerNorm."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.config = config
        D = config.dim
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = LayerNorm(D // config.heads)
        self.k_norm = LayerNorm(D // config.heads)
        self.proj = nn.Linear(D, D)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """Causal attention over x (B, N, D) and everything already cached."""
        qkv = self.qkv(x).unflatten(2, (3, self.config.heads, -1))  #                             B, N, 3, H, D/H
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  #                                                   3 x (B, H, N, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache:
            k, v = cache.append(layer, k, v)  #                                                   2 x (B, H, S, D/H)
        N, S = q.shape[2], k.shape[2]
        mask = None
        if 1 < N < S:  # several new elements (never in generate): each sees the cached ones, and new ones up to itself
            mask = q.new_ones(N, S).tril(S - N).bool()
        dropout = self.config.attn_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=N == S)  #           B, H, N, D/H
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  #                         B, N, D


class MLP(nn.Sequential):
    """Two linear layers with an exact GELU between them. nn.Sequential runs the layers in the order given here."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.gelu = nn.GELU()
        self.drop1 = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.drop2 = nn.Dropout(config.dropout)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x * (1 + scale) + shift, multiplied out because bfloat16 would round 1 + scale."""
    return x + x * scale + shift


class Block(nn.Module):
    """A transformer block. adaLN modulates both of its branches, unless `modulation` is None."""

    def __init__(self, config: RARConfig):
        super().__init__()
        D = config.dim
        self.norm1 = LayerNorm(D)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(D)
        self.mlp = MLP(config)
        if config.adaln:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, modulation: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """x and the result are (B, N, D), modulation is (B, N, 6D)."""
        if modulation is None:
            x = x + self.attn(self.norm1(x), cache, layer)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  #             6 x (B, N, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cache, layer)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  #                   B, N, D


class FinalNorm(nn.Module):
    """The modulated LayerNorm in front of the output projection. Unlike the others, it has no weight or bias."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x and the result are (B, N, D), modulation is (B, N, 2D)."""
        scale, shift = modulation.chunk(2, dim=-1)  # scale first, unlike in the blocks: the released layout
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)


class RAR(nn.Module):
    """A causal transformer over the sequence [cls, class, tokens in some order] (Sec. 3.2).

    A label is a class 0..C-1, or C for the null class of classifier-free guidance.
    """

    def __init__(self, config: RARConfig):
        super().__init__()
        self.config = config
        D, T, V, C = config.dim, config.seq_len, config.codebook_size, config.num_classes
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.embeddings = nn.Embedding(V + C + 2, D)  # V codes, a mask token (never used), C classes, the null class
        self.pos_embed = nn.Parameter(torch.empty(1, T + SPARE_POSITIONS, D))  # rows: cls, class, raster positions
        if config.target_aware:
            self.target_aware_pos_embed = nn.Parameter(torch.empty(1, T + SPARE_POSITIONS, D))  # row 2 + i: i is next
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.adaln:
            self.timesteps_embeddings = nn.Parameter(torch.empty(1, T + 100, D))  # row j: element j; some spare
            self.adaln_before_head = FinalNorm(config)
        else:
            self.norm = LayerNorm(D)
        self.lm_head = nn.Linear(D, V)
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(p)  # a block with adaLN starts as the identity
            elif p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)

    def modulations(self, class_ids: Tensor, start: int, N: int, cache: Cache | None) -> list[Tensor]:
        """adaLN outputs for classes (U,) and N elements from `start` on: (U, N, 6D) per block, then (U, N, 2D).

        They depend on the class and on the element's place alone, so images of one class share them. With a cache they
        are computed for LOOKAHEAD elements at once, so that the layers' weights are read less often. The cache keeps
        those that are not used yet.
        """
        ahead = cache.modulations if cache else []
        if not ahead or ahead[0].shape[1] < N:
            count = max(N, LOOKAHEAD) if cache else N
            places = self.timesteps_embeddings[:, start : start + count]
            condition = self.embeddings(class_ids)[:, None] + places  #                           U, count, D
            ahead = [module.adaLN_modulation(condition) for module in [*self.blocks, self.adaln_before_head]]
        if cache:
            cache.modulations = [m[:, N:] for m in ahead]
        return [m[:, :N] for m in ahead]

    def forward(self, tokens: Tensor, labels: Tensor, orders: Tensor, cache: Cache | None = None) -> Tensor:
        """At each element, logits of the next token (Eq. 3, or Eq. 1 in raster order).

        tokens (B, n) int64 are the first n < T tokens, already permuted. labels (B,) are in 0..C. orders are
        (B, T), or (1, T) if all images share one. Returns (B, n+1, V): logits[:, t] predicts the token at orders[:, t].
        With a cache, only the elements that it lacks are run, and the result holds their logits alone. All calls with
        one cache need the same labels and orders, and tokens that go on from those of the call before.
        """
        start, stop = (cache.length if cache else 0), tokens.shape[1] + LEADING
        class_ids = labels + self.config.codebook_size + 1  # rows of the embedding table         B
        ids = F.pad(torch.cat([class_ids[:, None], tokens], dim=1), (1, 0))  # 0 in place of cls  B, n+2
        x = self.embeddings(ids[:, start:])  #                                                    B, N, D
        if start == 0:
            x[:, 0] = self.cls_token[0]  # cls has a parameter of its own, not a row of the table
        own, upcoming = position_rows(orders)
        positions = F.embedding(own, self.pos_embed[0])  #                                        B, T+1, D
        if self.config.target_aware:  # Eq. (4): all elements but cls are told what is next
            positions[:, 1:] += F.embedding(upcoming, self.target_aware_pos_embed[0])
        x = x + positions[:, start:stop]
        classes, class_of = class_ids.unique(return_inverse=True)  # each distinct class once     U and B
        modulations = self.modulations(classes, start, stop - start, cache) if self.config.adaln else []
        for layer, block in enumerate(self.blocks):
            modulation = modulations[layer].index_select(0, class_of) if modulations else None  # B, N, 6D
            x = block(x, modulation, cache, layer)  #                                             B, N, D
        if self.config.adaln:
            x = self.adaln_before_head(x, modulations[-1].index_select(0, class_of))  #           B, N, D
        else:
            x = self.norm(x)
        if cache:
            cache.length = stop
        return self.lm_head(x[:, 1:] if start == 0 else x)  # no logits for cls                   B, (n+1 or N), V

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
        """Sample tokens (B, T) int64, in raster layout, for labels (B,) along one `order` (T,), raster by default.

        `prefix` (B, K) holds the image tokens at order[:K], as inpainting needs. Guidance is constant at
        power 0, else power-cosine (Sec. 4.1); at scale 1 the null branch is not run. use_cache=False computes all
        elements again at every step. Call eval() first if the model has dropout.
        Raises InputError for an order that is not a permutation and for values outside their ranges.
        """
        T = self.config.seq_len
        order = (torch.arange(T) if order is None else order).to(labels.device)
        tokens = labels.new_empty(len(labels), 0) if prefix is None else prefix.to(labels.device)
        require(temperature > 0, f"temperature must be above 0, got {temperature}")
        require(guidance_power >= 0, f"guidance power must be 0 or more, got {guidance_power}")
        check_inputs(self.config, labels, order, tokens)
        guided = guidance_scale != 1.0
        if guided:
            null_labels = torch.full_like(labels, self.config.num_classes)
            labels = torch.cat([labels, null_labels])  #                                          2B
        cache = Cache(self, len(labels)) if use_cache else None
        for t in tqdm(range(tokens.shape[1], T), desc="tokens", disable=not progress):
            inputs = tokens.repeat(2, 1) if guided else tokens  #                                 B or 2B, t
            logits = self(inputs, labels, order[None], cache)[:, -1].float()  #                   B or 2B, V
            if guided:
                conditional, unconditional = logits.chunk(2)
                scale = guidance_at(t, T, guidance_scale, guidance_power)
                logits = unconditional + scale * (conditional - unconditional)  #                 B, V
            codes = sample_codes(logits / temperature, top_k, generator)  #                       B, 1
            tokens = torch.cat([tokens, codes], dim=1)  #                                         B, t+1
        return tokens[:, order.argsort()]  # back in raster layout

    @torch.no_grad()
    def merge_position_embeddings(self, order: Tensor | None = None) -> RAR:
        """Add the target-aware table to the position table, in place, for one fixed order (T,), raster by default.

        Outputs in that order stay the same, and the model is then a plain autoregressive one (Sec. 3.2). In any
        other order its outputs are wrong from then on, and nothing checks for that. Returns self.
        """
        if self.config.target_aware:
            order = torch.arange(self.config.seq_len) if order is None else order.cpu()
            own, upcoming = position_rows(order[None])
            self.pos_embed[0, own[0, 1:]] += self.target_aware_pos_embed[0, upcoming[0]]  # Eq. (4) for the fixed order
            del self.target_aware_pos_embed
            self.config = replace(self.config, target_aware=False)
        return self

    @classmethod
    def from_released(cls, source: str | Path | dict, dtype: torch.dtype | None = None) -> RAR:
        """Build a model from a state dict in the authors' layout, or a file of one: its shapes give all sizes.

        `dtype` converts the weights; by default they stay as stored. Raises InputError, naming the file, if a tensor is
        missing, unknown or misshapen.
        """
        weights, name = read_weights(source, dtype)
        with reading(name, "are these the weights of a RAR model?"):
            V, D = weights["lm_head.weight"].shape
            C = len(weights["embeddings.weight"]) - V - 2
            T = weights["pos_embed"].shape[1] - SPARE_POSITIONS
            depth = len(fnmatch.filter(weights, "blocks.*.attn.qkv.weight"))
            heads = D // len(weights["blocks.0.attn.q_norm.weight"])
            mlp_dim = len(weights["blocks.0.mlp.fc1.bias"])
        config = RARConfig(V, C, T, D, depth, heads, mlp_dim)
        config.adaln = "timesteps_embeddings" in weights  # this and the next are True in the published models
        config.target_aware = "target_aware_pos_embed" in weights
        return load_weights(cls, config, weights, name)


def check_inputs(config: RARConfig, labels: Tensor, order: Tensor, prefix: Tensor):
    """Raise InputError, naming the argument, if generate cannot run on these."""
    T, V, C = config.seq_len, config.codebook_size, config.num_classes
    require(((labels >= 0) & (labels <= C)).all(), f"labels must lie in 0..{C - 1}, or be {C} for the null class")
    require(sorted(order.tolist()) == list(range(T)), f"the order must be a permutation of 0..{T - 1}")
    fits = prefix.shape[:-1] == labels.shape and prefix.shape[1] <= T
    require(fits, f"the prefix must be ({len(labels)}, K) with K <= {T}, got {tuple(prefix.shape)}")
    require(((prefix >= 0) & (prefix < V)).all(), f"prefix tokens must lie in 0..{V - 1}")


def sample_codes(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one code for each row of logits (B, V), from the top_k likeliest if that is given: (B, 1) int64."""
    require(logits.isfinite().all(), "logits are not finite: the weights are damaged or guidance is too strong")
    if top_k is not None:
        require(1 <= top_k <= logits.shape[1], f"top_k must lie in 1..{logits.shape[1]}, got {top_k}")
        least = logits.topk(top_k).values[:, -1:]  # the smallest logit that is kept              B, 1
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.softmax(dim=-1).multinomial(1, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights
# ---------------------------------------------------------------------------------------------------------------------

DAMAGED = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError)
DAMAGED += (pickle.UnpicklingError, zipfile.BadZipFile, tarfile.TarError, zlib.error)  # what reading a bad file raises


@contextmanager
def reading(file: object, hint: str) -> Iterator[None]:
    """Turn an error from reading bad input (a file, `--device`, `--mask`) into an InputError of one line that names it.

    Wrap only the reading itself: a bug in the program has to show its traceback.
    """
    try:
        yield
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file} cannot be used ({reason}): {hint}") from error


def load_file(path: str | Path, mmap: bool = False) -> dict:
    """torch.load of tensors and plain data only: code in the file never runs. With mmap, numbers are read when used."""
    with open(path, "rb") as file:
        start = file.read(40)
    # a safetensors file begins with 8 bytes of length and then JSON
    require(start[8:9] != b"{", f"{path} is a safetensors file: convert it with safetensors.torch and torch.save")
    require(not start.startswith(b"version https://git-lfs"), f"{path} is a Git LFS pointer: run git lfs pull")
    require(not start.lstrip().startswith(b"<"), f"{path} is an HTML page, not weights: download the file again")
    with reading(path, "it is damaged, incomplete or not a file of weights"):
        mmap = mmap and zipfile.is_zipfile(path)  # files in torch's old format cannot be mapped
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def read_weights(source: str | Path | dict, dtype: torch.dtype | None) -> tuple[dict, str]:
    """A state dict from memory or from a file, converted to `dtype` unless that is None; and its name for messages."""
    weights, name = source, "this state dict"
    if not isinstance(source, dict):
        weights, name = load_file(source, mmap=True), str(source)
    require("kind" not in weights, f"{name} is a checkpoint of train_tiny.py: use --run with its folder")
    with reading(name, "a state dict maps names to tensors"):
        for wrapper in ("model", "state_dict"):  # trainers wrap the weights; DDP and torch.compile rename them
            weights = weights.get(wrapper, weights)
        added = r"^(module\.|_orig_mod\.)+"
        weights = {re.sub(added, "", key): tensor.to(dtype=dtype) for key, tensor in weights.items()}
        types = {tensor.dtype for tensor in weights.values()}
    require(len(types) < 2, f"{name} mixes several types: choose one, as in --dtype float32")
    return weights, name


def load_weights(model_class: type[nn.Module], config: object, weights: dict, name: str) -> nn.Module:
    """Build a model in eval mode from exactly these tensors, without copying them."""
    with torch.device("meta"):
        model = model_class(config)
    with reading(name, f"its weights do not fit this {model_class.__name__}"):
        model.load_state_dict(weights, assign=True)
    return model.eval()


def worked_example() -> str:
    """The example at the top of this file in numbers: inputs, rows of the position tables, targets. No model is run."""
    tokens, orders = torch.tensor([[19, 64, 14, 89]]), torch.tensor([[2, 0, 3, 1]])
    own, upcoming = position_rows(orders)
    rows = ["cls", "class", "0", "1", "2", "3"]  # what the rows of the position tables stand for
    predicted = [f"token {token}" for token in tokens.gather(1, orders)[0].tolist()]
    fed = ["class 7", *predicted]  # each element is fed what the one before it predicts
    text = f"""a 2x2 image with tokens {tokens[0].tolist()} in raster layout, class 7, order {orders[0].tolist()}
at step 60 of 100, annealing from 50 to 75, r = {random_ratio(60, 50, 75):.2f} (Eq. 5)

element      input   own position   target-aware position   predicts
      0        cls            cls                       -   nothing"""
    for j in range(4):
        position, target = rows[own[0, j + 1]], rows[upcoming[0, j]]  # Eq. (4)
        text += f"\n{j + 1:>7} {fed[j]:>10} {position:>14} {target:>23}   {predicted[j]} at position {target}"
    return text


if __name__ == "__main__":
    print(worked_example())
