"""Every claim about RAR, tested on a CPU without network. `pytest -x --tb=short -k NAME` runs one concept.

Concepts, in the paper's order: random_ratio, sample_orders, target_aware, position_rows, scan_order, attention,
qk_norm, causal, adaln, loss_alignment, likelihood, guidance, cache, merge, prefix, null_class, dropout,
parameter_counts, golden, released, worked_example, vq, codebook. What is expected comes from elsewhere: brute force,
numbers worked out by hand, numbers of the authors' program (benchmarks/golden.json), or the same without the cache.
"""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageSequence

import rar
import sample as sample_script
import train_tiny
from rar import RAR, Cache, RARConfig, guidance_at, random_ratio, sample_orders, scan_order
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, codes_used, flatten_latents
from train_tiny import batch_rows, load_images, load_run, read_image, to_float, to_uint8

torch.set_num_threads(1)  # everything here is tiny

GOLDEN = json.loads((Path(rar.__file__).parent / "benchmarks" / "golden.json").read_text())
SHUFFLED = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])  # an order of nine positions that is none of the scans
ORDER = pytest.mark.parametrize("order", [torch.arange(9), SHUFFLED])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@torch.no_grad()
def fill(model, std):
    """Random values in every parameter: a fresh adaLN is zero, and a zero would hide mistakes."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(float("norm" in name and "weight" in name), std)
    return model.eval()


def small_rar(V=7, C=3, T=9, std=0.3, **options):
    """A model of width 16 with 2 layers of 2 heads, for V codes, C classes and T tokens."""
    return fill(RAR(RARConfig(V, C, T, 16, 2, 2, 24, **options)), std)


def random_input():
    """Five images: tokens in raster layout, labels (3 is the null class), and an order for each."""
    return torch.randint(7, (5, 9)), torch.tensor([1, 3, 0, 1, 2]), torch.rand(5, 9).argsort(1)


def released(keys, std):
    """The weights behind the golden numbers: each tensor follows from its name."""
    weights = {}
    for name, shape in GOLDEN[keys].items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        weights[name] = torch.from_numpy(noise * std + ("norm" in name and "weight" in name)).float()
    return weights


@torch.no_grad()
def logits_of(model, tokens, labels, orders):
    """Logits (B, T, V) as in training: the tokens (B, T) are put into their order, and all but the last are fed."""
    orders = orders.expand(tokens.shape)
    return model(tokens.gather(1, orders)[:, :-1], labels, orders)


def assert_close(found, expected, claim, tolerance=1e-4):
    __tracebackhide__ = True  # pytest shows the line of the test instead
    assert found.shape == expected.shape, f"{claim} (shape {tuple(found.shape)}, not {tuple(expected.shape)})"
    error = (found - expected).abs().max().item()
    assert error <= tolerance, f"{claim} (off by {error:.3g})"


def error_of(kind, function, *arguments):
    """What the error of this kind says, or "no error"."""
    try:
        function(*arguments)
    except kind as error:
        return str(error)
    return "no error"


# ---------------------------------------------------------------------------------------------------------------------
# random_ratio (Eq. 5) and sample_orders (Sec. 3.2, Eq. 3)
# ---------------------------------------------------------------------------------------------------------------------

RATIOS = [(0, 50, 75, 1), (55, 50, 75, 0.8), (62.5, 50, 75, 0.5), (75, 50, 75, 0), (0, 0, 0, 0), (399, 400, 400, 1)]


@pytest.mark.parametrize("step, start, end, r", RATIOS)
def test_random_ratio_of_eq_5(step, start, end, r):
    found = random_ratio(step, start, end)
    assert found == pytest.approx(r), f"annealing from {start} to {end}: at step {step}, r must be {r}, not {found}"


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
# target_aware and position_rows: Sec. 3.2, Eq. 4, Fig. 3b
# ---------------------------------------------------------------------------------------------------------------------


def test_target_aware_position_rows_by_hand():
    own, upcoming = rar.position_rows(torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]]))
    claim = "orders 2, 0, 3, 1 and 0, 1, 2, 3: row 0 is for cls, 1 for the class, i + 2 for position i;"
    assert own.tolist() == [[0, 1, 4, 2, 5], [0, 1, 2, 3, 4]], f"{claim} own rows leave out the last token"
    assert upcoming.tolist() == [[4, 2, 5, 3], [2, 3, 4, 5]], f"{claim} the class is told the first position"


@pytest.mark.parametrize("target_aware", [True, False])
def test_target_aware_tells_orders_with_a_shared_prefix_apart(target_aware):
    model = small_rar(T=5, target_aware=target_aware)
    orders = torch.tensor([[2, 0, 3, 1, 4], [2, 0, 4, 3, 1]])
    first, second = logits_of(model, torch.ones(2, 5).long(), torch.tensor([1, 1]), orders)
    differ = ((first - second).abs().amax(1) > 0.01).tolist()[:4]
    claim = f"orders 2, 0, 3 and 2, 0, 4: logits differ from step 2 on with Eq. 4, from step 3 on without, not {differ}"
    assert differ == [False, False, target_aware, True], f"{claim} (Fig. 3b)"


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


@pytest.mark.parametrize("name", ["spiral-in", "spiral-out", "alternate"])
def test_scan_order_walks_over_an_odd_grid(name):
    order = scan_order(name, 7)
    steps = (order // 7).diff().abs() + (order % 7).diff().abs()
    assert len(order.unique()) == 49 and (steps == 1).all(), f"{name} must go through a 7x7 grid from cell to next cell"


def test_scan_order_z_curve_of_a_larger_grid():
    quadrants = [2 * (i // 32) + i % 8 // 4 for i in scan_order("z-curve", 8).tolist()]
    assert quadrants == sorted(quadrants), "the z-curve must finish a quadrant of an 8x8 grid before the next"


def test_scan_order_mistakes_are_named():
    found = error_of(ValueError, scan_order, "zigzag", 4)
    assert "zigzag" in found and "spiral-in" in found, "an unknown order must be named, together with those there are"
    found = error_of(AssertionError, lambda: small_rar().generate(torch.tensor([0]), order=torch.arange(9) + 1))
    assert "order" in found, "generate must refuse an order that does not visit each position once"


# ---------------------------------------------------------------------------------------------------------------------
# attention, qk_norm, causal and adaln: Sec. 4.1, Eq. 1 and 3
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_and_qk_norm_are_an_explicit_softmax():
    attention, x = small_rar().blocks[0].attn, torch.randn(3, 5, 16)
    q, k, v = (part.view(3, 5, 2, 8).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=2))
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.mT / math.sqrt(8)
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    found = attention(x, 0, None)
    claim = "the last element sees all: scores must be q k / sqrt(8) for heads of width 8, with LayerNorm on q and on k"
    assert_close(found[:, -1], expected[:, -1], claim)
    assert_close(found, expected, "the causal mask is wrong: an element sees itself and all before it, nothing later")
    cache = SimpleNamespace(append=lambda layer, *new: (k, v))  # held four elements, returns these and the new one
    claim = "one new element must see all that is stored before it: a causal mask would hide all but the first"
    assert_close(attention(x[:, -1:], 0, cache), expected[:, -1:], claim)


def test_causal_in_any_order():
    model, (tokens, labels, _) = small_rar(V=8), random_input()
    changed = tokens.clone()
    changed[:, SHUFFLED[4]] += 1
    before, after = (logits_of(model, images, labels, SHUFFLED) for images in (tokens, changed))
    found = (after != before).any(2).any(0).nonzero().flatten().tolist()
    assert found == [5, 6, 7, 8], f"the token of step 4 must reach the logits of steps 5 to 8, not those of {found}"


@pytest.mark.parametrize("B", [2, 3, 4])
def test_adaln_does_not_depend_on_the_size_of_the_batch(B):
    model, inputs = small_rar(), random_input()
    found = logits_of(model, *(part[:B] for part in inputs))
    claim = f"adaLN must be that of the class: {B} images must get the logits that they get among 5 (3 classes + null)"
    assert_close(found, logits_of(model, *inputs)[:B], claim)


def test_adaln_is_not_rounded_to_bfloat16():
    x, scale = torch.randn(50, 16), torch.linspace(-0.1, 0.1, 16).bfloat16()  # as linear layers return it in autocast
    expected = x * (1 + scale.float()) + scale.float()
    assert_close(rar.modulate(x, scale, scale), expected, "1 + scale must not be rounded to bfloat16", 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# loss_alignment: what each logit predicts, and what learns from it
# ---------------------------------------------------------------------------------------------------------------------


@ORDER
@torch.no_grad()
def test_loss_alignment_of_a_model_that_knows_one_image(order):
    """By hand: position i has channel i in the target-aware table, and the head turns channel i into the token at i."""
    model, image = small_rar(V=9, std=0), torch.tensor([3, 1, 4, 8, 5, 0, 2, 6, 7])
    model.target_aware_pos_embed[0, 2:11, :9] = torch.eye(9)
    model.lm_head.weight[image, torch.arange(9)] = 1
    loss = F.cross_entropy(logits_of(model, image[None], torch.tensor([0]), order)[0], image[order])
    # LayerNorm turns the 1 into sqrt(15) and each of the 15 zeros into -1/sqrt(15), which are 16/sqrt(15) apart
    by_hand = math.log(1 + 8 * math.exp(-16 / math.sqrt(15)))
    claim = f"logits[:, t] must predict the token at orders[:, t]: then the loss is {by_hand:.3f}, not {loss:.3f}"
    assert loss.item() == pytest.approx(by_hand, abs=1e-4), claim


def test_loss_alignment_reaches_every_parameter():
    model, (tokens, labels, orders) = small_rar(), random_input()
    tokens = tokens.gather(1, orders)
    F.cross_entropy(model(tokens[:, :-1], labels, orders).flatten(0, 1), tokens.flatten()).backward()
    used = {"pos_embed": 11, "target_aware_pos_embed": 9, "timesteps_embeddings": 10, "embeddings.weight": 11}
    for name, p in model.state_dict(keep_vars=True).items():
        assert p.grad is not None, f"{name} gets no gradient in training: it is frozen, or cut off from the loss"
        found, expected = p.grad.view(-1, p.shape[-1]).any(1).sum(), used.get(name, p.numel() // p.shape[-1])
        assert found == expected, f"{found} rows of {name} get a gradient, not all {expected} that were used"


# ---------------------------------------------------------------------------------------------------------------------
# likelihood (Eq. 3) and guidance: classifier-free, power-cosine, Sec. 4.1
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_likelihood_and_guidance_temperature_agree_with_samples(temperature):
    """All eight images of three tokens and two codes: the probability of each is the product of Eq. 3."""
    model, order = small_rar(V=2, T=3, std=0.2), torch.tensor([2, 0, 1])
    images = torch.tensor(list(itertools.product(range(2), repeat=3)))
    log_p = (logits_of(model, images, torch.ones(8).long(), order) / temperature).log_softmax(-1)
    expected = log_p.gather(2, images[:, order, None]).sum((1, 2)).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5), "all images together must have a probability of 1"
    drawn = model.generate(torch.ones(20000).long(), order=order, temperature=temperature)
    found = (drawn[:, None] == images).all(2).float().mean(0)
    claim = f"images must be drawn as often as Eq. 3 says for logits / {temperature}, and come back in raster layout"
    assert_close(found, expected, claim, 0.018)  # five deviations


# step, T, scale, power and guidance, by hand: 1 + 2 * (1 - cos 45 degrees) / 2; 1 + 7.5 * (1 - cos(pi * 0.1486509));
# and power 0, which is constant from the first step on
GUIDANCE = [(1, 4, 3.0, 1.0, 1.292893), (128, 256, 16.0, 2.75, 1.803078), (0, 4, 5.0, 0.0, 5.0)]


@pytest.mark.parametrize("step, T, scale, power, expected", GUIDANCE)
def test_guidance_at_by_hand(step, T, scale, power, expected):
    claim = f"guidance with scale {scale} and power {power} at step {step} of {T} must be {expected}"
    assert guidance_at(step, T, scale, power) == pytest.approx(expected, abs=1e-5), claim


@torch.no_grad()
def test_guidance_top_k_keeps_the_likeliest():
    model = small_rar(V=4, T=1, std=0)
    model.lm_head.bias.copy_(torch.tensor([0.1, 0.5, 0.3, 0.7]))  # the logits, as all else is 0
    for k, likeliest in {2: [1, 3], 3: [1, 2, 3], 1: [3]}.items():
        drawn = model.generate(torch.zeros(5000).long(), top_k=k).unique().tolist()
        assert drawn == likeliest, f"top_k = {k} must draw from the {k} likeliest codes {likeliest}, not from {drawn}"


# ---------------------------------------------------------------------------------------------------------------------
# cache: sampling step by step computes what one forward pass does
# ---------------------------------------------------------------------------------------------------------------------


def test_cache_append_by_hand():
    cache = Cache(small_rar(), batch_size=3)
    stored = torch.randn(2, 2, 3, 2, 5, 8, dtype=torch.double)  # keys and values, layers, B, H, elements, D/H
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        for layer in range(2):
            keys, values = cache.append(layer, *stored[:, layer, :, :, start:stop])
            assert cache.length == start, "append must not move length: RAR.forward does, when all layers have stored"
            assert keys.dtype == values.dtype == torch.double, "the cache must take the dtype of the first keys"
            claim = f"after {stop} elements append must return all keys and values of layer {layer} so far, in order"
            for found, expected in zip((keys, values), stored[:, layer, :, :, :stop]):
                assert_close(found, expected, claim, 0)
        cache.length = stop


@pytest.mark.parametrize("K", [0, 5])
@torch.no_grad()
def test_cache_gives_the_logits_of_one_forward_pass(K):
    model, (tokens, labels, orders) = small_rar(), random_input()
    expected, tokens = logits_of(model, tokens, labels, orders), tokens.gather(1, orders)
    cache = Cache(model, 5)
    for n in range(K, 7):
        found = model(tokens[:, :n], labels, orders, cache)
        assert cache.length == n + 2, f"cls, class and {n} tokens: length must be {n + 2} now, not {cache.length}"
        start = 0 if n == K else n
        assert_close(found, expected[:, start : n + 1], f"{n} tokens: cached logits are not those of one forward pass")
    refused = error_of(AssertionError, model, tokens[:, :8], labels, orders, cache) != "no error"
    assert refused, "a cache that is not empty must go on with one new token: two at once must be refused"


@ORDER
@pytest.mark.parametrize("scale, power, K", [(1, 0, 0), (1, 0, 1), (1, 0, 8), (1, 0, 9), (3, 0, 0), (6, 1.5, 4)])
@torch.no_grad()
def test_cache_prefix_and_guidance_draw_what_a_plain_loop_draws(order, scale, power, K):
    """The loop has no cache: each step runs all that is known anew, for the classes and for the null class 3."""
    model, labels = small_rar(), torch.tensor([0, 2, 1, 1])
    prefix = tokens = torch.randint(7, (4, K))
    generator = torch.Generator().manual_seed(0)
    for t in range(K, 9):
        given, null = (model(tokens, c, order[None])[:, -1] for c in (labels, torch.full_like(labels, 3)))
        p = (null + guidance_at(t, 9, scale, power) * (given - null)).softmax(-1)
        tokens = torch.cat([tokens, p.multinomial(1, generator=generator)], dim=1)
    options = {"order": order, "prefix": prefix, "guidance_scale": scale, "guidance_power": power}
    found = model.generate(labels, generator=generator.manual_seed(0), **options)
    if scale == 1:
        claim = f"{K} known tokens: not kept at order[:{K}], wrong raster layout, or other draws than without a cache"
    else:
        claim = f"{K} known: draw from null + s * (conditional - null), s = guidance_at(t, ...), t from 0 at order[0]"
    assert_close(found[:, order], tokens, claim, 0)


@pytest.mark.parametrize("scale, rows", [(1.0, 3), (2.0, 6)])
def test_cache_runs_one_element_a_step(scale, rows):
    model, shapes = small_rar(T=7), []
    model.blocks[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    model.generate(torch.tensor([0, 1, 2]), prefix=torch.ones(3, 3).long(), guidance_scale=scale)
    claim = "3 known tokens: step 1 runs cls, the class and these, later steps one element; with guidance all run twice"
    assert shapes == [(rows, 5), (rows, 1), (rows, 1), (rows, 1)], claim


# ---------------------------------------------------------------------------------------------------------------------
# merge (both tables in one for a fixed order, Sec. 3.2) and prefix (known tokens, all that inpainting needs)
# ---------------------------------------------------------------------------------------------------------------------


@ORDER
def test_merge_leaves_the_logits_of_one_order(order):
    inputs = (*random_input()[:2], order)
    merged = small_rar().merge_position_embeddings(order)
    assert "target_aware_pos_embed" not in merged.state_dict(), "after merging there must be one table"
    claim = "merging must not change the logits of its order: a row gets the target-aware row of the next position"
    assert_close(logits_of(merged, *inputs), logits_of(small_rar(), *inputs), claim)


def test_prefix_inpainting_order_visits_known_cells_first():
    order, count = rar.inpainting_order(torch.arange(60) % 3 == 1)
    expected = sorted(range(60), key=lambda i: i % 3 != 1)
    assert order.tolist() == expected, "the known cells come first, then the others, both in raster order"
    assert count == 20, f"20 of the 60 cells are known, not {count}"


# ---------------------------------------------------------------------------------------------------------------------
# null_class and dropout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", range(4))
def test_null_class_is_label_C_and_has_a_row_of_its_own(label):
    model, inputs = small_rar(), (torch.ones(4, 9).long(), torch.arange(4), SHUFFLED)
    before = logits_of(model, *inputs)
    model.embeddings.weight.data[8 + label] = 0
    found = (logits_of(model, *inputs) != before).any(2).any(1).nonzero().flatten().tolist()
    claim = f"7 codes, a mask token, 3 classes, null class 3: row {8 + label} belongs to label {label}, not to {found}"
    assert found == [label], claim


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropout_of_labels_has_the_right_rate(rate):
    labels = torch.arange(20000) % 17
    dropped = rar.drop_labels(labels, 17, rate)
    share = (dropped == 17).float().mean().item()
    assert abs(share - rate) < 0.011, f"{rate:.0%} of the labels must become the null class, not {share:.1%}"
    assert_close(dropped, labels.where(dropped != 17, 17), "labels that are not dropped must stay as they are", 0)


@pytest.mark.parametrize("part", ["attn", "attn.proj_drop", "mlp.drop"])
def test_dropout_is_on_in_training_and_off_in_eval(part):
    model, inputs = small_rar(dropout=0.5), random_input()
    expected = logits_of(small_rar(), *inputs)
    assert_close(logits_of(model, *inputs), expected, "dropout must be off in eval mode")
    model.blocks[0].get_submodule(part).training = True  # of this module alone, not of those inside it
    change = (logits_of(model, *inputs) - expected).abs().max().item()
    assert change > 0.01, f"dropout of 0.5 must change the logits in training mode, that of {part} alone too"


# ---------------------------------------------------------------------------------------------------------------------
# parameter_counts: Tab. 1 and 6
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, millions", {"rar_b": 261, "rar_l": 461, "rar_xl": 955, "rar_xxl": 1499}.items())
def test_parameter_counts_of_table_1(name, millions):
    with torch.device("meta"):  # sizes without memory
        model = RAR(RARConfig(1024, 1000, 256, heads=16, **rar.TABLE_1[name]))
    count = sum(p.numel() for p in model.parameters()) / 1e6  # Tab. 1 rounds 260.9 up and 461.7 down
    assert abs(count - millions) < 0.7, f"{name} must have {millions} million parameters, not {count:.1f}"


def test_parameter_counts_have_the_settings_of_table_6():
    found = [(width, *settings.values()) for width, settings in sample_script.TABLE_6.items()]
    expected = [(768, 16, 2.75, 1), (1024, 15.5, 2.5, 1.02), (1280, 6.9, 1.5, 1.02), (1408, 8, 1.2, 1.02)]
    assert found == expected, "width, guidance scale and power, temperature are not those of Tab. 6"


# ---------------------------------------------------------------------------------------------------------------------
# golden and released: what the authors' program computes with weights in the released layout, and files of such weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["raster", "permuted", "uncond"])
def test_golden_logits(case):
    labels, orders, expected = (torch.tensor(numbers) for numbers in GOLDEN["rar"][case].values())
    model, tokens = RAR.from_released(released("rar_keys", 0.2)), torch.tensor(GOLDEN["rar"]["tokens"])
    claim = f"{case} logits are not those of the authors' program; a small error may be a detail: exact GELU, eps 1e-6"
    assert_close(logits_of(model, tokens, labels, orders), expected, claim)


@torch.no_grad()
def test_golden_tokenizer():
    golden, claim = GOLDEN["tokenizer"], "output is not that of the authors' program"
    model = VQTokenizer.from_released(released("tokenizer_keys", 0.1), image_size=16)
    images = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 16, 16)).float()
    assert_close(model.encoder(images), torch.tensor(golden["h"]), f"the encoder's {claim}")
    tokens = model.encode(images)
    assert tokens.tolist() == golden["indices"], "the authors' program gives these images other tokens"
    pixels = model.decoder(model.quantize.lookup(tokens, 4))[:, :, ::5, ::5]
    assert_close(pixels, torch.tensor(golden["recon"]), f"the decoder's {claim}")


def test_released_weights_must_fit():
    weights, name = released("rar_keys", 0.2), "lm_head.bias"
    missing = {other: tensor for other, tensor in weights.items() if other != name}
    misshapen = weights | {name: torch.ones(2)}
    for changed, words in ((missing, name), (misshapen, name), (weights | {"surplus": torch.ones(2)}, "surplus")):
        found = error_of(RuntimeError, RAR.from_released, changed)
        assert words in found, f"a tensor that is missing, misshapen or surplus, here {words}, must be refused by name"


class RunsCode:
    """Unpickled, this would make a file in the current folder."""

    def __reduce__(self):
        return open, ("the-code-ran", "w")


def test_released_weights_come_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = released("rar_keys", 0.2)
    torch.save(weights, "w.bin")
    assert RAR.from_released("w.bin").lm_head.bias.equal(weights["lm_head.bias"]), "weights must be those of the file"
    os.truncate("w.bin", 1000)
    assert "w.bin" in error_of(ValueError, RAR.from_released, "w.bin"), "a damaged file must be named in a ValueError"
    torch.save(weights | {"lm_head.bias": RunsCode()}, "w.bin")
    found = error_of(Exception, RAR.from_released, "w.bin")
    assert not Path("the-code-ran").exists(), "files come from anywhere: loading one must not run code that is in it"
    assert "w.bin" in found, "a file that holds code must be named"


# ---------------------------------------------------------------------------------------------------------------------
# worked_example: what `python rar.py` prints beside Fig. 3
# ---------------------------------------------------------------------------------------------------------------------


def test_worked_example_holds_together():
    text = rar.worked_example()
    layout, order = (json.loads(numbers) for numbers in re.findall(r"\[\d+, .*?\]", text))
    targets = [(str(layout[i]), str(i)) for i in order]
    found = re.findall(r"token (\d+) at position (\d)", text)
    assert found == targets, "the elements must predict the tokens of the image in the order that was drawn"
    inputs = [line.split()[1] for line in text.splitlines() if "at position" in line]
    assert inputs[1:] == [token for token, _ in targets[:3]], "an element must be fed the token predicted before it"


# ---------------------------------------------------------------------------------------------------------------------
# vq: the tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def small_vq(codes=12):
    """A tokenizer of 8x8 images to 4x4 tokens, and three images."""
    return fill(VQTokenizer(VQConfig(8, codes, 4, 8, (1, 2))), 0.3), torch.rand(3, 3, 8, 8)


def test_vq_chooses_the_nearest_code_and_passes_gradients():
    quantizer = small_vq(1024)[0].quantize
    latents, weights = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes, tokens = quantizer(latents)
    nearest = (flatten_latents(latents)[:, None] - quantizer.embedding.weight).square().sum(2).argmin(1)
    claim = "a latent did not get its nearest code: |z - c|^2 depends on |c|^2 too, and autocast must not round it"
    assert_close(tokens.flatten(), nearest, claim, 0)
    assert_close(codes, quantizer.lookup(tokens, 8), "forwards, each latent must be replaced by its nearest code")
    assert codes.requires_grad, "no gradient passes the quantizer, so the encoder learns nothing"
    (codes * weights).sum().backward()
    assert_close(latents.grad, weights, "backwards, the gradient must reach the latents as if they were the codes")


@torch.no_grad()
def test_vq_round_trip():
    model, images = small_vq()
    tokens = torch.randint(12, (3, 16))
    codes, expected = model.quantize.lookup(tokens, 4), model.quantize.embedding.weight[tokens[:, 11]]
    assert_close(codes[:, :, 2, 3], expected, "tokens are row-major: token 11 of a 4x4 grid is in row 2, column 3")
    assert_close(model.quantize(codes)[1], tokens, "each code is the one nearest to itself: its token comes back", 0)
    reconstruction, losses = model(images)
    found = model.decode(model.encode(images))
    assert_close(found, reconstruction.clamp(0, 1), "decode must give what training sees, in 0..1")
    assert_close(losses["reconstruction"], F.mse_loss(reconstruction, images), "the loss must be that before clamping")
    plain = model.decoder(model.encoder(images))
    assert_close(model(images, quantize=False)[0], plain, "with quantize=False the decoder must get the latents")


def test_vq_commitment_pulls_the_encoder_towards_the_codes():
    model, images = small_vq()
    model(images)[1]["commitment"].backward()
    apart = (model.encoder(images) - model.quantize.lookup(model.encode(images), 4)).detach()
    expected = 2 * apart.sum((0, 2, 3)) / apart.numel()
    assert_close(model.encoder.conv_out.bias.grad, expected, "latents must be pulled to codes: 2 (latent - code) / N")


# ---------------------------------------------------------------------------------------------------------------------
# codebook: moving averages, restarts, start, use
# ---------------------------------------------------------------------------------------------------------------------


def test_codebook_moving_average_by_hand():
    codes, latents = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0], [1.0]])
    ema = CodebookEMA(torch.tensor([2.0, 4.0]), torch.tensor([[2.0], [8.0]]), decay=0.8)
    ema.update(codes, latents, torch.tensor([0, 0, 1]))
    claim = "3 latents for 2 codes are 1.5 a code, so 2 and 1 count 4/3 and 2/3: counts become 0.8 * old + 0.2 * new"
    assert ema.counts.tolist() == pytest.approx([28 / 15, 10 / 3]), claim
    claim = "sums of latents, 8 and 1, are divided by 1.5 as well, and a code is its sum divided by its count"
    assert codes.flatten().tolist() == pytest.approx([10 / 7, 1.96]), claim


def test_codebook_restarts_dead_codes_and_no_others():
    counts = torch.tensor([1.0] * 3 + [0.001] * 10)
    codes, latents, tokens = torch.arange(13.0)[:, None], torch.arange(500.0, 600)[:, None], torch.zeros(100).long()
    ema = CodebookEMA(counts, codes * counts[:, None], decay=0.9)
    ema.update(codes, latents, tokens)  # all choose code 0
    restarted = codes[3:].clone()
    assert codes[1:3].flatten().tolist() == [1, 2], "a code in use must not restart, even if it misses a batch"
    claim = "a code with a count of almost 0 must restart at a latent of the batch, with count 1 and a sum that fits"
    assert torch.isin(restarted, latents).all() and ema.counts[3:].eq(1).all(), claim
    assert len(restarted.unique()) > 6, "ten dead codes must restart at random latents, each at one of its own"
    ema.update(codes, latents + 1000, tokens)
    assert_close(codes[3:], restarted, "a code must not restart again at the next step: its sum must fit its new place")


def means(latents, tokens):
    """The mean of all latents that chose the same code, for each latent."""
    return torch.stack([latents[tokens == token].mean(0) for token in tokens])


@pytest.mark.parametrize("count", [8, 40])
def test_codebook_starts_from_the_data(count):
    quantizer, latents = small_vq(count)[0].quantize, torch.randn(20, 4)
    overflowed = torch.tensor([[math.inf, 0, 0, 0], [0, math.nan, 0, 0]])
    ema = CodebookEMA.from_latents(quantizer, torch.cat([overflowed, latents]))
    codes = quantizer.embedding.weight
    assert codes.isfinite().all(), "a latent that is not finite must not enter the codebook"
    tokens = quantizer.nearest_codes(latents)
    claim = f"each of {count} codes must start at the mean of those of the 20 latents that it is nearest to (k-means)"
    assert_close(codes[tokens], means(latents, tokens), claim)
    assert_close(ema.sums / ema.counts[:, None], codes, "the statistics must agree with the codes from the start")


@torch.no_grad()
def test_codebook_follows_each_batch_that_trains():
    model, images = small_vq()
    latents, tokens = flatten_latents(model.encoder(images)), model.encode(images).flatten()
    codes = model.quantize.embedding.weight
    model(images, CodebookEMA(torch.ones(12), codes.clone(), decay=0.0))
    claim = "without memory (decay 0), a code must become the mean of the latents of the batch that chose it"
    assert_close(codes[tokens], means(latents, tokens), claim)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_codebook_ignores_a_batch_that_is_not_finite(bad):
    codes, counts, sums = torch.ones(2, 1), torch.ones(2), torch.ones(2, 1)
    CodebookEMA(counts, sums).update(codes, torch.tensor([[5.0], [bad]]), torch.tensor([0, 1]))
    moved = (torch.cat([codes.flatten(), counts, sums.flatten()]) != 1).any()
    assert not moved, f"a latent is {bad}, as after an overflow in float16: codes and averages must not move"


def test_codebook_use_is_counted():
    assert codes_used(torch.tensor([[0, 3, 3], [0, 0, 7]]), 12) == 0.25, "tokens 0, 3 and 7 are a quarter of 12 codes"


# ---------------------------------------------------------------------------------------------------------------------
# schedule: pure functions of the step (Sec. 4.1)
# ---------------------------------------------------------------------------------------------------------------------


def test_schedule_of_the_learning_rate():
    found = [train_tiny.learning_rate(step, 100, 1.0, 0.2) for step in (0, 9, 20, 60, 100)]
    by_hand = [1 / 21, 10 / 21, 1, (1 + 0.025) / 2, 0.025]
    assert found == pytest.approx(by_hand), "it rises in a line to the peak, then falls on a cosine to 1/40 of it"


def test_schedule_of_batches():
    rows = [batch_rows(step, 4, 10, 0, "rar") for step in range(10)]
    epochs = np.reshape(rows, (4, 10))
    assert (np.sort(epochs) == np.arange(10)).all(), "an epoch must visit every sample once"
    other_stage = batch_rows(0, 10, 10, 0, "tokenizer")
    orders = np.unique([*epochs, other_stage], axis=0)
    assert len(orders) == 5, "each epoch of each stage must have an order of its own"


def test_schedule_of_weight_decay():
    model = RAR(RARConfig(5, 2, 4, 8, 1, 2, 8))
    groups = train_tiny.make_optimizer(model, 0.03).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        free = any(word in name for word in ("bias", "norm", "embed", "adaln_before_head"))
        assert decay.get(p) == (0 if free else 0.03), f"wrong weight decay for {name}"


def test_schedule_of_an_update_clips_gradients():
    model = torch.nn.Linear(4, 4)
    optimizer = train_tiny.make_optimizer(model, 0.03)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.96), "AdamW has betas 0.9 and 0.96 (Sec. 4.1)"
    loss = 1000 * model(torch.ones(1, 4)).sum()
    train_tiny.update(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), loss, 0.1)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(1, rel=1e-4), f"the norm of the gradient must be clipped at 1, not be {norm:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# data: each reader, on small files written here
# ---------------------------------------------------------------------------------------------------------------------


def planar_noise(count, side, seed):
    """Random images (N, S, S, 3) and the same as rows of planar pixels (N, 3 * S * S)."""
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, images.transpose(0, 3, 1, 2).reshape(count, -1)


def write_image(path, pixels, side=8):
    """Save pixels, of which there may be a single one, as a picture of this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).resize((side, side), Image.NEAREST).save(path)


