"""Every claim about RAR, tested on a CPU without network. `pytest -x --tb=short -k NAME` runs one concept.

Concepts, in the paper's order: random_ratio, sample_orders, position_rows, target_aware, scan_order, causal, qk_norm,
loss_alignment, likelihood, guidance, cache, merge, prefix, null_class, dropout, parameter_counts, golden,
worked_example, vq, codebook; then those of the scripts: schedule, data, images, tokens, run, resume, processes, sample,
released, ablation, bad_input. What is expected comes from elsewhere: brute force, numbers worked out by hand, numbers
of the authors' program (benchmarks/golden.json), or the same result without the cache.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import rar
import sample as sample_script
import train_tiny
from rar import RAR, Cache, InputError, RARConfig, guidance_at, random_ratio, sample_orders, scan_order
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, codes_used, flatten_latents

torch.set_num_threads(1)  # everything here is tiny

SHUFFLED = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])  # an order of nine positions that is none of the scans
ADALN = pytest.mark.parametrize("adaln", [True, False])
ORDER = pytest.mark.parametrize("order", [torch.arange(9), SHUFFLED])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@torch.no_grad()
def fill(model, std):
    """Random values in every parameter: a fresh adaLN is zero, and a zero would hide mistakes."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        is_norm = p.dim() == 1 and name.endswith("weight")
        p.normal_(float(is_norm), std)
    return model.eval()


def small_rar(V=7, C=3, T=9, std=0.3, **options):
    """A model of width 16 for V codes, C classes and T tokens."""
    return fill(RAR(RARConfig(V, C, T, 16, 2, 2, 24, **options)), std)


def random_input(T=9):
    """Five images: tokens in raster layout, labels, and an order for each."""
    return torch.randint(7, (5, T)), torch.tensor([1, 3, 0, 1, 2]), torch.rand(5, T).argsort(1)


@torch.no_grad()
def logits_of(model, tokens, labels, orders):
    """Logits (B, T, V) as in training: the tokens (B, T) are put into their order, and all but the last are fed."""
    orders = orders.expand(tokens.shape)
    return model(tokens.gather(1, orders)[:, :-1], labels, orders)


@torch.no_grad()
def feels(model, row, inputs):
    """Which logits, (B, T), depend on this row of a table."""
    before = logits_of(model, *inputs)
    row.neg_()
    after = logits_of(model, *inputs)
    row.neg_()
    return (after - before).abs().amax(2) > 1e-4


def assert_close(found, expected, claim, tolerance=1e-4):
    __tracebackhide__ = True  # pytest shows the line of the test instead
    assert found.shape == expected.shape, f"{claim} (shape {tuple(found.shape)}, not {tuple(expected.shape)})"
    error = (found - expected).abs().max().item()
    assert error <= tolerance, f"{claim} (off by {error:.3g})"


# ---------------------------------------------------------------------------------------------------------------------
# random_ratio: Eq. 5
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, r", [(0, 1), (50, 1), (55, 0.8), (62.5, 0.5), (75, 0), (100, 0)])
def test_random_ratio_of_eq_5(step, r):
    found = random_ratio(step, 50, 75)
    assert found == pytest.approx(r), f"annealing from step 50 to 75: at step {step}, r must be {r}, not {found}"


def test_random_ratio_corners_of_table_2():
    assert random_ratio(0, 0, 0) == 0, "start = end = 0 is raster order throughout"
    assert random_ratio(399, 400, 400) == 1, "start = end = 400 of 400 steps is random order throughout"


# ---------------------------------------------------------------------------------------------------------------------
# sample_orders: Sec. 3.2, Eq. 3
# ---------------------------------------------------------------------------------------------------------------------


@ORDER
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_sample_orders_are_random_with_probability_r(order, ratio):
    orders = sample_orders(20000, 9, ratio, base_order=order)
    valid = orders.sort(1).values.equal(torch.arange(9).expand(20000, 9))
    assert valid, "each sample needs an order of its own that visits each position once"
    share = (orders != order).any(1).float().mean().item()
    claim = f"with r = {ratio}, {ratio:.0%} of the samples leave the base order, not {share:.0%}"
    assert abs(share - ratio) < 0.017, f"{claim}: each sample draws for itself, not the batch as a whole"


def test_sample_orders_are_uniform_over_all_permutations():
    _, counts = sample_orders(24000, 4, 1.0).unique(dim=0, return_counts=True)
    chi2 = ((counts - 1000) ** 2 / 1000).sum().item()  # 23 on average, above 58 once in 10,000 draws
    assert chi2 < 58, "with r = 1 each sample draws its own order, and all 24 orders of four are equally likely"


# ---------------------------------------------------------------------------------------------------------------------
# position_rows and target_aware: Sec. 3.2, Eq. 4, Fig. 3b
# ---------------------------------------------------------------------------------------------------------------------


def test_target_aware_position_rows_by_hand():
    own, upcoming = rar.position_rows(torch.tensor([[2, 0, 3, 1]]))
    claim = "order 2, 0, 3, 1: rows 0 and 1 are for cls and the class, row i + 2 for a token at position i"
    assert own.tolist() == [[0, 1, 4, 2, 5]], f"{claim}; the last token is never an input"
    claim = "order 2, 0, 3, 1: the class is told that position 2 is next (row 4), the token there that 0 is (row 2)"
    assert upcoming.tolist() == [[4, 2, 5, 3]], claim


@ADALN
def test_target_aware_rows_come_in_where_they_belong(adaln):
    model = small_rar(adaln=adaln)
    inputs = (*random_input()[:2], SHUFFLED)
    for step, i in enumerate(SHUFFLED[:8].tolist()):
        found = feels(model, model.target_aware_pos_embed[0, 2 + i], inputs).any(0).int().argmax().item()
        claim = f"position {i} is predicted next, but its target-aware embedding was not added to the element before it"
        assert found == step, f"{claim}: step {step} must feel it first, not step {found} (Eq. 4)"
        found = feels(model, model.pos_embed[0, 2 + i], inputs).any(0).int().argmax().item()
        claim = f"the token at position {i} must bring its own position embedding along, in any order"
        assert found == step + 1, f"{claim}: step {step + 1} must feel it first, not step {found}"


@pytest.mark.parametrize("target_aware", [True, False])
def test_target_aware_tells_orders_with_a_shared_prefix_apart(target_aware):
    model, orders = small_rar(T=5, target_aware=target_aware), torch.tensor([[2, 0, 3, 1, 4], [2, 0, 4, 3, 1]])
    first, second = logits_of(model, torch.ones(2, 5).long(), torch.tensor([1, 1]), orders)[:, 2]
    differ = (first - second).abs().max().item() > 0.1
    claim = "two orders begin 2, 0 and go on to 3 or 4: only Eq. 4 makes their logits for these two positions differ"
    assert differ == target_aware, f"{claim} (Fig. 3b)"


# ---------------------------------------------------------------------------------------------------------------------
# scan_order: Fig. 6, Tab. 3. The grids say when each cell is visited, row by row, as the figure does.
# ---------------------------------------------------------------------------------------------------------------------

FIG_6 = {
    "row-major": "0 1 2 3   4 5 6 7   8 9 10 11   12 13 14 15",
    "spiral-in": "0 11 10 9   1 12 15 8   2 13 14 7   3 4 5 6",
    "spiral-out": "15 4 5 6   14 3 0 7   13 2 1 8   12 11 10 9",
    "z-curve": "0 1 4 5   2 3 6 7   8 9 12 13   10 11 14 15",
    "subsample": "0 4 1 5   8 12 9 13   2 6 3 7   10 14 11 15",
    "alternate": "0 1 2 3   7 6 5 4   8 9 10 11   15 14 13 12",
}


@pytest.mark.parametrize("name", FIG_6)
def test_scan_order_is_that_of_fig_6(name):
    visited = torch.tensor([int(number) for number in FIG_6[name].split()])
    assert scan_order(name, 4).tolist() == visited.argsort().tolist(), f"{name} on a 4x4 grid is not as in Fig. 6"


