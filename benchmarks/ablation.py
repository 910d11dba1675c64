"""What RAR buys on few images and many passes: `python benchmarks/ablation.py --preset quick`.

Trains variants with several seeds on a part of a run's training images and writes all figures into OUT/table.md.

A variant is an order and options of train_tiny.py: `raster`, `rar,dropout=0.1`, `rar,no-target-aware`,
`rar,scan=z-curve` (Tab. 3), `rar,anneal-start=0.75,anneal-end=1` (Tab. 2). Every number of --images is combined with
every number of --steps: `--steps 94 188 375 750 1500 3000` are 3 to 96 passes over 1,000 digits. Options of
train_tiny.py may be added and hold for all runs. Finished runs are not repeated, and a stopped one goes on from its
last evaluation: give the same command again, or one with more runs.

`--run DIR` names the run whose data, tokenizer and tokens are used; without it, a tokenizer for digits is trained in
OUT/data. Where that run used mirror images, each image comes with its mirror image.

Figures are those of quality.py; "new" are recognised and no copies, "shared" is the median share of tokens in common
with the nearest training image, "val" the validation loss in nats per token, in the scan order. Each is a mean ±
standard deviation over seeds, at each guidance scale. What real images reach, as they are and reconstructed, says
`python benchmarks/quality.py --run OUT/data --classifier OUT/classifier.pt`.
In the code, `bench` holds the options of this script and what all runs share.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from quality import batched, get_classifier, judge, real_images

from rar import scan_order
from train_tiny import load_run, pick_device

TRAIN = Path(__file__).resolve().parents[1] / "train_tiny.py"
QUICK = {"variants": ["raster", "random", "rar"], "images": [1000], "steps": [1500], "seeds": [0], "workers": 1}
DROPOUT = ["random,dropout=0.1", "raster,dropout=0.1", "raster,dropout=0.3", "rar,dropout=0.1", "rar,dropout=0.3"]
FULL = [*QUICK["variants"], *DROPOUT, "rar,no-target-aware"]
PRESETS = {"quick": QUICK, "full": QUICK | {"variants": FULL, "seeds": [0, 1, 2], "workers": os.cpu_count()}}
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
MODEL = ("images", "passes", "variant", "guidance")
FIGURES = ("val", "fd", "recognised", "lowest", "copies", "new", "shared")


def parse_args():
    """The options of this script; `flags` are those that are left for train_tiny.py."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--preset", choices=PRESETS, default="quick", help="which runs (default: quick)")
    p.add_argument("--variants", nargs="+", help="such as raster rar rar,dropout=0.1 (default: by preset)")
    p.add_argument("--images", type=int, nargs="+", help="numbers of training images (default: by preset)")
    p.add_argument("--steps", type=int, nargs="+", help="numbers of training steps (default: by preset)")
    p.add_argument("--seeds", type=int, nargs="+", help="of training and samples (default: by preset)")
    p.add_argument("--workers", type=int, help="runs at a time, one thread each if several (default: by preset)")
    p.add_argument("--samples", type=int, default=500, help="samples of each run and guidance scale (default: 500)")
    p.add_argument("--run", type=Path, help="folder of a run with tokens.npz (default: a new one of digits)")
    p.add_argument("--out", type=Path, default=Path("runs/ablation"), help="(default: runs/ablation)")
    p.set_defaults(**PRESETS[p.parse_known_args()[0].preset])
    bench, bench.flags = p.parse_known_args()
    return bench


def train(folder, *options):
    """Run train_tiny.py in a process of its own, or go on with the run that is there; what it prints is in a .log."""
    if (folder / "run.json").exists():
        options = ["--resume"]
    with open(f"{folder}.log", "a") as log:
        command = [sys.executable, TRAIN, "--out", folder, *options]
        subprocess.run(command, stdout=log, stderr=log, check=True)


