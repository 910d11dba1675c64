"""Every claim about RAR, tested on a CPU without network: `pytest test_rar.py`; `pytest -k NAME` runs one concept.

Concepts, in order: random_ratio, sample_orders, scan_order, target_aware, causal, qk_norm, loss_alignment, likelihood,
guidance, cache, merge, prefix, null_class, dropout, golden, parameter_counts, worked_example, vq, codebook, tokenizer,
schedule, data, download, tokens, run, sample, released, ablation, bad_input. Oracles are independent where they can be:
brute-force sums, a reference written from the formulas, numbers computed by the authors' program, separate forward
passes.
"""

from __future__ import annotations

import copy
import csv
import functools
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import nn

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import ablation

import rar
import sample
import tokenizer
import train_tiny
from rar import RAR, InputError, RARConfig, drop_labels, guidance_at, random_ratio, sample_orders, scan_order
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, codes_used

torch.set_num_threads(1)  # everything here is tiny


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(module: nn.Module, std: float = 0.3, seed: int = 0) -> nn.Module:
    """Random values in every parameter: adaLN and residual branches start at zero, which would make tests vacuous."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(0, std, generator=generator)
            if name.endswith("weight") and p.dim() == 1:
                p.add_(1)  # of norms
    return module.eval()


def small_rar(V: int = 7, C: int = 3, T: int = 9, seed: int = 0, std: float = 0.3, **options) -> RAR:
    return fill(RAR(RARConfig(V, C, T, **dict(dim=16, depth=2, heads=2, mlp_dim=24) | options)), std, seed)


def random_input(model: RAR, B: int = 5, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels (the null class among them) and one random order for each image."""
    c, g = model.config, seeded(seed)
    tokens = torch.randint(c.codebook_size, (B, c.seq_len), generator=g)
    labels = torch.randint(c.num_classes + 1, (B,), generator=g)
    return tokens, labels, torch.rand(B, c.seq_len, generator=g).argsort(1)


@torch.no_grad()
def logits_of(model: RAR, *args) -> torch.Tensor:
    return model(*args)


ADALN = pytest.mark.parametrize("adaln", [True, False], ids=["adaln", "plain"])
SHUFFLED = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])  # an order of nine places that is no scan


# ---------------------------------------------------------------------------------------------------------------------
# random_ratio: Eq. 5
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, r", [(0, 1), (49, 1), (50, 1), (55, 0.8), (62.5, 0.5), (74, 0.04), (75, 0), (100, 0)])
def test_random_ratio_of_eq_5(step, r):
    assert random_ratio(step, 50, 75) == pytest.approx(r)


def test_random_ratio_corners_of_table_2():
    assert [random_ratio(s, 0, 0) for s in (0, 1, 400)] == [0, 0, 0]  # start = end = 0: raster throughout
    assert [random_ratio(s, 400, 400) for s in (0, 1, 399)] == [1, 1, 1]  # start = end = total: random throughout
    assert [random_ratio(s, 5, 5) for s in (0, 4, 6, 10)] == [1, 1, 0, 0]  # a sudden change divides by nothing


def test_random_ratio_falls_in_a_straight_line_in_any_window():
    rng = random.Random(0)
    for _ in range(300):
        start, length, share = rng.randrange(1000), rng.randrange(1, 1000), rng.random()
        assert random_ratio(start + share * length, start, start + length) == pytest.approx(1 - share, abs=1e-9)
        assert random_ratio(start - 1000 * share, start, start + length) == 1
        assert random_ratio(start + length + 1000 * share, start, start + length) == 0


# ---------------------------------------------------------------------------------------------------------------------
# sample_orders: Sec. 3.2
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("B, T", [(0, 4), (1, 1), (9, 2), (64, 10), (3, 256)])
def test_sample_orders_are_permutations(B, T, ratio):
    base = torch.randperm(T, generator=seeded())
    orders = sample_orders(B, T, ratio, base_order=base, generator=seeded(1))
    assert orders.shape == (B, T) and orders.dtype == torch.int64
    assert orders.sort(1).values.equal(torch.arange(T).expand(B, T))
    assert ratio > 0 or (orders == base).all()


def test_sample_orders_are_uniform_over_all_permutations():
    N = 24000
    counts = Counter(map(tuple, sample_orders(N, 4, 1.0, generator=seeded()).tolist()))
    assert len(counts) == 24
    chi2 = sum((n - N / 24) ** 2 / (N / 24) for n in counts.values())
    assert chi2 < 58  # 23 degrees of freedom: mean 23, deviation 6.8; a fair draw is above this once in 10,000


def test_sample_orders_keep_the_base_order_at_the_right_rate():
    in_raster = (sample_orders(20000, 8, 0.3, generator=seeded()) == torch.arange(8)).all(1).float().mean().item()
    assert in_raster == pytest.approx(0.7, abs=0.016)  # five deviations; 1/8! of the random ones are raster too


def test_sample_orders_decide_per_sample_and_not_per_batch():
    generator = seeded()
    for _ in range(20):
        in_raster = (sample_orders(60, 8, 0.5, generator=generator) == torch.arange(8)).all(1).sum().item()
        assert 8 < in_raster < 52


def test_sample_orders_differ_within_a_batch():
    assert len(sample_orders(50, 12, 1.0, generator=seeded()).unique(dim=0)) == 50


def test_sample_orders_honour_base_order():
    orders = sample_orders(1000, 9, 0.5, base_order=SHUFFLED, generator=seeded())
    assert 400 < (orders == SHUFFLED).all(1).sum() < 600
    assert not (orders == torch.arange(9)).all(1).any()


def test_sample_orders_extremes_and_generator():
    assert sample_orders(7, 5, 0.0).equal(torch.arange(5).expand(7, 5))
    assert not (sample_orders(200, 9, 1.0, generator=seeded()) == torch.arange(9)).all(1).any()
    draw = [sample_orders(9, 9, 0.5, generator=seeded(s)) for s in (1, 1, 2)]
    assert draw[0].equal(draw[1]) and not draw[0].equal(draw[2])
    state = torch.get_rng_state()
    sample_orders(9, 9, 0.5, generator=seeded())
    assert state.equal(torch.get_rng_state())  # with a generator nothing else is drawn from


# ---------------------------------------------------------------------------------------------------------------------
# scan_order: Fig. 6, Tab. 3. The grids say when each cell is visited, as the figure does.
# ---------------------------------------------------------------------------------------------------------------------

FIG_6 = {
    "row-major": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    "spiral-in": [[0, 11, 10, 9], [1, 12, 15, 8], [2, 13, 14, 7], [3, 4, 5, 6]],
    "spiral-out": [[15, 4, 5, 6], [14, 3, 0, 7], [13, 2, 1, 8], [12, 11, 10, 9]],
    "z-curve": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
    "subsample": [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]],
    "alternate": [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]],
}
ON_2X2 = {"spiral-in": [0, 2, 3, 1], "spiral-out": [1, 3, 2, 0], "alternate": [0, 1, 3, 2]}  # the rest are raster


@pytest.mark.parametrize("name", FIG_6)
def test_scan_order_is_that_of_fig_6(name):
    visited = torch.tensor(FIG_6[name]).flatten()
    assert scan_order(name, 4).tolist() == visited.argsort().tolist()
    assert scan_order(name, 2).tolist() == ON_2X2.get(name, [0, 1, 2, 3])


@pytest.mark.parametrize("side", range(1, 18))
def test_scan_order_visits_each_cell_of_any_grid_once(side):
    """Spirals and alternate move one cell at a time; subsample, which jumps between quarters, needs an even grid."""
    for name in FIG_6.keys() - ({"subsample"} if side % 2 else ()):
        order = scan_order(name, side)
        assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(side**2)), name
        steps = (order // side).diff().abs() + (order % side).diff().abs()
        assert (steps == 1).all() or name in ("row-major", "z-curve", "subsample"), name
    if side % 2:
        with pytest.raises(InputError, match="even"):
            scan_order("subsample", side)


def test_scan_order_on_8x8():
    """z-curve fills quadrant after quadrant; subsample takes one cell of each in turn."""
    quadrant = [2 * (i // 8 // 4) + i % 8 // 4 for i in scan_order("z-curve", 8).tolist()]
    assert quadrant == sorted(quadrant)
    assert scan_order("subsample", 8)[:8].tolist() == [0, 4, 32, 36, 1, 5, 33, 37]


def test_scan_order_unknown_name_is_refused():
    with pytest.raises(InputError, match="row-major"):
        scan_order("diagonal", 4)


# ---------------------------------------------------------------------------------------------------------------------
# target_aware: Sec. 3.2, Eq. 4, Fig. 3b
# ---------------------------------------------------------------------------------------------------------------------

FIG_3B = torch.tensor([[2, 0, 3, 1, 4], [2, 0, 4, 3, 1]])  # one prefix 2, 0, going on at 3 or at 4


@ADALN
def test_target_aware_tells_orders_with_a_shared_prefix_apart(adaln):
    tokens, labels = torch.tensor([[3, 1, 4, 1, 5]] * 2), torch.tensor([1, 1])
    without = logits_of(small_rar(T=5, adaln=adaln, target_aware=False), tokens, labels, FIG_3B)
    torch.testing.assert_close(without[0, :3], without[1, :3])  # equal logits for different targets: Fig. 3b
    with_it = logits_of(small_rar(T=5, adaln=adaln), tokens, labels, FIG_3B)
    torch.testing.assert_close(with_it[0, :2], with_it[1, :2])  # the same places come next
    assert (with_it[0, 2] - with_it[1, 2]).abs().max() > 0.1  # here 3 comes next, or 4


def first_changed(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """The first step (of B, T, V logits of one image) whose logits differ."""
    changed = (before - after).abs().amax((0, 2)) > 1e-4
    return changed.nonzero()[0].item() if changed.any() else None


@ADALN
@pytest.mark.parametrize("t", range(9))
def test_target_aware_row_enters_one_step_before_its_position(adaln, t):
    """Row 2 + i of the table is first felt by the prediction of position i: at the class element if i comes first."""
    model = small_rar(adaln=adaln)
    tokens, labels, _ = random_input(model, 1)
    before = logits_of(model, tokens, labels, SHUFFLED[None])
    with torch.no_grad():
        model.target_aware_pos_embed[0, 2 + SHUFFLED[t]] += torch.linspace(-2, 2, 16).roll(3)
    after = logits_of(model, tokens, labels, SHUFFLED[None])
    assert first_changed(before, after) == t


def test_target_aware_other_rows_are_never_read():
    model = small_rar()
    tokens, labels, orders = random_input(model)
    before = logits_of(model, tokens, labels, orders)
    with torch.no_grad():
        model.target_aware_pos_embed[0, :2] = 9
        model.target_aware_pos_embed[0, 11:] = 9
        model.pos_embed[0, 11:] = 9
        model.timesteps_embeddings[0, 10:] = 9
        model.embeddings.weight[7] = 9  # the mask token
    assert before.equal(logits_of(model, tokens, labels, orders))


@ADALN
@pytest.mark.parametrize("t", range(9))
def test_target_aware_leaves_the_ordinary_position_with_its_token(adaln, t):
    """Row 2 + i of the ordinary table comes in with the token of position i, whenever that is: felt one step later."""
    model = small_rar(adaln=adaln)
    tokens, labels, _ = random_input(model, 1)
    before = logits_of(model, tokens, labels, SHUFFLED[None])
    with torch.no_grad():
        model.pos_embed[0, 2 + SHUFFLED[t]] += torch.linspace(-2, 2, 16).roll(3)
    after = logits_of(model, tokens, labels, SHUFFLED[None])
    assert first_changed(before, after) == (t + 1 if t < 8 else None)  # the last token is never fed


def test_target_aware_prefix_rows_are_never_permuted():
    model = small_rar(adaln=False)
    tokens, labels, _ = random_input(model, 1)
    for row in (0, 1):  # cls and class stand before the first prediction in every order
        other = small_rar(adaln=False)
        with torch.no_grad():
            other.pos_embed[0, row] += torch.linspace(-2, 2, 16)
        for order in (SHUFFLED, SHUFFLED.flip(0)):
            before, after = (logits_of(m, tokens, labels, order[None]) for m in (model, other))
            assert first_changed(before, after) == 0


# ---------------------------------------------------------------------------------------------------------------------
# causal: attention under any order, Eq. 1 and 3
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
def test_causal_under_any_order(adaln):
    model = small_rar(adaln=adaln)
    tokens, labels, orders = random_input(model, 6)
    before = logits_of(model, tokens, labels, orders)
    for t in range(9):
        changed = tokens.scatter(1, orders[:, t : t + 1], (tokens.gather(1, orders[:, t : t + 1]) + 1) % 7)
        difference = (logits_of(model, changed, labels, orders) - before).abs().amax(2)  # (B, T)
        assert (difference[:, : t + 1] == 0).all()  # nothing before it, nor its own prediction, sees the token
        assert (difference[:, t + 1 :] > 1e-4).all()  # everything after it does


def test_causal_class_reaches_every_step():
    model = small_rar()
    tokens, _, orders = random_input(model, 4)
    a, b = (logits_of(model, tokens, torch.full((4,), c), orders) for c in (0, 1))
    assert ((a - b).abs().amax(2) > 1e-3).all()


def test_causal_default_order_is_raster():
    model = small_rar()
    tokens, labels, _ = random_input(model)
    torch.testing.assert_close(model(tokens, labels), model(tokens, labels, torch.arange(9).expand(5, 9)))


# ---------------------------------------------------------------------------------------------------------------------
# qk_norm: QK-LayerNorm, Sec. 4.1
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, same", [(0, True), (1, True), (2, False)], ids=["q", "k", "v"])
def test_qk_norm_makes_logits_blind_to_the_size_of_queries_and_keys(part, same):
    model = small_rar(std=1.0)
    tokens, labels, orders = random_input(model)
    before = logits_of(model, tokens, labels, orders)
    with torch.no_grad():
        for block in model.blocks:
            for p in (block.attn.qkv.weight, block.attn.qkv.bias):
                p[16 * part : 16 * (part + 1)] *= 5
    change = (logits_of(model, tokens, labels, orders) - before).abs().max()
    assert change < 1e-3 if same else change > 0.1


def test_qk_norm_has_learnt_parameters_per_head_channel():
    """A factor on q's norm is a temperature: it does change the logits."""
    model = small_rar()
    tokens, labels, orders = random_input(model)
    before = logits_of(model, tokens, labels, orders)
    for name in ("q_norm", "k_norm"):
        changed = small_rar()
        with torch.no_grad():
            getattr(changed.blocks[0].attn, name).weight.mul_(3)
        assert getattr(changed.blocks[0].attn, name).weight.shape == (8,)
        assert (logits_of(changed, tokens, labels, orders) - before).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# loss_alignment: what each logit predicts
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_alignment_is_cross_entropy_with_the_token_at_each_step_of_the_order():
    model = small_rar()
    tokens, labels, orders = random_input(model)
    log_p = logits_of(model, tokens, labels, orders).log_softmax(-1)
    by_hand = [-log_p[b, t, tokens[b, orders[b, t]]].item() for b in range(5) for t in range(9)]
    loss = train_tiny.token_loss(model, tokens, labels, orders).item()
    assert loss == pytest.approx(sum(by_hand) / 45, abs=1e-5)
    assert loss != pytest.approx(train_tiny.token_loss(model, tokens, labels, orders.roll(1, 1)).item(), abs=1e-2)


def test_loss_alignment_lets_a_model_learn_an_image_in_every_order():
    """One image with a token of its own at each place: only a model told which place comes next can reach zero loss."""
    torch.manual_seed(0)
    tokens, labels = torch.arange(9).expand(32, 9), torch.zeros(32, dtype=torch.long)
    reached = {}
    for target_aware in (True, False):
        model = RAR(RARConfig(9, 1, 9, dim=32, depth=1, heads=2, mlp_dim=64, target_aware=target_aware))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            orders = torch.rand(32, 9, generator=seeded(step)).argsort(1)
            loss = train_tiny.token_loss(model, tokens, labels, orders)
            train_tiny.update(model, optimizer, loss, 1e-2)
        reached[target_aware] = loss.item()
    guessing = sum(math.log(k) for k in range(1, 10)) / 9  # which of the places that are left: 1.42 nats
    assert reached[True] < 0.1 and reached[False] > 0.9 * guessing


# ---------------------------------------------------------------------------------------------------------------------
# likelihood: Eq. 3 factorises one distribution in every order
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
def test_likelihood_of_all_images_sums_to_one_in_every_order(adaln):
    V, T = 3, 4
    model = small_rar(V=V, T=T, adaln=adaln, std=0.5)
    images = torch.tensor(list(itertools.product(range(V), repeat=T)))  # all 81
    labels = torch.ones(len(images), dtype=torch.long)
    by_order = []
    for order in itertools.permutations(range(T)):
        orders = torch.tensor(order).expand(len(images), T)
        log_p = logits_of(model, images, labels, orders).log_softmax(-1)
        by_order.append(log_p.gather(2, images.gather(1, orders)[..., None]).sum((1, 2)).exp())
        assert by_order[-1].sum().item() == pytest.approx(1, abs=1e-5)
    assert len(by_order) == 24
    assert (torch.stack(by_order).std(0) > 1e-4).any()  # an untrained model gives each order another distribution


def test_likelihood_matches_sampled_frequencies():
    """Sampling follows the same probabilities that the loss measures, along an order that is not raster."""
    V, T, N = 2, 3, 20000
    model = small_rar(V=V, T=T, std=0.2)
    order, images = torch.tensor([2, 0, 1]), torch.tensor(list(itertools.product(range(V), repeat=T)))
    orders, labels = order.expand(8, 3), torch.ones(8, dtype=torch.long)
    log_p = logits_of(model, images, labels, orders).log_softmax(-1)
    expected = log_p.gather(2, images.gather(1, orders)[..., None]).sum((1, 2)).exp()
    drawn = model.generate(torch.ones(N, dtype=torch.long), order=order, generator=seeded())
    found = torch.bincount(drawn @ torch.tensor([4, 2, 1]), minlength=8) / N
    assert (found - expected).abs().max() < 0.018  # five deviations at most
    assert (expected.view(2, 2, 2) - expected.view(2, 2, 2).permute(2, 1, 0)).abs().max() > 0.03  # not symmetric


# ---------------------------------------------------------------------------------------------------------------------
# guidance: classifier-free, power-cosine, Sec. 4.1; and the other knobs of sampling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, seq_len, scale, power, expected",
    [
        (0, 4, 3.0, 1.0, 1.0),  # cos 0 = 1
        (1, 4, 3.0, 1.0, 1.292893),  # 1 + 2 * (1 - cos 45 degrees) / 2
        (2, 4, 3.0, 1.0, 2.0),  # half way
        (3, 4, 3.0, 1.0, 2.707107),
        (0, 256, 16.0, 2.75, 1.0),
        (128, 256, 16.0, 2.75, 1.803078),  # 1 + 7.5 * (1 - cos(pi * 0.1486509))
        (4, 4, 16.0, 2.75, 16.0),
        (0, 4, 5.0, 0.0, 5.0),  # power 0 is constant, from the first step on
        (3, 4, 5.0, 0.0, 5.0),
        (3, 4, 1.0, 1.5, 1.0),  # scale 1 is none
    ],
)
def test_guidance_at_by_hand(step, seq_len, scale, power, expected):
    assert guidance_at(step, seq_len, scale, power) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_of_scale_1_does_not_run_the_null_branch(use_cache):
    model, rows = small_rar(), []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for scale, expected in ((1.0, 4), (2.0, 8)):
        model.generate(torch.tensor([0, 1, 2, 1]), guidance_scale=scale, guidance_power=1.0, use_cache=use_cache)
        assert rows == [expected] * 9
        rows.clear()


@ADALN
@pytest.mark.parametrize("K", [0, 4])
@pytest.mark.parametrize("scale, power", [(4.0, 0.0), (6.0, 1.5), (0.0, 0.0)])
def test_guidance_mixes_two_forward_passes(adaln, K, scale, power):
    """Near temperature 0 each token is the best of uncond + s_t * (cond - uncond), s_t of its place in the order."""
    model = small_rar(V=40, C=17, adaln=adaln)
    labels = torch.arange(17)
    prefix = torch.randint(40, (17, K), generator=seeded())
    options = dict(guidance_scale=scale, guidance_power=power, temperature=1e-5, order=SHUFFLED, prefix=prefix)
    tokens, orders = model.generate(labels, **options), SHUFFLED.expand(17, 9)
    cond = logits_of(model, tokens, labels, orders)
    null = logits_of(model, tokens, torch.full((17,), 17), orders)
    cosine = [(1 - math.cos(math.pi * (t / 9) ** power)) / 2 for t in range(9)]
    mixed = null + (1 + (scale - 1) * torch.tensor(cosine))[:, None] * (cond - null)
    assert tokens.gather(1, orders)[:, K:].equal(mixed.argmax(-1)[:, K:])
    assert not tokens.gather(1, orders)[:, K:].equal(cond.argmax(-1)[:, K:])


def test_guidance_temperature_divides_the_logits():
    N, model = 20000, small_rar(T=1, V=5, std=0.8)
    logits = logits_of(model, torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))[0, 0]
    for temperature in (0.5, 1.0, 2.0):
        drawn = model.generate(torch.ones(N, dtype=torch.long), temperature=temperature, generator=seeded())
        found = torch.bincount(drawn[:, 0], minlength=5) / N
        assert (found - (logits / temperature).softmax(0)).abs().max() < 0.018
    assert ((logits / 0.5).softmax(0) - (logits / 2).softmax(0)).abs().max() > 0.1  # so the three can be told apart


def test_guidance_top_k_keeps_the_likeliest():
    N, model = 5000, small_rar(T=1, V=8, std=0.8)
    logits = logits_of(model, torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))[0, 0]
    for k in (1, 3, 8):
        drawn = model.generate(torch.ones(N, dtype=torch.long), top_k=k, temperature=30.0, generator=seeded())
        assert set(drawn.flatten().tolist()) == set(logits.topk(k).indices.tolist())


def test_guidance_draw_never_takes_what_has_no_probability(monkeypatch):
    """At both ends of what torch.rand gives; the sum of the probabilities is seldom exactly 1."""
    logits = torch.randn(50, 40, generator=seeded()) * 3
    logits[:, [0, 7, 39]] = -math.inf
    for uniform in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=uniform, **_: torch.full(shape, u))
        for top_k in (None, 1, 5):
            drawn = rar.draw(logits, top_k, None)
            allowed = logits.isfinite() if top_k is None else logits >= logits.topk(top_k).values[:, -1:]
            assert drawn.shape == (50,) and allowed[torch.arange(50), drawn].all()
            assert uniform > 0 or drawn.equal(allowed.int().argmax(1))  # the first one in the table


