"""What RAR buys on few images and many passes: `python benchmarks/ablation.py` (digits, three seeds).

Trains variants with several seeds on the first training images of a run and writes all figures into OUT/table.md.

A variant is an order and options of train_tiny.py: `raster`, `rar,dropout=0.1`, `rar,no-target-aware`,
`rar,scan=z-curve` (Tab. 3), `rar,anneal-start=0.75,anneal-end=1` (Tab. 2). Every number of --images is combined with
every number of --steps: `--steps 94 188 375 750 1500 3000` are 3 to 96 passes over 1,000 digits. Options of
train_tiny.py may be added and hold for all runs. Finished runs are not repeated, and a stopped one goes on from its
last evaluation: give the same command again, or one with more runs. To use all cores, let `--variants raster --seeds 0`
finish; then start one process for each seed, in terminals of their own, with OMP_NUM_THREADS=1 in the environment.

`--run DIR` names the run whose data, tokenizer and tokens are used; without it, a tokenizer for digits is trained in
OUT/data. Where that run used mirror images, each image comes with its mirror image.

Figures are those of quality.py; "new" are recognised and no copies, "shared" is the median share of tokens in common
with the nearest training image, "val" the validation loss in nats per token, in the scan order. Each is a mean ±
standard deviation over seeds, at each guidance scale. Samples are drawn in the scan order, but those of `random` in a
random order for each seed and scale, because the paper draws them so (Tab. 2). What real images reach, as they are and
reconstructed, says `python benchmarks/quality.py --run OUT/data --classifier OUT/classifier.pt`.
In the code, `bench` holds the options of this script and what all runs share.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from quality import batched, get_classifier, judge, real_images

from rar import scan_order
from train_tiny import load_run, pick_device

TRAIN = Path(__file__).resolve().parents[1] / "train_tiny.py"
VARIANTS = ["raster", "random", "rar", "raster,dropout=0.1", "random,dropout=0.1", "rar,dropout=0.1"]
VARIANTS += ["raster,dropout=0.3", "rar,dropout=0.3", "rar,no-target-aware"]
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)
MODEL = ("images", "passes", "variant", "guidance")
FIGURES = ("val", "fd", "recognised", "lowest", "copies", "new", "shared")


def parse_args():
    """The options of this script; `flags` are those that are left for train_tiny.py."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--variants", nargs="+", default=VARIANTS, help=f"(default: {' '.join(VARIANTS)})")
    p.add_argument("--images", type=int, nargs="+", default=[1000], help="numbers of training images (default: 1000)")
    p.add_argument("--steps", type=int, nargs="+", default=[1500], help="numbers of training steps (default: 1500)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and samples (default: 0 1 2)")
    p.add_argument("--samples", type=int, default=500, help="for each run and guidance scale (default: 500)")
    p.add_argument("--run", type=Path, help="folder of a run with tokens.npz (default: a new one of digits)")
    p.add_argument("--out", type=Path, default=Path("runs/ablation"), help="of all runs (default: runs/ablation)")
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
    bench.data = dict(np.load(bench.run / "tokens.npz"))
    bench.tokenizer = load_run(bench.run)[1].to(bench.device)
    path, classes = bench.out / "classifier.pt", len(bench.data["class_names"])
    bench.classifier = get_classifier(path, bench.options, classes, bench.device)
    _, _, _, others = real_images(bench.options, bench.tokenizer, bench.samples, bench.device)
    bench.reference = batched(bench.classifier[:-1], others)


def do_run(bench, folder, variant, images, steps, seed):
    """Train a run and write the scores of its last weights, a row for each guidance scale."""
    views = 2 if bench.options["flip"] else 1  # the mirror images are the second half of the tokens
    rows = np.arange(len(bench.data["tokens"])).reshape(views, -1)[:, :images].flatten()
    data = bench.data | {name: bench.data[name][rows] for name in ("tokens", "labels")}
    np.savez(f"{folder}.npz", **data)
    order, *extras = variant.split(",")
    options = [f"--config={bench.options['config']}", f"--tokens={folder}.npz", f"--order={order}", f"--seed={seed}"]
    train(folder, *options, f"--steps={steps}", *bench.flags, *[f"--{extra}" for extra in extras])

    model, _, kept = load_run(folder)
    model = model.to(bench.device)
    batch_size = json.loads((folder / "run.json").read_text())["batch_size"]
    metrics = np.loadtxt(folder / "metrics.csv", delimiter=",", skiprows=1, ndmin=2)
    row = {"variant": variant, "images": images, "passes": round(steps * batch_size / len(rows)), "val": metrics[-1, 4]}
    training = torch.from_numpy(data["tokens"]).long().to(bench.device)
    labels = torch.arange(bench.samples, device=bench.device) % len(data["class_names"])
    scan = scan_order(kept["scan"], int(data["grid_size"]))
    scores = []
    for scale in GUIDANCE:
        torch.manual_seed(seed)
        path = torch.randperm(len(scan)) if order == "random" else scan
        tokens = batched(model.generate, labels, guidance_scale=scale, order=path)
        decoded = batched(bench.tokenizer.decode, tokens)
        figures = judge(bench.classifier, bench.reference, decoded, labels, tokens, training)
        scores.append(row | {"guidance": scale} | figures)
    Path(f"{folder}-scores.json").write_text(json.dumps(scores))
    print(f"finished {folder}", flush=True)


def write_table(out):
    """table.md: all figures, as "2.18 ± 0.05" over seeds."""
    groups = {}
    for path in sorted(out.glob("*-scores.json")):
        for row in json.loads(path.read_text()):
            groups.setdefault(tuple(row[name] for name in MODEL), []).append(row)
    names = (*MODEL, "seeds", *FIGURES)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for model, rows in sorted(groups.items()):
        cells = [*model, len(rows)]
        for name in FIGURES:
            values = [row[name] for row in rows]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(rows) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    bench = parse_args()
    prepare(bench)
    for seed, images, steps, variant in product(bench.seeds, bench.images, bench.steps, bench.variants):
        folder = bench.out / f"{variant}-{images}x{steps}-{seed}"
        if not Path(f"{folder}-scores.json").exists():
            do_run(bench, folder, variant, images, steps, seed)
    write_table(bench.out)


if __name__ == "__main__":
    main()
