"""What RAR buys on few images and many passes: `python benchmarks/ablation.py --preset quick`.

Trains variants with several seeds on a part of the digits and writes into --out: table.md (all figures), duel.md (RAR
against raster order, the best of each), samples.png (the nearest training image under each sample), completions.png
(half-covered digits, completed by the weights from before annealing) and, where matplotlib is installed, passes.png.

A variant is an order and options of train_tiny.py: `raster`, `rar,dropout=0.1`, `rar,no-target-aware`,
`rar,scan=z-curve` (Tab. 3), `rar,anneal-start=0.75,anneal-end=1` (Tab. 2). Every number of --images is combined with
every number of --steps: `--steps 94 188 375 750 1500 3000` are 3 to 96 passes over 1,000 images, and
`--images 250 1000 4000 12000` spend the same steps on more images. Options of train_tiny.py may be added and hold for
all runs. Finished runs are not repeated, and a stopped one goes on from its last evaluation: give the same command
again, or one with more runs.

Figures: "recognised" is the share of samples that a classifier (digits_quality.py) reads as the class asked for;
"copies" have over 90% of their tokens in common with one training image; "new" are recognised and no copies; "shared"
is the median share of tokens in common with the nearest training image; "fd" is the Frechet distance to real held-out
images in the classifier's features; "val" is the validation loss in nats per token, along --scan. rar.pt holds the last
weights of a run, lowest_val.pt those of the lowest validation loss. "real" and "decoded" are real images that no run of
seed 0 trains on, as they are and as the tokenizer gives them back. In the code, `bench` holds the options of this
script and what all runs share.
"""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from digits_quality import build_classifier, features, train_classifier
from PIL import ImageDraw
from torch import Tensor

import train_tiny
from rar import load_file, require, scan_order
from sample import mask_image
from train_tiny import load_images, load_model, make_sheet, save_sheet, to_float, token_batch, write_atomically

QUICK = {"variants": ["raster", "random", "rar"], "images": [1000], "steps": [1500], "seeds": [0], "workers": 1}
DROPOUT = ["random,dropout=0.1", "raster,dropout=0.1", "raster,dropout=0.3", "rar,dropout=0.1", "rar,dropout=0.3"]
FULL = [*QUICK["variants"], *DROPOUT, "rar,no-target-aware"]
PRESETS = {"quick": QUICK, "full": QUICK | {"variants": FULL, "seeds": [0, 1, 2], "workers": os.cpu_count()}}
SAMPLES, CLASSIFIER_STEPS, EVALUATIONS = 500, 600, 24
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
MODEL = ("images", "passes", "variant", "weights")
FIGURES = ("guidance", "val_lowest", "val_last", "fd", "recognised", "copies", "new", "shared")


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, fitted to features (N, D) and (M, D), as in FID.

    With A and B centred and scaled so that cov_a = A^T A, tr (cov_a cov_b)^(1/2) is the nuclear norm of A B^T.
    """
    a, b = a.double(), b.double()
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    means = (a.mean(0) - b.mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(A @ B.T, "nuc")
    return (means + A.square().sum() + B.square().sum() - 2 * cross).item()


def nearest_training(tokens: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the tokens (N, T) in common with the nearest training image (M, T), and its row: both (N,)."""
    shares = [(part[:, None] == training).float().mean(2) for part in tokens.split(20)]
    return torch.cat(shares).max(1)