def write_npz(folder, name, labels, seed=0):
    """A file as of the downsampled ImageNet, but of 8x8 pixels."""
    np.savez(folder / f"{name}.npz", data=planar_noise(len(labels), 8, seed)[1], labels=labels)


def test_data_digits(monkeypatch):
    monkeypatch.setattr(np, "arange", lambda count, arange=np.arange: arange(20))  # 20 images are enough
    val, again, train = (load_images("digits", split)[0] for split in ("val", "val", "train"))
    assert (val == again).all(), "the data set must be the same each time"
    assert not (train == val).all((1, 2, 3)).any(), "training images must not be validation images"
    with pytest.raises(AssertionError, match="not test"):  # there are no other splits
        load_images("digits", "test")


def test_data_cifar10(tmp_path, monkeypatch):
    """First its files, then a file that is cut short, then the archive alone."""
    monkeypatch.setattr(train_tiny, "CIFAR10_RECORDS", 2)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        records = np.insert(planar_noise(2, 32, seed)[1], 0, [seed, 9], axis=1)
        records.tofile(folder / f"{name}.bin")
    shutil.make_archive(tmp_path / "cifar-10-binary", "gztar", tmp_path, folder.name)
    images, labels, _ = load_images("cifar10", "train", tmp_path)
    assert labels[::2].tolist() == [1, 2, 3, 4, 5], "a label is the first byte of its record"
    assert (images[2:4] == planar_noise(2, 32, 2)[0]).all(), "pixels are planar: all red, all green, all blue"
    os.truncate(folder / "data_batch_3.bin", 3073)
    with pytest.raises(SystemExit, match="download it again"):
        load_images("cifar10", "train", tmp_path)
    shutil.rmtree(folder)
    images, _, _ = load_images("cifar10", "val", tmp_path)
    assert (images == planar_noise(2, 32, 0)[0]).all(), "the val split must be that of test_batch.bin"