def test_guidance_sampling_repeats_with_its_generator():
    model, labels = small_rar(), torch.arange(3).repeat(4)
    a, b, c = (model.generate(labels, guidance_scale=2.0, generator=seeded(s)) for s in (5, 5, 6))
    assert a.equal(b) and not a.equal(c)


# ---------------------------------------------------------------------------------------------------------------------
# cache: sampling step by step gives the numbers of a whole forward pass
# ---------------------------------------------------------------------------------------------------------------------


def streamed(model: RAR, tokens, labels, order, first: int, use_cache: bool) -> torch.Tensor:
    """Logits of steps first..T-1 one by one, each fed the true tokens before it."""
    ids = tokens.gather(1, order.expand_as(tokens))
    return torch.stack(list(model.stream_logits(ids, labels, order, first, use_cache)), 1)


@ADALN
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("first", [0, 1, 5, 8])
@torch.no_grad()
def test_cache_logits_are_those_of_forward(adaln, use_cache, first):
    model = small_rar(adaln=adaln)
    tokens, labels, _ = random_input(model)
    for order in (torch.arange(9), SHUFFLED):
        expected = model(tokens, labels, order.expand(5, 9))[:, first:]
        found = streamed(model, tokens, labels, order, first, use_cache)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [0, 7, 31, 32, 33])
@torch.no_grad()
def test_cache_logits_beyond_one_chunk_of_modulations(first):
    T = rar.MODULATION_CHUNK * 2 + 5
    model = small_rar(T=T)
    tokens, labels, orders = random_input(model, 3)
    expected = model(tokens, labels, orders[:1].expand(3, T))[:, first:]
    for use_cache in (True, False):
        found = streamed(model, tokens, labels, orders[0], first, use_cache)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (8,), (9,), (4, 2), (2, 1), (0,)])
@torch.no_grad()
def test_cache_linear_layers_of_few_rows(shape, mkl, monkeypatch):
    """Where a sampling step has few rows, weights are multiplied in slices: against the sums written out."""
    monkeypatch.setattr(rar.mkl, "is_available", lambda: mkl)
    for M in (512, 576, 600):  # from 2^19 weights on
        layer, x = rar.Linear(1024, M), torch.randn(*shape, 1024, generator=seeded())
        expected = (x[..., None, :].double() * layer.weight.double()).sum(-1) + layer.bias
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)
        assert layer.bfloat16()(x.bfloat16()).shape == expected.shape


def with_and_without_cache(model: RAR, K: int | None, **options) -> None:
    """Sampling draws the same tokens either way, in raster and in another order, after a prefix of K tokens."""
    labels, T = torch.tensor([0, 2, 3, 1]), model.config.seq_len
    options["prefix"] = None if K is None else torch.randint(7, (4, K), generator=seeded())
    for order in (None, torch.randperm(T, generator=seeded())):
        pair = [model.generate(labels, order=order, use_cache=u, generator=seeded(), **options) for u in (True, False)]
        assert pair[0].equal(pair[1]) and pair[0].shape == (4, T) and pair[0].dtype == torch.int64


@ADALN
@pytest.mark.parametrize("K", [None, 0, 1, 5, 8, 9])
def test_cache_draws_the_tokens_of_uncached_sampling(adaln, K):
    with_and_without_cache(small_rar(adaln=adaln), K)


@ADALN
@pytest.mark.parametrize("K, T", [(None, 9), (0, 9), (1, 9), (5, 9), (8, 9), (9, 9), (3, rar.MODULATION_CHUNK + 9)])
def test_guidance_draws_the_same_tokens_with_and_without_cache(adaln, K, T):
    with_and_without_cache(small_rar(T=T, adaln=adaln), K, guidance_scale=3.0, guidance_power=1.0)


def test_cache_feeds_one_element_a_step():
    """What a cache is for: after the first step a block sees one new element and no more."""
    model, lengths = small_rar(), []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.generate(torch.tensor([0]), prefix=torch.zeros(1, 3, dtype=torch.long))
    assert lengths == [5, 1, 1, 1, 1, 1]  # cls, class and three known tokens; then one by one
    lengths.clear()
    model.generate(torch.tensor([0]), use_cache=False)
    assert lengths == list(range(2, 11))


# ---------------------------------------------------------------------------------------------------------------------
# merge: both tables in one for a fixed order, Sec. 3.2
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
@pytest.mark.parametrize("order", [None, SHUFFLED], ids=["raster", "shuffled"])
def test_merge_leaves_outputs_as_they_are(adaln, order):
    model, merged = small_rar(adaln=adaln), small_rar(adaln=adaln)
    assert merged.merge_position_embeddings(order) is merged
    tokens, labels, _ = random_input(model)
    orders = None if order is None else order.expand(5, 9)
    before, after = logits_of(model, tokens, labels, orders), logits_of(merged, tokens, labels, orders)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


def test_merge_leaves_one_table_for_one_order():
    model, merged = small_rar(), small_rar().merge_position_embeddings()
    assert not merged.config.target_aware and "target_aware_pos_embed" not in merged.state_dict()
    RAR(merged.config).load_state_dict(merged.state_dict())  # the config says what is left
    tokens, labels, orders = random_input(model)
    changed = logits_of(model, tokens, labels, orders) - logits_of(merged, tokens, labels, orders)
    assert changed.abs().max() > 0.1  # another order than the merged one no longer makes sense


# ---------------------------------------------------------------------------------------------------------------------
# prefix: known tokens, which is all that inpainting needs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("K", [0, 1, 4, 8, 9])
def test_prefix_stays_in_its_places(K, use_cache):
    model, labels = small_rar(), torch.tensor([0, 1, 2])
    prefix = torch.randint(7, (3, K), generator=seeded())
    for order in (torch.arange(9), SHUFFLED):
        drawn = model.generate(labels, order=order, prefix=prefix, use_cache=use_cache, generator=seeded(1))
        assert drawn[:, order[:K]].equal(prefix)
        if K < 8:
            other = model.generate(labels, order=order, prefix=prefix, use_cache=use_cache, generator=seeded(2))
            assert not drawn.equal(other)  # the rest is drawn


def test_prefix_conditions_the_rest():
    """Near temperature 0 each token after the prefix is the best one given those before it."""
    model, labels = small_rar(V=30, C=17), torch.arange(17)
    prefix = torch.randint(30, (17, 4), generator=seeded())
    drawn = model.generate(labels, order=SHUFFLED, prefix=prefix, temperature=1e-5)
    best = logits_of(model, drawn, labels, SHUFFLED.expand(17, 9)).argmax(-1)
    assert drawn[:, SHUFFLED][:, 4:].equal(best[:, 4:])
    assert not drawn[:, SHUFFLED][:, 4:].equal(
        model.generate(labels, order=SHUFFLED, temperature=1e-5)[:, SHUFFLED][:, 4:]
    )


def test_prefix_order_of_inpainting_visits_known_cells_first():
    """Any mask, all and none included: what is known in raster order, then what is not, in raster order too."""
    for case in range(100):
        known = torch.rand(1 + 7 * case, generator=seeded(case)) < case % 5 / 4
        order, count = rar.inpainting_order(known)
        cells = range(len(known))
        assert order.tolist() == [i for i in cells if known[i]] + [i for i in cells if not known[i]]
        assert count == known.sum() and type(count) is int


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(prefix=torch.zeros(2, 10, dtype=torch.long)), "prefix"),
        (dict(prefix=torch.zeros(3, 4, dtype=torch.long)), "prefix"),
        (dict(prefix=torch.full((2, 4), 7)), "prefix"),
        (dict(prefix=torch.full((2, 4), -1)), "prefix"),
        (dict(order=torch.zeros(9, dtype=torch.long)), "permutation"),
        (dict(order=torch.arange(8)), "permutation"),
        (dict(order=torch.arange(1, 10)), "permutation"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=8), "top_k"),
    ],
)
def test_prefix_order_and_other_options_that_do_not_fit_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        small_rar().generate(torch.tensor([0, 1]), **options)


# ---------------------------------------------------------------------------------------------------------------------
# null_class: label C, whatever C is; and dropout, of labels and of activations
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
@pytest.mark.parametrize("C", [1, 3, 17])
def test_null_class_is_label_C_and_has_a_row_of_its_own(C, adaln):
    """Of the V + C + 2 rows, V codes, an unused mask and the classes stand before the null class, which is the last."""
    model = small_rar(C=C, adaln=adaln)
    assert model.embeddings.weight.shape[0] == 7 + C + 2
    labels = torch.arange(C + 1)
    tokens = torch.randint(7, (1, 9), generator=seeded()).expand(C + 1, 9)
    before = logits_of(model, tokens, labels)
    for label in range(C + 1):
        changed = small_rar(C=C, adaln=adaln)
        with torch.no_grad():
            changed.embeddings.weight[7 + 1 + label] += torch.linspace(-1, 1, 16)
        difference = (logits_of(changed, tokens, labels) - before).abs().amax((1, 2)) > 1e-4
        assert difference.nonzero().flatten().tolist() == [label]


@pytest.mark.parametrize("C", [1, 3, 17])
def test_null_class_is_what_guidance_leads_away_from(C):
    model = small_rar(C=C, V=30)
    null = torch.full((6,), C)
    a, b = (model.generate(null, guidance_scale=s, temperature=1e-5) for s in (1.0, 7.0))
    assert a.equal(b)  # cond and uncond are one
    last = torch.full((6,), C - 1)
    a, b = (model.generate(last, guidance_scale=s, temperature=1e-5) for s in (1.0, 7.0))
    assert not a.equal(b)  # class C - 1 is a class like any other


@pytest.mark.parametrize("C", [1, 3, 17])
def test_null_class_is_the_last_label(C):
    for label in (C + 1, -1):
        with pytest.raises(InputError, match=f"0..{C - 1}"):
            small_rar(C=C).generate(torch.tensor([0, label]))


def test_null_class_logits_do_not_depend_on_the_batch():
    """Modulations are shared between images of a class: alone or among many, an image gets the same logits."""
    model = small_rar()
    tokens, labels, orders = random_input(model, 12)
    together = logits_of(model, tokens, labels, orders)
    apart = torch.cat([logits_of(model, tokens[i, None], labels[i, None], orders[i, None]) for i in range(12)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_dropout_of_labels_has_the_right_rate():
    labels = torch.randint(17, (20000,), generator=seeded())
    kept = labels.clone()
    dropped = drop_labels(labels, 17, 0.1, generator=seeded())
    assert (dropped == 17).float().mean().item() == pytest.approx(0.1, abs=0.011)
    assert dropped[dropped != 17].equal(labels[dropped != 17]) and labels.equal(kept)
    assert drop_labels(labels, 17, 0.0).equal(labels) and (drop_labels(labels, 17, 1.0) == 17).all()


@pytest.mark.parametrize("option", ["dropout", "attn_dropout"])
def test_dropout_is_on_in_training_and_off_in_eval(option):
    model = small_rar(**{option: 0.5})
    tokens, labels, orders = random_input(model)
    expected = logits_of(small_rar(), tokens, labels, orders)
    assert logits_of(model, tokens, labels, orders).equal(expected)
    torch.manual_seed(0)
    model.train()
    assert (logits_of(model, tokens, labels, orders) - expected).abs().max() > 0.01


def test_dropout_of_zero_changes_nothing_in_training():
    model = small_rar().train()
    tokens, labels, orders = random_input(model)
    assert logits_of(model, tokens, labels, orders).equal(logits_of(model.eval(), tokens, labels, orders))


# ---------------------------------------------------------------------------------------------------------------------
# golden: what the authors' program computes; and a reference written from the formulas, one image at a time
# ---------------------------------------------------------------------------------------------------------------------


def golden_weights(module: nn.Module, scale: float) -> nn.Module:
    """The recipe behind the numbers below: each tensor a function of its name."""
    weights = {}
    for key, value in module.state_dict().items():
        w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape)) * scale
        weights[key] = torch.from_numpy((1 + w if key.endswith("weight") and w.ndim == 1 else w).astype(np.float32))
    module.load_state_dict(weights)
    return module.eval()


GOLDEN_IDS = [
    [12, 15, 21, 0, 3, 3, 7, 9, 19, 21, 18, 4, 23, 6, 12, 1],
    [6, 7, 23, 14, 17, 5, 13, 8, 9, 20, 19, 16, 19, 5, 15, 15],
    [0, 18, 3, 17, 19, 19, 19, 14, 7, 0, 1, 9, 0, 10, 20, 23],
]
GOLDEN_ORDERS = [
    [13, 8, 15, 3, 1, 10, 11, 6, 9, 5, 4, 14, 0, 2, 12, 7],
    [4, 11, 5, 0, 14, 2, 13, 6, 3, 9, 7, 12, 1, 8, 15, 10],
    [1, 2, 15, 0, 13, 3, 8, 7, 14, 6, 11, 4, 10, 9, 12, 5],
]
GOLDEN_CLASSES = [3, 3, 2]
GOLDEN_GREEDY = {  # guidance scale and power -> tokens at temperature 1e-5
    (3.0, 1.5): [
        [1, 14, 13, 14, 5, 11, 1, 13, 14, 19, 13, 4, 15, 20, 2, 2],
        [1, 14, 13, 14, 5, 11, 1, 13, 14, 19, 13, 4, 15, 20, 2, 2],
        [1, 19, 4, 19, 5, 4, 19, 19, 15, 18, 18, 4, 15, 19, 4, 19],
    ],
    (1.0, 0.0): [
        [1, 14, 13, 14, 5, 11, 1, 13, 13, 19, 13, 4, 15, 10, 21, 19],
        [1, 14, 13, 14, 5, 11, 1, 13, 13, 19, 13, 4, 15, 10, 21, 19],
        [1, 19, 4, 19, 5, 14, 19, 10, 13, 13, 13, 4, 4, 10, 19, 19],
    ],
}
# fmt: off
GOLDEN_ROWS = {  # (image, element): logits over the 24 codes
    "raster": {
        (0, 0): [
            -1.2601, 2.81487, -2.42931, -3.2379, -0.69649, 0.68209, -1.29407, -2.26727, -0.37998, 0.9976, 0.31261,
            -0.61474, -0.42939, 0.7428, -0.20362, -2.06981, -0.80167, -0.79908, -1.54317, 0.93993, -0.39983,
            -0.36701, 1.59967, -0.27204,
        ],
        (1, 7): [
            -1.52114, 0.49738, -0.51683, -2.2689, -0.93089, -2.03758, -1.61843, -0.95823, 0.42914, 0.49193, 1.41199,
            -0.03522, -0.61398, 1.24763, 0.11039, 0.47149, 0.73053, 0.42055, -0.40709, 2.01534, 1.39619, 0.01909,
            -1.08515, -1.64381,
        ],
        (2, 15): [
            -0.40932, 0.61907, -0.62494, -1.30684, 1.45309, -1.42748, 0.07783, -0.10122, 1.26039, -0.14593, 1.2992,
            -1.31201, -1.97688, 0.67636, -0.21968, -1.18282, -0.38026, 0.08954, 0.9755, 2.47995, -0.17007, -0.37836,
            -1.47328, -0.33596,
        ],
    },
    "permuted": {
        (0, 0): [
            -2.29863, 2.55202, -2.29524, -4.21251, 0.03525, 0.17903, -2.46583, -2.1478, 0.23022, -0.03306, 0.06572,
            -0.02556, 0.81865, 0.22354, -0.02262, -1.61664, 0.67564, -1.02669, -1.85679, 0.40349, 0.10097, -0.26203,
            0.5849, 0.4422,
        ],
        (1, 7): [
            -0.39049, 0.42487, -0.96456, -2.40569, 0.25989, -1.18878, 0.21131, 0.37278, -1.01187, -0.15174, 1.69701,
            0.68956, -1.19836, 1.29512, 0.1878, -0.83389, 0.79946, -1.6947, 0.46252, 1.07965, -0.69781, 0.46775,
            0.72254, -1.43786,
        ],
        (2, 15): [
            -0.18999, 1.23959, -2.93913, -1.21593, 0.69567, -1.89179, 0.15716, 1.07037, 0.36069, -2.13823, 0.22798,
            -0.86537, 0.37148, 1.44547, 0.04069, -1.40061, -0.38212, -0.54715, 0.17769, 0.3215, -0.79412, -0.88387,
            -0.71409, 0.65557,
        ],
    },
    "uncond": {
        (0, 0): [
            -2.60104, 2.26941, -3.63743, 0.25043, -0.48685, -0.57443, 0.1121, -0.70269, -0.78685, 0.33754, -0.00112,
            -1.25943, -0.72857, 1.86427, -1.26796, -0.00979, 1.8094, -0.20777, -2.70564, 1.23084, -1.57964, -2.06664,
            0.79766, 0.53215,
        ],
        (1, 9): [
            -0.39282, 0.80874, -2.53258, -0.6834, -1.76231, -2.06353, 0.0418, 0.7769, 0.63969, 1.55056, 0.03586,
            1.16233, -0.289, 2.81178, 0.40769, -1.31616, -0.69406, -0.10168, -1.01973, 0.16076, -0.46929, -1.34547,
            -0.7733, 1.8175,
        ],
    },
}
# fmt: on