@torch.no_grad()
def judge(bench: Namespace, images: Tensor, tokens: Tensor, labels: Tensor, training: Tensor) -> dict:
    """All figures of images (N, 3, S, S), their tokens (N, T) and the classes asked for (N,)."""
    found = features(bench.classifier, images)
    recognised = bench.classifier[-1](found).argmax(1) == labels
    shared, nearest = nearest_training(tokens, training)
    copies = shared > 0.9
    figures = {"recognised": recognised, "copies": copies, "new": recognised & ~copies, "shared": shared.median()}
    figures = {name: figure.float().mean().item() for name, figure in figures.items()}
    picture = torch.stack([tokens[:10], training[nearest[:10]]])
    return figures | {"fd": frechet_distance(found, bench.reference), "picture": picture.tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# What all runs share, and the runs
# ---------------------------------------------------------------------------------------------------------------------


def train_options(flags: list[str], out: Path) -> Namespace:
    """Options of train_tiny.py for a run in the folder `out`."""
    args = train_tiny.parse_args(flags)
    args.out, args.device = out, train_tiny.pick_device(args.device)
    args.dtype = train_tiny.pick_dtype(args.dtype, args.device)
    return args


def prepare(bench: Namespace):
    """Make tokenizer, tokens and classifier, unless they are there, and judge real images as the bound of all runs."""
    args = train_options(bench.flags, bench.out / "data")
    path = Path(args.tokens or args.out / "tokens.npz")
    if not path.exists():
        train_tiny.make_tokens(args)
    bench.data, bench.tokenizer = train_tiny.load_tokens(path)
    require(bench.tokenizer, f"{path.parent} lacks the tokenizer.pt of these tokens")
    bench.tokenizer.to(args.device)
    images, labels, names = load_images(args.config, "train", args.data_dir, args.image_size)
    weights = args.out / "classifier.pt"
    if not weights.exists():
        classifier = train_classifier(images, labels, args.device, CLASSIFIER_STEPS)
        write_atomically(weights, partial(torch.save, classifier.state_dict()))
    bench.classifier = build_classifier(len(names)).to(args.device).eval()
    bench.classifier.load_state_dict(load_file(weights))
    bench.held_out, _, _ = load_images(args.config, "val", args.data_dir, args.image_size)
    bench.reference = features(bench.classifier, to_float(bench.held_out, args.device))
    judge_real_images(bench, args, images)


def judge_real_images(bench: Namespace, args: Namespace, images: np.ndarray):
    """Write figures of real images that no run of seed 0 trains on, and of their reconstructions."""
    order = np.random.default_rng(0).permutation(len(images))
    training, _ = token_batch(bench.data, "", order[: bench.images[0]], args.device)
    tokens, labels = token_batch(bench.data, "", order[-SAMPLES:], args.device)
    pictures = {"real": to_float(images[order[-SAMPLES:]], args.device), "decoded": bench.tokenizer.decode(tokens)}
    row = dict.fromkeys(("images", "passes", "seed", "val_lowest", "val_last"), 0) | {"weights": "", "guidance": 1.0}
    scores = [row | {"variant": v} | judge(bench, x, tokens, labels, training) for v, x in pictures.items()]
    write_scores(args.out, scores)


def write_scores(out: Path, scores: list[dict]):
    """Write scores.json: a row for each of a run's weights and guidance scales. It says that the run is finished."""
    write_atomically(out / "scores.json", lambda path: path.write_text(json.dumps(scores)))


def run_options(bench: Namespace, run: dict) -> Namespace:
    """The options of train_tiny.py for a run, in a folder of its own."""
    order, *extras = run["variant"].split(",")
    flags = [f"--order={order}", f"--seed={run['seed']}", f"--steps={run['steps']}", *(f"--{x}" for x in extras)]
    args = train_options(bench.flags + flags, bench.out / "{variant}-{images}x{steps}-{seed}".format(**run))
    args.eval_every = max(1, args.steps // EVALUATIONS)
    return args


class KeepLowest(train_tiny.Training):
    """Training that also keeps the weights of the lowest validation loss."""

    def save(self, step: int, metrics: list):
        if metrics[-1][4] == min(row[4] for row in metrics):
            train_tiny.save_checkpoint(self.args.out / "lowest_val.pt", "rar", self.stateful["model"])
        super().save(step, metrics=metrics)


def do_run(bench: Namespace, run: dict) -> Path:
    """Train a run, score its last weights and those of the lowest validation loss, and return its folder."""
    args = run_options(bench, run)
    rows = np.random.default_rng(args.seed).permutation(len(bench.data["tokens"]))[: run["images"]]
    data = bench.data | {name: bench.data[name][rows] for name in ("tokens", "labels")}
    if not (args.out / "rar.pt").exists():
        with mock.patch.object(train_tiny, "Training", KeepLowest):
            train_tiny.train_rar(args, data, None)
    losses = np.loadtxt(args.out / "metrics.csv", delimiter=",", skiprows=1, ndmin=2)[:, 4]
    run |= {"val_lowest": losses.min(), "val_last": losses[-1]}
    run["passes"] = round(args.steps * args.batch_size / len(rows))
    training, _ = token_batch(data, "", slice(None), args.device)
    labels = torch.arange(SAMPLES, device=args.device) % len(data["class_names"])
    scores = []
    for weights, scale in product(("rar.pt", "lowest_val.pt"), GUIDANCE):
        model, _ = load_model(args.out / weights, "rar")
        generator = torch.Generator(args.device).manual_seed(args.seed)
        order = scan_order(args.scan, data["grid_size"])
        if args.order == "random":  # it has no order of its own: draw along a random one
            order = torch.randperm(len(order), generator=generator, device=args.device)
        tokens = model.to(args.device).generate(labels, guidance_scale=scale, order=order, generator=generator)
        figures = judge(bench, bench.tokenizer.decode(tokens), tokens, labels, training)
        scores.append(run | {"weights": weights, "guidance": scale} | figures)
    write_scores(args.out, scores)
    (args.out / "state.pt").unlink(missing_ok=True)
    return args.out


def start_worker():
    """A worker computes on one thread and shows no progress bars."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# ---------------------------------------------------------------------------------------------------------------------


def group_by(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by their values of these names, sorted."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(groups.items()))


def at_best_guidance(rows: list[dict]) -> list[dict]:
    """A row for each seed, at the guidance of the lowest FD of the other seeds (of its own if there is no other)."""
    best = []
    for (seed,), own in group_by(rows, "seed").items():
        others = [row for row in rows if row["seed"] != seed] or own
        scales = [row["guidance"] for row in own]
        scale = min(scales, key=lambda s: sum(row["fd"] for row in others if row["guidance"] == s))
        best += [row for row in own if row["guidance"] == scale]
    return best


def cell(rows: list[dict], name: str) -> str:
    """ "2.18 ± 0.05", over seeds."""
    values = [row[name] for row in rows]
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(rows) > 1 else "")


def main_table(groups: dict[tuple, list[dict]]) -> list[list[str]]:
    """All figures of each model, without guidance and, where that is better, at its best guidance."""
    lines = [[*MODEL, "seeds", *FIGURES]]
    for model, group in groups.items():
        plain, best = [row for row in group if row["guidance"] == 1], at_best_guidance(group)
        for rows in [plain] if best == plain else [plain, best]:
            lines.append([*map(str, model), str(len(rows)), *(cell(rows, name) for name in FIGURES)])
    return lines


def duel_table(rows: list[dict]) -> list[list[str]]:
    """The lowest FD of raster order and of RAR, each with any dropout, weights and guidance but under 1% copies."""
    lines = [["budget", "raster: fd, new, model", "RAR: fd, new, model", "ratio of fd"]]
    honest = [row for row in rows if row["copies"] < 0.01]
    for key, group in group_by(honest, "images", "passes", "seed").items():
        best = {}
        for row in sorted(group, key=lambda row: -row["fd"]):
            best[row["variant"].partition(",")[0]] = row
        if "raster" in best and "rar" in best:
            cells = ["{} images, {} passes, seed {}".format(*key)]
            for side in ("raster", "rar"):
                cells.append("{fd:.2f}, {new:.2f}, {variant}, {weights}, guidance {guidance}".format(**best[side]))
            lines.append([*cells, f"{best['rar']['fd'] / best['raster']['fd']:.2f}"])
    return lines


def plot_passes(rows: list[dict], path: Path):
    """Share of new samples, and FD, against passes. Does nothing if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("new", "fd")):
        for label, curve in group_by(rows, "images", "variant", "weights").items():
            points = [row for group in group_by(curve, "passes").values() for row in at_best_guidance(group)]
            passes, heights = zip(*[(row["passes"], row[name]) for row in points])
            axis.plot(passes, heights, "o-", label="{}: {}, {}".format(*label))
        axis.set(xscale="symlog", xlabel="passes over the training images", ylabel=name)
    axis.legend(fontsize=7)
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))