def test_data_imagenet64(tmp_path, capsys):
    write_npz(tmp_path, "train_data_batch_1", [7, 2, 1000])
    write_npz(tmp_path, "train_data_batch_2", [9])
    write_npz(tmp_path, "val_data", [5, 1000, 2], seed=2)
    _, labels, names = load_images("imagenet64", "train", tmp_path, 8)
    assert names == ["label-2", "label-7", "label-9", "label-1000"], "classes are those of the training files"
    assert labels.tolist() == [1, 0, 3, 2], "labels must count from 0 without gaps"
    images, labels, _ = load_images("imagenet64", "val", tmp_path, 8)
    assert labels.tolist() == [3, 0], "validation images of a class without training images are left out"
    assert (images == planar_noise(3, 8, 2)[0][1:]).all(), "pixels are planar; images must stay with their labels"
    assert "1 images are left out" in capsys.readouterr().out, "it must say how many are left out"


LAYOUTS = [("u1", (4, 8, 8, 3), (4,)), ("f4", (4, 192), (4,)), ("u1", (4, 192), (4, 1)), ("u1", (0, 192), (0,))]


@pytest.mark.parametrize("dtype, shape, labels", [*LAYOUTS, ("u1", (4, 48), (4,))])
def test_data_imagenet64_in_another_layout_is_refused(dtype, shape, labels, tmp_path):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros(shape, dtype), labels=np.zeros(labels, int))
    with pytest.raises(SystemExit, match=r"train_data_batch_1\.npz: data must be uint8"):
        load_images("imagenet64", "train", tmp_path, 8)


