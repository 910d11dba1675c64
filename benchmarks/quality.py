"""How good a run's samples are: `python benchmarks/quality.py --run runs/digits-1 --guidance 1 1.5 2`.

Prints a markdown table with a row for real held-out images, the same as the run's tokenizer gives them back, and
samples at each guidance scale, or with `--npz FILE` those of a file that sample.py or another program wrote:

    recognised      share that a classifier, trained here on real images, reads as the class asked for
    lowest class    the same for the class that is recognised least
    FD              Frechet distance to other held-out images, in the pooled features of the classifier
    copies          share with over 90% of their tokens in common with an image that the run trained on

Where the run used mirror images, so do the classifier and the search for copies. Training the classifier takes half a
minute for digits, and minutes for photos: `--classifier FILE` keeps it. Only figures of one classifier compare.
`--blind FILE.png` only writes --n samples in random order, for a person who does not know what was asked for, and the
labels in FILE.json. `--real-npz FILE` only writes all held-out images, in the layout that FID evaluators read.

Letters: N images, M others, S side of an image in pixels, T tokens of an image, C classes, D features.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import train_tiny
from rar import load_file, scan_order
from train_tiny import learning_rate, load_images, load_run, newest_run, pick_device, to_float

ROW = "| {} | {} | {recognised:.1%} | {lowest:.1%} | {fd:.2f} | {copies:.1%} |"


def load_split(options, split):
    """Images uint8 (N, S, S, 3), labels (N,) and class names of the data set that a run.json names."""
    return load_images(options["config"], split, options["data_dir"], options["image_size"])


def to_tensors(images, labels, device):
    """As float (N, 3, S, S) in [0, 1] and int64 (N,)."""
    return to_float(images, device), torch.from_numpy(labels).to(device)


@torch.no_grad()
def batched(function, x, **settings):
    """A function of many images, labels or tokens, 100 at a time."""
    return torch.cat([function(part, **settings) for part in x.split(100)])


def disturb(images):
    """Shift images (N, 3, S, S) by up to two pixels and blur a third of them, as every tokenizer loses fine detail."""
    images = images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear")
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 1 / 3, blurred, images)


def build_classifier(classes, image_size):
    """Images (N, 3, S, S) -> logits (N, C): seven convolutions, 128 pooled features, one linear layer."""
    layers, before = [], 3
    for width, stride in ((32, image_size // 32), (64, 2), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [nn.Conv2d(before, width, 3, max(1, stride), padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def get_classifier(path, options, classes, device):
    """The classifier in the file `path`, or one that is trained on real images, and kept there if there is a path."""
    torch.manual_seed(0)
    classifier = build_classifier(classes, options["image_size"]).to(device)
    if path and path.exists():
        classifier.load_state_dict(load_file(path))
        return classifier.eval()
    images, labels, _ = load_split(options, "train")
    steps = 200 if options["config"] == "digits" else 4800
    optimizer = train_tiny.make_optimizer(classifier, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for step in trange(steps, desc="classifier"):
        rows = torch.randint(len(images), (64,)).numpy()
        batch, targets = to_tensors(images[rows], labels[rows], device)
        if options["flip"] and step % 2:
            batch = batch.flip(3)
        loss = F.cross_entropy(classifier(disturb(batch)), targets)
        train_tiny.update(classifier, optimizer, scaler, loss, learning_rate(step, steps, 3e-3, 0.2))
    if path:
        torch.save(classifier.state_dict(), path)
    return classifier.eval()


def frechet_distance(a, b):
    """Squared Frechet distance of two Gaussians, fitted to features (N, D) and (M, D), as in FID."""
    a, b = a.double().cpu(), b.double().cpu()
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    return (means + (cov_a + cov_b).trace() - 2 * roots.sum()).item()


def nearest_training(tokens, training):
    """Share (N,) of the tokens (N, T) in common with the nearest training image (M, T)."""
    training = training.float()
    fewest = [torch.cdist(part, training, p=0).min(1).values for part in tokens.float().split(100)]
    return 1 - torch.cat(fewest) / tokens.shape[1]


def judge(classifier, reference, images, labels, tokens, training):
    """Figures of images (N, 3, S, S), the classes asked for (N,) and their tokens (N, T).

    `reference` (M, D) holds features of real images, `training` (M, T) the tokens of training images.
    """
    found = batched(classifier[:-1], images)
    right = classifier[-1](found).argmax(1) == labels
    shared = nearest_training(tokens, training)
    copies = shared > 0.9
    figures = {"recognised": right, "copies": copies, "new": right & ~copies, "shared": shared.median()}
    figures = {name: figure.float().mean().item() for name, figure in figures.items()}
    figures["lowest"] = min(right[labels == c].float().mean().item() for c in labels.unique())
    return figures | {"fd": frechet_distance(found, reference)}


def parse_args():
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--run", type=Path, help="folder of a run (default: the newest in runs/)")
    p.add_argument("--npz", help="judge the samples in this file instead, all of them")
    p.add_argument("--guidance", type=float, nargs="+", help="guidance scales to try (default: the run's)")
    p.add_argument("--n", type=int, default=500, help="samples of each guidance scale (default: 500)")
    p.add_argument("--classifier", type=Path, help="keep the classifier in this file, or take it from there")
    p.add_argument("--blind", type=Path, help="only write this picture of --n samples in random order, and a .json")
    p.add_argument("--real-npz", help="only write all held-out images to this file")
    return p.parse_args()


def real_images(options, tokenizer, n, device):
    """Half of the held-out images, but at most n, with labels and tokens; and the others, as a reference."""
    images, labels, _ = load_split(options, "val")
    rows = np.random.default_rng(0).permutation(len(labels))
    n = min(n, len(rows) // 2)
    images, labels = to_tensors(images[rows], labels[rows], device)
    return images[:n], labels[:n], batched(tokenizer.encode, images[:n]), images[n:]


def main():
    args = parse_args()
    run = args.run or newest_run("rar.pt")
    device, _ = pick_device(None)
    options = json.loads((run / "run.json").read_text())
    if args.real_npz:
        return np.savez(args.real_npz, *load_split(options, "val")[:2])

    model, tokenizer, kept = load_run(run)
    model, tokenizer, names = model.to(device), tokenizer.to(device), kept["class_names"]
    images, labels, tokens, others = real_images(options, tokenizer, args.n, device)
    judged = {"real, held out": (images, labels, tokens)}
    judged["reconstructed"] = (batched(tokenizer.decode, tokens), labels, tokens)
    if args.npz:
        images, labels = to_tensors(*np.load(args.npz).values(), device)  # whatever their names
        judged[args.npz] = (images, labels, batched(tokenizer.encode, images))
    settings = {"order": scan_order(kept["scan"], tokenizer.config.grid_size), "guidance_power": kept["guidance_power"]}
    for scale in [] if args.npz else args.guidance or [kept["guidance_scale"]]:
        torch.manual_seed(1)
        labels = torch.arange(args.n, device=device) % len(names)
        tokens = batched(model.generate, labels, guidance_scale=scale, **settings)
        images = batched(tokenizer.decode, tokens)
        judged[f"samples, guidance {scale:g}"] = (images, labels, tokens)
    if args.blind:
        shuffled = torch.randperm(len(images))[: args.n]
        train_tiny.save_sheet(args.blind, images[shuffled], 10)
        return args.blind.with_suffix(".json").write_text(json.dumps(labels[shuffled].tolist()))

    training = torch.from_numpy(np.load(options["tokens"] or run / "tokens.npz")["tokens"]).to(device)
    classifier = get_classifier(args.classifier, options, len(names), device)
    reference = batched(classifier[:-1], others)
    print("| images | number | recognised | lowest class | FD | copies |\n|---|---|---|---|---|---|")
    for name, x in judged.items():
        print(ROW.format(name, len(x[0]), **judge(classifier, reference, *x, training)), flush=True)


if __name__ == "__main__":
    main()