@pytest.mark.parametrize("name", FIG_6)
def test_scan_order_of_grids_of_any_side(name):
    for side in range(2, 18, 2) if name == "subsample" else range(1, 18):
        order = scan_order(name, side)
        assert sorted(order.tolist()) == list(range(side**2)), f"{name} visits each cell of a {side}x{side} grid once"
        steps = (order // side).diff().abs() + (order % side).diff().abs()
        walks = bool((steps == 1).all()) or name in ("row-major", "z-curve", "subsample")
        assert walks, f"{name} on a {side}x{side} grid must move to a neighbouring cell, but it jumps"


def test_scan_order_z_curve_of_a_larger_grid():
    quadrants = [2 * (i // 32) + i % 8 // 4 for i in scan_order("z-curve", 8).tolist()]
    assert quadrants == sorted(quadrants), "the z-curve must finish a quadrant of an 8x8 grid before the next"


# ---------------------------------------------------------------------------------------------------------------------
# causal: Eq. 1 and 3
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
def test_causal_in_any_order(adaln):
    model = small_rar(V=8, adaln=adaln)
    tokens, labels, _ = random_input()
    before = logits_of(model, tokens, labels, SHUFFLED)
    for t in range(8):
        changed = tokens.clone()
        changed[:, SHUFFLED[t]] += 1
        change = (logits_of(model, changed, labels, SHUFFLED) - before).abs().amax((0, 2))
        claim = f"the token of step {t} must reach the logits of all later steps, and of no step up to {t} itself"
        assert (change > 1e-5).tolist() == [step > t for step in range(9)], claim


# ---------------------------------------------------------------------------------------------------------------------
# qk_norm: QK-LayerNorm, Sec. 4.1
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, what", [(0, "queries"), (1, "keys")])
@torch.no_grad()
def test_qk_norm_takes_the_size_out_of_queries_and_keys(part, what):
    model, inputs = small_rar(std=1.0), random_input()
    before = logits_of(model, *inputs)
    for name, p in model.named_parameters():
        if "qkv" in name:
            p.view(3, 16, -1)[part] *= 5
    claim = f"{what} are normalised before the attention product, so {what} five times as large must change nothing"
    assert_close(logits_of(model, *inputs), before, claim, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# loss_alignment: what each logit predicts
# ---------------------------------------------------------------------------------------------------------------------


@ORDER
@torch.no_grad()
def test_loss_alignment_of_a_model_that_knows_one_image(order):
    """By hand: position i has channel i in the target-aware table, and the head turns channel i into the token at i."""
    model, image = small_rar(V=9, std=0), torch.tensor([3, 1, 4, 8, 5, 0, 2, 6, 7])
    model.target_aware_pos_embed[0, 2:11, :9] = torch.eye(9)
    model.lm_head.weight[image, torch.arange(9)] = 1
    logits = logits_of(model, image[None], torch.tensor([0]), order)[0]
    # LayerNorm turns the 1 into sqrt(15) and each of the 15 zeros into -1/sqrt(15), which are 16/sqrt(15) apart
    by_hand = math.log(1 + 8 * math.exp(-16 / math.sqrt(15)))
    loss = F.cross_entropy(logits, image[order])
    claim = f"logits[:, t] must predict the token at orders[:, t]: then the loss is {by_hand:.3f}, not {loss:.3f}"
    assert_close(loss, torch.tensor(by_hand), claim)


# ---------------------------------------------------------------------------------------------------------------------
# likelihood: Eq. 3 factorises one distribution in every order
# ---------------------------------------------------------------------------------------------------------------------


def probabilities(model, order, V, temperature=1.0):
    """All images of V codes along the order, and the probability of each by the product of Eq. 3."""
    images = torch.tensor(list(itertools.product(range(V), repeat=len(order))))
    logits = logits_of(model, images, torch.ones(len(images)).long(), order) / temperature
    log_p = logits.log_softmax(-1).gather(2, images[:, order, None])
    return images, log_p.sum((1, 2)).exp()


def test_likelihood_of_all_images_sums_to_one_in_every_order():
    model = small_rar(V=3, T=4, std=0.5)
    for order in itertools.permutations(range(4)):
        total = probabilities(model, torch.tensor(order), 3)[1].sum().item()
        assert total == pytest.approx(1, abs=1e-5), f"in order {order} the 81 images have probability {total} together"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_likelihood_and_guidance_temperature_agree_with_samples(temperature):
    model, order = small_rar(V=2, T=3, std=0.2), torch.tensor([2, 0, 1])
    images, expected = probabilities(model, order, 2, temperature)
    drawn = model.generate(torch.ones(20000).long(), order=order, temperature=temperature)
    found = (drawn[:, None] == images).all(2).float().mean(0)
    claim = f"images must be drawn as often as Eq. 3 says for logits / {temperature}, and come back in raster layout"
    assert_close(found, expected, claim, 0.018)  # five deviations


# ---------------------------------------------------------------------------------------------------------------------
# guidance: classifier-free, power-cosine, Sec. 4.1; and how a code is drawn
# ---------------------------------------------------------------------------------------------------------------------

GUIDANCE = [  # step, T, scale, power, and the guidance at that step
    (1, 4, 3.0, 1.0, 1.292893),  # 1 + 2 * (1 - cos 45 degrees) / 2
    (128, 256, 16.0, 2.75, 1.803078),  # 1 + 7.5 * (1 - cos(pi * 0.1486509))
    (0, 4, 5.0, 0.0, 5.0),  # power 0 is constant, from the first step on
]


@pytest.mark.parametrize("step, seq_len, scale, power, expected", GUIDANCE)
def test_guidance_at_by_hand(step, seq_len, scale, power, expected):
    found = guidance_at(step, seq_len, scale, power)
    claim = f"scale {scale}, power {power}: at step {step} of {seq_len} guidance is {expected}, not {found}"
    assert found == pytest.approx(expected, abs=1e-5), claim


@pytest.mark.parametrize("scale, power, K", [(1, 0, 4), (6, 1.5, 0), (6, 1.5, 4)])
def test_guidance_mixes_two_branches(scale, power, K):
    model, labels, prefix = small_rar(V=40, C=17), torch.arange(17), torch.randint(40, (17, K))
    options = dict(guidance_scale=scale, guidance_power=power, temperature=1e-5)  # so cold that the best code is drawn
    tokens = model.generate(labels, order=SHUFFLED, prefix=prefix, **options)
    given = logits_of(model, tokens, labels, SHUFFLED)
    null = logits_of(model, tokens, torch.full((17,), 17), SHUFFLED)
    s = torch.tensor([[guidance_at(t, 9, scale, power)] for t in range(9)])
    best = (null + s * (given - null)).argmax(-1)
    claim = f"{K} known tokens: step t must draw from null + s * (conditional - null), s = guidance_at(t, ...), where t"
    assert_close(tokens[:, SHUFFLED[K:]], best[:, K:], f"{claim} counts from the start of the order", 0)


def test_guidance_top_k_keeps_the_likeliest():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.7]]).expand(5000, 4)
    for k in range(1, 5):
        drawn = rar.sample_codes(logits, k, None).unique().tolist()
        likeliest = sorted([3, 1, 2, 0][:k])
        assert drawn == likeliest, f"top_k = {k} must draw from the {k} likeliest codes {likeliest}, not from {drawn}"


# ---------------------------------------------------------------------------------------------------------------------
# cache: sampling step by step computes what one forward pass does
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
@pytest.mark.parametrize("known", [range(41), [0, 1, 5, 6, 33, 40]])
@torch.no_grad()
def test_cache_gives_the_logits_of_one_forward_pass(adaln, known):
    """41 tokens are more than modulations are computed ahead (LOOKAHEAD). Each call knows some more of them."""
    model = small_rar(T=41, adaln=adaln)
    tokens, labels, orders = random_input(41)
    expected = logits_of(model, tokens, labels, orders)
    cache, done = Cache(model, 5), 0
    for n in known:
        found = model(tokens.gather(1, orders)[:, :n], labels, orders, cache)
        claim = f"with a cache the logits of steps {done} to {n} are not those of one forward pass"
        assert_close(found, expected[:, done : n + 1], claim)
        done = n + 1


@ADALN
@ORDER
@pytest.mark.parametrize("K", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cache_draws_the_tokens_of_uncached_sampling(adaln, order, K, scale):
    model, labels = small_rar(adaln=adaln), torch.tensor([0, 2, 3, 1])
    options = dict(order=order, prefix=torch.randint(7, (4, K)), guidance_scale=scale, guidance_power=1.0)
    cached = model.generate(labels, generator=torch.Generator().manual_seed(0), **options)
    naive = model.generate(labels, generator=torch.Generator().manual_seed(0), use_cache=False, **options)
    assert_close(cached, naive, f"after {K} known tokens, sampling with the cache draws other codes than without", 0)


@pytest.mark.parametrize("use_cache, expected", [(True, [5, 1, 1, 1]), (False, [5, 6, 7, 8])])
def test_cache_runs_one_element_a_step(use_cache, expected):
    model, lengths = small_rar(T=7), []
    model.blocks[0].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.generate(torch.tensor([0]), prefix=torch.ones(1, 3).long(), use_cache=use_cache)
    claim = "3 known tokens: the first step runs cls, the class and these, later ones one element, or all without cache"
    assert lengths == expected, claim


# ---------------------------------------------------------------------------------------------------------------------
# merge: both tables in one for a fixed order, Sec. 3.2
# ---------------------------------------------------------------------------------------------------------------------


@ADALN
@ORDER
def test_merge_leaves_the_logits_of_one_order(adaln, order):
    inputs = (*random_input()[:2], order)
    before = logits_of(small_rar(adaln=adaln), *inputs)
    merged = small_rar(adaln=adaln).merge_position_embeddings(order)
    assert "target_aware_pos_embed" not in merged.state_dict(), "after merging there must be one table"
    claim = "merging must not change the logits of its order: a row gets the target-aware row of the next position"
    assert_close(logits_of(merged, *inputs), before, claim)


# ---------------------------------------------------------------------------------------------------------------------
# prefix: known tokens, which is all that inpainting needs
# ---------------------------------------------------------------------------------------------------------------------


@ORDER
@pytest.mark.parametrize("K", [1, 4, 9])
def test_prefix_keeps_its_positions(order, K):
    prefix = torch.randint(7, (3, K))
    drawn = small_rar().generate(torch.tensor([0, 1, 2]), order=order, prefix=prefix)
    claim = f"the {K} known tokens must come back at the first {K} positions of the order, in raster layout"
    assert_close(drawn[:, order[:K]], prefix, claim, 0)


def test_prefix_inpainting_order_visits_known_cells_first():
    order, _ = rar.inpainting_order(torch.arange(60) % 3 == 1)
    expected = sorted(range(60), key=lambda i: i % 3 != 1)
    assert order.tolist() == expected, "the known cells come first, then the others, both in raster order"


# ---------------------------------------------------------------------------------------------------------------------
# null_class and dropout
# ---------------------------------------------------------------------------------------------------------------------


def test_null_class_is_label_C_and_has_a_row_of_its_own():
    model = small_rar(adaln=False)
    inputs = torch.ones(4, 9).long(), torch.arange(4), SHUFFLED
    for label in range(4):
        found = feels(model, model.embeddings.weight[8 + label], inputs).all(1).nonzero().flatten().tolist()
        claim = f"7 codes, a mask token, 3 classes, null class 3: row {8 + label} is that of label {label}, in front of"
        assert found == [label], f"{claim} all tokens, so all steps depend on it, but here they do for labels {found}"


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropout_of_labels_has_the_right_rate(rate):
    labels = torch.arange(20000) % 17
    dropped = rar.drop_labels(labels, 17, rate)
    share = (dropped == 17).float().mean().item()
    assert abs(share - rate) < 0.011, f"{rate:.0%} of the labels must become the null class, not {share:.1%}"
    assert_close(dropped, labels.where(dropped != 17, 17), "labels that are not dropped must stay as they are", 0)


@pytest.mark.parametrize("option", ["dropout", "attn_dropout"])
def test_dropout_is_on_in_training_and_off_in_eval(option):
    model, inputs = small_rar(**{option: 0.5}), random_input()
    expected = logits_of(small_rar(), *inputs)
    assert_close(logits_of(model, *inputs), expected, f"{option} must be off in eval mode")
    change = (logits_of(model.train(), *inputs) - expected).abs().max().item()
    assert change > 0.01, f"{option} of 0.5 must change the logits in training mode"


# ---------------------------------------------------------------------------------------------------------------------
# parameter_counts: Tab. 1 and 6
# ---------------------------------------------------------------------------------------------------------------------

TABLE_1 = [  # width, depth, mlp; guidance scale, power, temperature; millions of parameters
    "rar_b 768 24 3072 16.0 2.75 1.0 261",
    "rar_l 1024 24 4096 15.5 2.5 1.02 461",
    "rar_xl 1280 32 5120 6.9 1.5 1.02 955",
    "rar_xxl 1408 40 6144 8.0 1.2 1.02 1499",
]


@pytest.mark.parametrize("row", TABLE_1)
def test_parameter_counts_of_table_1(row):
    name, *numbers = row.split()
    *expected, millions = map(float, numbers)
    found = [*rar.TABLE_1[name].values(), *sample_script.TABLE_6[expected[0]].values()]
    assert found == expected, f"sizes and settings of {name} are not those of Tab. 1 and 6"
    with torch.device("meta"):  # sizes without memory
        model = RAR(RARConfig(1024, 1000, 256, heads=16, **rar.TABLE_1[name]))
    count = sum(p.numel() for p in model.parameters()) / 1e6  # Tab. 1 rounds 260.9 up and 461.7 down
    assert abs(count - millions) < 0.7, f"{name} must have {millions} million parameters, not {count:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# golden: what the authors' program computes with weights in the released layout
# ---------------------------------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "benchmarks" / "golden.json").read_text())


def released(keys, std):
    """The weights behind the golden numbers: each tensor follows from its name."""
    weights = {}
    for name, shape in GOLDEN[keys].items():
        w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * std
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = torch.from_numpy(w + is_norm).float()
    return weights


@pytest.mark.parametrize("case", ["raster", "permuted", "uncond", "plain"])
def test_golden_logits(case):
    model = RAR.from_released(released("plain_keys" if case == "plain" else "rar_keys", 0.2))
    tokens = torch.tensor(GOLDEN["rar"]["tokens"])
    labels, orders, expected = (torch.tensor(numbers) for numbers in GOLDEN["rar"][case].values())
    logits = logits_of(model, tokens, labels, orders)
    claim = f"{case} logits are not those of the authors' program; a small error may be a detail: exact GELU, eps 1e-6"
    assert_close(logits, expected, claim, 2e-4)


@pytest.mark.parametrize("case, scale", [("greedy_cfg", 3.0), ("greedy_nocfg", 1.0)])
def test_golden_greedy_tokens(case, scale):
    model = RAR.from_released(released("rar_keys", 0.2))
    expected = torch.tensor(GOLDEN["rar"][case])
    found = model.generate(torch.tensor([3, 3, 2]), guidance_scale=scale, guidance_power=1.5, temperature=1e-5)
    assert_close(found, expected, f"{case}: the authors' program draws other tokens", 0)


@torch.no_grad()
def test_golden_tokenizer():
    golden = GOLDEN["tokenizer"]
    weights = released("tokenizer_keys", 0.1)
    model = VQTokenizer.from_released(weights, image_size=16)
    images = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 16, 16)).float()
    claim = "output is not that of the authors' program"
    assert_close(model.encoder(images), torch.tensor(golden["h"]), f"the encoder's {claim}", 2e-4)
    tokens = model.encode(images)
    assert tokens.tolist() == golden["indices"], "the authors' program gives these images other tokens"
    pixels = model.decoder(model.quantize.lookup(tokens, 4))[:, :, ::5, ::5]
    assert_close(pixels, torch.tensor(golden["recon"]), f"the decoder's {claim}", 2e-4)
    half = VQTokenizer.from_released(weights, torch.bfloat16, image_size=16)
    share = (half.encode(images) == tokens).float().mean().item()
    assert share > 0.7, f"in bfloat16 most tokens stay as they are, but only {share:.0%} do"