def prepare(bench):
    """Load what all runs share, or make it."""
    bench.device, _ = pick_device(None)
    bench.out.mkdir(parents=True, exist_ok=True)
    if bench.run is None:
        bench.run = bench.out / "data"
        train(bench.run, "--steps", "1")
    bench.options = json.loads((bench.run / "run.json").read_text())
    bench.data = dict(np.load(bench.options["tokens"] or bench.run / "tokens.npz"))
    bench.tokenizer = load_run(bench.run)[1].to(bench.device)
    path, classes = bench.out / "classifier.pt", len(bench.data["class_names"])
    bench.classifier = get_classifier(path, bench.options, classes, bench.device)
    _, _, _, others = real_images(bench.options, bench.tokenizer, bench.samples, bench.device)
    bench.reference = batched(bench.classifier[:-1], others)


def training_rows(bench, run):
    """The tokens.npz of a run: a random part of the training images, with their mirror images where there are any."""
    views = 2 if bench.options["flip"] else 1  # the mirror images are the second half
    rows = np.arange(len(bench.data["tokens"])).reshape(views, -1)
    some = np.random.default_rng(run["seed"]).permutation(rows.shape[1])[: run["images"]]
    rows = rows[:, some].flatten()
    return bench.data | {name: bench.data[name][rows] for name in ("tokens", "labels")}


def run_folder(bench, run):
    return bench.out / "{variant}-{images}x{steps}-{seed}".format(**run)


def do_run(bench, run):
    """Train a run and score its last weights. Its scores, a row for each guidance scale, say that it is finished."""
    folder, data = run_folder(bench, run), training_rows(bench, run)
    np.savez(f"{folder}.npz", **data)
    order, *extras = run["variant"].split(",")
    options = [f"--config={bench.options['config']}", f"--tokens={folder}.npz", f"--order={order}"]
    options += [f"--seed={run['seed']}", f"--steps={run['steps']}", *bench.flags, *[f"--{extra}" for extra in extras]]
    train(folder, *options)

    model, _, kept = load_run(folder)
    batch_size = json.loads((folder / "run.json").read_text())["batch_size"]
    metrics = np.loadtxt(folder / "metrics.csv", delimiter=",", skiprows=1, ndmin=2)
    run |= {"passes": round(run["steps"] * batch_size / len(data["tokens"])), "val": metrics[-1, 4]}
    training = torch.from_numpy(data["tokens"]).long().to(bench.device)
    labels = torch.arange(bench.samples, device=bench.device) % len(data["class_names"])
    order = scan_order(kept["scan"], int(data["grid_size"]))
    scores = []
    for scale in GUIDANCE:
        generator = torch.Generator(bench.device).manual_seed(run["seed"])
        settings = {"guidance_scale": scale, "order": order, "generator": generator}
        tokens = batched(model.to(bench.device).generate, labels, **settings)
        images = batched(bench.tokenizer.decode, tokens)
        figures = judge(bench.classifier, bench.reference, images, labels, tokens, training)
        scores.append(run | {"guidance": scale} | figures)
    Path(f"{folder}-scores.json").write_text(json.dumps(scores))
    return folder


def read_scores(out):
    """(images, passes, variant, guidance) -> rows of all seeds."""
    groups = {}
    for path in sorted(out.glob("*-scores.json")):
        for row in json.loads(path.read_text()):
            groups.setdefault(tuple(row[name] for name in MODEL), []).append(row)
    return dict(sorted(groups.items()))


def write_table(path, groups):
    """table.md: all figures, as "2.18 ± 0.05" over seeds."""
    names = (*MODEL, "seeds", *FIGURES)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for model, rows in groups.items():
        cells = [*model, len(rows)]
        for name in FIGURES:
            values = [row[name] for row in rows]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(rows) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    bench = parse_args()
    if bench.workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that train
        torch.set_num_threads(1)
    prepare(bench)
    runs = product(bench.seeds, bench.images, bench.steps, bench.variants)
    runs = [dict(zip(("seed", "images", "steps", "variant"), values)) for values in runs]
    todo = [run for run in runs if not Path(f"{run_folder(bench, run)}-scores.json").exists()]
    print(f"{len(todo)} runs to do, {bench.workers} at a time")
    for folder in ThreadPool(bench.workers).imap_unordered(partial(do_run, bench), todo):
        print(f"finished {folder}", flush=True)
    write_table(bench.out / "table.md", read_scores(bench.out))


if __name__ == "__main__":
    main()