def test_data_folder_with_val(tmp_path, capsys):
    write_image(tmp_path / "train/red/a.png", [[[255, 0, 0]]])
    write_image(tmp_path / "train/grey/b.gif", [[99]])
    for path in ("val/red/c.bmp", "val/not-in-train/d.png", "train/red/.hidden.png", "train/.hidden/e.png"):
        write_image(tmp_path / path, [[[0, 0, 255]]])
    (tmp_path / "train/red/damaged.jpg").write_bytes(b"?")
    images, labels, names = load_images("folder", "train", tmp_path, 4)
    assert names == ["grey", "red"], "classes are the folders of train/ that hold images, sorted"
    assert images[labels.argsort(), 0, 0].tolist() == [[99] * 3, [255, 0, 0]], "read each image of train/, and no other"
    assert "damaged.jpg" in "".join(capsys.readouterr()), "an image that cannot be read must be named, and skipped"
    images, labels, _ = load_images("folder", "val", tmp_path, 4)
    assert labels.tolist() == [1], "labels of val/ are those of train/, and its other classes are left out"
    assert images[0, 0, 0].tolist() == [0, 0, 255], "the val split must be that of val/"


def test_data_folder_without_val(tmp_path):
    for i in range(23):
        name = "many" if i < 21 else "two"
        write_image(tmp_path / f"train/{name}/{i}.png", [[[i, 0, 0]]])
    train, labels, _ = load_images("folder", "train", tmp_path)
    val, val_labels, _ = load_images("folder", "val", tmp_path)
    assert np.bincount(val_labels).tolist() == [2, 1], "every tenth image of a class must be held out"
    assert np.bincount(labels).tolist() == [19, 1], "each class must keep an image for training"
    assert len(np.unique([*train, *val], axis=0)) == 23, "no image may be in both splits"