@pytest.fixture(scope="module")
def golden_rar() -> RAR:
    return golden_weights(RAR(RARConfig(24, 5, 16, dim=32, depth=2, heads=4, mlp_dim=64)), 0.2)


@pytest.mark.parametrize("case", GOLDEN_ROWS)
def test_golden_logits(golden_rar, case):
    labels = torch.full((3,), 5) if case == "uncond" else torch.tensor(GOLDEN_CLASSES)
    orders = torch.tensor(GOLDEN_ORDERS) if case == "permuted" else None
    logits = logits_of(golden_rar, torch.tensor(GOLDEN_IDS), labels, orders)
    assert logits.shape == (3, 16, 24)
    for (image, element), row in GOLDEN_ROWS[case].items():
        torch.testing.assert_close(logits[image, element], torch.tensor(row), atol=1e-4, rtol=0)


def test_golden_losses(golden_rar):
    ids, labels, orders = torch.tensor(GOLDEN_IDS), torch.tensor(GOLDEN_CLASSES), torch.tensor(GOLDEN_ORDERS)
    raster = torch.arange(16).expand(3, 16)
    assert train_tiny.token_loss(golden_rar, ids, labels, raster).item() == pytest.approx(3.679205, abs=1e-4)
    assert train_tiny.token_loss(golden_rar, ids, labels, orders).item() == pytest.approx(3.652692, abs=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("guidance", GOLDEN_GREEDY)
def test_golden_greedy_tokens(golden_rar, guidance, use_cache):
    scale, power = guidance
    options = dict(guidance_scale=scale, guidance_power=power, temperature=1e-5, use_cache=use_cache)
    merged = copy.deepcopy(golden_rar).merge_position_embeddings()
    for model in (golden_rar, merged):
        assert model.generate(torch.tensor(GOLDEN_CLASSES), **options).tolist() == GOLDEN_GREEDY[guidance]


def test_golden_names_and_shapes_are_those_of_the_released_weights():
    shapes = {name: tuple(p.shape) for name, p in RAR(RARConfig(24, 5, 16, 32, 2, 4, 64)).state_dict().items()}
    expected = {"cls_token": (1, 1, 32), "embeddings.weight": (31, 32), "pos_embed": (1, 1040, 32)}
    expected |= {"target_aware_pos_embed": (1, 1040, 32), "timesteps_embeddings": (1, 116, 32)}
    expected |= {"lm_head.weight": (24, 32), "lm_head.bias": (24,)}
    expected |= {"adaln_before_head.adaLN_modulation.1.weight": (64, 32)}
    expected |= {"adaln_before_head.adaLN_modulation.1.bias": (64,)}
    for n in range(2):
        linear = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
        for name, shape in (linear | {"adaLN_modulation.1": (192, 32)}).items():
            expected |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
        for name, size in {"norm1": 32, "norm2": 32, "attn.q_norm": 8, "attn.k_norm": 8}.items():
            expected |= {f"blocks.{n}.{name}.weight": (size,), f"blocks.{n}.{name}.bias": (size,)}
    assert shapes == expected


@torch.no_grad()
def reference_logits(model: RAR, tokens: list[int], label: int, order: list[int]) -> torch.Tensor:
    """(T, V) for one image, from ../shared's description: element by element, head by head, a mask written out."""
    w, c = model.state_dict(), model.config
    T, V, D = c.seq_len, c.codebook_size, c.dim

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"] if name else x

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    class_row = w["embeddings.weight"][V + 1 + label]
    x = [w["cls_token"][0, 0] + w["pos_embed"][0, 0], class_row + w["pos_embed"][0, 1]]
    x += [w["embeddings.weight"][tokens[i]] + w["pos_embed"][0, 2 + i] for i in order[:-1]]
    if c.target_aware:
        x = [x[0]] + [x[1 + t] + w["target_aware_pos_embed"][0, 2 + order[t]] for t in range(T)]  # Eq. 4
    x = torch.stack(x)
    mask = torch.full((T + 1, T + 1), -math.inf).triu(1)
    shift1 = scale1 = shift2 = scale2 = 0.0
    gate1 = gate2 = 1.0
    condition = F.silu(class_row + w["timesteps_embeddings"][0, : T + 1]) if c.adaln else None
    for n in range(c.depth):
        block = f"blocks.{n}."
        if c.adaln:
            chunks = linear(condition, block + "adaLN_modulation.1").chunk(6, -1)
            shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        q, k, v = linear(norm(x, block + "norm1") * (1 + scale1) + shift1, block + "attn.qkv").chunk(3, -1)
        outputs = []
        for h in range(c.heads):
            part = slice(h * D // c.heads, (h + 1) * D // c.heads)
            qh, kh = norm(q[:, part], block + "attn.q_norm"), norm(k[:, part], block + "attn.k_norm")
            outputs.append((qh @ kh.T / math.sqrt(D // c.heads) + mask).softmax(-1) @ v[:, part])
        x = x + gate1 * linear(torch.cat(outputs, -1), block + "attn.proj")
        hidden = F.gelu(linear(norm(x, block + "norm2") * (1 + scale2) + shift2, block + "mlp.fc1"))
        x = x + gate2 * linear(hidden, block + "mlp.fc2")
    if c.adaln:
        scale, shift = linear(condition, "adaln_before_head.adaLN_modulation.1").chunk(2, -1)
        x = norm(x, "") * (1 + scale) + shift
    else:
        x = norm(x, "norm")
    return linear(x, "lm_head")[1:]


@ADALN
@pytest.mark.parametrize("target_aware", [True, False])
def test_golden_reference_by_the_formulas(adaln, target_aware):
    model = small_rar(adaln=adaln, target_aware=target_aware)
    tokens, labels, orders = random_input(model, 4)
    logits = logits_of(model, tokens, labels, orders)
    for b in range(4):
        expected = reference_logits(model, tokens[b].tolist(), labels[b].item(), orders[b].tolist())
        torch.testing.assert_close(logits[b], expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def golden_tokenizer() -> VQTokenizer:
    config = VQConfig(16, 20, 16, 32, (1, 1, 2), res_blocks=2, groups=32, released_shortcut=True)
    return golden_weights(VQTokenizer(config), 0.1)


@torch.no_grad()
def test_golden_tokenizer(golden_tokenizer):
    images = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 16, 16)).float()
    h, tokens = golden_tokenizer.encoder(images), golden_tokenizer.encode(images)
    assert tokens.tolist() == [
        [7, 5, 15, 14, 12, 1, 1, 14, 5, 7, 15, 3, 1, 11, 9, 9],
        [9, 16, 15, 17, 12, 12, 1, 15, 16, 16, 9, 16, 1, 17, 19, 5],
    ]
    codes = golden_tokenizer.quantize.lookup(tokens, 4)
    raw, close = golden_tokenizer.decoder(codes), dict(atol=1e-4, rtol=0)
    expected = [-0.27659, 0.36225, 0.0292, -0.27884, -0.32156, 0.42846]
    torch.testing.assert_close(h[0, :6, 0, 0], torch.tensor(expected), **close)
    expected = [0.47474, -0.24782, 0.28354, 0.38883, -0.24889, -0.07991]
    torch.testing.assert_close(h[1, :6, 3, 2], torch.tensor(expected), **close)
    torch.testing.assert_close(raw[0, :, 0, 0], torch.tensor([0.68455, 0.40799, -0.5106]), **close)
    torch.testing.assert_close(raw[1, :, 15, 5], torch.tensor([-0.59774, 0.71535, -0.61121]), **close)
    torch.testing.assert_close(golden_tokenizer.decode(tokens), raw.clamp(0, 1))
    torch.testing.assert_close(raw[0, :, 7, 9], torch.tensor([1.1451, 1.52055, 1.55167]), **close)


# ---------------------------------------------------------------------------------------------------------------------
# parameter_counts: Tab. 1
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth, dim, mlp_dim, millions",
    [(24, 768, 3072, 261), (24, 1024, 4096, 461), (32, 1280, 5120, 955), (40, 1408, 6144, 1499)],
)
def test_parameter_counts_of_table_1(depth, dim, mlp_dim, millions):
    with torch.device("meta"):  # sizes without memory
        model = RAR(RARConfig(1024, 1000, 256, dim, depth, 16, mlp_dim))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < 0.7  # Tab. 1 rounds RAR-B up (260.9) and RAR-L down (461.7)


# ---------------------------------------------------------------------------------------------------------------------
# worked_example: what `python rar.py` prints beside Fig. 3
# ---------------------------------------------------------------------------------------------------------------------


def test_worked_example_holds_together():
    """Each line predicts what the next one takes in, at the place its target-aware embedding names."""
    text = rar.worked_example()
    layout = [int(v) for v in re.search(r"raster layout: \[(.*?)\]", text)[1].split(",")]
    order = [int(v) for v in re.search(r"order drawn: \[(.*?)\]", text)[1].split(",")]
    assert sorted(order) == [0, 1, 2, 3] and f"{random_ratio(60, 50, 75):.2f}" in text
    rows = text.splitlines()[-5:]
    assert "nothing" in rows[0] and "cls" in rows[0]
    for t, row in enumerate(rows[1:]):
        assert f"q[{order[t]}]" in row and row.endswith(f"token {layout[order[t]]} at {order[t]}")
        if t:
            assert f"token {layout[order[t - 1]]} " in row and f" p[{order[t - 1]}] " in row


# ---------------------------------------------------------------------------------------------------------------------
# vq: the tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def small_vq(seed: int = 0, **options) -> VQTokenizer:
    sizes = dict(image_size=8, codebook_size=12, code_dim=4, channels=8, multipliers=(1, 2), groups=4)
    return fill(VQTokenizer(VQConfig(**sizes | options)), 0.3, seed)


def test_vq_nearest_code_is_that_of_brute_force():
    model = small_vq(codebook_size=40)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(torch.linspace(0.2, 5, 40)[:, None])  # so that norms matter
    z = torch.randn(500, 4, generator=seeded())
    distance = (z[:, None] - model.quantize.embedding.weight[None]).square().sum(-1)  # (500, 40)
    assert model.quantize.nearest(z).equal(distance.argmin(1))


def test_vq_round_trip_of_codes():
    """A code is its own nearest code, and tokens are laid out in row-major order on the way in and out."""
    model, tokens = small_vq(), torch.randint(12, (3, 16), generator=seeded())
    codes = model.quantize.lookup(tokens, 4)
    assert codes.shape == (3, 4, 4, 4)
    assert codes[1, :, 2, 3].equal(model.quantize.embedding.weight[tokens[1, 2 * 4 + 3]])
    assert model.quantize(codes)[1].equal(tokens)


@torch.no_grad()
def test_vq_round_trip_of_images():
    model, images = small_vq(), torch.rand(3, 3, 8, 8, generator=seeded())
    tokens = model.encode(images)
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    reconstruction, losses = model(images)
    torch.testing.assert_close(decoded, reconstruction.clamp(0, 1))
    assert losses["reconstruction"].item() == pytest.approx((reconstruction - images).square().mean().item(), rel=1e-5)


def test_vq_straight_through_gradient_is_the_identity():
    model = small_vq()
    latents = torch.randn(2, 4, 4, 4, generator=seeded(), requires_grad=True)
    codes, tokens = model.quantize(latents)
    torch.testing.assert_close(codes, model.quantize.lookup(tokens, 4), atol=1e-6, rtol=0)  # forwards: the codes
    weights = torch.randn(codes.shape, generator=seeded(1))
    (codes * weights).sum().backward()
    assert latents.grad.equal(weights)  # backwards: as if nothing had happened


def test_vq_commitment_pulls_the_encoder_and_not_the_codebook():
    model, images = small_vq(), torch.rand(3, 3, 8, 8, generator=seeded())
    _, losses = model(images)
    latents = model.encoder(images)
    codes = model.quantize.lookup(model.encode(images), 4)
    assert losses["commitment"].item() == pytest.approx((latents - codes).square().mean().item(), rel=1e-4)
    losses["commitment"].backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.quantize.embedding.weight.grad is None
    assert model.decoder.conv_out.weight.grad is None


def test_vq_reconstruction_loss_reaches_the_encoder_through_the_codes():
    model = small_vq()
    model(torch.rand(2, 3, 8, 8, generator=seeded()))[1]["reconstruction"].backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0 and model.decoder.conv_in.weight.grad.abs().max() > 0


@torch.no_grad()
def test_vq_hands_each_batch_to_the_codebook_it_is_given():
    model, images, handed = small_vq(), torch.rand(3, 3, 8, 8, generator=seeded()), []
    before = model.quantize.embedding.weight.clone()
    model(images, SimpleNamespace(update=lambda *args: handed.append(args)))
    assert model.quantize.embedding.weight.equal(before)  # nothing else moves the codes
    (codes, latents, tokens), expected = handed[0], model.encoder(images)
    assert codes is model.quantize.embedding.weight and tokens.equal(model.encode(images).flatten())
    assert latents[17].equal(expected[1, :, 0, 1])  # rows of the second image's sixteen follow those of the first


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (3, 8, 8), (2, 3, 8, 4)])
def test_vq_images_of_another_size_are_refused(shape):
    with pytest.raises(InputError, match="8"):
        small_vq().encode(torch.zeros(shape))
    with pytest.raises(InputError, match="multiple"):
        VQConfig(image_size=30)


# ---------------------------------------------------------------------------------------------------------------------
# codebook: moving averages, start, revival, use; tokenizer: all of it together
# ---------------------------------------------------------------------------------------------------------------------


def test_codebook_moving_average_by_hand():
    codes = torch.tensor([[1.0], [2.0]])
    ema = CodebookEMA(torch.tensor([2.0, 4.0]), torch.tensor([[2.0], [8.0]]), decay=0.5)
    ema.update(codes, latents=torch.tensor([[3.0], [5.0], [1.0]]), tokens=torch.tensor([0, 0, 1]))
    # the fair share is 1.5 latents a code: 2 and 1 of them count 4/3 and 2/3, their sums 8 and 1 count 16/3 and 2/3
    assert ema.counts.tolist() == pytest.approx([5 / 3, 7 / 3])  # (2 + 4/3) / 2, (4 + 2/3) / 2
    assert ema.sums.flatten().tolist() == pytest.approx([11 / 3, 13 / 3])  # (2 + 16/3) / 2, (8 + 2/3) / 2
    assert codes.flatten().tolist() == pytest.approx([11 / 5, 13 / 7])  # sums over counts


def test_codebook_follows_latents_to_their_mean():
    """Whatever the share of a code in a batch, it goes to the mean of its latents, and slowly."""
    codes = torch.tensor([[0.0], [10.0]])
    ema = CodebookEMA(torch.ones(2), codes.clone(), decay=0.9)
    latents, tokens = torch.tensor([[1.0], [2.0], [3.0], [12.0]]), torch.tensor([0, 0, 0, 1])
    ema.update(codes, latents, tokens)
    assert 0 < codes[0] < 1 and 10 < codes[1] < 11
    for _ in range(200):
        ema.update(codes, latents, tokens)
    assert codes.flatten().tolist() == pytest.approx([2.0, 12.0], abs=1e-3)


def test_codebook_revives_dead_codes_from_latents():
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]])
    ema = CodebookEMA(torch.tensor([4.0, 4.0, 0.001]), codes * torch.tensor([[4.0], [4.0], [0.001]]), decay=0.9)
    latents = torch.tensor([[0.25, 0.0], [1.0, 1.25], [0.0, 0.5]])
    ema.update(codes, latents, torch.tensor([0, 1, 0]))
    assert (codes[2] - latents).abs().amax(1).min() < 1e-5  # the third, which none chose, is now a real latent
    assert ema.counts[2] == 1  # and counts as alive, so that it is not revived again at once
    assert codes[:2].abs().max() < 1.3 and (codes[:2] - torch.tensor([[0.0, 0.0], [1.0, 1.0]])).abs().max() < 0.1


def test_codebook_in_use_is_not_revived():
    codes = torch.arange(8.0)[:, None].clone()
    ema = CodebookEMA(torch.ones(8), codes.clone(), decay=0.9)
    ema.update(codes, torch.arange(7.0)[:, None], torch.arange(7))  # the last one is merely unlucky in this batch
    assert codes.flatten().tolist() == pytest.approx(list(range(8)), abs=1e-5)