def draw_samples(bench: Namespace, groups: dict[tuple, list[dict]]):
    """samples.png: ten samples of each model's first seed, and the nearest training image under each."""
    rows = [at_best_guidance(group)[0] for group in groups.values()]
    tokens = torch.tensor([row["picture"] for row in rows], device=bench.reference.device)
    tiles = bench.tokenizer.decode(tokens.flatten(0, 2))
    tiles = torch.constant_pad_nd(tiles, (0, 0, 8, 0), 1.0)  # white above each, for the captions
    page = make_sheet(tiles, tokens.shape[2])
    for i, row in enumerate(rows):
        caption = "{images} images, {passes} passes: {variant}, {weights}, guidance {guidance}".format(**row)
        ImageDraw.Draw(page).text((4, 2 + i * page.height / len(rows)), caption, "black")
    write_atomically(bench.out / "samples.png", page.save)


def draw_completions(bench: Namespace, weights: Path):
    """completions.png: held-out images, what is known after half of each was covered, and four completions."""
    device, S = bench.reference.device, bench.tokenizer.config.image_size
    model = load_model(weights, "rar")[0].to(device)
    torch.manual_seed(0)
    tiles = []
    for image, label in zip(bench.held_out[:4], bench.data["val_labels"]):
        labels = torch.tensor([label] * 4, device=device)
        for mask in (f"0,0,{S},{S // 2}", f"0,{S // 2},{S},{S}", f"0,0,{S // 2},{S}", f"{S // 2},0,{S},{S}"):
            hole, covered, order, prefix = mask_image(image, mask, bench.tokenizer)
            tokens = model.generate(labels, order=order, prefix=prefix.expand(4, -1), guidance_scale=2.0)
            completed = np.where(hole, train_tiny.to_uint8(bench.tokenizer.decode(tokens)), image)
            tiles += [image, covered, *completed]
    save_sheet(bench.out / "completions.png", to_float(np.stack(tiles)), 12)