def test_golden_modulation_is_not_rounded_by_autocast():
    x, scale = torch.randn(50, 16), torch.linspace(-0.1, 0.1, 16).bfloat16()  # as linear layers return it
    with torch.autocast("cpu", torch.bfloat16):
        found = rar.modulate(x, scale, scale)
    assert_close(found, x * (1 + scale.float()) + scale.float(), "autocast must not round 1 + scale to bfloat16", 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# worked_example: what `python rar.py` prints beside Fig. 3
# ---------------------------------------------------------------------------------------------------------------------


def test_worked_example_holds_together():
    text = rar.worked_example()
    layout, order = (json.loads(numbers) for numbers in re.findall(r"\[\d+, .*?\]", text))
    tokens = [str(layout[i]) for i in order]
    predicted = re.findall(r"token (\d+) at position \d", text)
    assert predicted == tokens, "the elements must predict the tokens of the image in the order that was drawn"
    for token, line in zip(tokens, text.splitlines()[-3:]):
        assert f"token {token} " in line, "an element must be fed the token that the element before it predicts"


# ---------------------------------------------------------------------------------------------------------------------
# vq: the tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def small_vq(codes=12):
    """A tokenizer of 8x8 images to 4x4 tokens, and three images."""
    model = fill(VQTokenizer(VQConfig(8, codes, 4, 8, (1, 2))), 0.3)
    return model, torch.rand(3, 3, 8, 8)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_vq_chooses_the_nearest_code(autocast):
    quantizer = small_vq(1024)[0].quantize
    latents = torch.randn(500, 4)
    nearest = (latents[:, None] - quantizer.embedding.weight).square().sum(2).argmin(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = quantizer.nearest_codes(latents)
    claim = "a latent did not get its nearest code: |z - c|^2 depends on |c|^2 too, and autocast must not round it"
    assert_close(found, nearest, claim, 0)


@torch.no_grad()
def test_vq_round_trip():
    model, images = small_vq()
    tokens = torch.randint(12, (3, 16))
    codes = model.quantize.lookup(tokens, 4)
    expected = model.quantize.embedding.weight[tokens[:, 11]]
    assert_close(codes[:, :, 2, 3], expected, "tokens are row-major: token 11 of a 4x4 grid is in row 2, column 3")
    again = model.quantize(codes)[1]
    assert_close(again, tokens, "each code is the one nearest to itself, so its token must come back", 0)
    reconstruction = model(images)[0].clamp(0, 1)
    assert_close(model.decode(model.encode(images)), reconstruction, "decode must give what training sees, in 0..1")


def test_vq_straight_through():
    quantizer = small_vq()[0].quantize
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    codes, tokens = quantizer(latents)
    assert_close(codes, quantizer.lookup(tokens, 4), "forwards, each latent must be replaced by its nearest code")
    assert codes.requires_grad, "no gradient passes the quantizer, so the encoder learns nothing"
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    assert_close(latents.grad, weights, "backwards, the gradient must reach the latents as if they were the codes")


def test_vq_commitment_pulls_the_encoder_towards_the_codes():
    model, images = small_vq()
    loss = model(images)[1]["commitment"]
    assert loss.requires_grad, "the commitment loss must reach the encoder"
    loss.backward()
    apart = (model.encoder(images) - model.quantize.lookup(model.encode(images), 4)).detach()
    claim = "the gradient of commitment must be 2 (latent - code) / N: it pulls latents to their codes"
    assert_close(model.encoder.conv_out.bias.grad, 2 * apart.sum((0, 2, 3)) / apart.numel(), claim)


# ---------------------------------------------------------------------------------------------------------------------
# codebook: moving averages, restarts, start, use
# ---------------------------------------------------------------------------------------------------------------------


def test_codebook_moving_average_by_hand():
    codes = torch.tensor([[1.0], [2.0]])
    latents = torch.tensor([[3.0], [5.0], [1.0]])
    ema = CodebookEMA(torch.tensor([2.0, 4.0]), torch.tensor([[2.0], [8.0]]), decay=0.5)
    ema.update(codes, latents, torch.tensor([0, 0, 1]))
    claim = "3 latents for 2 codes are 1.5 a code, so 2 and 1 of them count 4/3 and 2/3; decay 0.5 goes half way there"
    assert ema.counts.tolist() == pytest.approx([5 / 3, 7 / 3]), claim
    claim = "sums of latents, 8 and 1, are divided by 1.5 as well, and a code is its sum divided by its count"
    assert codes.flatten().tolist() == pytest.approx([11 / 5, 13 / 7]), claim


def test_codebook_restarts_dead_codes_and_no_others():
    codes = torch.tensor([0.0, 1.0, 2.0, 50.0])[:, None]
    counts = torch.tensor([1.0, 1.0, 1.0, 0.001])
    ema = CodebookEMA(counts, codes * counts[:, None], decay=0.9)
    ema.update(codes, torch.arange(2.0)[:, None], torch.arange(2))  # latents 0 and 1 choose codes 0 and 1
    *used, dead = codes.flatten().tolist()
    assert dead in (0, 1), f"a code with a count of almost 0 must restart at one of the latents, not stay at {dead}"
    assert used == pytest.approx([0, 1, 2]), "a code in use must not restart, even if it misses a batch as code 2 does"


def means(latents, tokens):
    """The mean of all latents that chose the same code, for each latent."""
    return torch.stack([latents[tokens == token].mean(0) for token in tokens])


@pytest.mark.parametrize("count", [8, 40])
def test_codebook_starts_from_the_data(count):
    quantizer = small_vq(count)[0].quantize
    latents = torch.randn(20, 4)
    ema = CodebookEMA.from_latents(quantizer, latents)
    codes = quantizer.embedding.weight
    tokens = quantizer.nearest_codes(latents)
    claim = f"each of {count} codes must start at the mean of those of the 20 latents that it is nearest to (k-means)"
    assert_close(codes[tokens], means(latents, tokens), claim)
    assert_close(ema.sums / ema.counts[:, None], codes, "the statistics must agree with the codes from the start")


@torch.no_grad()
def test_codebook_follows_each_batch_that_trains():
    model, images = small_vq()
    latents = flatten_latents(model.encoder(images))
    tokens = model.encode(images).flatten()
    codes = model.quantize.embedding.weight
    model(images, CodebookEMA(torch.ones(12), codes.clone(), decay=0.0))
    claim = "without memory (decay 0), a code must become the mean of the latents of the batch that chose it"
    assert_close(codes[tokens], means(latents, tokens), claim)


def test_codebook_use_is_counted():
    assert codes_used(torch.tensor([[0, 3, 3], [0, 0, 7]]), 12) == 0.25, "tokens 0, 3 and 7 are a quarter of 12 codes"


# ---------------------------------------------------------------------------------------------------------------------
# bad_input: the message names the value that is wrong
# ---------------------------------------------------------------------------------------------------------------------


def sample(labels=(0, 1), **options):
    small_rar().generate(torch.tensor(labels), **options)


REFUSED = {
    "temperature must be above 0, got -1": lambda: sample(temperature=-1),
    "top_k must lie in 1..7, got 8": lambda: sample(top_k=8),
    "order must be a permutation of 0..8": lambda: sample(order=torch.arange(8)),
    "prefix must be (2, K) with K <= 9, got (3, 4)": lambda: sample(prefix=torch.ones(3, 4).long()),
    "prefix tokens must lie in 0..6": lambda: sample(prefix=torch.full((2, 4), 7)),
    "labels must lie in 0..2, or be 3": lambda: sample(labels=(0, 4)),
    "even grid, this one is 3x3": lambda: scan_order("subsample", 3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_named_in_the_message(message):
    with pytest.raises(InputError, match=re.escape(message)):
        REFUSED[message]()


def test_readme_line_ranges_are_those_of_rar_py():
    readme, source = (Path(__file__).with_name(name).read_text() for name in ("README.md", "rar.py"))
    for first, last, names in re.findall(r"\n\| (\d+)-(\d+) \| (.*?):", readme):
        part = "\n".join(source.splitlines()[int(first) - 1 : int(last)])
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(def|class) {name}\b", part), f"{name} is not in lines {first} to {last} of rar.py"


# ---------------------------------------------------------------------------------------------------------------------
# schedule: pure functions of the step (Sec. 4.1)
# ---------------------------------------------------------------------------------------------------------------------


def test_schedule_of_the_learning_rate():
    found = [train_tiny.learning_rate(step, 100, 1.0, 0.2) for step in (0, 9, 20, 60, 100)]
    by_hand = [1 / 21, 10 / 21, 1, (1 + 0.025) / 2, 0.025]
    assert found == pytest.approx(by_hand), "it rises in a line to the peak, then falls on a cosine to 1/40 of it"


def test_schedule_of_batches():
    epochs = np.concatenate([train_tiny.batch_indices(step, 4, 10, seed=0) for step in range(10)]).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all(), "an epoch must visit every sample once"
    assert len(np.unique(epochs, axis=0)) == 4, "each epoch must have an order of its own"


def test_schedule_of_weight_decay():
    model = RAR(RARConfig(5, 2, 4, 8, 1, 2, 8))
    optimizer = train_tiny.adamw(model, 0.03)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        free = any(word in name for word in ("bias", "norm", "embed", "adaln_before_head"))
        assert decay.get(id(p)) == (0 if free else 0.03), f"wrong weight decay for {name}"


# ---------------------------------------------------------------------------------------------------------------------
# data: one test for each reader, on small files written here
# ---------------------------------------------------------------------------------------------------------------------


def planar_noise(count, side, seed):
    """Random images (N, S, S, 3) and the same as rows of planar pixels (N, 3 * S * S)."""
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, images.transpose(0, 3, 1, 2).reshape(count, -1)


def test_data_digits(monkeypatch):
    images, labels, _ = train_tiny.load_images("digits", "val")
    assert np.bincount(labels).tolist() == [100] * 10, "every digit must occur equally often"
    monkeypatch.setattr(np, "arange", lambda count, arange=np.arange: arange(20))  # the first 20 images are enough
    again, train = (train_tiny.load_images("digits", split)[0] for split in ("val", "train"))
    assert (again == images[:20]).all(), "the data set must be the same each time"
    assert not (train == again).all((1, 2, 3)).any(), "training images must not be validation images"


def test_data_cifar10(tmp_path):
    """The archive is there already, so that nothing is downloaded."""
    folder = tmp_path / "packed/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for seed, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        records = np.insert(planar_noise(2, 32, seed)[1], 0, [seed, 9], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    shutil.make_archive(tmp_path / "cifar-10-binary", "gztar", tmp_path / "packed", folder.name)
    images, labels, _ = train_tiny.load_images("cifar10", "train", tmp_path)
    assert labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9], "a label is the first byte of its record"
    assert (images[2:4] == planar_noise(2, 32, 2)[0]).all(), "pixels are planar: all red, all green, all blue"
    images, _, _ = train_tiny.load_images("cifar10", "val", tmp_path)
    assert (images == planar_noise(2, 32, 0)[0]).all(), "the val split must be that of test_batch.bin"


def test_data_imagenet64(tmp_path):
    splits = {"train_data_batch_1": [7, 2, 1000], "train_data_batch_2": [9], "val_data": [5, 1000, 2]}
    for seed, (name, labels) in enumerate(splits.items()):
        np.savez(tmp_path / f"{name}.npz", data=planar_noise(len(labels), 8, seed)[1], labels=labels)
    images, labels, names = train_tiny.load_images("imagenet64", "train", tmp_path, 8)
    assert names == ["label-2", "label-7", "label-9", "label-1000"], "classes are those of the training files"
    assert labels.tolist() == [1, 0, 3, 2], "labels must count from 0 without gaps"
    images, labels, _ = train_tiny.load_images("imagenet64", "val", tmp_path, 8)
    assert labels.tolist() == [3, 0], "validation images of a class without training images are left out"
    assert (images == planar_noise(3, 8, 2)[0][1:]).all(), "pixels are planar; images must stay with their labels"
    with pytest.raises(InputError):  # an image of 8x8 must not be taken for four of 4x4
        train_tiny.load_images("imagenet64", "val", tmp_path, 4)


def write_image(path, colour=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_data_folder_with_val(tmp_path, capsys):
    """Only images of the class folders are read; files that systems leave behind are passed over."""
    write_image(tmp_path / "train/red/a.png", "red")
    write_image(tmp_path / "train/grey/b.gif", 99, mode="L")
    for path in ("val/red/c.bmp", "val/not-in-train/d.png", "train/red/deeper/e.png", "train/__MACOSX/f.png"):
        write_image(tmp_path / path, "blue")
    for name in (".DS_Store", "._x.png", "Thumbs.db", "README.txt"):
        (tmp_path / "train/red" / name).write_bytes(b"?")
    (tmp_path / "train/no-images").mkdir()
    images, labels, names = train_tiny.load_images("folder", "train", tmp_path, 4)
    assert names == ["grey", "red"], "classes are the folders of train/ that hold images, sorted"
    assert images[labels.argsort(), 0, 0].tolist() == [[99] * 3, [255, 0, 0]], "read each image of train/, and no other"
    images, labels, _ = train_tiny.load_images("folder", "val", tmp_path, 4)
    assert labels.tolist() == [1], "labels of val/ are those of train/, and its other classes are left out"
    assert images[0, 0, 0].tolist() == [0, 0, 255], "the val split must be that of val/"
    said = capsys.readouterr().out
    for words in ("no-images", "not-in-train", "2 files, 1 folders", "right inside"):
        assert words in said, f"what is left out must be said: {words}"


@pytest.mark.parametrize("sizes, held_out", [([4, 4, 4], 1), ([8] * 150, 120), ([9, 1], 1), ([2], 1)])
def test_data_folder_without_val(sizes, held_out, tmp_path):
    for c, size in enumerate(sizes):
        for i in range(size):
            write_image(tmp_path / f"train/{c:03}/{i}.png", (c, i, 0))
    train, labels, _ = train_tiny.load_images("folder", "train", tmp_path, 8)
    val, _, _ = train_tiny.load_images("folder", "val", tmp_path, 8)
    assert len(val) == held_out, "every tenth image, and at least one, must be held out"
    assert set(labels) == set(range(len(sizes))), "each class must keep an image for training"
    both = np.concatenate([train, val])
    assert len(both) == len(np.unique(both, axis=0)) == sum(sizes), "every image must be in one split, and in one only"


# ---------------------------------------------------------------------------------------------------------------------
# images: files as people have them
# ---------------------------------------------------------------------------------------------------------------------

TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"


def read_pixels(image, path, size=8, **options):
    """What read_image makes of a picture that was saved."""
    image.save(path, **options)
    return train_tiny.read_image(path, size).astype(int)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_images_are_turned_upright_and_cropped_in_the_middle(orientation, tmp_path):
    ramp, exif = np.linspace(0, 200, 16), Image.Exif()
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:12, None], 99), axis=2).astype(np.uint8)
    turned = Image.fromarray(pixels).transpose(Image.Transpose[TURNS.split()[orientation - 2]])
    exif[274] = orientation
    found = read_pixels(turned, tmp_path / "turned.jpg", 12, exif=exif, quality=100, subsampling=0)
    assert np.abs(found - pixels[:, 2:14]).max() <= 3, f"EXIF orientation {orientation}: not upright, or not the middle"


@pytest.mark.parametrize("name, kind", [("grey.png", np.uint16), ("grey.tiff", np.int32)])
def test_images_of_16_bits(name, kind, tmp_path):
    grey = np.arange(0, 256, 4).reshape(8, 8)
    found = read_pixels(Image.fromarray((grey * 257).astype(kind)), tmp_path / name)
    assert np.abs(found - grey[..., None]).max() <= 2, f"16 bits of grey in {name} must look like their 8-bit twin"


@pytest.mark.filterwarnings("error")
def test_images_with_transparency_lie_on_white(tmp_path):
    images = [Image.new("RGBA", (8, 8), (255, 0, 0, 128)), Image.new("RGBA", (8, 8), (0, 0, 0, 128))]
    images += [Image.new("LA", (8, 8), (0, 128)), Image.new("P", (8, 8))]
    images[-1].info["transparency"] = bytes([128])
    pink, *greys = (read_pixels(image, tmp_path / "x.png") for image in images)
    assert (pink == [255, 127, 127]).all(), "half-transparent red on white is pink"
    assert np.ptp(greys, axis=0).max() == 0, "three files that look alike must give equal arrays"


@pytest.mark.filterwarnings("error")
def test_images_too_large_are_refused(tmp_path):
    write_image(tmp_path / "x.png", size=(10000, 9000), mode="1")
    with pytest.raises(InputError, match=r"10000x9000.*smaller"):
        train_tiny.read_image(tmp_path / "x.png", 8)


# ---------------------------------------------------------------------------------------------------------------------
# run: one miniature run of train_tiny.py, watched
# ---------------------------------------------------------------------------------------------------------------------

RAR_OPTIONS = "--dim 16 --depth 1 --heads 2 --steps 16 --batch-size 8 --lr 0.01 --eval-every 4 --scan z-curve"
IMAGE_OPTIONS = "--image-size 16 --codebook-size 16 --channels 4 --tokenizer-steps 6 --tokenizer-batch 4"
MINIATURE = f"train_tiny.py --config folder --data-dir data {IMAGE_OPTIONS} {RAR_OPTIONS}"
FROM_TOKENS = f"train_tiny.py --config folder --tokens run/tokens.npz {RAR_OPTIONS}"
FILES_OF_A_RUN = """run.json reconstructions.png tokenizer.pt tokens.npz metrics.csv samples-000004.png
samples-000008.png rar_random.pt samples-000012.png samples-000016.png samples.png rar.pt"""
Z_CURVE = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])