def test_codebook_starts_from_the_data():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, 0.0], [0.0, -9.0]])
    latents = (centres + 0.1 * torch.randn(200, 4, 2, generator=seeded())).view(-1, 2)
    model = small_vq(codebook_size=4, code_dim=2)
    codebook = CodebookEMA.from_latents(model.quantize, latents)
    codes = model.quantize.embedding.weight.detach()
    assert torch.cdist(codes, centres).min(0).values.max() < 0.1  # each cluster has a code at its centre
    torch.testing.assert_close(codebook.sums / codebook.counts[:, None], codes)
    for rounds in (0, 10):  # fewer latents than codes; before any averaging, codes are latents
        model = small_vq(codebook_size=40, code_dim=2)
        CodebookEMA.from_latents(model.quantize, latents[:12], rounds=rounds)
        assert torch.cdist(model.quantize.embedding.weight, latents[:12]).min(1).values.max() < 0.5


def test_codebook_use_is_counted():
    assert codes_used(torch.tensor([[0, 3, 3], [0, 0, 7]]), 12) == pytest.approx(3 / 12)
    assert codes_used(torch.arange(12), 12) == 1


def test_tokenizer_learns_an_image():
    """A few steps on a few images bring the error of quantized images far below that of their mean colour."""
    torch.manual_seed(0)
    model = VQTokenizer(VQConfig(image_size=8, codebook_size=16, code_dim=4, channels=8, multipliers=(1, 2)))
    corners = torch.rand(8, 3, 2, 2, generator=seeded())
    images = F.interpolate(corners, scale_factor=4.0)
    optimizer, codebook = torch.optim.AdamW(model.parameters()), None
    for step in range(100):
        if step == 50:  # until then a plain autoencoder
            codebook = CodebookEMA.from_latents(model.quantize, tokenizer.as_rows(model.encoder(images).detach()))
        _, losses = model(images, codebook, quantize=codebook is not None)
        train_tiny.update(model, optimizer, losses["reconstruction"] + 0.25 * losses["commitment"], 1e-2)
    error = (model.decode(model.encode(images)) - images).square().mean()
    assert error < 0.35 * (images - images.mean((2, 3), keepdim=True)).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# schedule: pure functions of the step, Sec. 4.1
# ---------------------------------------------------------------------------------------------------------------------


def test_schedule_of_the_learning_rate():
    lr = [train_tiny.learning_rate(s, 400, 4e-4, 0.25) for s in range(401)]
    assert 0 < lr[0] < 0.02 * 4e-4 and np.allclose(np.diff(lr[:100]), lr[0], rtol=0.02)  # linear, from the bottom
    assert lr[100] == pytest.approx(4e-4) == max(lr)
    assert lr[250] == pytest.approx((4e-4 + 1e-5) / 2)  # half way down the cosine
    assert lr[400] == pytest.approx(1e-5) and (np.diff(lr[100:]) < 0).all()
    assert train_tiny.learning_rate(0, 10, 1.0, 0.0) == pytest.approx(1)  # no warm-up


def test_schedule_clips_the_gradient_norm_at_one():
    for factor, expected in ((1e4, 1.0), (1e-6, None)):
        model = nn.Linear(3, 2)
        optimizer = train_tiny.adamw(model, 0.03)
        loss = factor * model(torch.ones(4, 3)).sum()
        unclipped = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        train_tiny.update(model, optimizer, loss, 0.5)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(expected or torch.cat([g.flatten() for g in unclipped]).norm().item(), rel=1e-3)
        assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


def test_schedule_update_goes_downhill_and_forgets_old_gradients():
    model = nn.Linear(1, 1, bias=False)
    optimizer = train_tiny.adamw(model, 0.0)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(2):
        train_tiny.update(model, optimizer, 0.1 * model.weight.sum(), 0.01)
        assert model.weight.grad.item() == pytest.approx(0.1)
    assert model.weight.item() == pytest.approx(0.98, abs=1e-4)  # two AdamW steps of 0.01


@ADALN
def test_schedule_weight_decay_is_on_matrices_alone(adaln):
    model = small_rar(adaln=adaln)
    optimizer = train_tiny.adamw(model, 0.03)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(group["betas"] == (0.9, 0.96) for group in optimizer.param_groups)
    for name, p in model.named_parameters():
        plain = p.dim() == 1 or "embed" in name or name == "cls_token"
        assert decay.pop(id(p)) == (0.0 if plain else 0.03), name
    assert not decay


def test_schedule_of_batches_visits_every_sample_once_an_epoch():
    """Whatever the sizes: a batch may span two epochs, or be larger than the data."""
    rng = random.Random(0)
    for seed in range(100):
        count, size = rng.randrange(1, 40), rng.randrange(1, 60)
        batches = [train_tiny.batch_indices(s, size, count, seed) for s in range(4 * count)]
        epochs = np.concatenate(batches).reshape(4 * size, count)
        assert {len(b) for b in batches} == {size} and (np.sort(epochs, 1) == np.arange(count)).all()
        if count > 12:  # then chance does not repeat an order
            orders = {tuple(train_tiny.batch_indices(0, count, count, s)) for s in (seed, seed + 1)}
            assert len(orders) == 2 and len({tuple(e) for e in epochs}) == len(epochs)


def test_schedule_seeds_a_step_by_seed_stage_and_number():
    draws = []
    for key in [(0, "rar", 5), (0, "rar", 5), (1, "rar", 5), (0, "tokenizer", 5), (0, "rar", 6)]:
        train_tiny.seed_step(*key)
        draws.append(tuple(torch.rand(4).tolist()))
    assert draws[0] == draws[1] and len(set(draws)) == 4


@pytest.mark.parametrize("order, window", [("rar", (20, 60)), ("raster", (0, 0)), ("random", (80, 80))])
def test_schedule_of_annealing_is_a_fraction_of_training(order, window):
    options = dict(order=order, steps=80, anneal_start=0.25, anneal_end=0.75)
    assert tuple(train_tiny.anneal_window(options)) == window


# ---------------------------------------------------------------------------------------------------------------------
# data: every reader on tiny files written here
# ---------------------------------------------------------------------------------------------------------------------


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def planar(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def test_data_digits():
    images, labels, names = train_tiny.load_images("digits", "val")
    assert images.shape == (len(labels), 32, 32, 3) and images.dtype == np.uint8 and names == [*"0123456789"]
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), len(labels) // 10)
    assert (train_tiny.load_images("digits", "val")[0] == images).all()  # the same each time
    corner = images[:, 0, 0].astype(int)
    assert corner.max() < 40 and images.max((1, 2, 3)).min() > 150  # bright on near-black
    assert len({i.tobytes() for i in images}) > 0.99 * len(images)
    mean = np.stack([images[labels == c].max(3).mean(0) for c in range(10)])  # classes do not look alike
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(mean, 2)) > 3


def test_data_digits_of_training_are_not_those_of_validation(monkeypatch):
    val = {i.tobytes() for i in train_tiny.load_images("digits", "val")[0]}
    chunk = next(iter(train_tiny.open_source("digits", "train").chunks()))
    assert not val & {i.tobytes() for i in chunk} and len(chunk) > 1000


def write_cifar10(folder: Path, per_batch: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        images = noise(per_batch, 32, seed=i)
        labels = np.random.default_rng(i).integers(0, 10, per_batch).astype(np.uint8)
        (folder / name).write_bytes(np.concatenate([labels[:, None], planar(images)], 1).tobytes())
        written[name] = images, labels
    return written


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_data_cifar10(tmp_path, below):
    written = write_cifar10(tmp_path / below)
    images, labels, names = train_tiny.load_images("cifar10", "train", tmp_path)
    batches = [written[f"data_batch_{i}.bin"] for i in range(1, 6)]
    assert (images == np.concatenate([b[0] for b in batches])).all()
    assert labels.tolist() == np.concatenate([b[1] for b in batches]).tolist()
    assert names[0] == "airplane" and names[9] == "truck" and len(names) == 10
    images, labels, _ = train_tiny.load_images("cifar10", "val", tmp_path)
    assert (images == written["test_batch.bin"][0]).all() and (labels == written["test_batch.bin"][1]).all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "label"])
