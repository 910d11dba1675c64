"""RAR: randomized autoregressive image generation, the method and its transformer in one file.

Yu, He, Deng, Shen, Chen, "Randomized Autoregressive Visual Generation", arXiv 2411.00776 (ICCV 2025). A frozen
tokenizer turns an image into T tokens on a square grid. A causal transformer predicts them one after another, given the
class. While it trains, the order of the tokens is random with probability r, which starts at 1 and falls to 0 (Sec. 3).
A second position table tells each element of the sequence which position has to be predicted next (Eq. 4).

A worked example: a 2x2 image with the tokens [a, b, c, d] in raster layout, and the order [2, 0, 3, 1].

    input                    cls     class    c    a    d
    own position             cls     class    2    0    3
    target-aware position    -       2        0    3    1
    predicts                 -       c        a    d    b

`python rar.py` prints this with numbers. An element is a slot of the sequence: cls, the class, or a token. cls belongs
to the authors' network and predicts nothing. Raster order is row by row from the top left. Parameters have the names
and shapes of the released weights, so that these load without conversion.

Letters: B images of a batch, T tokens of an image, n tokens given, N elements run in this call, S elements that
attention can see, D width, H heads, V codes, C classes, U conditions of adaLN (see RAR.forward).
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# The method: how often orders are random, the orders, and which position comes next
# ---------------------------------------------------------------------------------------------------------------------


def random_ratio(step: float, anneal_start: float, anneal_end: float) -> float:
    """The probability r, in 0..1, that an image is trained in a random order (Sec. 3.3, Eq. 5).

    All arguments are in the same unit, such as steps. If start = end = 0, the order is always the base order. If start
    and end are both the total number of steps, it is always random.
    """
    if step >= anneal_end:
        return 0.0
    if step <= anneal_start:
        return 1.0
    return 1.0 - (step - anneal_start) / (anneal_end - anneal_start)  # Eq. (5)


def sample_orders(
    batch_size: int, seq_len: int, ratio: float, *, base_order=None, generator=None, device=None
) -> Tensor:
    """Draw an order for each image: uniformly random with probability `ratio`, else `base_order` (Sec. 3.2, Eq. 3).

    Returns (B, T) int64 on `device`; orders[b, t] is the raster index that is predicted at step t. `base_order` (T,) is
    raster by default. Random numbers are drawn on the device of `generator`, if there is one.
    """
    base_order = torch.arange(seq_len) if base_order is None else base_order
    source = device if generator is None else generator.device
    permutations = torch.rand(batch_size, seq_len, generator=generator, device=source).argsort(1)  # all equally likely
    is_random = torch.rand(batch_size, 1, generator=generator, device=source) < ratio  # for each image, not the batch
    orders = torch.where(is_random, permutations, base_order.to(permutations.device))  #          B, T
    return orders.to(device)


def position_rows(orders: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the two position tables for orders (B, T): own (B, T+1) and upcoming (B, T), int64 (Sec. 3.2, Eq. 4).

    Row 0 belongs to cls, row 1 to the class, row 2 + i to raster position i. own[:, j] is for element j of the
    sequence, upcoming[:, j] for element j + 1, because cls has none. The last token is never an input, so own stops
    before it.
    """
    upcoming = orders + 2  # Eq. (4): the element before a token is told the token's position     B, T
    cls, label = torch.zeros_like(orders[:, :1]), torch.ones_like(orders[:, :1])  #               B, 1
    own = torch.cat([cls, label, upcoming[:, :-1]], dim=1)  # each token brings its own position  B, T+1
    return own, upcoming


SCANS = ("row-major", "spiral-in", "spiral-out", "z-curve", "subsample", "alternate")