def run_script(command):
    """Run the main function of train_tiny.py or sample.py in this process."""
    name, *options = command.split()
    script = train_tiny if name == "train_tiny.py" else sample_script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *options, "--device", "cpu"])
        script.main()


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder with data/ and run/, and all calls of RAR.forward except those of sampling."""
    folder = tmp_path_factory.mktemp("miniature")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    for i in range(30):
        path = folder / "data/train" / ["ant", "bee", "cat"][i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).resize((16, 16), Image.Resampling.NEAREST).save(path)
    calls, forward = [], RAR.forward

    def watched(self, tokens, labels, orders, cache=None):
        logits = forward(self, tokens, labels, orders, cache)
        if cache is None:
            call = SimpleNamespace(tokens=tokens, labels=labels, orders=orders, logits=logits.detach())
            call.dropout, call.learns = self.training, torch.is_grad_enabled()
            calls.append(call)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(RAR, "forward", watched)
        run_script(f"{MINIATURE} --out run")
    return SimpleNamespace(folder=folder, calls=calls)


@pytest.fixture
def here(miniature, tmp_path, monkeypatch):
    """A copy of the miniature's folder, which is the current folder during the test."""
    shutil.copytree(miniature.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def read_files(folder):
    """All files below a folder: {path: content}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_metrics(run):
    return np.genfromtxt(Path(run, "metrics.csv"), delimiter=",", names=True)


def read_tokens(prefix):
    """Tokens (N, T) and labels (N,) of the miniature run; the prefix of the val split is "val_"."""
    data, _ = train_tiny.load_tokens(Path("run/tokens.npz"))
    return torch.from_numpy(data[f"{prefix}tokens"]).long(), torch.from_numpy(data[f"{prefix}labels"]).long()


def test_run_leaves_files_and_metrics(here):
    assert sorted(read_files("run")) == sorted(FILES_OF_A_RUN.split()), "these are not the files of a finished run"
    rows = read_metrics("run")
    assert rows["step"].tolist() == [4, 8, 12, 16], "metrics.csv must have a row for every evaluation"
    assert rows["r"].tolist() == [1, 1, 0.25, 0], "r is 1 for half of the steps and 0 after three quarters of them"


def test_run_trains_on_permuted_tokens(here, miniature):
    tokens, labels = read_tokens("")
    dropped, in_scan, losses, orders = 0, [], [], []
    for step, call in enumerate(call for call in miniature.calls if call.learns):
        rows = train_tiny.batch_indices(step, 8, len(tokens), seed=0)
        shuffled = tokens[rows].gather(1, call.orders)
        assert call.tokens.equal(shuffled[:, :-1]), "the model must see all tokens but the last, in their order"
        null = call.labels == 3
        assert call.labels.equal(labels[rows].masked_fill(null, 3)), "labels must be those of the images"
        dropped += int(null.sum())
        orders.append(call.orders)
        in_scan.append((call.orders == Z_CURVE).all(1).float().mean().item())
        losses.append(F.cross_entropy(call.logits.transpose(1, 2), shuffled).item())
    assert 4 <= dropped <= 24, f"about a tenth of 128 labels must be dropped for guidance, not {dropped}"
    assert in_scan[:9] == [0] * 9, "orders must be random while r is 1"
    assert len(torch.cat(orders[:9]).unique(dim=0)) == 72, "each image of each step must get an order of its own"
    assert 0 < np.mean(in_scan[9:12]) < 1, "orders must be mixed while r falls"
    assert in_scan[12:] == [1] * 4, "orders must be the scan from the end of annealing on"
    means = np.reshape(losses, (4, 4)).mean(1)
    assert read_metrics("run")["train_loss"] == pytest.approx(means, rel=1e-4), "targets must be the tokens in order"


def test_run_validates_on_held_out_tokens(here, miniature):
    tokens, labels = read_tokens("val_")
    losses, calls = [], [call for call in miniature.calls if not call.learns]
    for i, call in enumerate(calls):
        assert not call.dropout, "dropout must be off in validation"
        shuffled = tokens.gather(1, call.orders.expand(3, -1))
        assert call.tokens.equal(shuffled[:, :-1]), "validation must use the held-out tokens, in their order"
        assert call.labels.equal(labels), "validation must use the labels, and drop none"
        assert (call.orders == Z_CURVE).all() == (i % 2 == 0), "first the order of the scan, then random orders"
        assert call.orders.equal(calls[i % 2].orders), "every evaluation must use the same orders"
        losses.append(F.cross_entropy(call.logits.transpose(1, 2), shuffled).item())
    columns = read_metrics("run")[["val_loss_scan", "val_loss_random"]].tolist()
    assert np.allclose(columns, np.reshape(losses, (4, 2)), rtol=1e-4), "metrics.csv must hold the validation losses"


def test_run_tokens_are_those_of_the_images(here):
    model, _ = train_tiny.load_model(Path("run/tokenizer.pt"), "tokenizer")
    for split, prefix in (("train", ""), ("val", "val_")):
        images, labels, _ = train_tiny.load_images("folder", split, "data", 16)
        views = [images, images[:, :, ::-1]] if split == "train" else [images]
        expected = torch.cat([model.encode(train_tiny.to_float(view, "cpu")) for view in views])
        tokens, found_labels = read_tokens(prefix)
        assert tokens.equal(expected), "tokens must be those of the images, and of train/ then of their mirror images"
        assert found_labels.tolist() == labels.tolist() * len(views), "each image must keep its label"


def test_run_from_tokens_alone(here):
    run_script(f"{FROM_TOKENS} --out other --seed 1 --anneal-start 0")
    assert read_files("other")["metrics.csv"] != read_files("run")["metrics.csv"], "the seed must make a difference"
    assert not Path("other/rar_random.pt").exists(), "r was never 1: there are no weights from random orders alone"
    for order, r in (("raster", 0), ("random", 1)):
        run_script(f"{FROM_TOKENS} --steps 4 --order {order} --no-adaln --no-target-aware --out {order}")
        assert read_metrics(order)["r"] == r, f"r must be {r} in all steps with --order {order}"
    Path("run/tokenizer.pt").unlink()
    run_script(f"{FROM_TOKENS} --out alone")
    assert read_files("alone")["metrics.csv"] == read_files("run")["metrics.csv"], "the same seed must train the same"


def refusal(capsys, command):
    """The line with which a script refuses a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train_tiny.run_main(lambda: run_script(command))
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.strip() and "[00:" not in line]  # no progress bars
    assert end.value.code == 2, "the exit code of bad input is 2"
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one line that starts with error: {errors}"
    return lines[0]