def test_data_cifar10_damaged(tmp_path, damage):
    write_cifar10(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    raw = file.read_bytes()
    file.write_bytes({"truncated": raw[:-5], "empty": b"", "label": b"\x0a" + raw[1:]}[damage])
    with pytest.raises(InputError, match="data_batch_3"):
        train_tiny.load_images("cifar10", "train", tmp_path)


def tar_member(tar: tarfile.TarFile, name: str, size: int, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(b"\x01" * size) if info.isfile() else None)


def test_data_cifar10_archive_is_unpacked_safely(tmp_path):
    """Only the six batches come out, as plain files of the right size, whatever else the archive names."""
    bad = {
        "short": dict(size=3073),
        "link": dict(size=0, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "other": dict(size=0, type=tarfile.DIRTYPE),
        "backwards": dict(size=-1024, type=tarfile.DIRTYPE),  # tarfile itself would go round in circles
    }
    for case, fields in bad.items():
        folder = tmp_path / case
        folder.mkdir()
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            tar_member(tar, "../escaped.bin", 10)
            for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
                tar_member(tar, f"cifar-10-batches-bin/{name}.bin", **fields)
        with pytest.raises(InputError):
            train_tiny.load_images("cifar10", "train", folder)
        assert not (tmp_path / "escaped.bin").exists() and not list(folder.rglob("*.bin"))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b not an archive")
    with pytest.raises(InputError, match="damaged"):
        train_tiny.load_images("cifar10", "train", tmp_path)


def test_data_cifar10_archive_gives_whole_batches(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
            tar_member(tar, f"cifar-10-batches-bin/{name}.bin", 10000 * 3073)
        tar_member(tar, "cifar-10-batches-bin/readme.html", 10)
    source = train_tiny.open_source("cifar10", "val", tmp_path)
    assert len(source.labels) == 10000 and (source.labels == 1).all()
    assert sorted(f.name for f in (tmp_path / "cifar-10-batches-bin").iterdir())[-1] == "test_batch.bin"


def write_imagenet64(folder: Path, train: list[list[int]], val: list[int], side: int = 8) -> dict[str, np.ndarray]:
    written = {}
    named = [(f"train_data_batch_{i}.npz", labels) for i, labels in enumerate(train, 1)] + [("val_data.npz", val)]
    for i, (name, labels) in enumerate(named):
        written[name] = noise(len(labels), side, seed=i)
        np.savez(folder / name, data=planar(written[name]), labels=np.array(labels))
    return written


def test_data_imagenet64_labels_have_no_gaps(tmp_path):
    """Labels count from 1 and here skip most classes; validation images of classes never trained are left out."""
    written = write_imagenet64(tmp_path, [[7, 2, 2, 1000], [9, 7]], [2, 5, 9, 1000])
    images, labels, names = train_tiny.load_images("imagenet64", "train", tmp_path, 8)
    assert labels.tolist() == [1, 0, 0, 3, 2, 1] and names == ["label-2", "label-7", "label-9", "label-1000"]
    assert (images == np.concatenate([written["train_data_batch_1.npz"], written["train_data_batch_2.npz"]])).all()
    images, labels, names = train_tiny.load_images("imagenet64", "val", tmp_path, 8)
    assert labels.tolist() == [0, 2, 3] and len(names) == 4
    assert (images == written["val_data.npz"][[0, 2, 3]]).all()


def test_data_imagenet64_is_streamed(tmp_path):
    """However the rows fall into chunks, they are the same rows, and no chunk is larger than asked for."""
    written = write_imagenet64(tmp_path, [[1, 2, 3, 1, 2, 3, 1], [2, 2]], [4, 1, 4, 2, 4, 3])
    expected = np.concatenate([written["train_data_batch_1.npz"], written["train_data_batch_2.npz"]])
    for rows in (1, 3, 7, 100):
        chunks = list(train_tiny.imagenet64("train", tmp_path, 8, rows).chunks())
        assert max(map(len, chunks)) <= rows and (np.concatenate(chunks) == expected).all()
        val = train_tiny.imagenet64("val", tmp_path, 8, rows)
        assert (np.concatenate(list(val.chunks())) == written["val_data.npz"][[1, 3, 5]]).all()
        assert val.labels.tolist() == [0, 1, 2]


IMAGENET64_DAMAGES = ["truncated", "no labels", "other size", "pickled", "no val", "float", "nan", "short", "bomb"]


@pytest.mark.parametrize("damage", IMAGENET64_DAMAGES)
def test_data_imagenet64_damaged(tmp_path, damage):
    write_imagenet64(tmp_path, [[1, 2], [2, 1]], [1])
    file, size = tmp_path / "train_data_batch_2.npz", 8
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "no labels":
        np.savez(file, data=planar(noise(2, 8)))
    elif damage == "pickled":
        np.savez(file, data=planar(noise(2, 8)), labels=np.array([1, {}], dtype=object))
    elif damage == "float":
        np.savez(file, data=planar(noise(2, 8)).astype(np.float32), labels=[1, 2])
    elif damage == "nan":
        np.savez(file, data=planar(noise(2, 8)), labels=np.array([1, np.nan]))
    elif damage == "short":  # fewer rows than it says, and a checksum that is right
        npy = io.BytesIO()
        np.save(npy, planar(noise(2, 8)))
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.npy", npy.getvalue()[:-192])
            np.save(archive.open("labels.npy", "w"), np.array([1, 2]))
    elif damage == "bomb":
        np.savez_compressed(file, data=planar(noise(2, 8)), labels=np.zeros(1 << 24, int))
    elif damage == "no val":
        (tmp_path / "val_data.npz").unlink()
    else:
        size = 16
    with pytest.raises(InputError, match="val_data" if damage == "no val" else "train_data_batch"):
        train_tiny.load_images("imagenet64", "val" if damage == "no val" else "train", tmp_path, size)


def plain(path: Path, colour, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_data_folder_with_val(tmp_path):
    plain(tmp_path / "train" / "red" / "a.png", (255, 0, 0))
    plain(tmp_path / "train" / "blue" / "b.gif", (0, 0, 255), mode="RGB")
    plain(tmp_path / "train" / "red" / "c.png", (255, 0, 0, 255), mode="RGBA")
    plain(tmp_path / "train" / "grey" / "d.png", 99, mode="L")
    plain(tmp_path / "val" / "red" / "e.bmp", (250, 0, 0))
    images, labels, names = train_tiny.load_images("folder", "train", tmp_path, 8)
    assert names == ["blue", "grey", "red"] and labels.tolist() == [0, 1, 2, 2] and images.shape == (4, 8, 8, 3)
    assert [i[4, 4].tolist() for i in images] == [[0, 0, 255], [99, 99, 99], [255, 0, 0], [255, 0, 0]]
    images, labels, names = train_tiny.load_images("folder", "val", tmp_path, 8)
    assert labels.tolist() == [2] and images[0, 0, 0].tolist() == [250, 0, 0] and len(names) == 3


def test_data_folder_without_val_holds_some_back(tmp_path):
    for i in range(25):
        plain(tmp_path / "train" / "a" / f"{i:02}.png", (i, 0, 0))
        plain(tmp_path / "train" / "b" / f"{i:02}.png", (0, i, 0))
    seen = {}
    for split in ("train", "val"):
        images, labels, _ = train_tiny.load_images("folder", split, tmp_path, 8)
        seen[split] = {(int(c), *p) for c, p in zip(labels, images[:, 0, 0].tolist())}
        assert set(labels.tolist()) == {0, 1} and len(seen[split]) == len(labels)
    assert not seen["train"] & seen["val"] and len(seen["train"]) + len(seen["val"]) == 50
    assert len(seen["val"]) == 4  # every tenth


def test_data_folder_resizes_and_crops_the_centre(tmp_path):
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 255, 0), (8, 0, 32, 20))  # the centre square is 10..30; the ends are red
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture.save(tmp_path / "train" / "a" / "wide.png")
    images, _, _ = train_tiny.load_images("folder", "train", tmp_path, 8)
    assert (np.abs(images[0].astype(int) - [0, 255, 0]) < 12).all()


def test_data_folder_names_an_unreadable_image(tmp_path):
    plain(tmp_path / "train" / "a" / "good.png", (1, 2, 3))
    (tmp_path / "train" / "a" / "broken.png").write_bytes((tmp_path / "train/a/good.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"broken\.png"):
        train_tiny.load_images("folder", "train", tmp_path, 8)


def test_data_folder_refuses_what_fills_the_memory_or_runs_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    for content in (postscript, b"P5 13000 13000 255\n"):  # Pillow starts Ghostscript; Pillow only warns
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.png.*(Ghostscript|169000000)"):
            train_tiny.read_image(tmp_path / "x.png", 8)


@pytest.mark.parametrize("name, split", [("mnist", "train"), ("digits", "test")])
def test_data_unknown_names_are_refused(name, split):
    with pytest.raises(InputError, match="digits"):
        train_tiny.load_images(name, split)


def test_data_pixels_survive_the_way_to_floats_and_back():
    images = noise(3, 8)
    floats = train_tiny.to_float(images, torch.device("cpu"))
    assert floats.shape == (3, 3, 8, 8) and floats.max() <= 1
    assert floats[1, 2, 3, 4].item() == pytest.approx(images[1, 3, 4, 2] / 255)
    assert (train_tiny.to_uint8(floats) == images).all()


# ---------------------------------------------------------------------------------------------------------------------
# download: from a server of our own on 127.0.0.1
# ---------------------------------------------------------------------------------------------------------------------

PAYLOAD = bytes(range(256)) * 3000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files; may break off half way through the first answers, know no ranges, send elsewhere, state hashes."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.redirects and not self.path.startswith("/elsewhere/"):
            self.answer(302, Location="/elsewhere" + self.path)
            return
        content = self.server.files.get(self.path.removeprefix("/elsewhere"))
        if content is None:
            self.answer(404)
            return
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        first = int(asked.split("=")[1].rstrip("-")) if asked and self.server.ranges else 0
        if first >= len(content):
            self.answer(416)
            return
        body = content[first:]
        self.answer(206 if first else 200, Content_Length=len(body))
        breaks = len(self.server.asked) <= self.server.breaks
        self.wfile.write(body[: len(body) // 2] if breaks else body)

    def answer(self, status: int, **headers: object) -> None:
        self.send_response(status)
        if self.path in self.server.stated:  # not on the second answer after a redirect, as Hugging Face does
            headers["X_Linked_ETag"] = self.server.stated[self.path]
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked, served.breaks, served.ranges = [], 0, True
    served.paths, served.files, served.redirects, served.stated = [], {"/file.bin": PAYLOAD}, False, {}
    served.url = f"http://127.0.0.1:{served.server_port}/file.bin"
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


MD5 = hashlib.md5(PAYLOAD).hexdigest()


def test_download_plain(server, tmp_path):
    train_tiny.download(server.url, tmp_path / "new" / "file.bin", MD5)
    assert (tmp_path / "new" / "file.bin").read_bytes() == PAYLOAD and server.asked == [None]
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["file.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_break(server, tmp_path, ranges):
    server.breaks, server.ranges = 1, ranges
    train_tiny.download(server.url, tmp_path / "file.bin", MD5)
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD  # also where the server starts again from the beginning
    assert server.asked == [None, f"bytes={len(PAYLOAD) // 2}-"]


def test_download_goes_on_in_another_run(server, tmp_path):
    for have in (1000, len(PAYLOAD)):
        (tmp_path / "file.bin.part").write_bytes(PAYLOAD[:have])
        train_tiny.download(server.url, tmp_path / "file.bin", MD5)
        assert (tmp_path / "file.bin").read_bytes() == PAYLOAD and server.asked[-1] == f"bytes={have}-"


def test_download_of_something_else_is_refused(server, tmp_path):
    with pytest.raises(InputError, match="md5"):
        train_tiny.download(server.url, tmp_path / "file.bin", "0" * 32)
    assert not list(tmp_path.iterdir())  # neither under its name nor as a part that the next run would trust


def test_download_without_a_server_is_refused(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="cannot be fetched"):
        train_tiny.download(server.url, tmp_path / "file.bin", MD5, tries=1)
    assert not (tmp_path / "file.bin").exists()


SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
REDIRECTS = pytest.mark.parametrize("redirects", [True, False], ids=["redirected", "direct"])


@REDIRECTS
def test_download_of_what_the_server_states_is_accepted(server, tmp_path, redirects):
    server.redirects, server.stated = redirects, {"/file.bin": f'"{SHA256}"'}
    train_tiny.download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD and [f.name for f in tmp_path.iterdir()] == ["file.bin"]
    assert server.paths == ["/file.bin", "/elsewhere/file.bin"][: 1 + redirects]


@REDIRECTS
def test_download_of_something_else_than_the_server_states_is_refused(server, tmp_path, redirects):
    server.redirects, server.stated = redirects, {"/file.bin": f'"{SHA256}"'}
    server.files["/file.bin"] = PAYLOAD[:-1] + b"x"  # of the right length: only the hash can tell
    with pytest.raises(InputError, match=f"sha256.*{SHA256}"):
        train_tiny.download(server.url, tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_break_through_a_redirect(server, tmp_path, ranges):
    server.redirects, server.stated, server.breaks, server.ranges = True, {"/file.bin": f'"{SHA256}"'}, 1, ranges
    train_tiny.download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert server.asked == [None, f"bytes={len(PAYLOAD) // 2}-"]  # the redirect hands the range on
    assert server.paths == ["/file.bin", "/elsewhere/file.bin"] * 2


@pytest.mark.parametrize("have", [1000, len(PAYLOAD)], ids=["some", "all"])
def test_download_goes_on_from_a_wrong_part_once_and_then_anew(server, tmp_path, have):
    """What lies there from another file is found out by the hash, also where the server has nothing to add."""
    server.redirects, server.stated = True, {"/file.bin": f'"{SHA256}"'}
    (tmp_path / "file.bin.part").write_bytes(bytes(have))
    with pytest.raises(InputError, match="sha256"):
        train_tiny.download(server.url, tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())
    train_tiny.download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD and server.asked == [f"bytes={have}-", None]


@REDIRECTS
def test_download_of_too_little_is_refused_and_kept_to_go_on(server, tmp_path, redirects):
    server.redirects, server.breaks = redirects, 2
    with pytest.raises(InputError, match="broke off"):
        train_tiny.download(server.url, tmp_path / "file.bin", tries=2)
    assert [f.name for f in tmp_path.iterdir()] == ["file.bin.part"]
    train_tiny.download(server.url, tmp_path / "file.bin", tries=1)
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert server.asked[-1] == f"bytes={len(PAYLOAD) * 3 // 4}-"  # half, then half of the rest


@REDIRECTS
@pytest.mark.parametrize("stated", ['"' + "0" * 40 + '"', '"' + "g" * 64 + '"', '"' + "0" * 65 + '"', ""])
def test_download_ignores_a_stated_tag_that_is_no_sha256(server, tmp_path, stated, redirects):
    server.redirects, server.stated = redirects, {"/file.bin": stated}  # files kept in git itself state its sha1
    train_tiny.download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD


# ---------------------------------------------------------------------------------------------------------------------
# run: a miniature run of train_tiny.py, watched from outside: what enters the model and the optimizer
# ---------------------------------------------------------------------------------------------------------------------

MINIATURE = """--config folder --image-size 16 --codebook-size 16 --channels 8 --tokenizer-steps 20 --tokenizer-batch 8
--steps 24 --batch-size 32 --dim 16 --depth 1 --heads 2 --dropout 0.1 --scan spiral-in --save-every 13 --eval-every 6
--lr 3e-3 --dtype float32 --device cpu"""
FLAGS = MINIATURE.split()
TOKENIZER_STEPS, STEPS = 20, 24
SPIRAL = torch.tensor([0, 4, 8, 12, 13, 14, 15, 11, 7, 3, 2, 1, 5, 9, 10, 6])


class Killed(BaseException):
    """Stops a run in the middle, as a kill would: nothing in the program catches it."""


def call(module, *argv: object) -> None:
    """A script's main with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        module.main()


def train(out: Path, *argv: object, stop_at: int | None = None, how: str = "kill") -> SimpleNamespace:
    """Run train_tiny.py into `out`; returns what its models and optimizers were handed, step by step."""
    seen = SimpleNamespace(batches=[], validation=[], updates=[])
    forward, step = RAR.forward, torch.optim.AdamW.step

    def watched_forward(self, tokens, labels, orders=None):
        if self.training or not torch.is_grad_enabled():
            (seen.batches if self.training else seen.validation).append((tokens, labels, orders))
        return forward(self, tokens, labels, orders)

    def watched_step(self, *args, **kwargs):
        seen.updates.append([dict(lr=g["lr"], weight_decay=g["weight_decay"]) for g in self.param_groups])
        if len(seen.updates) == stop_at:
            if how == "kill":
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RAR, "forward", watched_forward)
        patch.setattr(torch.optim.AdamW, "step", watched_step)
        with pytest.raises((Killed, InputError)) if stop_at else nullcontext() as seen.stopped:
            call(train_tiny, *argv, "--out", out)
    return seen


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> SimpleNamespace:
    """An unbroken run on three classes of 20 images, which holds every tenth back and mirrors the rest."""
    root = tmp_path_factory.mktemp("mini")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / "data" / "train" / name).mkdir(parents=True)
        for i in range(20):
            blocks = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)
            blocks[..., c] //= 4
            image = Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST)
            image.save(root / "data" / "train" / name / f"{i:02}.png")
    flags = [*FLAGS, "--data-dir", root / "data"]
    return SimpleNamespace(
        root=root, data=root / "data", run=root / "run", flags=flags, seen=train(root / "run", *flags)
    )


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["weights"]


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def metrics(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if k} for row in csv.DictReader(f)]


def test_run_leaves_everything_behind(mini):
    expected = "tokenizer.pt rar.pt rar_random.pt rar_best.pt tokens.npz metrics.csv reconstructions.png samples.png"
    assert {*expected.split()} <= {f.name for f in mini.run.iterdir()}
    assert not list(mini.run.glob("tmp-*"))
    for name in ("reconstructions.png", "samples.png"):
        with Image.open(mini.run / name) as picture:
            assert len(picture.getcolors(1 << 20)) > 10


def test_run_r_falls_and_orders_follow_it(mini):
    """r is 1 up to step 12 and 0 from step 18 on; per sample, and down to the scan that was asked for."""
    batches = mini.seen.batches
    assert len(batches) == STEPS
    in_scan = [(orders == SPIRAL).all(1).float().mean().item() for _, _, orders in batches]
    assert max(in_scan[:13]) == 0 and min(in_scan[18:]) == 1
    assert in_scan[13] < in_scan[17] and all(0 < share < 1 for share in in_scan[14:17])
    assert len(torch.cat([orders for _, _, orders in batches[:13]]).unique(dim=0)) == 13 * 32


def test_run_batches_are_training_tokens_with_their_labels(mini):
    data = np.load(mini.run / "tokens.npz")
    known = {(*t, int(c)) for t, c in zip(data["tokens"].tolist(), data["labels"])}
    dropped = 0
    for tokens, labels, _ in mini.seen.batches:
        for t, label in zip(tokens.tolist(), labels.tolist()):
            dropped += label == 3
            assert (*t, label) in known or (label == 3 and any((*t, c) in known for c in range(3)))
    assert 0.05 < dropped / (STEPS * 32) < 0.16  # a tenth goes to the null class: five deviations of 0.011


def test_run_validation_uses_held_out_tokens_in_raster_and_in_random_order(mini):
    data = np.load(mini.run / "tokens.npz")
    held_out = {tuple(t) for t in data["val_tokens"].tolist()}
    passes = mini.seen.validation
    assert len(passes) == 8 and all({tuple(t) for t in tokens.tolist()} == held_out for tokens, _, _ in passes)
    assert all((labels < 3).all() for _, labels, _ in passes)  # no label is dropped
    assert all((orders == SPIRAL).all() for _, _, orders in passes[::2])
    assert all(orders.equal(passes[1][2]) and not (orders == SPIRAL).all(1).any() for _, _, orders in passes[1::2])


def test_run_optimizer_gets_the_schedule_and_the_decay(mini):
    updates = mini.seen.updates
    assert len(updates) == TOKENIZER_STEPS + STEPS
    found = [groups[0]["lr"] for groups in updates[TOKENIZER_STEPS:]]
    assert found == pytest.approx([train_tiny.learning_rate(s, STEPS, 3e-3, 0.1) for s in range(STEPS)])
    assert {g["weight_decay"] for groups in updates[TOKENIZER_STEPS:] for g in groups} == {0.03, 0.0}


def test_run_metrics_say_what_happened(mini):
    rows = metrics(mini.run)
    assert [row["step"] for row in rows] == [6, 12, 18, 24]
    for row in rows:
        step = row["step"] - 1
        assert row["r"] == pytest.approx(random_ratio(step, 12, 18), abs=1e-5)
        assert row["lr"] == pytest.approx(train_tiny.learning_rate(step, STEPS, 3e-3, 0.1), rel=1e-4)
    model, _ = train_tiny.load_model(mini.run / "rar.pt", "rar", torch.device("cpu"))
    tokens, labels, orders = mini.seen.validation[-1]
    with torch.no_grad():  # the last row is that of the weights that were kept
        random_loss = train_tiny.token_loss(model, tokens, labels, orders).item()
        scan_loss = train_tiny.token_loss(model, tokens, labels, SPIRAL.expand_as(orders)).item()
    assert rows[-1]["val_loss_random"] == pytest.approx(random_loss, rel=1e-4)
    assert rows[-1]["val_loss_raster"] == pytest.approx(scan_loss, rel=1e-4)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_run_keeps_the_weights_of_the_lowest_validation_loss(mini, tmp_path, monkeypatch):
    """On losses that are lowest in the middle; the last column, in random orders, has no say."""
    losses = iter([3.0, 9.0, 2.0, 9.0, 4.0, 1.0, 3.5, 9.0])  # base order and random order, at steps 6, 12, 18 and 24
    seen = []

    def scripted(model, *_):
        seen.append({name: p.detach().clone() for name, p in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(train_tiny, "validation_loss", scripted)
    train(tmp_path / "run", *FLAGS, "--tokens", mini.run / "tokens.npz")
    best = torch.load(tmp_path / "run" / "rar_best.pt", weights_only=True)
    assert best["step"] == 12 and all(w.equal(seen[2][name]) for name, w in best["weights"].items())


def test_run_tokens_are_those_of_the_images_and_their_mirror_images(mini):
    model, _ = train_tiny.load_model(mini.run / "tokenizer.pt", "tokenizer", torch.device("cpu"))
    data = np.load(mini.run / "tokens.npz")
    for split, prefix in (("train", ""), ("val", "val_")):
        images, labels, names = train_tiny.load_images("folder", split, mini.data, 16)
        views = [images, images[:, :, ::-1]] if split == "train" else [images]
        expected = torch.cat([model.encode(train_tiny.to_float(view, torch.device("cpu"))) for view in views])
        assert (data[prefix + "tokens"] == expected.numpy()).mean() > 0.99  # a tie may fall either way
        assert data[prefix + "labels"].tolist() == labels.tolist() * len(views)
        assert data["class_names"].tolist() == names == ["ant", "bee", "cat"]
    assert not (data["tokens"][:54] == data["tokens"][54:]).all()


def check_same(run: Path, mini: SimpleNamespace) -> None:
    """A run has left what the unbroken one has, bit for bit: weights, tokens, metrics, pictures; and no more."""
    assert {f.name for f in run.iterdir()} == {f.name for f in mini.run.iterdir()}
    for name in ("tokenizer.pt", "rar.pt", "rar_random.pt", "rar_best.pt"):
        assert same_weights(run / name, mini.run / name), name
    for name in ("tokens.npz", "metrics.csv", "samples.png", "reconstructions.png"):
        assert (run / name).read_bytes() == (mini.run / name).read_bytes(), name


@pytest.mark.parametrize(
    "how, tokenizer_at, stop, rar_at", [("kill", 13, 20, 13), ("Ctrl-C", 17, 20, 20), ("Ctrl-C", 17, 24, 24)]
)
def test_run_resumed_is_an_unbroken_one_bit_for_bit(mini, tmp_path, how, tokenizer_at, stop, rar_at):
    """Stopped once in each stage, in between checkpoints and rows of metrics; it goes on from where it was saved."""
    run = tmp_path / "broken"
    first = train(run, *mini.flags, stop_at=17, how=how)
    assert not (run / "tokenizer.pt").exists()
    second = train(run, "--resume", stop_at=TOKENIZER_STEPS - tokenizer_at + stop, how=how)
    state = torch.load(run / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == ("rar", rar_at) and not (run / "rar.pt").exists()
    if how == "kill":  # step 13 is the last with r = 1, and that of a checkpoint
        assert all(w.equal(state["model"][k]) for k, w in weights(run / "rar_random.pt").items())
    else:
        for stopped, word in ((first, "17 steps of tokenizer"), (second, f"{stop} steps of rar")):
            assert f"{word}; go on: python train_tiny.py --resume --out {run}" in str(stopped.stopped.value)
    assert len(train(run, "--resume").updates) == STEPS - rar_at
    check_same(run, mini)
    assert not same_weights(mini.run / "rar.pt", mini.run / "rar_random.pt")


def test_run_resumed_revives_the_same_codes(mini, tmp_path, monkeypatch):
    """Where codes die at each step, those that replace them are drawn as if the run had not been stopped."""
    monkeypatch.setattr(CodebookEMA.__init__, "__defaults__", (0.9, 0.8))  # decay, dead_below
    train(tmp_path / "unbroken", *mini.flags, "--steps", 1)
    train(tmp_path / "broken", *mini.flags, "--steps", 1, stop_at=17)
    train(tmp_path / "broken", "--resume")
    assert same_weights(tmp_path / "broken" / "tokenizer.pt", tmp_path / "unbroken" / "tokenizer.pt")


def test_run_takes_the_first_ctrl_c_after_a_step_and_the_second_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for _, pressed in train_tiny.interruptible(range(3)):
            assert not pressed
            signal.raise_signal(signal.SIGINT)
            assert pressed
            signal.raise_signal(signal.SIGINT)
    gc.collect()  # a generator that was left ends when it is collected
    assert signal.getsignal(signal.SIGINT) is before


HOLD = """
import os
replace, seen = os.replace, []
def held(source, target):  # half of the file is there; the rest and its name come when a line of input does
    seen.append(os.path.basename(target))
    if seen[-1] == "{0}" and seen.count("{0}") == {1}:
        content = open(source, "rb").read()
        os.truncate(source, len(content) // 2)
        print("held", flush=True)
        input()
        open(source, "wb").write(content)
    replace(source, target)
os.replace = held
"""


def start(*argv: object, first: str = "") -> subprocess.Popen:
    """train_tiny.py as a process of its own, after some lines of Python if there are any."""
    code = f"{first}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, *(["-c", code] if first else []), "train_tiny.py", *map(str, argv)]
    options = dict(cwd=Path(train_tiny.__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, **options)


def held(run: Path, name: str, count: int) -> subprocess.Popen:
    """A resumed process that has written half of this file and waits."""
    process = start("--resume", "--out", run, first=HOLD.format(name, count))
    assert "held\n" in process.stdout, process.communicate()
    assert list(run.glob(f"tmp-*-{name}"))
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def test_run_stopped_at_any_moment_goes_on_bit_for_bit(mini, tmp_path):
    """A real process; Ctrl-C, kills at random moments and in the middle of writing, and no trace of it in the end."""
    run, rng = tmp_path / "run", random.Random(4)
    process = start(*mini.flags, "--out", run)
    assert any("tokenizer: " in line for line in process.stderr)  # the progress bar
    time.sleep(rng.uniform(0, 0.2))  # somewhere in the first stage
    if os.name == "nt":  # there Ctrl-C reaches a whole console; the test above has it without a process
        kill(process)
    else:
        process.send_signal(signal.SIGINT)
        *_, message = process.communicate()[1].splitlines()
        assert message.startswith(("error: stopped after", "stopped; ")) and "--resume --out" in message
    kill(held(run, "state.pt", 1))
    kill(held(run, "samples.png", 2))  # the last one
    process = held(run, "metrics.csv", 1)
    print(file=process.stdin, flush=True)
    time.sleep(rng.uniform(0, 0.5))  # somewhere at the end of the second stage
    kill(process)
    process = start("--resume", "--out", run)
    assert "done: " in process.communicate()[0] and process.returncode == 0
    check_same(run, mini)


def test_run_that_cannot_write_keeps_the_last_checkpoint(mini, tmp_path, capsys, monkeypatch):
    """The folder turned read-only; then there is no room for the new state.pt: files may not grow so large."""
    run = tmp_path / "run"
    train(run, *mini.flags, stop_at=TOKENIZER_STEPS + 20)
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    run.chmod(0o555)
    if os.access(run, os.W_OK):  # root may write here all the same, and anyone on Windows
        monkeypatch.setattr(os, "replace", lambda *_: os.mkdir(run))  # an OSError
    assert f"{run / 'run.json'} cannot be written" in refused(capsys, train_tiny, "--resume", "--out", run)
    run.chmod(0o755)
    monkeypatch.undo()
    assert before == {f.name: f.read_bytes() for f in run.iterdir()}

    pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({len(before['state.pt']) - 1000},) * 2)"
    process = start("--resume", "--out", run, first=limit)
    *_, message = process.communicate()[1].splitlines()
    assert process.returncode == 2 and message.startswith(f"error: {run / 'state.pt'} cannot be written")
    assert before.keys() == {f.name for f in run.iterdir()} and (run / "state.pt").read_bytes() == before["state.pt"]
    assert len(train(run, "--resume").updates) == STEPS - 13
    check_same(run, mini)


def test_run_from_tokens_alone_and_seeds(mini, tmp_path):
    """tokens.npz is all that the second stage needs; the same seed gives the same run, another one does not."""
    (tmp_path / "elsewhere").mkdir()
    tokens = shutil.copy(mini.run / "tokens.npz", tmp_path / "elsewhere")
    flags = [*FLAGS, "--tokens", tokens]
    train(tmp_path / "same", *flags)
    assert same_weights(tmp_path / "same" / "rar.pt", mini.run / "rar.pt")
    assert (tmp_path / "same" / "metrics.csv").read_text() == (mini.run / "metrics.csv").read_text()
    train(tmp_path / "other", *flags, "--seed", 1)
    assert (tmp_path / "other" / "metrics.csv").read_text() != (mini.run / "metrics.csv").read_text()


@pytest.mark.parametrize("order, share", [("raster", 1), ("random", 0)])
def test_run_in_the_orders_of_table_2(mini, tmp_path, order, share):
    flags = [*FLAGS, "--tokens", mini.run / "tokens.npz", "--steps", 3, "--order", order]
    seen = train(tmp_path / order, *flags, "--no-target-aware", "--no-adaln")
    assert all((orders == SPIRAL).all(1).float().mean() == share for _, _, orders in seen.batches)
    assert (tmp_path / order / "rar_random.pt").exists() == (order == "random")
    model, _ = train_tiny.load_model(tmp_path / order / "rar.pt", "rar", torch.device("cpu"))
    assert not model.config.adaln and not model.config.target_aware


def test_run_from_the_tokens_of_another_run_can_be_sampled(mini, tmp_path, capsys):
    """What the last line says to do next works, also where the tokenizer stands beside the tokens."""
    train(tmp_path / "run", *FLAGS, "--tokens", mini.run / "tokens.npz", "--steps", 1)
    assert f"sample.py --run {tmp_path / 'run'}" in capsys.readouterr().out.splitlines()[-1]
    call(sample, "--run", tmp_path / "run", "--n", 1, "--out", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("cuda, mps, picked", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_run_takes_the_first_device_there_is(monkeypatch, cuda, mps, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert train_tiny.pick_device(None).type == picked


def in_two_processes(script, *argv: object) -> None:
    """Run a script under torchrun, on the CPU with gloo."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    argv = [script.__file__, *map(str, argv), "--device", "cpu"]  # -- since torchrun would take --n for its own
    done = subprocess.run([*start, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_processes_train_and_sample_as_one_does(mini, tmp_path):
    """Two processes under torchrun: the same losses to 1e-5, the same tokenizer, every sample drawn."""
    flags = [
        *FLAGS,
        "--tokens",
        mini.run / "tokens.npz",
        "--steps",
        20,
        "--eval-every",
        1,
        "--dropout",
        0,
        "--lr",
        1e-3,
    ]
    train(tmp_path / "one", *flags)
    in_two_processes(train_tiny, *flags, "--out", tmp_path / "two")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 20 and one[0]["train_loss"] - one[-1]["train_loss"] > 0.05
    for a, b in zip(one, two):
        assert a == pytest.approx(b, abs=2e-5)  # 1e-5, and the file's rounding to five decimals

    flags = [*mini.flags, "--channels", 8, "--steps", 2]
    call(train_tiny, *flags, "--out", tmp_path / "one images")
    in_two_processes(train_tiny, *flags, "--out", tmp_path / "two images")
    single, double = (weights(tmp_path / f"{count} images" / "tokenizer.pt") for count in ("one", "two"))
    assert all(torch.allclose(single[k], double[k], atol=1e-3) for k in single)
    single, double = (np.load(tmp_path / f"{count} images" / "tokens.npz")["tokens"] for count in ("one", "two"))
    assert single.shape == double.shape and (single == double).mean() > 0.98

    in_two_processes(sample, "--run", mini.run, "--npz", tmp_path / "x.npz", "--n", 7, "--batch-size", 3)
    content = np.load(tmp_path / "x.npz")
    assert len(content["arr_0"]) == 7 and content["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len({image.tobytes() for image in content["arr_0"]}) == 7 and content["arr_0"].any((1, 2, 3)).all()


def test_processes_must_divide_the_batch(mini, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tiny, "process", lambda: (0, 4))
    message = refused(capsys, train_tiny, *FLAGS, "--tokens", mini.run / "tokens.npz", "--batch-size", 6)
    assert "multiples of the 4 processes" in message


def test_run_stops_when_the_loss_is_no_number(mini, tmp_path, capsys):
    flags = [*FLAGS, "--tokens", mini.run / "tokens.npz", "--lr", 1e30, "--warmup", 0]
    message = refused(capsys, train_tiny, *flags, "--out", tmp_path / "run", bars=True)
    assert "nan at step 11; nothing was saved" in message and not (tmp_path / "run" / "rar.pt").exists()


@pytest.mark.parametrize(
    "stage, since, bad, noticed",
    [("tokenizer", 15, math.nan, 20), ("rar", 15, math.inf, 21), ("rar", 24, math.nan, 24)],
)
def test_run_never_saves_what_is_no_number(mini, tmp_path, capsys, monkeypatch, stage, since, bad, noticed):
    """Weights are no numbers from some step on: the checkpoint of step 13 stays, is named, and is good."""
    run, argv = tmp_path / "run", [*mini.flags, "--out", tmp_path / "run"]
    if stage == "rar":
        train(run, *mini.flags, stop_at=TOKENIZER_STEPS + 14)
        argv = ["--resume", "--out", run]
    rate = train_tiny.learning_rate
    monkeypatch.setattr(
        train_tiny, "learning_rate", lambda step, *rest: bad if step + 1 >= since else rate(step, *rest)
    )
    message = refused(capsys, train_tiny, *argv, bars=True)
    assert f"at step {noticed}; {run / 'state.pt'} is the last good checkpoint" in message
    assert not (run / "rar.pt").exists() and torch.load(run / "state.pt", weights_only=True)["step"] == 13
    monkeypatch.undo()
    train(run, "--resume")
    check_same(run, mini)


# ---------------------------------------------------------------------------------------------------------------------
# sample: each mode of sample.py on the miniature run
# ---------------------------------------------------------------------------------------------------------------------


def tiles(file: Path, columns: int, side: int = 16) -> np.ndarray:
    """The images of a sheet: (N, side, side, 3), out of enlarged tiles two white pixels apart."""
    with Image.open(file) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    step = (sheet.shape[1] - 2) // columns
    zoom = (step - 2) // side
    corners = itertools.product(range(2, sheet.shape[0], step), range(2, sheet.shape[1], step))
    return np.stack([sheet[y : y + side * zoom : zoom, x : x + side * zoom : zoom] for y, x in corners])


def draw_npz(mini, file: Path, *argv: object) -> tuple[np.ndarray, np.ndarray]:
    call(sample, "--run", mini.run, "--npz", file, *argv)
    with np.load(file) as content:
        return content["arr_0"], content["arr_1"]


def test_sample_sheet_and_npz_hold_the_same_images(mini, tmp_path, capsys):
    call(sample, "--run", mini.run, "--classes", "0,cat", "--n", 6, "--out", tmp_path / "sheet.png")
    assert "sheet.png" in capsys.readouterr().out
    images, labels = draw_npz(mini, tmp_path / "set.npz", "--classes", "0,cat", "--n", 6)
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8 and labels.tolist() == [0, 2, 0, 2, 0, 2]
    assert (tiles(tmp_path / "sheet.png", 2) == images).all()
    assert len({i.tobytes() for i in images}) == 6


def test_sample_draws_images_from_the_tokens_of_generate(mini, tmp_path):
    """The sheet's images are what the model's own generate and the tokenizer's decode give."""
    options = dict(guidance_scale=2.0, guidance_power=1.5, temperature=0.9, top_k=5)
    argv = itertools.chain(*((f"--{k.replace('_', '-')}", v) for k, v in options.items()))
    images, labels = draw_npz(mini, tmp_path / "set.npz", "--n", 7, "--seed", 3, *argv)
    cpu = torch.device("cpu")
    model, _ = train_tiny.load_model(mini.run / "rar.pt", "rar", cpu)
    decoder, _ = train_tiny.load_model(mini.run / "tokenizer.pt", "tokenizer", cpu)
    tokens = model.generate(torch.from_numpy(labels), order=SPIRAL, generator=seeded(3), **options)
    assert (images == train_tiny.to_uint8(decoder.decode(tokens))).all()


def test_sample_seeds_and_balance(mini, tmp_path):
    (a, labels), (b, _), (c, _) = (draw_npz(mini, tmp_path / f"{s}.npz", "--n", 8, "--seed", s) for s in (1, 1, 2))
    assert (a == b).all() and not (a == c).all()
    assert sorted(Counter(labels.tolist()).values()) == [2, 3, 3]
    images, _ = draw_npz(mini, tmp_path / "batches.npz", "--n", 8, "--batch-size", 3)
    assert len({i.tobytes() for i in images}) == 8


def test_sample_npz_gets_the_name_asked_for(mini, tmp_path):
    call(sample, "--run", mini.run, "--npz", tmp_path / "set", "--n", 1)
    assert [f.name.removesuffix(".npz") for f in tmp_path.iterdir()] == ["set"]  # numpy adds a suffix by itself


def test_sample_gif_of_batches_smaller_than_a_row(mini, tmp_path):
    call(sample, "--run", mini.run, "--n", 6, "--batch-size", 1, "--gif", tmp_path / "grow.gif")
    with Image.open(tmp_path / "grow.gif") as gif:
        assert gif.size == (48, 48)


def test_sample_gif_grows_token_by_token_in_its_order(mini, tmp_path):
    call(sample, "--run", mini.run, "--classes", "1", "--n", 1, "--gif", tmp_path / "grow.gif")
    with Image.open(tmp_path / "grow.gif") as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 17  # nothing, then 16 cells one by one
    side = frames[0].shape[0] // 4
    cells = [f.reshape(4, side, 4, side, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1) for f in frames]
    assert np.ptp(cells[0]) <= 8  # all dark grey
    for t in range(16):
        changed = np.abs(cells[t + 1] - cells[t]).max(1) > 40
        assert not changed[[c for c in range(16) if c != SPIRAL[t]]].any()
    assert (np.abs(cells[16] - cells[0]).max(1) > 8).sum() > 12


def test_sample_other_orders_use_the_weights_from_before_annealing(mini, tmp_path, capsys):
    cpu = torch.device("cpu")
    model, _ = train_tiny.load_model(mini.run / "rar_random.pt", "rar", cpu)
    decoder, _ = train_tiny.load_model(mini.run / "tokenizer.pt", "tokenizer", cpu)
    images, labels = draw_npz(mini, tmp_path / "z.npz", "--n", 3, "--order", "z-curve", "--guidance-scale", 1)
    assert "rar_random.pt" in capsys.readouterr().out
    tokens = model.generate(torch.from_numpy(labels), order=scan_order("z-curve", 4), generator=seeded(0))
    assert (images == train_tiny.to_uint8(decoder.decode(tokens))).all()
    draw_npz(mini, tmp_path / "r.npz", "--n", 3, "--order", "random")
    assert "rar_random.pt" in capsys.readouterr().out
    draw_npz(mini, tmp_path / "s.npz", "--n", 3, "--order", "spiral-in")  # the one it ended in
    assert "rar_random.pt" not in capsys.readouterr().out


def test_sample_inpaints_a_region_and_keeps_the_rest(mini, tmp_path, capsys):
    image = sorted(mini.data.rglob("*.png"))[3]
    out = tmp_path / "inpainted.png"
    call(sample, "--run", mini.run, "--inpaint", image, "--mask", "4,0,12,8", "--n", 5, "--out", out)
    assert "rar_random.pt" in capsys.readouterr().out
    original, masked, *drawn = tiles(out, 7)
    known = np.ones((16, 16), bool)
    known[0:8, 4:12] = False  # x from 4 to 12, y from 0 to 8
    with Image.open(image) as picture:
        assert (original == np.asarray(picture.convert("RGB"))).all()
    assert all((picture[known] == original[known]).all() for picture in (masked, *drawn))
    assert np.ptp(masked[~known], axis=0).max() == 0  # nothing of the hole is left
    assert all(not (picture[~known] == masked[~known]).all() for picture in drawn)
    assert len({picture.tobytes() for picture in drawn}) > 1


def test_sample_takes_the_newest_run(mini, tmp_path, monkeypatch):
    for i, name in enumerate(("new", "old")):
        shutil.copytree(mini.run, tmp_path / "runs" / name)
        for file in (tmp_path / "runs" / name).iterdir():
            os.utime(file, (2e9 - i, 2e9 - i))
    (tmp_path / "runs" / "old" / "tokenizer.pt").unlink()  # so that taking it would fail
    monkeypatch.chdir(tmp_path)
    call(sample, "--n", 2)
    assert (tmp_path / "sheet.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# tokens: tokens.npz is refused when it does not fit
# ---------------------------------------------------------------------------------------------------------------------


def token_file(path: Path, **changes: object) -> Path:
    content = dict(tokens=np.zeros((4, 9), np.uint16), labels=np.array([0, 1, 1, 0]), val_tokens=np.zeros((1, 9), int))
    content |= dict(val_labels=np.array([1]), codebook_size=12, grid_size=3, class_names=np.array(["a", "b"]))
    content |= dict(tokenizer=np.array("0123456789abcdef")) | changes
    save = np.savez_compressed if "extra" in changes else np.savez
    save(path, **{k: v for k, v in content.items() if v is not None})
    return path


def test_tokens_that_fit_are_read(tmp_path):
    data = train_tiny.load_tokens(token_file(tmp_path / "tokens.npz"), None)
    assert (
        data["tokens"].shape == (4, 9) and data["labels"].tolist() == [0, 1, 1, 0] and int(data["codebook_size"]) == 12
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(tokens=np.full((4, 9), 12)),  # a code too many
        dict(tokens=np.full((4, 9), -1)),
        dict(tokens=np.zeros((4, 8), int)),  # another grid
        dict(tokens=np.zeros((3, 9), int)),  # fewer than labels
        dict(tokens=np.zeros((0, 9), int), labels=np.zeros(0, int)),
        dict(labels=np.array([0, 1, 2, 0])),  # a class too many
        dict(labels=np.array([0, 1, -1, 0])),
        dict(val_tokens=np.full((1, 9), 12)),
        dict(val_labels=np.array([2])),
        dict(tokenizer=None),
        dict(class_names=None),
        dict(class_names=np.array(["a", None], dtype=object)),  # would have to be unpickled
        dict(tokens=np.full((4, 9), np.nan)),
        dict(labels=np.zeros((4, 1), int)),
        dict(grid_size=-3),
        dict(extra=np.zeros(1 << 26, np.uint8)),  # packed, a bomb
    ],
)
def test_tokens_out_of_range_are_refused(tmp_path, changes):
    with pytest.raises(InputError, match=r"tokens\.npz"):
        train_tiny.load_tokens(token_file(tmp_path / "tokens.npz", **changes), None)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    made_by, other = small_vq(seed=1, image_size=6), small_vq(seed=2, image_size=6)
    name = np.array(train_tiny.weights_hash(made_by))
    file = token_file(tmp_path / "tokens.npz", tokenizer=name)
    assert str(train_tiny.load_tokens(file, made_by)["tokenizer"]) == str(name)
    with pytest.raises(InputError, match="tokenizer"):
        train_tiny.load_tokens(file, other)


def test_tokens_truncated_are_refused(tmp_path):
    file = token_file(tmp_path / "tokens.npz")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"tokens\.npz"):
        train_tiny.load_tokens(file, None)


# ---------------------------------------------------------------------------------------------------------------------
# released: the authors' files, here small ones in the same layout; loaded, refused, drawn with, fetched
# ---------------------------------------------------------------------------------------------------------------------


def handed_over(module: nn.Module, folder: Path, how: str) -> Path | str | dict[str, torch.Tensor]:
    """The module's state dict as from_released may get it."""
    weights, path = module.state_dict(), folder / "weights.bin"
    if how == "dict":
        return weights
    torch.save(weights, path, _use_new_zipfile_serialization=how != "old file")
    return str(path) if how == "text" else path


HANDED_OVER = pytest.mark.parametrize("how", ["path", "text", "dict", "old file"])


@HANDED_OVER
def test_released_rar_gives_the_golden_numbers(golden_rar, tmp_path, how):
    model = RAR.from_released(handed_over(golden_rar, tmp_path, how))
    assert model.config == golden_rar.config and not model.training  # the four heads too are read off the shapes
    for case in GOLDEN_ROWS:
        test_golden_logits(model, case)
    test_golden_losses(model)
    test_golden_greedy_tokens(model, (3.0, 1.5), use_cache=True)


@HANDED_OVER
def test_released_tokenizer_gives_the_golden_numbers(golden_tokenizer, tmp_path, how):
    decoder = VQTokenizer.from_released(handed_over(golden_tokenizer, tmp_path, how), image_size=16)
    assert decoder.config == golden_tokenizer.config and not decoder.training
    test_golden_tokenizer(decoder)


@ADALN
@pytest.mark.parametrize("target_aware", [True, False])
def test_released_layout_is_the_way_there_and_back(tmp_path, adaln, target_aware):
    model = small_rar(adaln=adaln, target_aware=target_aware, mlp_dim=20)
    back = RAR.from_released(handed_over(model, tmp_path, "path"), adaln=adaln, target_aware=target_aware)
    assert back.config == model.config
    assert (logits_of(back, *random_input(model)) == logits_of(model, *random_input(model))).all()
    torch.save(back.state_dict(), tmp_path / "again.bin")
    again = torch.load(tmp_path / "again.bin", weights_only=True)
    assert list(again) == list(model.state_dict()) and all((again[k] == v).all() for k, v in model.state_dict().items())


def test_released_layout_holds_what_was_trained(tmp_path):
    model = small_rar().train()
    tokens, labels, orders = random_input(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train_tiny.token_loss(model, tokens, labels, orders).backward()
    optimizer.step()
    back = RAR.from_released(handed_over(model, tmp_path, "path"))
    assert (logits_of(back, tokens, labels, orders) == logits_of(model.eval(), tokens, labels, orders)).all()
    back.train()  # what was loaded can be trained further
    train_tiny.token_loss(back, tokens, labels, orders).backward()
    assert all(p.grad is not None for p in back.parameters())


@pytest.mark.parametrize("how", ["path", "dict"])
@torch.no_grad()
def test_released_weights_are_converted_on_the_way(golden_rar, golden_tokenizer, tmp_path, how):
    source = handed_over(golden_rar, tmp_path, how)
    model = RAR.from_released(source, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all((w == golden_rar.state_dict()[k].bfloat16()).all() for k, w in model.state_dict().items())
    assert model.generate(torch.tensor([0, 5])).shape == (2, 16)
    if how == "dict":  # the caller's own stay as they were
        assert {w.dtype for w in source.values()} == {torch.float32}
    source = handed_over(golden_tokenizer, tmp_path, how)
    decoder = VQTokenizer.from_released(source, torch.bfloat16, image_size=16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(decoder.decode(tokens), golden_tokenizer.decode(tokens), atol=0.1, rtol=0)


def test_released_files_are_mapped_into_memory_and_dicts_not_copied(golden_rar, tmp_path, monkeypatch):
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    path = handed_over(golden_rar, tmp_path, "path")
    RAR.from_released(path)
    assert [options["mmap"] for options in asked] == [True]
    for options in ("old file", "path"):  # what cannot be mapped, or would have to be held twice
        RAR.from_released(handed_over(golden_rar, tmp_path, options), None if options == "old file" else torch.float16)
    assert [options["mmap"] for options in asked] == [True, False, False]
    assert all(options["weights_only"] is True for options in asked)
    weights = golden_rar.state_dict()
    model = RAR.from_released(weights)
    assert all(p.data_ptr() == weights[k].data_ptr() for k, p in model.named_parameters())


def test_released_files_are_left_alone_by_what_is_done_to_the_model(golden_rar, tmp_path):
    """A mapped file could be written through: merging works in place."""
    path = handed_over(golden_rar, tmp_path, "path")
    before = path.read_bytes()
    model = RAR.from_released(path)
    model.merge_position_embeddings()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def released(golden_rar, golden_tokenizer) -> dict:
    """Loader and golden weights of both kinds."""
    return {"rar": (RAR.from_released, golden_rar), "tokenizer": (VQTokenizer.from_released, golden_tokenizer)}


def refusal(load, source: object) -> str:
    """What from_released says when it refuses: one line."""
    with pytest.raises(InputError) as error:
        load(source)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


KINDS = pytest.mark.parametrize("kind", ["rar", "tokenizer"])
STRIDES = {"rar": 1, "tokenizer": 5}  # every tensor, and every fifth of many: building a tokenizer takes 30 ms


@KINDS
def test_released_weights_with_a_tensor_missing_are_refused(kind, released):
    load, module = released[kind]
    for name in sorted(module.state_dict().keys())[:: STRIDES[kind]]:
        assert name in refusal(load, {k: w for k, w in module.state_dict().items() if k != name})


@KINDS
def test_released_weights_with_a_tensor_too_many_are_refused(kind, released):
    load, module = released[kind]
    for name in ("surprise", "blocks.0.attn.surprise", "encoder.mid.0.surprise"):
        assert f"{name} is unknown" in refusal(load, module.state_dict() | {name: torch.zeros(2)})


@KINDS
def test_released_weights_of_several_types_or_made_of_nothing_are_refused(kind, released):
    load, module = released[kind]
    name, w = next(iter(module.state_dict().items()))
    assert "types" in refusal(load, module.state_dict() | {name: w.double()})
    assert name in refusal(load, module.state_dict() | {name: w.flatten()[:1].clone().expand(w.numel()).view(w.shape)})


TELLS_SIZES = {"lm_head.weight", "blocks.0.mlp.fc1.bias", "quantize.embedding.weight"}  # others then seem misshapen


@KINDS
def test_released_weights_with_a_misshapen_tensor_are_refused(kind, released):
    load, module = released[kind]
    for name, w in itertools.islice(module.state_dict().items(), None, None, STRIDES[kind]):
        message = refusal(load, module.state_dict() | {name: w[..., :-1]})
        assert name in TELLS_SIZES or f"{name} is {tuple(w[..., :-1].shape)}, not {tuple(w.shape)}" in message


def test_released_weights_of_the_other_kind_are_refused(released, tmp_path):
    (load_rar, model), (load_tokenizer, decoder) = released.values()
    assert "RAR" in refusal(load_rar, handed_over(decoder, tmp_path, "path"))
    assert "tokenizer" in refusal(load_tokenizer, handed_over(model, tmp_path, "path"))


@KINDS
@pytest.mark.parametrize("how", ["path", "old file"])
def test_released_file_cut_short_is_refused(kind, how, released, tmp_path):
    load, module = released[kind]
    path = handed_over(module, tmp_path, how)
    content = path.read_bytes()
    for keep in (len(content) - 1, len(content) - 100, len(content) // 2, 10, 0):
        path.write_bytes(content[:keep])
        assert str(path) in refusal(load, path)


NO_WEIGHTS = ["text", "picture", "folder", "missing", "list", "nested", "own checkpoint"]


@KINDS
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_released_file_that_holds_something_else_is_refused(kind, what, released, tmp_path):
    load, module = released[kind]
    path, weights = tmp_path / "weights.bin", module.state_dict()
    if what == "text":
        path.write_text("<html>404</html>")
    elif what == "picture":
        plain(tmp_path / "weights.png", (1, 2, 3))
        (tmp_path / "weights.png").rename(path)
    elif what == "folder":
        path.mkdir()
    elif what == "own checkpoint":
        train_tiny.save_checkpoint(path, kind, module)
    elif what != "missing":
        torch.save(list(weights.values()) if what == "list" else {"model": weights}, path)
    assert str(path) in refusal(load, path)


@KINDS
@pytest.mark.parametrize("how", ["pickle", "file", "old file", "among weights"])
def test_released_file_with_code_is_refused_and_not_run(kind, how, released, tmp_path):
    load, module = released[kind]
    path, evil = tmp_path / "weights.bin", Evil(str(tmp_path / "pwned"))
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        content = module.state_dict() | {"cls_token": evil} if how == "among weights" else evil
        torch.save(content, path, _use_new_zipfile_serialization=how != "old file")
    assert str(path) in refusal(load, path)
    assert not (tmp_path / "pwned").exists()


LARGE = VQConfig(256, 16, 8, 32, (1, 1, 2, 2, 4), 1, 32, released_shortcut=True)  # image and grid of the real one


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> SimpleNamespace:
    """A RAR and a tokenizer that fit together as the published ones do, and their files."""
    folder = tmp_path_factory.mktemp("published")
    model = small_rar(V=16, C=3, T=256, dim=32, depth=1, std=0.2, mlp_dim=48)
    decoder = fill(VQTokenizer(LARGE), 0.1)
    torch.save(model.state_dict(), folder / "some_rar.bin")
    torch.save(decoder.state_dict(), folder / "some_tokenizer.bin")
    files = SimpleNamespace(model=model, decoder=decoder, rar=folder / "some_rar.bin")
    files.tokenizer = folder / "some_tokenizer.bin"
    files.flags = ["--rar", files.rar, "--tokenizer", files.tokenizer, "--device", "cpu"]
    return files


def drawn(published, classes: list[int], seed: int, **options) -> np.ndarray:
    """The images that these options should give."""
    tokens = published.model.generate(torch.tensor(classes), generator=seeded(seed), **options)
    return train_tiny.to_uint8(published.decoder.decode(tokens))


@pytest.fixture
def tiny_rar_l(monkeypatch) -> dict:
    """Gives the size of the tiny RAR the name rar_l, with settings of its own, as generate takes them."""
    size = dict(dim=32, depth=1, mlp_dim=48, scale=3.0, power=1.5, temperature=0.8)
    monkeypatch.setitem(sample.TABLE_1, "rar_l", size)
    return dict(guidance_scale=3.0, guidance_power=1.5, temperature=0.8)


def test_released_sample_draws_a_sheet_from_files(published, tiny_rar_l, tmp_path):
    argv = [*published.flags, "--n", 2, "--seed", 4, "--classes", "2,0", "--out", tmp_path / "sheet.png"]
    call(sample, *argv, "--guidance-scale", 5)  # before the size's own
    expected = drawn(published, [2, 0], 4, **tiny_rar_l | dict(guidance_scale=5.0))
    assert (tiles(tmp_path / "sheet.png", 2, 256) == expected).all()
    assert (expected[0] != expected[1]).any() and 20 < expected.mean() < 235  # not clamped to one colour


def released_args(**changes: object) -> SimpleNamespace:
    args = dict(rar="rar.bin", tokenizer="tokenizer.bin", cache=None, dtype=None, inpaint=None, order=None)
    return SimpleNamespace(**args | changes)


@pytest.mark.parametrize(
    "depth, dim, settings",
    [
        (24, 768, (16.0, 2.75, 1.0)),
        (24, 1024, (15.5, 2.5, 1.02)),
        (32, 1280, (6.9, 1.5, 1.02)),
        (40, 1408, (8.0, 1.2, 1.02)),
        (24, 512, (1.0, 0.0, 1.0)),  # of no size in Tab. 1: plain sampling
    ],
)
def test_released_sample_settings_are_those_of_table_6(depth, dim, settings, monkeypatch):
    meta = torch.device("meta")  # sizes without memory
    with meta:
        model, decoder = RAR(RARConfig(16, 1000, 256, dim, depth, 16, 64)), VQTokenizer(LARGE)
    monkeypatch.setattr(RAR, "from_released", lambda *_: model)
    monkeypatch.setattr(VQTokenizer, "from_released", lambda *_: decoder)
    picked = sample.load_released(released_args(), meta)[2]
    assert tuple(picked[name] for name in ("guidance_scale", "guidance_power", "temperature")) == settings
    assert picked["scan"] == "row-major" and picked["class_names"] == [str(c) for c in range(1000)]


def test_released_sample_converts_to_the_type_asked_for(published):
    args = released_args(rar=published.rar, tokenizer=published.tokenizer, dtype=torch.bfloat16)
    model, decoder, _ = sample.load_released(args, torch.device("cpu"))
    assert {p.dtype for p in (*model.parameters(), *decoder.parameters())} == {torch.bfloat16}


RAR_L, MASKGIT = "rar_l.bin", "maskgit-vqgan-imagenet-f16-256.bin"


@pytest.fixture
def hub(server, published, monkeypatch) -> SimpleNamespace:
    """The published files where Hugging Face has them: behind a redirect that states their hashes."""
    address = {"/yucornetto/RAR": (RAR_L, published.rar), "/fun-research/TiTok": (MASKGIT, published.tokenizer)}
    server.files = {f"{owner}/resolve/main/{name}": f.read_bytes() for owner, (name, f) in address.items()}
    server.stated = {path: f'"{hashlib.sha256(content).hexdigest()}"' for path, content in server.files.items()}
    server.redirects = True
    monkeypatch.setattr(sample, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(train_tiny.time, "sleep", lambda seconds: None)
    return server


def test_released_sample_fetches_by_name_once(published, tiny_rar_l, hub, tmp_path):
    argv = ["--rar", "rar_l", "--cache", tmp_path / "cache", "--device", "cpu", "--n", 1, "--out", tmp_path / "a.png"]
    call(sample, *argv)
    assert hub.paths == [p for path in hub.files for p in (path, "/elsewhere" + path)]
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == [MASKGIT, RAR_L]
    assert (tmp_path / "cache" / RAR_L).read_bytes() == published.rar.read_bytes()
    assert (tmp_path / "cache" / MASKGIT).read_bytes() == published.tokenizer.read_bytes()
    assert (tiles(tmp_path / "a.png", 1, 256) == drawn(published, [0], 0, **tiny_rar_l)).all()
    asked = len(hub.paths)
    call(sample, *argv[:-1], tmp_path / "b.png")
    assert len(hub.paths) == asked and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_released_sample_says_which_files_to_put_where(hub, tmp_path, capsys):
    cache = tmp_path / "cache"
    argv = ["--rar", "rar_l", "--cache", cache, "--out", tmp_path / "sheet.png"]
    del hub.files[f"/fun-research/TiTok/resolve/main/{MASKGIT}"]  # half of what is needed can be had
    message = refused(capsys, sample, *argv, bars=True)
    assert str(cache) in message and RAR_L in message and MASKGIT in message
    assert [f.name for f in cache.iterdir()] == [RAR_L]  # kept
    (cache / RAR_L).unlink()
    hub.shutdown()
    hub.server_close()
    message = refused(capsys, sample, *argv)
    assert str(cache) in message and RAR_L in message and MASKGIT in message
    assert not list(cache.iterdir()) and not (tmp_path / "sheet.png").exists()


def test_released_sample_refuses_what_the_hub_did_not_state(hub, tmp_path, capsys):
    path = f"/yucornetto/RAR/resolve/main/{RAR_L}"
    hub.files[path] = hub.files[path][:-1] + b"x"
    argv = ["--rar", "rar_l", "--cache", tmp_path / "cache", "--out", tmp_path / "sheet.png"]
    assert "sha256" in refused(capsys, sample, *argv, bars=True)
    assert not list((tmp_path / "cache").iterdir())


RELEASED_REFUSES = {
    "no tokenizer": (["--rar", "RAR"], "--tokenizer"),
    "random order": (["--rar", "RAR", "--tokenizer", "VQ", "--order", "random"], "row-major"),
    "another scan": (["--rar", "RAR", "--tokenizer", "VQ", "--order", "spiral-in"], "row-major"),
    "inpainting": (["--rar", "RAR", "--tokenizer", "VQ", "--inpaint", "a.png", "--mask", "0,0,9,9"], "row-major"),
    "swapped": (["--rar", "VQ", "--tokenizer", "RAR"], "RAR"),
    "tokenizer twice": (["--rar", "VQ", "--tokenizer", "VQ"], "RAR"),
    "another codebook": (["--rar", "CODES", "--tokenizer", "VQ"], "codes.bin"),
    "another grid": (["--rar", "GRID", "--tokenizer", "VQ"], "grid.bin"),
    "missing": (["--rar", "nowhere.bin", "--tokenizer", "VQ"], "nowhere.bin"),
    "tokenizer missing": (["--rar", "RAR", "--tokenizer", "nowhere.bin"], "nowhere.bin"),
    "unknown name": (["--rar", "rar_s", "--tokenizer", "VQ"], "rar_s"),
    "class beyond the last": (["--rar", "RAR", "--tokenizer", "VQ", "--classes", "3"], "'3'"),
}


@pytest.mark.parametrize("case", RELEASED_REFUSES)
def test_released_sample_refuses(case, published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"RAR": published.rar, "VQ": published.tokenizer}
    for name, (V, T) in {"CODES": (17, 256), "GRID": (16, 64)}.items():
        files[name] = published.rar.with_name(f"{name.lower()}.bin")
        torch.save(small_rar(V, 3, T, dim=32, depth=1).state_dict(), files[name])
    argv, word = RELEASED_REFUSES[case]
    message = refused(capsys, sample, *(files.get(a, a) for a in argv), "--device", "cpu", "--out", "sheet.png")
    assert word in message and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# ablation: benchmarks/ablation.py, its measures and the whole of it in miniature
# ---------------------------------------------------------------------------------------------------------------------

ABLATION_FLAGS = """--config folder --image-size 16 --codebook-size 16 --channels 4 --tokenizer-steps 8
--tokenizer-batch 8 --images 30 --steps 8 --batch-size 8 --dim 16 --depth 1 --heads 2 --evaluations 4
--classifier-steps 4 --samples 12 --guidance 1,2 --seeds 2 --crossing 0.5 --crossing-seeds 1 --dtype float32
--device cpu --workers 1 --variants raster,random,rar-spiral-in,rar+flip+drop0.1,rar"""
ABLATION = ABLATION_FLAGS.split()


def test_ablation_frechet_distance_of_covariances_that_commute():
    """Then it is the squared distance of the means and of the deviations along the common axes."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    a, b, mean = rng.uniform(0, 3, 5), rng.uniform(0, 3, 5), rng.normal(size=(2, 5))
    a[0] = 0  # a covariance without full rank
    found = ablation.frechet_distance(mean[0], axes * a @ axes.T, mean[1], axes * b @ axes.T)
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert found == pytest.approx(expected, abs=1e-6)


def test_ablation_frechet_distance_of_any_covariances():
    """The trace of the root of a product is the sum of the roots of its eigenvalues."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 1
    (mean_x, cov_x), (mean_y, cov_y) = ablation.moments(x), ablation.moments(y)
    centred = x - x.mean(0)
    np.testing.assert_allclose(cov_x, centred.T @ centred / 49)
    cross = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real).sum()
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y) - 2 * cross
    assert ablation.frechet_distance(mean_x, cov_x, mean_y, cov_y) == pytest.approx(expected)
    assert ablation.frechet_distance(mean_y, cov_y, mean_x, cov_x) == pytest.approx(expected)
    assert ablation.frechet_distance(mean_x, cov_x, mean_x, cov_x) == pytest.approx(0, abs=1e-6)


def test_ablation_distance_to_the_nearest_training_image():
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (5000, 4, 4, 3), dtype=np.uint8)  # more than one part
    images = np.concatenate([training[[4700, 3]], rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)])
    images[1, 0, 0, 0] ^= 16
    gaps = images[:, None].astype(float) - training
    expected = np.sqrt((gaps**2).mean((2, 3, 4))).min(1)
    found = ablation.nearest_distance(images, training, torch.device("cpu"))
    assert found == pytest.approx(expected, rel=1e-5) and found[0] == 0 and found[1] == pytest.approx(16 / 48**0.5)


def test_ablation_copies_share_most_tokens_with_one_training_image():
    training = torch.arange(40).view(2, 20)
    tokens = torch.stack([training[1], training[1], training[1], torch.cat([training[0, :10], training[1, 10:]])])
    tokens[1, 0] = tokens[2, :2] = 99  # 19 and 18 of 20 are equal; the last shares ten with each
    assert ablation.is_copy(tokens, training).tolist() == [True, True, False, False]


def test_ablation_guidance_is_chosen_on_one_half_and_reported_on_the_other():
    fd = {(1.0, 0): 5.0, (2.0, 0): 3.0, (3.0, 0): 4.0, (1.0, 1): 6.0, (2.0, 1): 9.0, (3.0, 1): 1.0}
    asked = []

    def sample(scale, half):
        asked.append((scale, half))
        return {"fd": fd[scale, half]}

    scale, plain, guided, _ = ablation.best_guidance([1.0, 2.0, 3.0], sample)
    assert (scale, plain["fd"], guided["fd"]) == (2.0, 6.0, 9.0)  # though 3 is better on half B
    assert (3.0, 1) not in asked
    assert ablation.best_guidance([1.0], sample)[2]["fd"] == 6.0


def test_ablation_crossing_is_found_between_two_budgets():
    epochs = [1, 4, 16]
    assert ablation.crossings(epochs, [3, 3, 1], [2, 2, 2]) == [pytest.approx(8)]  # halfway, in logarithms
    assert ablation.crossings(epochs, [3, 3, 3], [2, 2, 2]) == []
    assert ablation.crossings(epochs, [1, 3, 1], [2, 2, 2]) == [pytest.approx(2), pytest.approx(8)]


def test_ablation_variants_change_what_they_name():
    base = dict(steps=40, evaluations=4, dropout=0.2, flip=False, order="rar", anneal_start=0.5, anneal_end=0.75)
    assert ablation.variant_options(base, "rar") == base | dict(eval_every=10, save_every=10)
    found = ablation.variant_options(base, "raster+flip+drop0.1@20")
    assert found == base | dict(order="raster", flip=True, dropout=0.1, steps=20, eval_every=20, save_every=5)
    assert ablation.variant_options(base, "rar-75-100")["anneal_end"] == 1
    scans = {ablation.variant_options(base, f"rar-{scan}")["scan"] for scan in rar.SCANS[1:]}
    assert scans == set(rar.SCANS[1:])
    for wrong in ("", "rat", "rar+flop", "rar+drop", "rar+drop1.5", "rar@", "rar@0", "rar@x"):
        with pytest.raises(InputError, match="no variant"):
            ablation.variant_options(base, wrong)


def stamps(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.glob("*/*")}


def test_ablation_runs_in_miniature(mini, tmp_path):
    """All of it once; again, when nothing is repeated; and with one run's scores gone, by a worker of its own."""
    flags = [*ABLATION, "--data-dir", mini.data, "--out", tmp_path]
    call(ablation, *flags)
    variants = ["raster", "raster@4", "random", "rar", "rar+flip+drop0.1", "rar@4", "rar-spiral-in"]
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(dict.fromkeys(row["variant"] for row in rows)) == variants
    assert {(row["variant"], row["seed"]) for row in rows} == {
        (variant, seed) for variant in variants for seed in "01" if "@" not in variant or seed == "0"
    }
    assert all(math.isfinite(float(row[key])) for row in rows for key in ("nll", "nll_train", "fd", "distance"))
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for line in ("| real training", "| reconstructed", "| `rar-spiral-in` | 2.5 | 2 |", "- RAR / raster", "- val NLL"):
        assert line in table
    for name in ("samples.png", "crossing.png", "by_position.png", "inpainting.png", "orders.gif"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100
    before = stamps(tmp_path)
    call(ablation, *flags)
    assert stamps(tmp_path) == before
    (tmp_path / "random-1" / "scores.json").unlink()
    call(ablation, *flags, "--workers", "2")
    changed = {f.relative_to(tmp_path).parts[0] for f, when in stamps(tmp_path).items() if before.get(f) != when}
    assert changed == {"random-1"}
    assert (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()[:9] == table.splitlines()[:9]


def test_ablation_runs_are_those_of_train_tiny(mini, tmp_path):
    """The same tokens, options and seed give the same weights, also if killed; no mirror image is seen."""
    flags = [*ABLATION, "--data-dir", mini.data, "--out", tmp_path, "--crossing", "0", "--seeds", "1"]
    seen, forward = [], RAR.forward

    def watched(self, tokens, labels, orders=None):
        seen.extend(map(tuple, tokens.tolist()) if self.training else [])
        if len(seen) == 5 * 8:
            raise Killed
        return forward(self, tokens, labels, orders)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RAR, "forward", watched)
        with pytest.raises(Killed):
            call(ablation, *flags, "--variants", "rar")
        call(ablation, *flags, "--variants", "rar")
    assert len(seen) == (5 + 4) * 8  # the fifth step was not done, and goes on from the state after the fourth
    data = np.load(tmp_path / "data" / "tokens.npz")
    assert len(data["tokens"]) == 60 and {*seen} <= {tuple(t) for t in data["tokens"][:30].tolist()}
    plain = {key: data[key] for key in data.files} | {key: data[key][:30] for key in ("tokens", "labels")}
    np.savez(tmp_path / "tokens.npz", **plain)
    images, steps, evaluations = (ABLATION.index(name) for name in ("--images", "--steps", "--evaluations"))
    sizes = [*ABLATION[:images], *ABLATION[steps:evaluations]]
    recipe = ["--dropout", 0, "--lr", 3e-3, "--eval-every", 2, "--dtype", "float32", "--device", "cpu"]
    call(train_tiny, *sizes, *recipe, "--tokens", tmp_path / "tokens.npz", "--out", tmp_path / "alone")
    assert same_weights(tmp_path / "alone" / "rar.pt", tmp_path / "rar-0" / "rar.pt")


# ---------------------------------------------------------------------------------------------------------------------
# bad_input: one line that says what is wrong, exit code 2, nothing lost
# ---------------------------------------------------------------------------------------------------------------------


def refused(capsys, module, *argv: object, bars: bool = False) -> str:
    """The one line on stderr with which a script ends; with `bars`, the last one after progress bars."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        train_tiny.run_main(module.main)
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    assert end.value.code == 2 and "Traceback" not in "".join(lines)
    assert bars or len(lines) == 1
    return lines[-1]


TRAIN_REFUSES = {
    "unknown config": (["--config", "mnist"], "mnist"),
    "unknown order": (["--order", "sideways"], "sideways"),
    "unknown scan": (["--scan", "diagonal"], "diagonal"),
    "unknown option": (["--colour", "red"], "colour"),
    "no number": (["--steps", "many"], "steps"),
    "no steps": (["--steps", "0"], "steps"),
    "negative batch": (["--batch-size", "-3"], "batch-size"),
    "annealing backwards": (["--anneal-start", "0.9", "--anneal-end", "0.1"], "anneal"),
    "annealing beyond the end": (["--anneal-end", "1.5"], "anneal"),
    "learning rate 0": (["--lr", "0"], "lr"),
    "dropout 1": (["--dropout", "1"], "dropout"),
    "negative seed": (["--tokens", "TOKENS", "--seed", "-1"], "seed"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "no data": (["--config", "folder", "--data-dir", "nowhere"], "nowhere"),
    "no imagenet64": (["--config", "imagenet64", "--data-dir", "nowhere"], "nowhere"),
    "cifar10 of another size": (["--config", "cifar10", "--image-size", "64"], "32"),
    "size that cannot be halved": (["--config", "folder", "--data-dir", "DATA", "--image-size", "30"], "30"),
    "no tokens": (["--tokens", "nowhere.npz"], "nowhere.npz"),
    "resumed nothing": (["--resume"], "out"),
}


@pytest.mark.parametrize("case", TRAIN_REFUSES)
def test_bad_input_of_train_tiny(case, mini, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, word = TRAIN_REFUSES[case]
    argv = [{"DATA": mini.data, "TOKENS": mini.run / "tokens.npz"}.get(a, a) for a in argv]
    assert word in refused(capsys, train_tiny, *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "rar.pt").exists()


ABLATION_REFUSES = {
    "unknown variant": (["--variants", "raster,rat"], "rat"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "crossing beyond the end": (["--crossing", "2"], "crossing"),
    "no number": (["--guidance", "much"], "guidance"),
    "no samples": (["--samples", "0"], "samples"),
    "no data": (["--data-dir", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", ABLATION_REFUSES)
def test_bad_input_of_ablation(case, mini, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, word = ABLATION_REFUSES[case]
    assert word in refused(capsys, ablation, *ABLATION, "--data-dir", mini.data, "--out", tmp_path / "out", *argv)


def test_bad_input_of_ablation_in_the_folder_of_another_one(mini, tmp_path, capsys):
    flags = [*ABLATION, "--data-dir", mini.data, "--out", tmp_path, "--crossing", "0", "--seeds", "1"]
    call(ablation, *flags, "--variants", "raster")
    assert "--steps 8, not 9" in refused(capsys, ablation, *flags, "--steps", "9")


def test_bad_input_folders(mini, tmp_path, capsys):
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    argv = ["--config", "folder", "--image-size", 16, "--data-dir", tmp_path / "empty"]
    assert "no images" in refused(capsys, train_tiny, *argv, "--out", tmp_path / "1")
    (tmp_path / "empty" / "train" / "a" / "note.txt").write_text("not an image")
    (tmp_path / "empty" / "val" / "a").mkdir(parents=True)
    shutil.copy(sorted(mini.data.rglob("*.png"))[0], tmp_path / "empty" / "val" / "a")
    assert "note.txt" in refused(capsys, train_tiny, *argv, "--out", tmp_path / "2")
    (tmp_path / "file").write_text("in the way")
    tokens = mini.run / "tokens.npz"
    assert "file" in refused(capsys, train_tiny, "--tokens", tokens, "--out", tmp_path / "file" / "run")


def test_bad_input_can_be_mended(mini, tmp_path, capsys):
    """A refused run does not stand in the way of the same command with its mistake mended."""
    flags = [*FLAGS, "--steps", 1, "--tokenizer-steps", 1]
    refused(capsys, train_tiny, *flags, "--data-dir", tmp_path / "nowhere", "--out", tmp_path / "run")
    train(tmp_path / "run", *flags, "--data-dir", mini.data)
    assert (tmp_path / "run" / "rar.pt").exists()


def test_bad_input_leaves_an_old_run_as_it_is(mini, capsys):
    before = {f.name: f.stat().st_mtime_ns for f in mini.run.iterdir()}
    assert "--resume" in refused(capsys, train_tiny, *mini.flags, "--out", mini.run)
    message = refused(capsys, train_tiny, "--resume", "--out", mini.run, "--dim", 64)
    assert "dim" in message  # another architecture cannot go on
    assert before == {f.name: f.stat().st_mtime_ns for f in mini.run.iterdir()}


SAMPLE_REFUSES = {
    "class beyond the last": (["--classes", "3"], "'3'"),
    "unknown class": (["--classes", "ant,dragon"], "dragon"),
    "negative class": (["--classes=-1"], "-1"),
    "temperature 0": (["--temperature", "0"], "temperature"),
    "temperature below 0": (["--temperature", "-1"], "temperature"),
    "top-k beyond the codes": (["--top-k", "17"], "top_k"),
    "no images": (["--n", "0"], "--n"),
    "unknown order": (["--order", "sideways"], "sideways"),
    "no number": (["--seed", "x"], "seed"),
    "seed too large": (["--seed", str(2**70)], "seed"),
    "guidance that is no number": (["--guidance-scale", "nan"], "guidance"),
    "guidance power below 0": (["--guidance-scale", "3", "--guidance-power", "-1"], "power"),
    "picture of an unknown kind": (["--out", "sheet.xyz"], "xyz"),
    "mask outside": (["--inpaint", "IMAGE", "--mask", "4,4,20,8"], "20"),
    "mask inside out": (["--inpaint", "IMAGE", "--mask", "8,8,4,4"], "8,8,4,4"),
    "mask of three numbers": (["--inpaint", "IMAGE", "--mask", "1,2,3"], "1,2,3"),
    "mask without numbers": (["--inpaint", "IMAGE", "--mask", "all"], "all"),
    "no mask": (["--inpaint", "IMAGE"], "mask"),
    "mask alone": (["--mask", "4,0,12,8"], "--inpaint"),
    "two kinds of output": (["--npz", "a.npz"], "--out"),
    "order of a hole": (["--inpaint", "IMAGE", "--mask", "4,0,12,8", "--order", "random"], "--order"),
    "class with too many digits": (["--classes", "1" * 5000], "error: class '1"),
    "no image": (["--inpaint", "nowhere.png", "--mask", "0,0,4,4"], "nowhere.png"),
}


@pytest.mark.parametrize("case", SAMPLE_REFUSES)
def test_bad_input_of_sample(case, mini, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, word = SAMPLE_REFUSES[case]
    argv = [sorted(mini.data.rglob("*.png"))[0] if a == "IMAGE" else a for a in argv]
    argv = ["--out", "sheet.png", *argv]  # of an option given twice the last one counts
    assert word in refused(capsys, sample, "--run", mini.run, *argv, bars=True)
    assert not list(tmp_path.iterdir())


class Evil:
    """Pickled, this would make a folder as it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Large:
    """Pickled, this would take as much memory as it says; torch takes it for plain data."""

    def __reduce__(self):
        return bytearray, (1 << 20,)


def laughs() -> list:
    """A list that prints as 2^40 words."""
    return functools.reduce(lambda words, _: [words, words], range(40), ["ha"])


DAMAGES = ["missing", "empty", "truncated", "another kind", "cut weights", "lost weights", "wrong config", "pickle"]
DAMAGES += ["absurd config", "bomb", "large object", "laughs"]


@pytest.mark.parametrize("name", ["scan", "class_names", "guidance_scale"])
def test_bad_input_checkpoints_without_or_with_absurd_settings(name, mini, tmp_path, capsys):
    run = Path(shutil.copytree(mini.run, tmp_path / "run"))
    content = torch.load(run / "rar.pt", weights_only=True)
    without = {key: content[key] for key in content if key != name}
    for damaged in (without, without | {name: 7}, without | {name: laughs()}):
        torch.save(damaged, run / "rar.pt")
        for options in ([], ["--order", "random"]) if name == "scan" else ([],):
            refused(capsys, sample, "--run", run, "--out", tmp_path / "sheet.png", *options)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rar.pt", "tokenizer.pt"])
def test_bad_input_checkpoints(name, damage, mini, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(mini.run, run)
    file, content = run / name, torch.load(run / name, weights_only=True)
    if damage == "missing":
        file.unlink()
    elif damage in ("empty", "truncated"):
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -100])
    elif damage == "another kind":
        shutil.copy(mini.run / ("tokenizer.pt" if name == "rar.pt" else "rar.pt"), file)
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    elif damage == "wrong config":  # sizes that no network can have
        content["config"].update({"dim": 0} if name == "rar.pt" else {"groups": 5})
        torch.save(content, file)
    elif damage == "absurd config":
        content["config"].update({"depth": 10**9} if name == "rar.pt" else {"res_blocks": 10**9})
        torch.save(content, file)
    elif damage == "bomb":
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb", bytes(1 << 26))
    elif damage in ("large object", "laughs"):
        torch.save(content | {"kind": Large() if damage == "large object" else laughs()}, file)
    else:
        key = next(iter(content["weights"]))
        value = content["weights"].pop(key)
        if damage == "cut weights":
            content["weights"][key] = value[..., :-1].clone()
        torch.save(content, file)
    message = refused(capsys, sample, "--run", run, "--n", 1, "--out", tmp_path / "sheet.png")
    assert name in message and ("plain data" in message) == (damage in ("pickle", "large object"))
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "sheet.png").exists()


def test_bad_input_has_a_second_lock(monkeypatch, tmp_path):
    """What the scan of the pickle lets through is still not unpickled by torch: seen from torch's side of the door."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs))
    assert rar.load_data(tmp_path / "a.pt")["a"].sum() == 2
    assert [kwargs["weights_only"] for kwargs in asked] == [True]


UNFIT = {
    "state.pt": [
        lambda state: state.pop("model"),
        lambda state: state.update(stage="lunch"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step=10**9),
        lambda state: state.update(losses=[laughs()]),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=laughs()),
    ],
    "run.json": [
        lambda options: options.pop("lr"),
        lambda options: options.update(config="mnist"),
        lambda options: options.update(order="sideways"),
        lambda options: options.update(dim="16"),
        lambda options: options.update(eval_every=0),
        lambda options: options.update(device="meta"),
        lambda options: options.update(tokens=[[]]),
        lambda options: options.update(dim=1 << 40),
    ],
}


@pytest.fixture(scope="module")
def killed(mini) -> Path:
    """A run that was killed some steps after it had written a state.pt of the transformer."""
    train(mini.root / "killed", *mini.flags, stop_at=TOKENIZER_STEPS + 16)
    return mini.root / "killed"


@pytest.mark.parametrize("name, number", [(name, i) for name in UNFIT for i in range(len(UNFIT[name]))])
def test_bad_input_resumed_runs(name, number, killed, tmp_path, capsys):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    if name == "state.pt":
        content = torch.load(run / name, weights_only=True)
        UNFIT[name][number](content)
        torch.save(content, run / name)
    else:
        content = json.loads((run / name).read_text())
        UNFIT[name][number](content)
        (run / name).write_text(json.dumps(content))
    refused(capsys, train_tiny, "--resume", "--out", run, bars=True)
    (run / "run.json").write_text("[" * 100000)
    assert "run.json" in refused(capsys, train_tiny, "--resume", "--out", run)


def test_bad_input_weights_that_are_no_numbers():
    model = small_rar()
    torch.nn.init.constant_(model.lm_head.bias, math.nan)
    for scale in (1.0, 2.0):
        with pytest.raises(InputError, match="damaged"):
            model.generate(torch.tensor([0, 1]), guidance_scale=scale)


def test_bad_input_runs_that_do_not_fit_together(mini, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(mini.run, run)
    (run / "rar_random.pt").unlink()
    assert "random orders" in refused(capsys, sample, "--run", run, "--order", "z-curve")
    content = torch.load(run / "tokenizer.pt", weights_only=True)
    next(iter(content["weights"].values())).add_(1)
    torch.save(content, run / "tokenizer.pt")
    assert "tokenizer" in refused(capsys, sample, "--run", run, "--out", tmp_path / "sheet.png")
    assert "tokenizer" in refused(capsys, train_tiny, *FLAGS, "--tokens", run / "tokens.npz", "--out", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert "train_tiny.py" in refused(capsys, sample)  # no runs/ at all: says what to do


def test_bad_input_never_costs_what_was_there(tmp_path):
    """A file is written whole or not at all: a failure half way leaves the old one, and nothing beside it."""
    path = tmp_path / "file"
    train_tiny.write_atomically(path, lambda p: p.write_text("old"))

    def fails(p: Path) -> None:
        p.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match=rf"{re.escape(str(path))} cannot .* \(disk full\)"):
        train_tiny.write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("field", ["dim", "heads", "codebook_size", "num_classes", "seq_len"])
def test_bad_input_sizes_of_a_model(field):
    sizes = dict(codebook_size=7, num_classes=3, seq_len=9, dim=16, heads=2)
    for value in (0, -1):
        with pytest.raises(InputError):
            RARConfig(**sizes | {field: value})
    with pytest.raises(InputError):
        RARConfig(**sizes | dict(heads=3))


def test_bad_input_of_a_real_process(tmp_path):
    """The script itself, not its main: exit code 2 and one line."""
    script = Path(train_tiny.__file__)
    done = subprocess.run(
        [sys.executable, script, "--config", "mnist"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "mnist" in done.stderr
    assert not list(tmp_path.iterdir())