def scan_order(name: str, grid_size: int) -> Tensor:
    """One of the six fixed orders of Fig. 6 and Tab. 3 on a square grid: (T,) int64, the raster index at each step.

    `row-major` is raster order. Raises ValueError for an unknown name; `subsample` needs an even grid.
    """
    grid = torch.arange(grid_size**2).view(grid_size, grid_size)
    if name == "row-major":
        return grid.flatten()
    if name == "alternate":
        grid[1::2] = grid[1::2].flip(1)
        return grid.flatten()
    if name in ("spiral-in", "spiral-out"):
        path = []
        # Take the left column downwards, then turn the rest so that its bottom row is on the left.
        while grid.numel() > 0:
            path.append(grid[:, 0])
            grid = grid[:, 1:].rot90(-1)
        inwards = torch.cat(path)
        return inwards if name == "spiral-in" else inwards.flip(0)
    if name == "z-curve":  # Morton order: sort by a number whose bits come from row and column in turn
        i = torch.arange(grid_size)
        spread = torch.zeros_like(i)  # the bits of i with a gap after each: 0b11 becomes 0b101
        for bit in range(grid_size.bit_length()):
            spread += (i >> bit & 1) << 2 * bit
        return (2 * spread[:, None] + spread).flatten().argsort()
    if name == "subsample":  # the same cell of each quadrant in turn
        assert grid_size % 2 == 0, f"the subsample order needs an even grid, this one is {grid_size}x{grid_size}"
        half = grid_size // 2
        return grid.view(2, half, 2, half).permute(1, 3, 0, 2).flatten()
    raise ValueError(f"unknown order {name!r}: choose one of {', '.join(SCANS)}")


def inpainting_order(known: Tensor) -> tuple[Tensor, int]:
    """An order (T,) that starts with the known cells, for known (T,) bool, and how many of these there are."""
    order = known.int().argsort(descending=True, stable=True)
    return order, int(known.sum())


def drop_labels(labels: Tensor, null_label: int, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label (B,) by the null class with probability `rate`, for classifier-free guidance (Sec. 4.1)."""
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
    return labels.masked_fill(dropped, null_label)


def guidance_at(step: int, seq_len: int, scale: float, power: float) -> float:
    """Classifier-free guidance at a step: power-cosine from 1 up to `scale`; power 0 is constant (Sec. 4.1)."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / seq_len) ** power)) / 2


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
    """Sizes of a RAR transformer (Tab. 1). Dropout is used in attention too. target_aware=False omits Eq. (4)."""

    codebook_size: int
    num_classes: int
    seq_len: int
    dim: int = 128
    depth: int = 4
    heads: int = 4
    mlp_dim: int = 512
    dropout: float = 0.0
    target_aware: bool = True


class Cache:
    """Keys and values of all layers, which sampling keeps from step to step so that each element is run once."""

    def __init__(self, model: RAR, batch_size: int):
        c = model.config
        self.shape = (c.depth, batch_size, c.heads, c.seq_len + 1, c.dim // c.heads)
        self.keys, self.values = None, None  # allocated at the first append, in its dtype
        self.length = 0  # elements that are stored for all layers; RAR.forward moves it on

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, N, D/H) of a layer behind those it has; return all of them, (B, H, S, D/H)."""
        if self.keys is None:
            self.keys = keys.new_empty(self.shape)
            self.values = values.new_empty(self.shape)
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class Attention(nn.Module):
    """Causal self-attention with a LayerNorm on queries and keys (Sec. 4.1)."""

    def __init__(self, config):
        super().__init__()
        assert config.dim % config.heads == 0, f"dim {config.dim} is not a multiple of heads {config.heads}"
        self.heads, self.dropout = config.heads, config.dropout
        head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.proj = nn.Linear(config.dim, config.dim)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x, layer, cache):
        """x and the result are (B, N, D). With a cache, x also attends to the elements that are stored in it."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  #                                         3 x (B, H, N, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.append(layer, k, v)  #                                                   2 x (B, H, S, D/H)
        dropout = self.dropout if self.training else 0.0
        # Several elements are run only when nothing is stored: then a square causal mask is right. A single new element
        # may see everything.
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=N > 1)  #        B, H, N, D/H
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))  #                                                    B, N, D


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        """x and the result are (B, N, D)."""
        x = self.drop(F.gelu(self.fc1(x)))  #                                                     B, N, mlp_dim
        return self.drop(self.fc2(x))


def modulate(x, shift, scale):
    """adaLN: x * (1 + scale) + shift, multiplied out because bfloat16 would round 1 + scale."""
    return x + x * scale + shift