def test_run_ends_with_one_line_after_ctrl_c(capsys):
    with pytest.raises(SystemExit, match="130"):
        train_tiny.run_main(lambda: signal.raise_signal(signal.SIGINT))
    assert capsys.readouterr().err.strip() == "stopped", "Ctrl-C must end a script with one line"


def test_run_that_diverges_overwrites_nothing(here, capsys):
    message = refusal(capsys, f"{FROM_TOKENS} --out new --lr 1e30 --warmup 0 --eval-every 1")
    assert sorted(read_files("new")) == ["run.json", "tokenizer.pt"], "a model that has diverged must not be saved"
    assert "learning rate" in message, "the message must say what helps"


def test_tokens_that_do_not_fit_are_refused(here):
    arrays = dict(np.load("run/tokens.npz"))
    changes = [{"tokens": arrays["tokens"] + 16}, {"val_tokens": arrays["val_tokens"] - 16}, {"grid_size": 3}]
    changes += [{"labels": arrays["labels"] + 3}, {"val_labels": arrays["val_labels"] - 3}, {"tokenizer": "0123abcd"}]
    for change in changes:
        np.savez("run/tokens.npz", **arrays | change)
        with pytest.raises(InputError, match=r"tokens\.npz"):
            read_tokens("")


# ---------------------------------------------------------------------------------------------------------------------
# resume: stopped at any moment, a run ends as if it had never been stopped
# ---------------------------------------------------------------------------------------------------------------------


