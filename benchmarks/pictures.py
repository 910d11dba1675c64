"""Pictures of a run: `python benchmarks/pictures.py --run runs/cifar10-1`. The plot needs `pip install matplotlib`.

Writes into the run's folder: plot.png, r and the losses in both orders against the step; moments.png, two rows of
samples from the beginning, the middle and the end of training; and completions.png, held-out images, the same with a
half covered in grey, and four completions by the weights from before annealing, in an order that starts with what is
known.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from sample import mask_image
from train_tiny import load_images, load_run, newest_run, pick_device, save_sheet, to_float, to_uint8


def draw_plot(run, path):
    """r and the losses against the step; without matplotlib, a line that says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plot: pip install matplotlib")
    step, _, _, train, scan, random = np.loadtxt(run / "metrics.csv", delimiter=",", skiprows=1, unpack=True)
    options = json.loads((run / "run.json").read_text())
    corners = [share * options["steps"] for share in (0, options["anneal_start"], options["anneal_end"], 1)]
    figure, losses = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    losses.plot(step, train, "grey", label="training")
    losses.plot(step, scan, label="held out, fixed order")
    losses.plot(step, random, label="held out, random orders")
    losses.set(xlabel="step", ylabel="loss, nats per token")
    ratio = losses.twinx()
    ratio.plot(corners, [1, 1, 0, 0], "k--", label="r")
    ratio.set(ylabel="r", ylim=(-0.05, 1.05))
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=100)


def draw_completions(run, path, device):
    """Held-out images of different classes, and their completions where a half was covered."""
    options = json.loads((run / "run.json").read_text())
    model, tokenizer, kept = load_run(run, "rar_random.pt")
    model, tokenizer = model.to(device), tokenizer.to(device)
    images, labels, _ = load_images(options["config"], "val", options["data_dir"], options["image_size"])
    S = options["image_size"]
    masks = ((0, 0, S, S // 2), (0, S // 2, S, S), (0, 0, S // 2, S), (S // 2, 0, S, S))
    torch.manual_seed(0)
    rows = []
    for label in range(min(8, len(kept["class_names"]))):
        image = images[labels == label][0]
        hole, covered, order, prefix = mask_image(image, masks[label % 4], tokenizer)
        asked = torch.full((4,), label, device=device)
        settings = {"guidance_scale": kept["guidance_scale"], "guidance_power": kept["guidance_power"]}
        tokens = model.generate(asked, order=order, prefix=prefix.expand(4, -1), **settings)
        rows += [image, covered, *np.where(hole, to_uint8(tokenizer.decode(tokens)), image)]
    save_sheet(path, to_float(np.stack(rows)), 12)


def draw_moments(run, path):
    """Two rows of samples at the first evaluation, in the middle of training, and at its end."""
    sheets = sorted(run.glob("samples-*.png"))
    parts = []
    for sheet in (sheets[0], sheets[len(sheets) // 2 - 1], sheets[-1]):
        picture = np.asarray(Image.open(sheet))
        parts.append(picture[: len(picture) // 4])  # a sheet has eight rows
        parts.append(np.full_like(picture[:6], 255))  # a white line
    Image.fromarray(np.concatenate(parts[:-1])).save(path)


def main():
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--run", type=Path, help="folder of a run (default: the newest in runs/)")
    run = p.parse_args().run or newest_run("rar.pt")
    draw_plot(run, run / "plot.png")
    draw_moments(run, run / "moments.png")
    if (run / "rar_random.pt").exists():  # not in a run in raster order
        draw_completions(run, run / "completions.png", pick_device(None)[0])


if __name__ == "__main__":
    main()