def report(bench: Namespace):
    """Write the tables and pictures of all finished runs in --out."""
    rows = [row for path in sorted(bench.out.glob("*/scores.json")) for row in json.loads(path.read_text())]
    groups = group_by(rows, *MODEL)
    for name, lines in {"table.md": main_table(groups), "duel.md": duel_table(rows)}.items():
        lines.insert(1, ["---"] * len(lines[0]))
        text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        write_atomically(bench.out / name, partial(Path.write_text, data=text, encoding="utf-8"))
    plot_passes(rows, bench.out / "passes.png")
    draw_samples(bench, groups)
    for weights in sorted(bench.out.glob("rar*/rar_random.pt"))[:1]:
        draw_completions(bench, weights)


def parse_args(argv: list[str] | None) -> Namespace:
    """The options of this script; `flags` are those that are left for train_tiny.py."""
    p = train_tiny.Parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, default="quick", help="which runs (default: quick)")
    p.add_argument("--variants", nargs="+", help="such as raster rar rar,dropout=0.1 (default: by preset)")
    p.add_argument("--images", type=int, nargs="+", help="numbers of training images (default: by preset)")
    p.add_argument("--steps", type=int, nargs="+", help="numbers of training steps (default: by preset)")
    p.add_argument("--seeds", type=int, nargs="+", help="of training and samples (default: by preset)")
    p.add_argument("--workers", type=int, help="runs at a time, one thread each if several (default: by preset)")
    p.add_argument("--out", type=Path, default=Path("runs/ablation"), help="(default: runs/ablation)")
    p.set_defaults(**PRESETS[p.parse_known_args(argv)[0].preset])
    bench, flags = p.parse_known_args(argv)
    bench.flags = [*flags, "--no-flip"]
    return bench


def main(argv: list[str] | None = None):
    bench = parse_args(argv)
    runs = product(bench.seeds, bench.images, bench.steps, bench.variants)
    runs = [dict(zip(("seed", "images", "steps", "variant"), values)) for values in runs]
    todo = [run for run in runs if not (run_options(bench, run).out / "scores.json").exists()]
    print(f"{len(todo)} runs to do, {bench.workers} at a time")
    prepare(bench)
    run_all = get_context("spawn").Pool(bench.workers, start_worker).imap_unordered if bench.workers > 1 else map
    for folder in run_all(partial(do_run, bench), todo):
        print(f"finished {folder}", flush=True)
        report(bench)


if __name__ == "__main__":
    train_tiny.run_main(main)