def kill_in_front_of(name, command):
    """Run a command and end it when it has written a file but not yet given it this name."""

    def replace_or_exit(source, target, replace=os.replace):
        if Path(target).name == name:
            sys.exit("killed")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(os, "replace", replace_or_exit)
        run_script(command)


def test_resume_in_float16_needs_the_loss_scale(here):
    kill_in_front_of("samples-000008.png", f"{FROM_TOKENS} --dtype float16 --out half")
    state, rate = torch.load("half/state.pt"), train_tiny.learning_rate(3, 16, 0.01, 0.1)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate), "the optimizer must follow the schedule"
    assert state["scaler"]["scale"] > 1, "the loss must be scaled in float16, and the scale saved"


STOP_HALF_WAY = """import os, runpy, signal, sys, torch
stage, name, *sys.argv = sys.argv[1:]
def save_half(content, path, save=torch.save):
    save(content, path)
    if content.get("stage") == stage and content["step"] > 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), getattr(signal, name))
torch.save = save_half
runpy.run_path(sys.argv[0], run_name="__main__")"""
SCRIPTS = Path(train_tiny.__file__).parent


def run_process(*command):
    """Run Python with these arguments as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)


def check_resumed_run(run):
    """Resume a run for the last time, and compare all that it leaves with the unbroken one."""
    run_script(f"train_tiny.py --resume --out {run}")
    found, expected = read_files(run), read_files("run")
    assert sorted(found) == sorted(expected), "a resumed run must leave the files of an unbroken one, and no others"
    for name in FILES_OF_A_RUN.split():
        same = found[name] == expected[name]
        if name.endswith(".pt"):
            weights, others = (torch.load(Path(folder, name))["weights"] for folder in (run, "run"))
            same = all(map(torch.equal, weights.values(), others.values()))
        assert same, f"{name} of a resumed run must be that of an unbroken one, bit for bit"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_resume_after_sigkill_and_ctrl_c(here):
    """The process gets a signal when it has written half of the second checkpoint of a stage."""
    options = f"{MINIATURE} --device cpu".split()[1:]
    for stage, name, code in (("tokenizer", "SIGKILL", -9), ("rar", "SIGKILL", -9), ("rar", "SIGINT", 130)):
        stopped = run_process("-c", STOP_HALF_WAY, stage, name, SCRIPTS / "train_tiny.py", *options, "--out", "broken")
        assert stopped.returncode == code, f"{name} must end the run with exit code {code}: {stopped.stderr}"
        assert torch.load("broken/state.pt")["step"] == 4, "a half-written file must not replace a whole one"
        options = ["--resume", "--device", "cpu"]
    assert "Traceback" not in stopped.stderr and "error" not in stopped.stderr, "Ctrl-C is not an error"
    assert "train_tiny.py --resume --out broken" in stopped.stderr.splitlines()[-1], "it must say how to go on"
    check_resumed_run("broken")


def test_resume_after_a_kill_in_front_of_every_file(here):
    kill_in_front_of("reconstructions.png", f"{MINIATURE} --out broken")
    for name in FILES_OF_A_RUN.split()[1:]:
        kill_in_front_of(name, "train_tiny.py --resume --out broken")
    check_resumed_run("broken")


def test_processes_train_as_one_does(here):
    """Two processes under torchrun reach the losses of one."""
    command = f"{FROM_TOKENS} --steps 6 --eval-every 2 --dropout 0"
    run_script(f"{command} --out one")
    name, *options = f"{command} --out two --device cpu".split()
    done = run_process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPTS / name, *options)
    assert done.returncode == 0, f"torchrun failed: {done.stderr[-2000:]}"
    one, two = (read_metrics(run).tolist() for run in ("one", "two"))
    assert np.allclose(one, two, rtol=0, atol=2e-5), "two processes must reach the losses of one to 1e-5"


# ---------------------------------------------------------------------------------------------------------------------
# sample: every mode of sample.py on the miniature run
# ---------------------------------------------------------------------------------------------------------------------


def cut_sheet(path, columns):
    """The 16x16 images of a sheet, each four times enlarged with a white line around it."""
    tiles = np.asarray(Image.open(path)).reshape(-1, 66, columns, 66, 3)
    return tiles[:, 1:-1:4, :, 1:-1:4].swapaxes(1, 2).reshape(-1, 16, 16, 3)


@pytest.mark.parametrize("name, steps, scan", [("rar", 16, "z-curve"), ("rar_random", 9, "spiral-in")])
def test_sample_draws_what_generate_gives(name, steps, scan, here, capsys):
    """Other orders than that of the run need the weights from before annealing."""
    flags = f"--order {scan} --guidance-scale 2 --guidance-power 1.5 --temperature 0.9 --top-k 5 --batch-size 4"
    run_script(f"sample.py --run run --classes cat,0 --n 6 --seed 3 --npz set.npz --out sheet.png {flags}")
    first_line = capsys.readouterr().out.splitlines()[0]
    assert f"run/{name}.pt, {steps} steps" in first_line, "the first line must say which weights are used"
    images, labels = np.load("set.npz").values()
    assert labels.tolist() == [2, 0] * 3, "the classes asked for must be drawn in turn"
    model, _ = train_tiny.load_model(Path(f"run/{name}.pt"), "rar")
    tokenizer, _ = train_tiny.load_model(Path("run/tokenizer.pt"), "tokenizer")
    options = {"guidance_scale": 2, "guidance_power": 1.5, "temperature": 0.9, "top_k": 5}
    options |= {"order": scan_order(scan, 4), "generator": torch.manual_seed(3)}
    tokens = torch.cat([model.generate(part, **options) for part in torch.from_numpy(labels).split(4)])
    assert (images == train_tiny.to_uint8(tokenizer.decode(tokens))).all(), "images must be those of generate"
    assert (cut_sheet("sheet.png", 2) == images).all(), "sheet and npz must hold the same images"


def test_sample_gif_grows_along_the_order(here):
    run_script("sample.py --run run --classes bee --n 1 --gif grow.gif")
    gif = ImageSequence.Iterator(Image.open("grow.gif"))
    frames = [np.asarray(frame.convert("RGB"), int)[1:-1, 1:-1] for frame in gif]
    assert len(frames) == 17, "there must be a frame for nothing and one for each of the 16 cells"
    for t in range(16):
        change = np.abs(frames[t + 1] - frames[t]).reshape(4, 16, 4, 16, 3).max((1, 3, 4)).flatten()
        assert change[Z_CURVE[t]] == change.max(), f"frame {t + 1} must add the cell that comes next in the order"
        assert np.sort(change)[-2] < 40, f"frame {t + 1} must add no other cell"


def test_sample_inpaints(here):
    image = Image.open("data/train/ant/0.png")
    image.paste("white", (4, 0, 12, 8))
    image.save("other.png")
    sheets = []
    for path, mask in (("data/train/ant/0.png", "4,0,12,8"), ("other.png", "4,0,12,8"), ("other.png", "0,0,16,16")):
        run_script(f"sample.py --run run --inpaint {path} --mask {mask} --n 5 --out sheet.png")
        sheets.append(cut_sheet("sheet.png", 7))
    known = np.ones((16, 16), bool)
    known[0:8, 4:12] = False
    assert (sheets[0][:, known] == sheets[0][0, known]).all(), "known pixels must stay as they are"
    assert (sheets[0][1:] == sheets[1][1:]).all(), "what was in the hole must have no influence"
    assert len(np.unique(sheets[2][2:], axis=0)) == 5, "the hole must be drawn anew each time, be it the whole image"


def test_sample_finds_runs(here, capsys):
    for name, time in (("new", 2e9), ("old", 1e9)):
        shutil.copytree("run", f"runs/{name}")
        os.utime(f"runs/{name}/rar.pt", (time, time))
    run_script("sample.py")
    assert "runs/new" in capsys.readouterr().out, "the newest run must be taken"
    assert read_files(".")["sheet.png"] == read_files("run")["samples.png"], "it must draw as the run did at its end"
    run_script("sample.py --n 1 --run old")
    assert "runs/old" in capsys.readouterr().out, "the name of a run inside runs/ must do"


@pytest.mark.parametrize("text, numbers", [("1", [0]), ("3, 7", [2, 5]), ("10,4", [3, 4]), ("red, bright", [4])])
def test_sample_pick_classes(text, numbers):
    found = sample_script.pick_classes(text, ["1", "2", "3", "10", "red, bright", "7"])
    assert found == numbers, "the whole text may be a name; of its parts a name wins over a number"


# ---------------------------------------------------------------------------------------------------------------------
# released: files in the authors' layout, here small ones of random numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def released_model(tmp_path, monkeypatch):
    """A model of 4x4 tokens; its weights rar.bin, and vq.bin for 256x256 images, are in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = fill(RAR(RARConfig(16, 3, 16, 32, 1, 16, 48)), 0.3)
    tokenizer = VQTokenizer(VQConfig(256, 16, 4, 32, (1,) * 7, groups=32, released_shortcut=True))
    torch.save(tokenizer.state_dict(), "vq.bin")
    torch.save(model.state_dict(), "rar.bin")
    return model