# ---------------------------------------------------------------------------------------------------------------------
# run: one miniature run of train_tiny.py, watched
# ---------------------------------------------------------------------------------------------------------------------


RAR_OPTIONS = "--dim 16 --depth 1 --heads 2 --steps 16 --batch-size 8 --lr 0.01 --eval-every 4 --scan z-curve"
IMAGE_OPTIONS = "--image-size 16 --codebook-size 16 --channels 4 --tokenizer-steps 6 --tokenizer-batch 4"
MINIATURE = f"train_tiny.py --config folder {IMAGE_OPTIONS} {RAR_OPTIONS}"
FROM_TOKENS = f"train_tiny.py --config folder --tokens run/tokens.npz {RAR_OPTIONS}"
FILES_OF_A_RUN = """metrics.csv rar.pt rar_random.pt reconstructions.png run.json samples-000004.png samples-000008.png
samples-000012.png samples-000016.png samples.png state.pt tokenizer.pt tokens.npz"""
Z_CURVE = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])


def run_script(command):
    """Run the main function of train_tiny.py or sample.py in this process."""
    name, *options = command.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "--device", "cpu", *options])
        (train_tiny if name == "train_tiny.py" else sample_script).main()


def watch_script(command):
    """Run a script; returns the images of each step of the tokenizer, and what RAR got and gave, but not in sampling:
    tokens, labels, orders, logits, and whether dropout was on and its seed. Each is stacked over the steps."""
    calls = defaultdict(list)

    def hook(model, inputs, result):
        if type(model) is VQTokenizer:
            calls["tokenizer"].append(inputs[:1])
        if type(model) is RAR and len(inputs) == 3:  # sampling gives a cache too
            stage = "training" if torch.is_grad_enabled() else "validation"
            dropout = torch.tensor([model.training, torch.initial_seed()])
            calls[stage].append((*inputs, result.detach(), dropout))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    run_script(command)
    handle.remove()
    return {stage: [torch.stack(part) for part in zip(*calls[stage])] for stage in calls}


