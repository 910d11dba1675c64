"""What each part of RAR buys: `python benchmarks/ablation.py --preset quick --config cifar10 --data-dir DIR --out DIR`.

Trains variants on the same tokens with the same budget and several seeds, and writes table.md, results.csv, samples.png
(the same seeds in every row), crossing.png (quality against epochs), by_position.png, inpainting.png and orders.gif
into --out. `--preset quick` takes 20 minutes on two CPU cores, `--preset full` is for a GPU. Finished runs are not
repeated, a stopped one goes on: give the same command again, or one with more --variants, --seeds or --crossing.

A variant is a name of VARIANTS, with extras: `raster+flip+drop0.1` adds mirror images and dropout, `rar@250` has a
schedule of 250 steps. Quality is the Frechet distance (FD) of samples to real test images in the features of a
classifier that is trained here, on real images. Half A of the test images and of the samples chooses the guidance,
half B is reported. Images of a split are shuffled once, so that halves and subsets are balanced, and held in memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rar import RAR, InputError, sample_orders, scan_order
from sample import growth, inpaint, pick_order, save_gif
from tokenizer import VQTokenizer
from train_tiny import (
    DEFAULTS,
    PRESETS,
    Parser,
    Source,
    adamw,
    autocast,
    batch_indices,
    check_options,
    learning_rate,
    load_images,
    load_model,
    load_plain,
    load_tokens,
    pick_device,
    pick_dtype,
    pretokenize,
    run_main,
    save_picture,
    save_sheet,
    seed_step,
    to_batch,
    to_float,
    to_uint8,
    train_rar,
    train_tokenizer,
    update,
    validation_loss,
    write_atomically,
    write_npz,
)

# fmt: off
VARIANTS = {  # what each changes in the preset's training, and its FID in the paper (Tab. 2 and 3)
    "raster": (dict(order="raster"), 3.08),
    "random": (dict(order="random"), 3.01),
    "rar": ({}, 2.18),  # r falls from 50% to 75% of training
    "rar-0-100": (dict(anneal_start=0.0, anneal_end=1.0), 2.43),
    "rar-50-50": (dict(anneal_start=0.5, anneal_end=0.5), 2.39),
    "rar-25-75": (dict(anneal_start=0.25, anneal_end=0.75), 2.28),
    "rar-75-100": (dict(anneal_start=0.75, anneal_end=1.0), 2.74),
    "rar-no-target": (dict(target_aware=False), None),  # without Eq. 4
    "rar-spiral-in": (dict(scan="spiral-in"), 2.50),
    "rar-spiral-out": (dict(scan="spiral-out"), 2.46),
    "rar-z-curve": (dict(scan="z-curve"), 2.29),
    "rar-subsample": (dict(scan="subsample"), 2.39),
    "rar-alternate": (dict(scan="alternate"), 2.48),
}
SIZES = {
    "quick": dict(images=500, codebook_size=512, channels=24, res_blocks=1, tokenizer_steps=700, tokenizer_batch=32,
                  tokenizer_lr=2e-3, classifier_steps=800, dim=128, depth=4, heads=4, dropout=0.0, flip=False,
                  steps=400, batch_size=32, lr=3e-3, evaluations=5, seeds=2, samples=250, guidance=[1, 2],
                  crossing=[0.25, 0.5], crossing_seeds=1,
                  variants=["raster", "raster+flip+drop0.1", "random", "rar"]),
    "full": dict(images=50000, classifier_steps=6000, steps=20000, batch_size=256, evaluations=20, seeds=3,
                 samples=2000, guidance=[1, 1.5, 2, 3], crossing=[0.0625, 0.125, 0.25, 0.5], crossing_seeds=3,
                 variants=[*VARIANTS, "raster+drop0", "raster+drop0.3"]),
}
FREE = "out data_dir device workers only preset variants seeds crossing crossing_seeds"  # may differ within a folder
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Data: one tokenizer, one set of tokens, one classifier for all variants
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A small convolutional network: images (N, 3, H, W) in [0, 1] -> 64 features -> logits (N, C)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers, before = [], 3
        for width, stride in ((32, 2), (64, 1), (64, 2), (64, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images * 4 - 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(source: Source, steps: int, mirror: bool, device: torch.device, dtype: torch.dtype) -> Classifier:
    """Train on real images with shifts of up to 2 pixels, blur and, with `mirror`, flips.

    Half of the batches are blurred, so that features tell of what is shown more than of the tokenizer's own blur, which
    all variants share.
    """
    images, labels = all_images(source), torch.from_numpy(source.labels).to(device)
    torch.manual_seed(0)
    model = Classifier(len(source.names)).to(device).to(memory_format=torch.channels_last).train()
    optimizer = adamw(model, 0.05)
    for step in range(steps):
        seed_step(0, "classifier", step)
        rows = batch_indices(step, 128, len(images), 0)
        batch = to_float(images[rows], device).roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        batch = batch.flip(3) if mirror and step % 2 else batch
        if step % 4 > 1:
            batch = F.interpolate(F.avg_pool2d(batch, 2), scale_factor=2.0, mode="bilinear")
        with autocast(device, dtype):
            loss = F.cross_entropy(model(batch), labels[rows])
        update(model, optimizer, loss, learning_rate(step, steps, 4e-3, 0.2))
    return model.eval()


@torch.no_grad()
def look(classifier: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) of uint8 images (N, S, S, 3), and the classes (N,) that they are named."""
    device, features, named = classifier.head.weight.device, [], []
    for first in range(0, len(images), 500):
        features.append(classifier.features(to_float(images[first : first + 500], device)))
        named.append(classifier.head(features[-1]).argmax(1))
    return torch.cat(features).cpu().numpy(), torch.cat(named).cpu().numpy()