class Block(nn.Module):
    """Block with adaLN: a linear layer turns class and place in the sequence into shift, scale and gate (Sec. 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def forward(self, x, c, class_of, layer, cache):
        """x and the result are (B, N, D). The conditions c are (U, N, D); that of image b is c[class_of[b]]."""
        modulation = self.adaLN_modulation(c).index_select(0, class_of)  #                        B, N, 6D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  #             6 x (B, N, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), layer, cache)
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalNorm(nn.Module):
    """The modulated LayerNorm in front of the output projection. Unlike the others it has no weight and no bias."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x, c, class_of):
        """As in Block. The released weights have scale before shift here."""
        modulation = self.adaLN_modulation(c).index_select(0, class_of)  #                        B, N, 2D
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class RAR(nn.Module):
    """A causal transformer over the sequence [cls, class, tokens in some order] (Sec. 3.2).

    A label is a class 0..C-1, or C for the null class of classifier-free guidance.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, T, V, C = config.dim, config.seq_len, config.codebook_size, config.num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.embeddings = nn.Embedding(V + C + 2, D)  # V codes, a mask token (never used), C classes, the null class
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))  # rows: cls, class, raster positions, spare ones
        if config.target_aware:
            self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))  # row 2 + i: position i is next
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, T + 100, D))  # row j: for element j (no diffusion here)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.adaln_before_head = FinalNorm(config)
        self.lm_head = nn.Linear(D, V)
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(p)  # all gates are 0, so each block starts as the identity
            elif p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor, orders: Tensor, cache: Cache | None = None) -> Tensor:
        """At each element, logits of the next token (Eq. 3, or Eq. 1 in raster order).

        tokens (B, n) int64 are the first n < T tokens, already permuted. labels (B,) int64 lie in 0..C. orders (B, T)
        are permutations; (1, T) is one for all images. Returns (B, n+1, V): logits[:, t] predicts the token at
        orders[:, t]. A cache must be empty, or filled by a call with the same labels and orders and one token less.
        With a filled cache only the last token is run, and the result is (B, 1, V).
        """
        B, n = tokens.shape
        V, C = self.config.codebook_size, self.config.num_classes
        start = 0 if cache is None else cache.length
        assert start in (0, n + 1), f"the cache holds {start - 2} tokens: give one more, not {n} in all"

        # The sequence; behind a filled cache, its last element alone.
        if start == 0:
            cls = self.cls_token.expand(B, -1, -1)  #                                             B, 1, D
            class_embedding = self.embeddings(labels + V + 1)[:, None]  # behind V codes and a mask  B, 1, D
            x = torch.cat([cls, class_embedding, self.embeddings(tokens)], dim=1)  #              B, n+2, D
        else:
            x = self.embeddings(tokens[:, -1:])  #                                                B, 1, D

        # Own positions, and from the class on the position that is predicted next.
        own, upcoming = position_rows(orders)
        positions = F.embedding(own, self.pos_embed[0])  #                                        B, T+1, D
        if self.config.target_aware:
            positions[:, 1:] += F.embedding(upcoming, self.target_aware_pos_embed[0])  # Eq. (4); cls has none
        x = x + positions[:, start : n + 2]  #                                                    B, N, D

        # adaLN depends on class and place in the sequence: computed for all classes if these are few, else per image.
        if C + 1 < B:
            classes, class_of = torch.arange(C + 1, device=labels.device), labels
        else:
            classes, class_of = labels, torch.arange(B, device=labels.device)
        c = self.embeddings(classes + V + 1)[:, None] + self.timesteps_embeddings[:, start : n + 2]  # U, N, D

        for layer, block in enumerate(self.blocks):
            x = block(x, c, class_of, layer, cache)  #                                            B, N, D
        x = self.adaln_before_head(x, c, class_of)
        if cache is not None:
            cache.length = n + 2
        if start == 0:
            x = x[:, 1:]  # cls predicts nothing                                                  B, n+1, D
        return self.lm_head(x)  #                                                                 B, n+1 or 1, V

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
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample tokens (B, T) int64, in raster layout, for labels (B,) along one `order` (T,), raster by default.

        `prefix` (B, K) holds the image tokens at order[:K], as inpainting needs. Guidance is constant at power 0, else
        power-cosine (Sec. 4.1); at scale 1 the null branch is not run. Call eval() first if the model has dropout.
        """
        T = self.config.seq_len
        order = (torch.arange(T) if order is None else order).to(labels.device)
        assert order.sort().values.equal(torch.arange(T, device=order.device)), f"order is no permutation of 0..{T - 1}"
        tokens = labels.new_empty(len(labels), 0) if prefix is None else prefix.to(labels.device)
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])  #     2B
        cache = Cache(self, len(labels))
        for t in range(tokens.shape[1], T):
            # exercise: a step of sampling, from the first t tokens to t+1
            inputs = tokens.repeat(2, 1) if guided else tokens  #                                 B or 2B, t
            logits = self(inputs, labels, order[None], cache)[:, -1].float()  #                   B or 2B, V
            if guided:
                conditional, unconditional = logits.chunk(2)
                scale = guidance_at(t, T, guidance_scale, guidance_power)
                logits = unconditional + scale * (conditional - unconditional)  #                 B, V
            logits = logits / temperature
            if top_k is not None:
                least = logits.topk(top_k).values[:, -1:]  # the smallest logit that is kept      B, 1
                logits = logits.masked_fill(logits < least, -math.inf)
            token = logits.softmax(dim=-1).multinomial(1, generator=generator)  #                 B, 1
            tokens = torch.cat([tokens, token], dim=1)  #                                         B, t+1
            # end of exercise
        return tokens[:, order.argsort()]  # back in raster layout

    @torch.no_grad()
    def merge_position_embeddings(self, order: Tensor | None = None) -> RAR:
        """Add the target-aware table to the position table, in place, for one fixed order (T,), raster by default.

        Logits in that order stay the same, and the model is then a plain autoregressive one (Sec. 3.2). In any other
        order they are wrong from then on, and nothing checks for that. Returns self.
        """
        order = torch.arange(self.config.seq_len) if order is None else order.cpu()
        own, upcoming = position_rows(order[None])
        self.pos_embed[0, own[0, 1:]] += self.target_aware_pos_embed[0, upcoming[0]]  # Eq. (4) for the fixed order
        del self.target_aware_pos_embed
        self.config = replace(self.config, target_aware=False)
        return self

    @classmethod
    def from_released(cls, source: str | Path | dict) -> RAR:
        """A model in eval mode from the authors' weights, a file or its state dict; the shapes give all sizes.

        Raises ValueError, naming the file, if it is damaged, and KeyError or RuntimeError, naming the tensor, if one is
        missing, unknown or misshapen.
        """
        weights = source if isinstance(source, dict) else load_file(source)
        V, D = weights["lm_head.weight"].shape
        C = len(weights["embeddings.weight"]) - V - 2
        T = weights["pos_embed"].shape[1] - 1024
        depth = len(fnmatch.filter(weights, "blocks.*.attn.qkv.weight"))
        heads = D // len(weights["blocks.0.attn.q_norm.weight"])
        mlp_dim = len(weights["blocks.0.mlp.fc1.bias"])
        return build_model(cls, RARConfig(V, C, T, D, depth, heads, mlp_dim), weights)