def mean_losses(logits, targets, count):
    """The mean loss of each of so many equal parts of a batch."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(count, -1).mean(1)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder with data/ and run/, and the calls of the run."""
    folder = tmp_path_factory.mktemp("miniature")
    for i, pixels in enumerate(planar_noise(30, 4, 0)[0]):
        name = ("ant", "bee", "cat")[i % 3]
        write_image(folder / f"data/train/{name}/{i}.png", pixels, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, watch_script(f"{MINIATURE} --out run")


@pytest.fixture
def here(miniature, tmp_path, monkeypatch):
    """The calls of the run; a copy of the miniature's folder is the current folder during the test."""
    shutil.copytree(miniature[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return miniature[1]


def read_files(folder):
    """All files below a folder: {path: content}."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_metrics(run):
    return np.genfromtxt(Path(run, "metrics.csv"), delimiter=",", names=True)


def read_tokens(prefix=""):
    """Tokens (N, T) and labels (N,) of the miniature run; the prefix of the val split is "val_"."""
    data = np.load("run/tokens.npz")
    return torch.from_numpy(data[f"{prefix}tokens"]).long(), torch.from_numpy(data[f"{prefix}labels"])


def cut_sheet(path, columns):
    """The 16x16 images of a sheet, each four times enlarged with a white line around it."""
    tiles = np.asarray(Image.open(path)).reshape(-1, 66, columns, 66, 3)
    return tiles[:, 1:-1:4, :, 1:-1:4].swapaxes(1, 2).reshape(-1, 16, 16, 3)


def test_run_leaves_files_and_metrics(here):
    assert sorted(read_files("run")) == FILES_OF_A_RUN.split(), "these are not the files of a finished run"
    rows = read_metrics("run")
    assert rows["step"].tolist() == [4, 8, 12, 16], "metrics.csv must have a row for every evaluation"
    assert rows["r"].tolist() == [1, 1, 0.25, 0], "r is 1 for half of the steps and 0 after three quarters of them"
    groups = rar.load_file("run/state.pt")["optimizer"]["param_groups"]
    rate = train_tiny.learning_rate(15, 16, 0.01, train_tiny.PRESETS["folder"]["warmup"])
    assert groups[0]["lr"] == pytest.approx(rate), "the optimizer must follow the schedule of the learning rate"


def test_run_trains_the_tokenizer_on_images_and_mirror_images(here):
    images, _, _ = load_images("folder", "train", "data", 16)
    for step, found in enumerate(here["tokenizer"][0]):
        expected = images[batch_rows(step, 4, 27, 0, "tokenizer")]
        if step % 2:
            expected = expected[:, :, ::-1]
        assert (to_uint8(found) == expected).all(), "every other batch must be mirrored from left to right"


@pytest.mark.parametrize("split, prefix", [("train", ""), ("val", "val_")])
def test_run_encodes_all_images(split, prefix, here):
    _, tokenizer, _ = load_run("run")
    images, labels, _ = load_images("folder", split, "data", 16)
    views = [images, images[:, :, ::-1]] if split == "train" else [images]
    expected = torch.cat([tokenizer.encode(to_float(view)) for view in views])
    tokens, found_labels = read_tokens(prefix)
    assert tokens.equal(expected), "tokens must be those of the images, and of train/ then of their mirror images"
    assert found_labels.tolist() == labels.tolist() * len(views), "each image must keep its label"
    if split == "val":
        pairs = np.stack([images, to_uint8(tokenizer.decode(tokens))], axis=1).reshape(6, 16, 16, 3)
        assert (cut_sheet("run/reconstructions.png", 10)[:6] == pairs).all(), "show images beside what remains of them"


def test_run_trains_on_permuted_tokens(here):
    tokens, labels = read_tokens()
    rows = np.stack([batch_rows(step, 8, 54, 0, "rar") for step in range(16)])
    seen, given, orders, logits, dropout = here["training"]
    shuffled = tokens[rows].gather(2, orders)
    dropped = given == 3
    in_scan = (orders == Z_CURVE).all(2).float().mean(1).tolist()
    assert seen.equal(shuffled[:, :, :-1]), "the model must see all tokens but the last, in their order"
    assert given.equal(labels[rows].masked_fill(dropped, 3)), "labels must be those of the images, or dropped"
    assert 4 <= dropped.sum() <= 24, f"about a tenth of 128 labels must be dropped, not {dropped.sum()}"
    assert len(orders[:9].flatten(0, 1).unique(dim=0)) == 72, "each image of each step must get an order of its own"
    assert in_scan[:9] == [0] * 9, "orders must be random while r is 1"
    assert 0 < np.mean(in_scan[9:12]) < 1, "orders must be mixed while r falls"
    assert in_scan[12:] == [1] * 4, "orders must be the scan from the end of annealing on"
    assert dropout[:, 0].all(), "dropout must be on in training, also after an evaluation"
    losses = mean_losses(logits, shuffled, 4)
    assert read_metrics("run")["train_loss"] == pytest.approx(losses, rel=1e-4), "targets must be the tokens in order"


def test_run_validates_on_held_out_tokens(here):
    tokens, labels = read_tokens("val_")
    seen, given, orders, logits, dropout = here["validation"]
    shuffled = tokens.expand(8, -1, -1).gather(2, orders)
    assert not dropout[:, 0].any(), "dropout must be off in validation"
    assert seen.equal(shuffled[:, :, :-1]), "validation must use the held-out tokens, in their order"
    assert given.equal(labels.expand(8, -1)), "validation must use the labels, and drop none"
    assert (orders[0::2] == Z_CURVE).all(), "the first loss must be that of the scan"
    assert (orders[1::2] == orders[1]).all(), "the orders of the second loss must always be the same"
    assert not (orders[1] == Z_CURVE).all(1).any(), "the orders of the second loss must be random"
    losses = mean_losses(logits, shuffled, 8)
    columns = read_metrics("run")[["val_loss_scan", "val_loss_random"]].tolist()
    assert np.allclose(columns, losses.view(4, 2), rtol=1e-4), "metrics.csv must hold the validation losses"


@pytest.mark.parametrize("options", ["", "--seed 1", "--dtype float16"])
def test_run_from_tokens_alone(options, here):
    os.remove("run/tokenizer.pt")
    run_script(f"{FROM_TOKENS} {options} --out new")
    found, expected = (read_metrics(run)["val_loss_scan"] for run in ("new", "run"))
    difference = np.abs(found - expected).max()
    assert (difference == 0) == (options == ""), "losses must be those of the run if the options are, and only then"
    assert difference < 0.3, f"with {options} it must learn as well as without"
    scaler = rar.load_file("new/state.pt")["scaler"]
    assert bool(scaler) == ("float16" in options), "in float16 state.pt must hold the loss scale"


@pytest.mark.parametrize("order, r", [("raster", 0), ("random", 1)])
def test_run_with_a_fixed_ratio(order, r, here):
    run_script(f"{FROM_TOKENS} --order {order} --out new")
    assert (read_metrics("new")["r"] == r).all(), f"r must be {r} in all steps with --order {order}"
    assert Path("new/rar_random.pt").exists() == r, "rar_random.pt holds the last weights of random orders alone"


def test_run_takes_validation_images_evenly(tmp_path, monkeypatch):
    """300 validation images sorted by class, and training images in two files."""
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path, "train_data_batch_1", [3, 1, 2])
    write_npz(tmp_path, "train_data_batch_2", [3, 3])
    write_npz(tmp_path, "val_data", np.arange(300) // 100 + 1)
    run_script(f"{MINIATURE} --config imagenet64 --data-dir . --image-size 8 --steps 1 --out run")
    assert np.bincount(read_tokens("val_")[1]).min() >= 85, "256 images must be taken evenly, not the first ones"
    assert read_tokens()[1].tolist() == [2, 0, 1, 2, 0, 1, 2, 2, 2, 2], "all files must be encoded, and mirrored"


def test_run_claims_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as it looks to runs that start at the same moment
    args = train_tiny.parse_args([])
    assert train_tiny.claim_folder(args) != train_tiny.claim_folder(args), "two runs must not share a folder"


DIVERGING = [
    f"{FROM_TOKENS} --eval-every 21",
    f"{FROM_TOKENS} --eval-every 21 --dtype float16",
    f"{MINIATURE} --eval-every 60 --dtype float16 --tokenizer-steps 60",
    f"{MINIATURE} --eval-every 60 --dtype float16 --tokenizer-steps 120",  # before the codebook starts
]


@pytest.mark.parametrize("command", DIVERGING)
def test_run_that_diverges_ends_and_saves_nothing(command, here, monkeypatch):
    """In float16 the optimizer skips steps that are not finite, so the loss scale falls until the run ends."""

    def watched(self, codes, *others, update=CodebookEMA.update):
        update(self, codes, *others)
        assert codes.isfinite().all(), "latents that are not finite must not move the codebook"

    monkeypatch.setattr(CodebookEMA, "update", watched)
    monkeypatch.setattr(train_tiny, "learning_rate", lambda step, *_: 1e-3 if step < 20 else 1e30)
    with pytest.raises(SystemExit, match="learning rate"):
        run_script(f"{command} --steps 60 --out new")
    assert list(read_files("new")) == ["run.json"], "a model that has diverged must not be saved"


# ---------------------------------------------------------------------------------------------------------------------
# resume: stopped at any moment, a run ends as if it had never been stopped
# ---------------------------------------------------------------------------------------------------------------------


def stop_in_front_of(name, command, kill=False):
    """Run a command until a file, of which half is lost, is about to get this name."""

    def replace_or_stop(source, target, replace=os.replace):
        if Path(target).name == name:
            os.truncate(source, os.path.getsize(source) // 2)
            if kill:
                os.kill(os.getpid(), 9)
            sys.exit("stopped here")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="stopped here"):
        patch.setattr("os.replace", replace_or_stop)
        run_script(command)


def check_resumed_run(run):
    """Resume a run for the last time, and compare all that it leaves with the unbroken one."""
    run_script(f"train_tiny.py --resume --out {run}")
    found, expected = read_files(run), read_files("run")
    assert found.keys() == expected.keys(), "a resumed run must leave the files of an unbroken one, and no others"
    for name in sorted(expected.keys() - {"run.json", "state.pt"}):  # run.json holds the name of the folder
        assert found[name] == expected[name], f"{name} of a resumed run must be that of an unbroken one, bit for bit"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
@pytest.mark.parametrize("name", ["tokenizer.pt", "samples-000012.png"])
def test_resume_after_sigkill_in_each_stage(name, here):
    command = f"{MINIATURE} --out killed"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=stop_in_front_of, args=(name, command, True))
    process.start()
    process.join(60)
    assert process.exitcode == -9, f"the process must be killed in front of {name}"
    check_resumed_run("killed")


def test_resume_after_a_stop_in_front_of_every_file(here, monkeypatch):
    """The run is the newest one in runs/. Files that are written again and again are met at several steps."""
    stop_in_front_of("reconstructions.png", MINIATURE)
    for name in ("tokenizer.pt", "tokens.npz"):
        stop_in_front_of(name, "train_tiny.py --resume")
    monkeypatch.setattr(train_tiny, "train_tokenizer", Mock(side_effect=AssertionError("it was trained already")))
    stages = "samples-000004.png state.pt samples-000008.png metrics.csv rar.pt state.pt rar_random.pt"
    for name in f"{stages} samples-000012.png samples.png samples-000016.png state.pt".split():
        stop_in_front_of(name, "train_tiny.py --resume")
    check_resumed_run(Path("runs/folder-1"))


def test_resume_of_a_finished_run_changes_nothing(here):
    before = read_files(".")
    run_script("train_tiny.py --resume --out run")
    assert read_files(".") == before, "a finished run must stay as it is"


# ---------------------------------------------------------------------------------------------------------------------
# images: files as people have them
# ---------------------------------------------------------------------------------------------------------------------


TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]


def read_pixels(image, path, size=8, **options):
    """What read_image makes of a picture that was saved."""
    image.save(path, **options)
    return read_image(path, size).astype(int)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_images_are_turned_upright_and_cropped_in_the_middle(orientation, tmp_path):
    ramp = np.linspace(0, 200, 16)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:12, None], 99), axis=2).astype(np.uint8)
    turned = Image.fromarray(pixels).transpose(Image.Transpose[TURNS[orientation - 2]])
    exif = Image.Exif()
    exif[274] = orientation
    found = read_pixels(turned, tmp_path / "turned.jpg", 12, exif=exif, quality=100, subsampling=0)
    assert np.abs(found - pixels[:, 2:14]).max() <= 3, f"EXIF orientation {orientation}: not upright, or not the middle"


@pytest.mark.parametrize("name, kind", [("grey.png", np.uint16), ("grey.tiff", np.int32)])
def test_images_of_16_bits(name, kind, tmp_path):
    grey = np.arange(0, 256, 4).reshape(8, 8)
    found = read_pixels(Image.fromarray((grey * 257).astype(kind)), tmp_path / name)
    assert np.abs(found - grey[..., None]).max() <= 2, f"16 bits of grey in {name} must look like their 8-bit twin"


def test_images_with_transparency_lie_on_white(tmp_path):
    grey = Image.new("LA", (8, 8), (0, 128))
    for image in (grey, grey.convert("RGBA")):
        found = read_pixels(image, tmp_path / "x.png")
        assert (found == 127).all(), f"half-transparent black ({image.mode}) must be grey"


def test_images_from_a_large_jpeg_are_decoded_small_but_do_not_alias(tmp_path, monkeypatch):
    """22 waves are too fine for 32 pixels. Decoded at 32 pixels they would show as another pattern."""
    waves = 127.5 + 120 * np.sin(2 * np.pi * 22 / 256 * np.arange(256))
    image = Image.fromarray(np.broadcast_to(waves, (256, 256)).astype(np.uint8)).convert("RGB")
    whole = read_pixels(image, tmp_path / "x.png", 32)
    sizes, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or load(self))
    found = read_pixels(image, tmp_path / "x.jpg", 32, quality=95)
    assert set(sizes) == {(64, 64)}, "a JPEG must be decoded at twice the size that is needed, not in full"
    assert np.abs(found - whole).max() < 8, "a pattern that is too fine must become grey, not another pattern"


# ---------------------------------------------------------------------------------------------------------------------
# processes: torchrun
# ---------------------------------------------------------------------------------------------------------------------


def start_python(*command):
    """Start Python with these arguments as a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def test_processes_train_as_one_does(here):
    """Two processes under torchrun reach the losses of one; the first one trains the tokenizer meanwhile."""
    command = f"{MINIATURE} --steps 6 --eval-every 2 --dropout 0 --device cpu --out"
    program = [train_tiny.__file__, *command.split()[1:], "two"]
    torchrun = start_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program)
    run_script(f"{command} one")
    output, _ = torchrun.communicate()
    assert torchrun.returncode == 0, f"torchrun failed: {output.decode()[-2000:]}"
    one, two = (read_metrics(run).tolist() for run in ("one", "two"))
    assert np.allclose(one, two, rtol=0, atol=2e-5), "two processes must reach the losses of one to 1e-5"


def test_processes_share_a_batch_and_drop_different_units(here, monkeypatch):
    """The second of two processes, alone: what it would do with the other one is left out."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "barrier", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, Mock())
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    second = watch_script(f"{FROM_TOKENS} --out second")
    for found, batch in zip(second["training"][:3], here["training"]):
        assert found.equal(batch[:, 1::2]), "it must take every other image of a batch, with its label and order"
    seeds = torch.cat([second["training"][4], here["training"][4]])[:, 1]
    assert len(seeds.unique()) == 32, "dropout needs a seed for each step and process"
    assert not Path("second").exists(), "only the first process evaluates and writes"


# ---------------------------------------------------------------------------------------------------------------------
# machines: which device and type are taken, on computers that this test does not run on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, mps, processes, found", [(1, 1, 1, "cuda"), (0, 1, 1, "mps"), (0, 1, 2, "cpu")])
def test_machines_have_their_device_found(cuda, mps, processes, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    device, why = train_tiny.pick_device(None, processes)
    assert device.type == found, "cuda comes before mps; several processes cannot train on mps"
    assert why, "the first line must say why this device was taken"


@pytest.mark.parametrize("version, allowed", [("2.12.1", False), ("2.13.0", True)])
def test_machines_with_mps_need_a_new_torch_for_half_precision(version, allowed, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    mps = torch.device("mps")
    assert train_tiny.pick_dtype(None, mps) == torch.float32, "a Mac trains in float32 unless told otherwise"
    if allowed:
        assert train_tiny.pick_dtype("float16", mps) == torch.float16, "torch 2.13 can do it"
    else:
        with pytest.raises(SystemExit, match=r"float16 needs torch 2\.13"):
            train_tiny.pick_dtype("float16", mps)


def test_machines_with_too_few_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2 processes need as many GPUs"):
        train_tiny.join_processes(SimpleNamespace(world=2, device=torch.device("cuda")))


# ---------------------------------------------------------------------------------------------------------------------
# publish: files are replaced, also while another program holds them for a moment
# ---------------------------------------------------------------------------------------------------------------------


def test_publish_while_another_program_holds_the_file(monkeypatch, capsys):
    """As happens on Windows."""
    sleep, replace = Mock(), Mock(side_effect=[PermissionError] * 3 + [None])
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("os.replace", replace)
    train_tiny.publish(Path("rar.pt"))
    assert replace.call_count == 4, "a short hold must be waited out"
    replace.side_effect = PermissionError
    train_tiny.publish(Path("samples.png"))
    assert "samples.png" in capsys.readouterr().out, "a picture must be skipped with a line that names it"
    with pytest.raises(PermissionError, match=r"rar\.pt"):
        train_tiny.publish(Path("rar.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# sample: every mode of sample.py on the miniature run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, steps, scan", [("rar.pt", 16, "z-curve"), ("rar_random.pt", 9, "spiral-in")])
def test_sample_draws_what_generate_gives(name, steps, scan, here, capsys):
    """Other orders than that of the run need the weights from before annealing."""
    flags = f"--order {scan} --guidance-scale 2 --guidance-power 1.5 --temperature 0.9 --top-k 5 --batch-size 4"
    run_script(f"sample.py --run run --classes cat,0 --n 6 --seed 3 --npz set.npz --out sheet.png {flags}")
    first_line = capsys.readouterr().out.splitlines()[0]
    assert f"{Path('run', name)}, step {steps} of 16" in first_line, "the first line must say which weights are used"
    images, labels = np.load("set.npz").values()
    assert labels.tolist() == [2, 0] * 3, "the classes asked for must be drawn in turn"
    model, tokenizer, _ = load_run("run", name)
    options = {"guidance_scale": 2, "guidance_power": 1.5, "temperature": 0.9, "top_k": 5}
    options |= {"order": scan_order(scan, 4), "generator": torch.manual_seed(3)}
    tokens = torch.cat([model.generate(part, **options) for part in torch.from_numpy(labels).split(4)])
    assert (images == to_uint8(tokenizer.decode(tokens))).all(), "images must be those of generate"
    assert (cut_sheet("sheet.png", 2) == images).all(), "sheet and npz must hold the same images"


def test_sample_gif_grows_along_the_order(here):
    run_script("sample.py --run run --classes bee --n 1 --order spiral-in --gif grow.gif")
    with Image.open("grow.gif") as gif:
        frames = [np.asarray(frame.convert("RGB"), int)[1:-1, 1:-1] for frame in ImageSequence.Iterator(gif)]
    change = np.abs(np.diff(frames, axis=0)).reshape(-1, 4, 16, 4, 16, 3).max((2, 4, 5)).reshape(-1, 16)
    assert change.argmax(1).tolist() == scan_order("spiral-in", 4).tolist(), (
        "each frame must add the cell that comes next in the order"
    )
    assert np.sort(change)[:, -2].max() < 40, "a frame must add no other cell"


def test_sample_inpaints(here, capsys):
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
    assert "rar_random.pt" in capsys.readouterr().out, "inpainting needs the weights from before annealing"


def test_sample_finds_the_newest_run(here, capsys):
    """An older finished one is passed over, and the new one is still training."""
    shutil.copytree("run", "runs/old")
    stop_in_front_of("samples-000008.png", f"{FROM_TOKENS} --out runs/new")
    os.utime("runs/old/rar.pt", (1e9, 1e9))
    run_script("sample.py")
    assert f"{Path('runs/new/rar.pt')}, step 4 of 16" in capsys.readouterr().out, "the newest run must be taken"
    for name in ("samples.png", "samples-000004.png"):
        assert read_files("runs/new")[name] == read_files(".")["sheet.png"], f"{name} must be what sample.py draws"


@pytest.mark.parametrize("text, numbers", [("1", [0]), ("3, 7", [2, 5]), ("10,4", [3, 4]), ("red, bright", [4])])
def test_sample_pick_classes(text, numbers):
    found = sample_script.pick_classes(text, ["1", "2", "3", "10", "red, bright", "7"])
    assert found == numbers, "the whole text may be a name; of its parts a name wins over a number"


# ---------------------------------------------------------------------------------------------------------------------
# released: files in the authors' layout, here small ones of random numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_released_weights_by_file_and_by_name(tmp_path, monkeypatch):
    """A model of 4x4 tokens, 32 wide, and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    torch.save(fill(RAR(RARConfig(16, 3, 16, 32, 1, 16, 48)), 0.3).state_dict(), "rar_l.bin")
    config = VQConfig(256, 16, 4, 32, (1,) * 7, groups=32, released_shortcut=True)
    torch.save(VQTokenizer(config).state_dict(), "maskgit-vqgan-imagenet-f16-256.bin")
    fetch = Mock(side_effect=lambda url, path, *_: shutil.copy(Path(path).name, path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    monkeypatch.setitem(sample_script.TABLE_6, 32, sample_script.TABLE_6[1024])
    tab_6 = "--guidance-scale 15.5 --guidance-power 2.5 --temperature 1.02"
    run_script(f"sample.py --rar rar_l.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --n 1 --out file.png {tab_6}")
    for _ in range(2):
        run_script("sample.py --rar rar_l --n 1")
    assert Path("sheet.png").read_bytes() == Path("file.png").read_bytes(), "it must draw with the settings of Tab. 6"
    urls = "yucornetto/RAR/resolve/main/rar_l.bin fun-research/TiTok/resolve/main/maskgit-vqgan-imagenet-f16-256.bin"
    fetched = [call.args[0].removeprefix("https://mirror/") for call in fetch.mock_calls]
    assert fetched == urls.split(), "each file must be fetched once, from HF_ENDPOINT"


# ---------------------------------------------------------------------------------------------------------------------
# bad_input: the line names what is wrong, and nothing is changed
# ---------------------------------------------------------------------------------------------------------------------


BAD_INPUT = [
    ("train_tiny.py --tokens run/tokens.npz --warmup 500", "--warmup is a fraction"),
    ("train_tiny.py --tokens run/tokens.npz --out=", "cannot be empty"),
    ("train_tiny.py --tokens run/tokens.npz --out run", "run exists: add --resume"),
    ("train_tiny.py --tokens run/tokens.npz --step 1", "--step"),
    ("train_tiny.py --data-dir data", "--config"),
    ("train_tiny.py --tokens nowhere.npz", "nowhere.npz does not exist"),
    ("train_tiny.py --anneal-start 0.9", "--anneal-start 0.9 lies behind"),
    ("train_tiny.py --dim 100 --heads 3", "--dim 100 is not a multiple of --heads 3"),
    ("train_tiny.py --resume", "no folder in runs"),
    ("sample.py --run run --classes nosuch", "'nosuch'"),
    ("sample.py --run run --mask 0,0,4,4", "--inpaint"),
    ("sample.py --run run --inpaint data/train/ant/0.png --mask 1,2,3", "--mask"),
    ("sample.py --run run --inpaint data/train/ant/0.png --mask 4,4,17,8", "is no part of the image"),
    ("sample.py --rar run/rar.pt --order spiral-in", "row-major"),
    ("sample.py --run run --gif a.jpg", "a.jpg"),
    ("sample.py --run run --out a", ".png"),
    ("sample.py --run run --npz nowhere/a.npz", "existing folder"),
]


@pytest.mark.parametrize("command, words", BAD_INPUT)
def test_bad_input(command, words, here, monkeypatch, capsys):
    monkeypatch.setattr(RAR, "forward", Mock(side_effect=AssertionError("it must be refused before it draws")))
    before = read_files(".")
    with pytest.raises(SystemExit) as end:
        run_script(command)
    assert words in f"{end.value} {capsys.readouterr().err}", "the message must name what is wrong"
    assert read_files(".") == before, "what was there must stay as it was, and nothing may come to it"


@pytest.mark.parametrize("content", [b"PK damaged", RunsCode()])
def test_bad_input_in_rar_pt(content, here):
    torch.save({"weights": content}, "run/rar.pt")
    if isinstance(content, bytes):
        Path("run/rar.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"rar\.pt"):
        run_script("sample.py --run run")
    assert not Path("the-code-ran").exists(), "code in a file must not be run"


@pytest.mark.parametrize("command", [f"{FROM_TOKENS} --out new", "sample.py --run run"])
def test_bad_input_is_not_what_a_bug_is_called(command, here, monkeypatch):
    monkeypatch.setattr(RAR, "forward", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(command)


def test_import_has_no_side_effects():
    look = "print(Image.MAX_IMAGE_PIXELS, signal.getsignal(signal.SIGINT))"
    program = f"import signal; from PIL import Image; {look}; import train_tiny, sample; {look}"
    lines = start_python("-c", program).communicate()[0].splitlines()
    assert len(lines) == 2 and lines[0] == lines[1], f"importing the scripts must change nothing: {lines}"


sys.path.append(str(Path(__file__).parent / "benchmarks"))
from fake_device import *  # noqa: E402, F403