def test_released_weights_give_the_same_logits(released_model):
    inputs = torch.randint(16, (2, 15)), torch.tensor([1, 3]), torch.rand(2, 16).argsort(1)
    expected, weights = released_model(*inputs), released_model.state_dict()
    assert RAR.from_released("rar.bin")(*inputs).equal(expected), "a file of weights must give the same model"
    assert RAR.from_released("rar.bin", torch.bfloat16)(*inputs).dtype == torch.bfloat16, "dtype must convert them"
    for wrapper, prefix in (("model", "module."), ("state_dict", "_orig_mod.")):
        wrapped = {wrapper: {prefix + name: tensor for name, tensor in weights.items()}}
        assert RAR.from_released(wrapped)(*inputs).equal(expected), f"{wrapper} and {prefix} must be taken off"


def test_released_weights_that_do_not_fit_are_named(released_model):
    weights, name = released_model.state_dict(), "blocks.0.attn.proj.bias"
    bias, missing = weights[name], {key: weights[key] for key in weights if key != name}
    changed = [missing, weights | {"surplus": bias}, weights | {name: bias[1:]}, weights | {name: bias.half()}]
    words = [f"Missing.*{name}", "Unexpected.*surplus", f"size mismatch.*{name}", "rar.bin.*--dtype float32"]
    for content, expected in zip(changed, words):
        torch.save(content, "rar.bin")
        with pytest.raises(InputError, match=expected):
            RAR.from_released("rar.bin")