def shuffled(options: dict, split: str) -> Source:
    """A split of the data in one fixed random order: its halves and first images are balanced in any data set."""
    images, labels, names = load_images(options["config"], split, options["data_dir"], options["image_size"])
    order = np.random.default_rng(0).permutation(len(labels))
    images = images[order]
    return Source(labels[order], names, lambda: iter([images]))


def all_images(source: Source) -> np.ndarray:
    return next(iter(source.chunks()))


def first_images(source: Source, count: int) -> Source:
    images = all_images(source)[:count]
    return Source(source.labels[:count], source.names, lambda: iter([images]))


def prepare(out: Path, options: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Make what OUT/data lacks of tokenizer.pt, tokens.npz, classifier.pt, reference.npz and bounds.json."""
    folder, begin = out / "data", time.time()
    if (folder / "bounds.json").exists():
        return
    train, test = shuffled(options, "train"), shuffled(options, "val")
    if len(test.labels) < 4 or options["samples"] < 2:
        raise InputError(f"{len(test.labels)} test images and --samples {options['samples']} make no halves to compare")
    mirror = PRESETS[options["config"]]["flip"]
    data, tokenizer = prepare_tokens(folder, options | {"flip": mirror}, train, test, device, dtype)
    if not (folder / "reference.npz").exists():
        classifier = train_classifier(train, options["classifier_steps"], mirror, device, dtype)
        content = {"kind": "classifier", "classes": len(train.names), "weights": classifier.state_dict()}
        write_atomically(folder / "classifier.pt", lambda path: torch.save(content, path))
        features, named = look(classifier, all_images(test))
        again, _ = look(classifier, decode(tokenizer, to_batch(data, "val_", slice(None), device)[0]))
        halves = [np.array_split(f, 2) for f in (features, again)]
        reference = {"halves": np.stack([[np.vstack(moments(half)) for half in pair] for pair in halves])}
        reference["decoded"] = decode(tokenizer, to_batch(data, "", slice(None), device)[0])
        write_npz(folder / "reference.npz", reference | {"accuracy": (named == test.labels).mean()})
    made = {"bounds": measure_bounds(load_bench(out, options, device, dtype), train, test)}
    made["psnr"] = load_plain(folder / "tokenizer.pt", "tokenizer")["psnr"]
    made |= {"train_images": len(train.labels), "minutes": (time.time() - begin) / 60}
    write_atomically(folder / "bounds.json", lambda path: path.write_text(json.dumps(made, indent=1)))


def prepare_tokens(
    folder: Path, options: dict, train: Source, test: Source, device: torch.device, dtype: torch.dtype
) -> tuple[dict, VQTokenizer]:
    """A tokenizer of all training images; the tokens of the first ones and of all test images."""
    if not (folder / "tokenizer.pt").exists():
        held_out = first_images(test, 2000)  # its PSNR takes half a minute of two cores on all of CIFAR-10's
        train_tokenizer(folder, options, {"train": train, "val": held_out}, device, dtype)
    (folder / "state.pt").unlink(missing_ok=True)
    tokenizer, _ = load_model(folder / "tokenizer.pt", "tokenizer", device)
    if not (folder / "tokens.npz").exists():
        subset = first_images(train, options["images"])
        pretokenize(folder, options, {"train": subset, "val": test}, tokenizer, dtype)
    return load_tokens(folder / "tokens.npz", tokenizer), tokenizer


@torch.no_grad()
def decode(tokenizer: VQTokenizer, tokens: Tensor) -> np.ndarray:
    """Tokens (N, T) -> uint8 images (N, S, S, 3)."""
    return np.concatenate([to_uint8(tokenizer.decode(part)) for part in tokens.split(250)])


@dataclass
class Bench:
    """What every run is trained and judged with."""

    out: Path
    options: dict
    device: torch.device
    dtype: torch.dtype
    tokenizer: VQTokenizer
    classifier: Classifier
    data: dict  # of tokens.npz: first all training images, then, where a mirror image is one too, their mirror images
    decoded: np.ndarray  # the same rows as the tokenizer gives them back, uint8 (M, S, S, 3)
    halves: np.ndarray  # features of test images, then of their reconstructions, halves A and B: (2, 2, 65, 64)


def load_bench(out: Path, options: dict, device: torch.device, dtype: torch.dtype) -> Bench:
    """Read OUT/data."""
    tokenizer, _ = load_model(out / "data" / "tokenizer.pt", "tokenizer", device)
    data = load_tokens(out / "data" / "tokens.npz", tokenizer)
    content = load_plain(out / "data" / "classifier.pt", "classifier")
    classifier = Classifier(content["classes"])
    classifier.load_state_dict(content["weights"])
    with np.load(out / "data" / "reference.npz") as reference:
        arrays = (reference["decoded"], reference["halves"])
    return Bench(out, options, device, dtype, tokenizer, classifier.to(device).eval(), data, *arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    return features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), as FID takes it.

    cov_a cov_b has the eigenvalues of the symmetric root_a cov_b root_a, so that no complex root is needed.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest_distance(images: np.ndarray, training: np.ndarray, device: torch.device) -> np.ndarray:
    """Root mean square distance, of pixels in 0..255, of uint8 images (N, S, S, 3) to the nearest of training: (N,)."""
    flat = torch.from_numpy(images.reshape(len(images), -1)).to(device).float()
    best = flat.new_full((len(flat),), math.inf)
    for first in range(0, len(training), 4096):
        part = torch.from_numpy(training[first : first + 4096].reshape(-1, flat.shape[1])).to(device).float()
        nearest = (part.square().sum(1) - 2 * flat @ part.T).argmin(1)
        best = torch.minimum(best, (flat - part[nearest]).square().mean(1))  # exact, unlike the products above
    return best.sqrt().cpu().numpy()


def is_copy(tokens: Tensor, training: Tensor, share: float = 0.9) -> Tensor:
    """Whether more than `share` of an image's tokens (N, T) are those of one training image (M, T): bool (N,)."""
    best = torch.zeros(len(tokens), device=tokens.device)
    for part in training.split(max(1, (1 << 24) // tokens.numel())):
        best = torch.maximum(best, (tokens[:, None] == part).float().mean(2).amax(1))
    return best > share


def judge(bench: Bench, images: np.ndarray, labels: np.ndarray, half: int) -> dict:
    """How uint8 images compare with a half of the test images, and the share named as the class asked for.

    fd is the Frechet distance to the real ones; fd_decoded that to their reconstructions, from which the tokenizer's
    own loss is taken out: what is left is the transformer's.
    """
    features, named = look(bench.classifier, images)
    (mean, *cov), (mean_decoded, *cov_decoded) = bench.halves[:, half]
    found = {"fd": (mean, cov), "fd_decoded": (mean_decoded, cov_decoded)}
    row = {key: frechet_distance(*moments(features), m, np.stack(c)) for key, (m, c) in found.items()}
    return row | {"named": float((named == labels).mean())}


def closeness(bench: Bench, tokens: Tensor, images: np.ndarray) -> dict:
    """How close images (N) with these tokens come to training images or their mirror images."""
    training = torch.from_numpy(bench.data["tokens"].astype(np.int64)).to(bench.device)
    distance = float(np.median(nearest_distance(images, bench.decoded, bench.device)))
    return {"distance": distance, "copies": is_copy(tokens, training).float().mean().item()}


def measure_bounds(bench: Bench, train: Source, test: Source) -> dict[str, dict]:
    """What real images, and the tokenizer's reconstructions of half A, reach against half B; pictures of both."""
    n = bench.options["samples"]
    m = min(n, len(test.labels) // 2)
    tokens, _ = to_batch(bench.data, "val_", slice(m), bench.device)
    images, originals, folder = decode(bench.tokenizer, tokens), all_images(test), bench.out / "data"
    bounds = {"real training images": judge(bench, all_images(train)[-n:], train.labels[-n:], 1)}
    bounds["reconstructed test images"] = judge(bench, images, test.labels[:m], 1) | closeness(bench, tokens, images)
    rows = [int(np.argmax(test.labels == c)) for c in range(min(10, len(test.names)))]  # one of each class
    decoded = decode(bench.tokenizer, to_batch(bench.data, "val_", rows, bench.device)[0])
    for name, pictures in (("real", originals[rows]), ("decoded", decoded)):
        save_sheet(to_float(pictures, torch.device("cpu")), folder / f"{name}.png", columns=10)
    for i in range(3):  # to be completed
        save_picture(folder / f"test-{i}.png", Image.fromarray(originals[i]).save)
    return bounds


# ---------------------------------------------------------------------------------------------------------------------
# One run: a variant and a seed
# ---------------------------------------------------------------------------------------------------------------------


def variant_options(options: dict, variant: str) -> dict:
    """The preset's training as a variant like "rar", "raster+flip+drop0.1" or "rar@250" changes it."""
    name, at, steps = variant.partition("@")
    base, *extras = name.split("+")
    changes = dict(VARIANTS[base][0]) if base in VARIANTS else None
    for extra in extras:
        if changes is not None and extra == "flip":
            changes["flip"] = True
        elif changes is not None and re.fullmatch(r"drop0(\.\d+)?", extra):
            changes["dropout"] = float(extra[4:])
        else:
            changes = None
    if changes is None or (at and not (steps.isdecimal() and int(steps) > 0)):
        raise InputError(f"no variant {variant!r}: choose from {', '.join(VARIANTS)}, with +flip, +drop0.1 or @STEPS")
    options = options | changes | ({"steps": int(steps)} if at else {})
    every = max(1, options["steps"] // options["evaluations"])
    once = at or options["order"] == "random"  # where no lowest validation loss is looked for
    return options | {"eval_every": options["steps"] if once else every, "save_every": every}


def run_one(bench: Bench, name: str) -> None:
    """Train a variant with a seed, "rar-0", and write its scores.json; goes on where it was stopped."""
    variant, _, seed = name.rpartition("-")
    run, begin = bench.out / name, time.time()
    options = variant_options(bench.options, variant) | {"seed": int(seed)}
    data, N = dict(bench.data), options["images"]
    if not options["flip"]:
        data |= {key: bench.data[key][:N] for key in ("tokens", "labels")}
    if not (run / "rar.pt").exists():
        train_rar(run, options, data, None, bench.device, bench.dtype)
    write_atomically(run / "tokenizer.pt", lambda path: shutil.copyfile(bench.out / "data" / "tokenizer.pt", path))
    trained = time.time()
    rows = [score(bench, run, "rar.pt", options) | {"checkpoint": "last", "step": options["steps"]}]
    if options["eval_every"] < options["steps"]:
        step = load_plain(run / "rar_best.pt", "rar")["step"]
        row = score(bench, run, "rar_best.pt", options) if step < options["steps"] else rows[0]
        rows.append(row | {"checkpoint": "lowest val", "step": step})
    minutes = {"train_minutes": (trained - begin) / 60, "score_minutes": (time.time() - trained) / 60}
    for row in rows:
        row |= {"variant": variant, "seed": int(seed), **minutes}
        row["epochs"] = row["step"] * options["batch_size"] / min(N, len(bench.data["tokens"]))
    write_atomically(run / "scores.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    (run / "state.pt").unlink(missing_ok=True)


def score(bench: Bench, run: Path, checkpoint: str, options: dict) -> dict:
    """Likelihood and sample quality of one checkpoint; writes its first ten guided samples as a picture."""
    model, _ = load_model(run / checkpoint, "rar", bench.device)
    row = likelihood(bench, model, options)
    model.eval()
    order = "random" if options["order"] == "random" else options["scan"]
    labels = torch.arange(options["samples"], device=bench.device) % model.config.num_classes  # balanced

    def sample(scale: float, half: int) -> dict:
        tokens = generate(model, labels, order, scale, seed=2 * options["seed"] + half)
        images = decode(bench.tokenizer, tokens)
        return judge(bench, images, labels.cpu().numpy(), half) | {"tokens": tokens, "images": images}

    scale, plain, guided, tried = best_guidance(options["guidance"], sample)
    for key in ("fd", "fd_decoded", "named"):
        row |= {key: plain[key], f"{key}_guided": guided[key]}
    row |= {"guidance": scale, "fd_half_a": tried, **closeness(bench, plain["tokens"], plain["images"])}
    row["picture"] = f"samples_{checkpoint[:-3]}.png"
    save_sheet(to_float(guided["images"][:10], torch.device("cpu")), run / row["picture"], columns=10)
    return row


def likelihood(bench: Bench, model: RAR, options: dict) -> dict[str, float]:
    """Nats per token on 500 held-out images in the variant's own order, raster and random; and on training images."""
    grid, fixed = bench.tokenizer.config.grid_size, options | {"seed": 0}  # the same random orders for all
    training = {"val_tokens": bench.data["tokens"][: options["images"]], "val_labels": bench.data["labels"]}

    def nats(data: dict, scan: str, ratio: float) -> float:
        return validation_loss(model, data, scan_order(scan, grid), ratio, fixed, bench.dtype)

    own = ("row-major", 1.0) if options["order"] == "random" else (options["scan"], 0.0)
    known = {("row-major", 0.0): "nll_raster", ("row-major", 1.0): "nll_random"}
    row = {name: nats(bench.data, *order) for order, name in known.items()} | {"nll_train": nats(training, *own)}
    return row | {"nll": row[known[own]] if own in known else nats(bench.data, *own)}


def generate(model: RAR, labels: Tensor, order: str, scale: float, seed: int) -> Tensor:
    """Tokens (N, T) for labels (N,), drawn in eight batches; each has its own order if `order` is "random"."""
    generator = torch.Generator(labels.device).manual_seed(seed)
    grid = math.isqrt(model.config.seq_len)
    draws = ((part, pick_order(order, grid, generator)) for part in labels.chunk(8))
    return torch.cat([model.generate(p, order=o, guidance_scale=scale, generator=generator) for p, o in draws])


def best_guidance(scales: list[float], sample: Callable[[float, int], dict]) -> tuple[float, dict, dict, dict]:
    """The scale with the lowest FD on half A; what sample(scale, half) gives on half B without guidance and with it."""
    tried = {scale: sample(scale, 0)["fd"] for scale in scales}
    scale = min(tried, key=tried.get)
    plain = sample(1.0, 1)
    return scale, plain, plain if scale == 1 else sample(scale, 1), tried


# ---------------------------------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------------------------------


def run_names(options: dict) -> list[str]:
    """Folder names of all runs, seed by seed, so that a table of all variants is there early."""
    steps = [max(1, round(share * options["steps"])) for share in options["crossing"]]
    shorter = [f"{variant}@{count}" for count in dict.fromkeys(steps) for variant in ("raster", "rar")]
    names = []
    for seed in range(max(options["seeds"], options["crossing_seeds"] if shorter else 0)):
        names += [f"{variant}-{seed}" for variant in options["variants"] if seed < options["seeds"]]
        names += [f"{variant}-{seed}" for variant in shorter if seed < options["crossing_seeds"]]
    return list(dict.fromkeys(names))


def run_all(names: list[str], argv: list[str], options: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Do the runs that have no scores yet, `workers` at a time, and rewrite the table after each."""
    out, workers, begin, failed = Path(options["out"]), options["workers"], time.time(), []
    bench = load_bench(out, options, device, dtype) if names and workers == 1 else None

    def work(name: str) -> str | None:
        if bench is not None:
            return run_one(bench, name)
        log, threads = out / name / "log.txt", max(1, os.cpu_count() // workers)
        log.parent.mkdir(exist_ok=True)
        with open(log, "w") as f:
            command = [sys.executable, __file__, *argv, "--only", name]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(command, stdout=f, stderr=f, env=environment).returncode
        return f"{name} ended with {code}, see {log}" if code else None

    with ThreadPoolExecutor(workers) as pool:
        try:
            for i, (name, error) in enumerate(zip(names, (map if bench else pool.map)(work, names)), 1):
                failed += [error] if error else []
                left = (time.time() - begin) / 60 / i * (len(names) - i)
                said = error or f"{name} is finished"
                print(f"{said}, {i} of {len(names)}; about {left:.0f} minutes left", flush=True)
                write_report(out, options)
        except BaseException:  # workers have had the same Ctrl-C and save their state; the others must not start
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        raise InputError("; ".join(failed))


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = (  # title, key, factor, digits
    ("val NLL, own order", "nll", 1, 2),
    ("raster order", "nll_raster", 1, 2),
    ("random orders", "nll_random", 1, 2),
    ("train NLL", "nll_train", 1, 2),
    ("FD, no guidance", "fd", 1, 2),
    ("to reconstructions", "fd_decoded", 1, 2),
    ("named right, %", "named", 100, 0),
    ("best guidance", "guidance", 1, 1),
    ("FD", "fd_guided", 1, 2),
    ("to reconstructions", "fd_decoded_guided", 1, 2),
    ("named right, %", "named_guided", 100, 0),
    ("to nearest training image", "distance", 1, 1),
    ("copies, %", "copies", 100, 1),
)
LEGEND = """
Mean ± standard deviation over seeds. NLL in nats per token on 500 test images (train: 500 training images): in the
order that the variant draws in, in raster order, in random orders. FD: Frechet distance of {samples} samples to half B
of the test images in the features of a classifier that names {accuracy:.1%} of real test images right; to
reconstructions: to these images as the tokenizer gives them back, which takes its own loss out of the comparison.
Guidance is constant, chosen on half A. Distance: median root mean square difference of pixels, 0 to 255, from a sample
(no guidance) to the nearest training image or mirror image, as the tokenizer gives them back; copies share over 90% of
their tokens with one. Lowest val: the weights of the lowest validation loss on the way. Paper: FID, 256x256."""


def read_rows(out: Path) -> list[dict]:
    """The scores of all finished runs, in the order of VARIANTS."""
    rows = [row for path in sorted(out.glob("*/scores.json")) for row in json.loads(path.read_text())]
    bases = list(VARIANTS)
    return sorted(rows, key=lambda row: (bases.index(re.split("[+@]", row["variant"])[0]), row["variant"]))


def mean_and_spread(values: list[float], digits: int) -> str:
    """ "4.92 ± 0.03", or "4.92" if there is one value."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def by_variant(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows of full budget by (variant, checkpoint), a list over seeds; no second rows of the last weights."""
    groups = {}
    for row in rows:
        if "@" not in row["variant"]:
            groups.setdefault((row["variant"], row["checkpoint"]), []).append(row)
    return {
        key: group
        for key, group in groups.items()
        if key[1] == "last" or any(row["step"] < last["step"] for row, last in zip(group, groups[key[0], "last"]))
    }


def table_lines(groups: dict[tuple[str, str], list[dict]], bounds: dict[str, dict]) -> list[str]:
    """The Markdown table: what bounds every variant, then a line per variant."""
    titles = ["variant", "paper", "seeds", *(title for title, *_ in COLUMNS)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in bounds.items():
        cells = [f"{factor * row[key]:.{digits}f}" if key in row else "" for _, key, factor, digits in COLUMNS]
        lines.append(f"| {name} | | | {' | '.join(cells)} |")
    for (variant, checkpoint), group in groups.items():
        cells = [mean_and_spread([factor * r[key] for r in group], digits) for _, key, factor, digits in COLUMNS]
        fid = VARIANTS[variant][1] if variant in VARIANTS and checkpoint == "last" else None
        name = f"`{variant}`" + (f", {checkpoint}" if checkpoint != "last" else "")
        lines.append(f"| {name} | {fid or ''} | {len(group)} | {' | '.join(cells)} |")
    return lines


RATIOS = (  # the paper's FID: 2.18 / 3.08 = 0.71
    ("FD to real images, no guidance", "fd"),
    ("FD to real images, best guidance", "fd_guided"),
    ("FD to reconstructions, no guidance", "fd_decoded"),
    ("FD to reconstructions, best guidance", "fd_decoded_guided"),
)


def ratio_lines(groups: dict[tuple[str, str], list[dict]]) -> list[str]:
    """FD of RAR over FD of raster: of the plain variants, and of the best row of each."""
    lines = []
    for title, key in RATIOS:
        means = {row: statistics.mean(r[key] for r in group) for row, group in groups.items()}
        ours = {row: fd for row, fd in means.items() if re.fullmatch(r"rar(\+.*)?", row[0])}  # 50/75, with any extras
        raster = {row: fd for row, fd in means.items() if row[0].startswith("raster")}
        if ("rar", "last") in ours and ("raster", "last") in raster:
            a, b, last = min(ours, key=ours.get), min(raster, key=raster.get), ours["rar", "last"]
            line = f"- RAR / raster, {title}: {last / raster['raster', 'last']:.2f}"
            if ("raster", "lowest val") in raster:
                line += f"; over raster's weights of lowest validation loss {last / raster['raster', 'lowest val']:.2f}"
            line += f"; the best row of each, `{a[0]}` ({a[1]}) over `{b[0]}` ({b[1]}): {ours[a] / raster[b]:.2f}"
            lines.append(line)
    return lines


def curve(rows: list[dict], variant: str, key: str) -> dict[float, list[float]]:
    """A figure of the last checkpoint by epochs of training, a value per seed."""
    points = {}
    for row in rows:
        if row["variant"].split("@")[0] == variant and row["checkpoint"] == "last":
            points.setdefault(row["epochs"], []).append(row[key])
    return dict(sorted(points.items()))


def crossings(epochs: list[float], a: list[float], b: list[float]) -> list[float]:
    """Where a - b changes its sign, interpolated linearly in the logarithm of epochs."""
    gap, log, found = [x - y for x, y in zip(a, b)], [math.log(e) for e in epochs], []
    for i in range(1, len(gap)):
        if gap[i - 1] * gap[i] < 0:
            found.append(math.exp(log[i - 1] + (log[i] - log[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i])))
    return found


CROSSING = (("FD, no guidance", "fd"), ("FD, best guidance", "fd_guided"), ("val NLL, nats a token", "nll"))


def crossing_lines(rows: list[dict]) -> list[str]:
    """In words, from how many epochs on RAR is better than raster, each budget being a run with its own schedule."""
    lines = []
    for title, key in CROSSING:
        ours, raster = curve(rows, "rar", key), curve(rows, "raster", key)
        epochs = [e for e in ours if e in raster]
        if len(epochs) < 2:
            continue
        a, b = ([statistics.mean(points[e]) for e in epochs] for points in (ours, raster))
        lower = "RAR" if a[-1] < b[-1] else "raster"
        crossed = " and ".join(f"{e:.1f}" for e in crossings(epochs, a, b))
        where = f"the curves cross at {crossed} epochs; {lower} is" if crossed else f"no crossing: {lower} is"
        lines.append(f"- {title}: {where} lower at {epochs[-1]:.0f} (budgets from {epochs[0]:.1f} epochs on)")
    return lines


def hardware(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = f"{os.cpu_count()} cores, {model[1] if model else platform.processor() or platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if device.type == "cuda" else cpu


def setup_lines(rows: list[dict], made: dict, options: dict) -> list[str]:
    """What the table was made with: command, sizes, hardware, minutes."""
    runs = {(row["variant"], row["seed"]): row for row in rows}.values()
    full = [row["train_minutes"] for row in runs if "@" not in row["variant"]]
    total = made["minutes"] + sum(row["train_minutes"] + row["score_minutes"] for row in runs) / options["workers"]
    names = ("config", "images", "steps", "batch_size", "dim", "depth", "heads", "lr", "dropout", "flip", "dtype")
    epochs = options["steps"] * options["batch_size"] / min(options["images"], made["train_images"])
    return [
        f"Made by `{options['command']}`: {', '.join(f'{name} {options[name]}' for name in names)},"
        f" epochs {epochs:.1f}; the tokenizer reaches {made['psnr']:.1f} dB PSNR.",
        "",
        f"Time on {hardware(pick_device(options['device']))} (torch {torch.__version__}): {made['minutes']:.1f} minutes"
        f" for tokenizer, tokens and classifier; {len(runs)} runs, {options['workers']} at a time, those of full budget"
        f" {statistics.mean(full or [0]):.1f} minutes of training each; about {total:.0f} minutes in all.",
    ]


def write_report(out: Path, options: dict) -> None:
    """Write results.csv, table.md, samples.png and crossing.png from what is finished."""
    rows = read_rows(out)
    if not rows:
        return
    made = json.loads((out / "data" / "bounds.json").read_text())
    groups = by_variant(rows)
    with np.load(out / "data" / "reference.npz") as reference:
        legend = LEGEND.format(samples=options["samples"], accuracy=float(reference["accuracy"]))
    text = [*table_lines(groups, made["bounds"]), legend, "", *ratio_lines(groups), *crossing_lines(rows), ""]
    text += [*setup_lines(rows, made, options), ""]
    write_atomically(out / "table.md", lambda path: path.write_text("\n".join(text), encoding="utf-8"))
    write_atomically(out / "results.csv", lambda path: write_csv(path, rows))
    picture_of_samples(out, groups)
    picture_of_crossing(out, rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    """A line per run and checkpoint."""
    keys = ["variant", "seed", "checkpoint", "step", "epochs", *(key for _, key, *_ in COLUMNS)]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, [*keys, "train_minutes", "score_minutes"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def assemble(pictures: Iterable[tuple[str, Image.Image]], down: bool) -> Image.Image:
    """Pictures, each below its caption, in a column or in a row."""
    pictures, font, gap, line = list(pictures), ImageFont.load_default(13), 6, 18
    widths, heights = [p.width + gap for _, p in pictures], [p.height + line for _, p in pictures]
    size = (max(widths), sum(heights)) if down else (sum(widths), max(heights))
    sheet, x, y = Image.new("RGB", size, "white"), 0, 0
    for (caption, picture), width, height in zip(pictures, widths, heights):
        ImageDraw.Draw(sheet).text((x + 4, y + line // 2), caption, "black", font, anchor="lm")
        sheet.paste(picture, (x, y + line))
        x, y = (x, y + height) if down else (x + width, y)
    return sheet


@dataclass
class Series:
    """A curve, and marks that may scatter around it; thick with full marks, or thin with hollow ones."""

    label: str
    colour: str
    line: list[tuple[float, float]]
    marks: list[tuple[float, float]]
    bold: bool = True


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between two."""
    raw = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(series: list[Series], title: str, x_label: str, log_x: bool = False, zoom: int = 3) -> Image.Image:
    """Curves on axes with a legend below, 440 pixels wide; drawn large and shrunk, which smooths lines."""
    width, height, font = 440, 300 + 18 * len(series), ImageFont.load_default(12 * zoom)
    canvas = Image.new("RGB", (width * zoom, height * zoom), "white")
    draw, box = ImageDraw.Draw(canvas), (52, 30, 426, 250)
    points = [point for s in series for point in [*s.line, *s.marks]]
    scale = math.log if log_x else float
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in ([scale(x) for x, _ in points], [y for _, y in points]))
    x_pad, y_pad = 0.04 * (x1 - x0) or 0.5, 0.06 * (y1 - y0) or 0.5
    x0, x1, y0, y1 = x0 - x_pad, x1 + x_pad, y0 - y_pad, y1 + y_pad

    def at(x: float, y: float) -> tuple[float, float]:
        along, up = (scale(x) - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return zoom * (box[0] + along * (box[2] - box[0])), zoom * (box[3] - up * (box[3] - box[1]))

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x * zoom, y * zoom), text, "black", font, anchor=anchor)

    for y in ticks(y0, y1):
        draw.line([zoom * box[0], at(points[0][0], y)[1], zoom * box[2], at(points[0][0], y)[1]], "#dddddd", zoom)
        write(box[0] - 6, at(points[0][0], y)[1] / zoom, f"{y:g}", "rm")
    for x in sorted({x for x, _ in points}) if log_x else ticks(x0, x1):
        write(at(x, y0)[0] / zoom, box[3] + 12, f"{x:.3g}", "mm")
    draw.rectangle([v * zoom for v in box], outline="#888888", width=zoom)
    write(width / 2, 14, title, "mm")
    write((box[0] + box[2]) / 2, box[3] + 28, x_label, "mm")
    for i, s in enumerate(series):
        y, thick = height - 18 * (len(series) - i) + 4, zoom * (2 if s.bold else 1)
        draw.line([at(*p) for p in s.line], s.colour, thick, joint="curve")
        draw.line([zoom * 60, zoom * y, zoom * 84, zoom * y], s.colour, thick)
        write(92, y, s.label, "lm")
        for cx, cy in [*(at(*p) for p in s.marks), *([(zoom * 72, zoom * y)] if s.marks else [])]:
            box_of_mark = [cx - 3.5 * zoom, cy - 3.5 * zoom, cx + 3.5 * zoom, cy + 3.5 * zoom]
            draw.ellipse(box_of_mark, s.colour if s.bold else "white", s.colour, zoom)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def picture_of_samples(out: Path, groups: dict[tuple[str, str], list[dict]]) -> None:
    """samples.png: a row per variant, at its best guidance and with the same seed; above them what bounds them all."""
    rows = [("real", out / "data" / "real.png"), ("real, through the tokenizer", out / "data" / "decoded.png")]
    for (variant, checkpoint), group in groups.items():
        first = min(group, key=lambda row: row["seed"])
        caption = f"{variant}, {checkpoint} weights, guidance {first['guidance']:g}"
        rows.append((caption, out / f"{variant}-{first['seed']}" / first["picture"]))
    sheet = assemble([(caption, Image.open(path).convert("RGB")) for caption, path in rows], down=True)
    save_picture(out / "samples.png", sheet.save)


def picture_of_crossing(out: Path, rows: list[dict]) -> None:
    """crossing.png: FD and validation loss against epochs, for raster and RAR."""
    panels = []
    for title, pairs in (("FD", CROSSING[:2]), (CROSSING[2][0], CROSSING[2:])):
        series = []
        for label, key in pairs:
            for variant, colour in (("raster", "#d95f02"), ("rar", "#1b6ca8")):
                points = curve(rows, variant, key)
                line = [(e, statistics.mean(values)) for e, values in points.items()]
                marks = [(e, value) for e, values in points.items() for value in values]
                name = variant + label.removeprefix(title)
                if len(points) > 1:
                    series.append(Series(name, colour, line, marks, bold=key != "fd"))
        if series:
            panels.append(("", plot(series, title, "epochs over the training images", log_x=True)))
    if panels:
        save_picture(out / "crossing.png", assemble(panels, down=False).save)


def draw_pictures(bench: Bench) -> None:
    """by_position.png, inpainting.png and orders.gif, once both runs of seed 0 that they need are finished."""
    rar, raster = bench.out / "rar-0", bench.out / "raster-0"
    if not all((run / "scores.json").exists() for run in (rar, raster)):
        return
    files = {"raster": raster / "rar_best.pt", "rar": rar / "rar_best.pt", "any": rar / "rar_random.pt"}
    models = {name: load_model(path, "rar", bench.device)[0] for name, path in files.items()}
    for name, make in (
        ("by_position.png", picture_of_places),
        ("inpainting.png", picture_of_inpainting),
        ("orders.gif", film_of_orders),
    ):
        if not (bench.out / name).exists():
            make(bench, models, bench.out / name)


@torch.no_grad()
def loss_by_place(bench: Bench, model: RAR, ratio: float) -> list[float]:
    """Mean loss in nats at each place of the sequence, on 500 test images; ratio 0 is raster, 1 random orders."""
    tokens, labels = to_batch(bench.data, "val_", slice(500), bench.device)
    orders = sample_orders(*tokens.shape, ratio, generator=torch.Generator().manual_seed(0), device=bench.device)
    losses = []
    for t, c, o in zip(tokens.split(100), labels.split(100), orders.split(100)):
        losses.append(F.cross_entropy(model(t, c, o).mT, t.gather(1, o), reduction="none"))
    return torch.cat(losses).mean(0).tolist()


def picture_of_places(bench: Bench, models: dict[str, RAR], path: Path) -> None:
    """by_position.png: what each token costs, given how many are known."""
    asked = (
        ("raster model, raster order", "#d95f02", "raster", 0.0),
        ("RAR, raster order", "#1b6ca8", "rar", 0.0),
        ("RAR before annealing, raster order", "#66a61e", "any", 0.0),
        ("RAR before annealing, random orders", "#7570b3", "any", 1.0),
    )
    series = []
    for label, colour, name, ratio in asked:
        losses = loss_by_place(bench, models[name], ratio)
        series.append(Series(label, colour, list(enumerate(losses, 1)), []))
    save_picture(path, plot(series, "loss by place, nats, test images", "place in the sequence").save)


def picture_of_inpainting(bench: Bench, models: dict[str, RAR], path: Path) -> None:
    """inpainting.png: test images half covered, three completions each; raster order can only go on downwards."""
    S = bench.tokenizer.config.image_size
    halves = {"top": (0, 0, S, S // 2), "left": (0, 0, S // 2, S), "right": (S // 2, 0, S, S)}
    rows = [(f"RAR before annealing, {side} half covered", "any", box) for side, box in halves.items()]
    bottom = (0, S // 2, S, S)
    rows += [("RAR before annealing, bottom half covered", "any", bottom)]
    rows += [("raster order, bottom half covered: all that it can complete", "raster", bottom)]
    settings = {"guidance_scale": 2.0, "guidance_power": 0.0, "temperature": 1.0, "top_k": None}
    pictures = []
    for caption, name, box in rows:
        tiles = []
        for i in range(3):
            generator = torch.Generator(bench.device).manual_seed(i)
            image, mask = bench.out / "data" / f"test-{i}.png", ",".join(map(str, box))
            labels = torch.full((3,), int(bench.data["val_labels"][i]), device=bench.device)
            args = argparse.Namespace(inpaint=image, mask=mask, **settings)
            tiles.append(inpaint(models[name], bench.tokenizer, args, labels, generator)[1:])
        row = np.concatenate(to_uint8(F.pad(torch.cat(tiles), (1, 1, 1, 1), value=1.0)), 1)
        size = (row.shape[1] * max(1, 64 // S), row.shape[0] * max(1, 64 // S))
        pictures.append((caption, Image.fromarray(row).resize(size, Image.Resampling.NEAREST)))
    save_picture(path, assemble(pictures, down=True).save)


def film_of_orders(bench: Bench, models: dict[str, RAR], path: Path) -> None:
    """orders.gif: the same classes drawn in three orders by the weights from before annealing."""
    labels = torch.arange(4, device=bench.device) % len(bench.data["class_names"])
    panels = []
    for name in ("row-major", "spiral-in", "random"):
        generator = torch.Generator(bench.device).manual_seed(0)
        order = pick_order(name, bench.tokenizer.config.grid_size, generator)
        tokens = models["any"].generate(labels, order=order, guidance_scale=2.0, generator=generator)
        frames = growth(bench.tokenizer.decode(tokens), order.cpu(), columns=2, frames=32, zoom=2)
        panels.append([(name, frame) for frame in frames])
    shots = [assemble(panel, down=False) for panel in zip(*panels)]
    palette = shots[-1].quantize(64)  # one for all frames, so that what does not change costs nothing
    save_gif([shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots], path)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str]) -> dict:
    """Command line -> all options: what is given, over the preset, over the data set's preset, over the defaults."""
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--preset", choices=SIZES, help="(default: quick)")
    p.add_argument("--config", choices=PRESETS, help="data set (default: cifar10)")
    p.add_argument("--data-dir", help="folder of the data (default: data)")
    p.add_argument("--out", help="folder of all that is made (default: runs/ablation)")
    p.add_argument("--variants", type=lambda text: text.split(","), help="comma-separated (default: by preset)")
    p.add_argument("--crossing", type=numbers, help="raster and rar also with these shares of --steps; 0 for none")
    p.add_argument("--guidance", type=numbers, help="scales to choose from (default: by preset)")
    flag = argparse.BooleanOptionalAction
    p.add_argument("--flip", action=flag, help="mirror images in the training of all variants (default: by preset)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products (default: the faster)")
    p.add_argument("--device", help="cuda, mps, cpu (default: the first there is)")
    p.add_argument("--workers", type=int, help="runs at a time (default: 1 on a GPU, one per core otherwise)")
    p.add_argument("--only", help="do this run alone, as a worker does")
    whole = ("seeds", "crossing-seeds", "images", "steps", "batch-size", "dim", "depth", "heads", "samples")
    whole += ("evaluations", "image-size", "channels", "codebook-size", "tokenizer-steps", "tokenizer-batch")
    for name in (*whole, "classifier-steps"):
        p.add_argument(f"--{name}", type=int, help="(default: by preset)")
    for name in ("lr", "tokenizer-lr", "dropout", "warmup"):
        p.add_argument(f"--{name}", type=float, help="(default: by preset)")
    given = {"preset": "quick", "config": "cifar10", "out": "runs/ablation", **vars(p.parse_args(argv))}
    options = DEFAULTS | {"only": None, "workers": None} | PRESETS[given["config"]] | SIZES[given["preset"]] | given
    options["crossing"] = [share for share in options["crossing"] if share]
    check_options(options)
    if not all(0 < share < 1 for share in options["crossing"]):
        raise InputError("--crossing takes shares of the training, between 0 and 1")
    return options


def numbers(text: str) -> list[float]:
    """ "1,2,3" -> [1.0, 2.0, 3.0]."""
    return [float(word) for word in text.split(",")]


def settle(out: Path, options: dict, device: torch.device) -> dict:
    """Options with dtype and workers settled; what must be one for all runs is kept in settings.json."""
    file = out / "settings.json"
    stored = json.loads(file.read_text()) if file.exists() and (out / "data").exists() else {}
    if options["dtype"] is None:
        options["dtype"] = stored.get("dtype") or str(pick_dtype(None, device)).removeprefix("torch.")
    if options["workers"] is None:
        options["workers"] = min(8, os.cpu_count()) if device.type == "cpu" else 1
    fixed = json.loads(json.dumps({key: value for key, value in options.items() if key not in FREE.split()}))
    for key in stored:
        if stored[key] != fixed.get(key):
            flag = key.replace("_", "-")
            raise InputError(f"{out} holds runs with --{flag} {stored[key]}, not {fixed.get(key)}: name another --out")
    if not stored:
        write_atomically(file, lambda path: path.write_text(json.dumps(fixed, indent=1)))
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the ablation; being stopped is an error that says how to go on."""
    try:
        run_ablation(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as error:
        raise InputError("stopped: the same command goes on") from error
    except InputError as error:  # the stages of train_tiny name another command
        raise InputError(re.sub(r"python train_tiny.py --resume --out \S+", "the same command", str(error))) from error


def run_ablation(argv: list[str]) -> None:
    """Data, runs, table, pictures; or with --only one run, as a worker."""
    options = parse_options(argv)
    names = run_names(options)
    for name in names if options["only"] is None else [options["only"]]:
        variant_options(options, name.rpartition("-")[0])  # refuses what does not exist before anything is done
    out, device = Path(options["out"]), pick_device(options["device"])
    options = settle(out, options, device)
    dtype = getattr(torch, options["dtype"])
    if options["only"] is not None:
        run_one(load_bench(out, options, device, dtype), options["only"])
        return
    options["command"] = shlex.join(["python", "benchmarks/ablation.py", *argv])
    prepare(out, options, device, dtype)
    todo = [name for name in names if not (out / name / "scores.json").exists()]
    print(f"{len(todo)} of {len(names)} runs to do, {options['workers']} at a time; Ctrl-C stops after a step")
    run_all(todo, argv, options, device, dtype)
    write_report(out, options)
    draw_pictures(load_bench(out, options, device, dtype))
    print(f"wrote {out / 'table.md'}, results.csv and pictures")


if __name__ == "__main__":
    run_main(main)