def worked_example() -> str:
    """The example at the top of this file in numbers: inputs, rows of the position tables, targets. No model is run."""
    tokens, orders = torch.tensor([[19, 64, 14, 89]]), torch.tensor([[2, 0, 3, 1]])
    own, upcoming = position_rows(orders)
    shuffled = tokens.gather(1, orders)[0].tolist()
    inputs = ["class 7", *shuffled]
    text = f"tokens {tokens[0].tolist()} in raster layout, class 7, order {orders[0].tolist()}\n"
    text += "element     input   own row   target-aware row   predicts      (row i + 2 is that of position i)\n"
    text += "      0       cls         0                  -   nothing\n"
    for j in range(4):
        text += f"{j + 1:>7} {inputs[j]:>9} {own[0, j + 1]:>9} {upcoming[0, j]:>18}   "
        text += f"token {shuffled[j]} at position {orders[0, j]}\n"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights
# ---------------------------------------------------------------------------------------------------------------------


def load_file(path):
    """Tensors and plain data from a file of torch.save; code in it never runs. Raises ValueError, naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read weights from {path}: {error}") from error


def build_model(model_class, config, weights):
    """A model in eval mode that holds exactly these tensors, not copies. RuntimeError if one does not fit."""
    with torch.device("meta"):  # sizes without memory
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


if __name__ == "__main__":
    print(worked_example())