def test_released_weights_draw_by_file_and_by_name(released_model, monkeypatch, capsys):
    tab_6 = "--guidance-scale 15.5 --guidance-power 2.5 --temperature 1.02"
    run_script(f"sample.py --rar rar.bin --tokenizer vq.bin --n 1 {tab_6}")
    sheet = Path("sheet.png").read_bytes()
    monkeypatch.setitem(sample_script.TABLE_6, 32, sample_script.TABLE_6[1024])
    fetched = []

    def fetch(url, path, *_):
        fetched.append(url)
        shutil.copy("rar.bin" if "rar_l" in url else "vq.bin", path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    for weights in ("rar.bin --tokenizer vq.bin", "rar_l --cache cache", "rar_l --cache cache"):
        run_script(f"sample.py --rar {weights} --n 1")
        assert Path("sheet.png").read_bytes() == sheet, "it must draw with the settings of Tab. 6"
    url = "https://mirror/yucornetto/RAR/resolve/main/rar_l.bin"
    assert fetched[0] == url and len(fetched) == 2, "each file must be fetched once, from HF_ENDPOINT"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: os.stat("no network"))
    message = refusal(capsys, "sample.py --rar rar_l --cache empty")
    assert f"curl -L -C - -o empty/rar_l.bin {url}" in message, "the message must say how to fetch it by hand"


# ---------------------------------------------------------------------------------------------------------------------
# ablation: benchmarks/ablation.py on the images of the miniature run
# ---------------------------------------------------------------------------------------------------------------------


def test_ablation_in_miniature(here, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import ablation

    for name, value in {"GUIDANCE": (1.0, 2.0), "SAMPLES": 12, "CLASSIFIER_STEPS": 4}.items():
        monkeypatch.setattr(ablation, name, value)
    options = f"{IMAGE_OPTIONS} {RAR_OPTIONS} --images 12 --variants raster rar,dropout=0.1"
    command = f"--config folder --data-dir data --device cpu --out out {options}".split()
    ablation.main(command)
    for model in ("raster | rar.pt", "raster | lowest_val.pt", "rar,dropout=0.1 | rar.pt"):
        assert model in Path("out/table.md").read_text(), f"table.md must have a row for {model}"
    assert Path("out/completions.png").exists(), "the pictures are missing"
    monkeypatch.setattr(ablation, "do_run", lambda *_: pytest.fail("finished runs must not be repeated"))
    ablation.main(command)


# ---------------------------------------------------------------------------------------------------------------------
# bad_input: one line, exit code 2, and nothing is changed
# ---------------------------------------------------------------------------------------------------------------------

BAD_INPUT = """
sample.py --run run                               | rar.pt cannot be used       | run/rar.pt = half
sample.py --run run                               | rar.pt cannot be used       | run/rar.pt = code
sample.py --rar w.bin --tokenizer w.bin           | w.bin is an HTML page       | w.bin = <!DOCTYPE html><html>
sample.py --rar w.bin --tokenizer w.bin           | git lfs pull                | w.bin = version https://git-lfs
sample.py --rar w.bin --tokenizer w.bin           | safetensors                 | w.bin = 8 bytes:{"__metadata__":{}}
sample.py --rar run/rar.pt --tokenizer run/rar.pt | use --run
train_tiny.py --resume --out stopped              | state.pt                    | stopped/state.pt = half
train_tiny.py --resume --out stopped              | state.pt                    | stopped/state.pt = run/rar.pt
train_tiny.py --resume --out stopped              | run.json                    | stopped/run.json = {}
train_tiny.py --tokens run/tokens.npz             | tokens.npz                  | run/tokens.npz = code in an array
train_tiny.py --config imagenet64 --data-dir data | train_data_batch_1.npz      | data/train_data_batch_1.npz = text
train_tiny.py --config cifar10 --data-dir data    | cifar-10-binary.tar.gz      | data/cifar-10-binary.tar.gz = text
train_tiny.py --config folder --data-dir data     | 0.png                       | data/train/ant/0.png = half
train_tiny.py --config folder --data-dir nowhere  | nowhere
train_tiny.py --config folder --data-dir x        | add images                  | x/train/a/a.png = data/train/ant/0.png
train_tiny.py --tokens run/tokens.npz --step 1    | --step
train_tiny.py --dim 100 --heads 3                 | --dim 100 is not a multiple of --heads 3
train_tiny.py --tokens run/tokens.npz --out run   | --resume
train_tiny.py --resume --out run --dim 64         | --dim
sample.py --run run --temperature -1              | temperature must be above 0, got -1
sample.py --run run --classes nosuch              | 'nosuch'
sample.py --run run --mask 0,0,4,4                | --inpaint
sample.py --run run --out sheet.xyz               | sheet.xyz"""


class RunsCode:
    """Unpickled, this would make a file."""

    def __reduce__(self):
        return open, ("the-code-ran", "w")


def damage(path, content=""):
    """Put something else into a file: half of it, code to be run, another file, or this text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if content == "half":
        os.truncate(path, os.path.getsize(path) // 2)
    elif content == "code":
        torch.save({"weights": RunsCode()}, path)
    elif content == "code in an array":
        np.savez(path, tokens=np.array([RunsCode()]))
    elif Path(content).is_file():
        shutil.copy(content, path)
    else:
        Path(path).write_text(content)


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input(line, here, capsys):
    command, words, *change = (cell.strip() for cell in line.split("|"))
    kill_in_front_of("rar.pt", f"{FROM_TOKENS} --steps 1 --out stopped")
    if change:
        damage(*change[0].split(" = "))
    before = read_files(".")
    assert words in refusal(capsys, command), "the message must name what is wrong"
    assert read_files(".") == before, "what was there must stay as it was, and nothing may come to it"


@pytest.mark.parametrize("bug, forward", [(ZeroDivisionError, lambda *_: 1 / 0), (TypeError, lambda: None)])
@pytest.mark.parametrize("command", [f"{FROM_TOKENS} --out new", "sample.py --run run"])
def test_bad_input_is_not_what_a_bug_is_called(bug, forward, command, here, monkeypatch):
    monkeypatch.setattr(RAR, "forward", forward)
    with pytest.raises(bug):
        train_tiny.run_main(lambda: run_script(command))
