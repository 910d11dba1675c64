"""How good a digits run's samples are: `python benchmarks/digits_quality.py --run runs/digits-1 --guidance 1 2 3`.

A classifier that is trained apart, on real digits, reads the generated ones. It also sees shifted, blurred and noisy
digits, so that it cannot go by a single edge. The table holds the share of images that it reads as the digit asked for,
over all and for each digit, and how pure the colours are: of the bright pixels of an image, the share whose nearest
palette colour is the most frequent one. `--blind FILE.png` writes 100 samples in random order for a person to read
without knowing what was asked for, and FILE.json with the digits asked for, in the order of the sheet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor, nn

from rar import scan_order
from train_tiny import PALETTE, Parser, load_images, load_model, newest_run, run_main, save_sheet, to_float

CPU = torch.device("cpu")


def disturb(images: Tensor) -> Tensor:
    """Shift images (N, 3, S, S) by up to two pixels, blur a third of them and add noise to another third."""
    images = images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear")
    noisy = images + 0.15 * torch.randn_like(images)
    kind = torch.randint(3, (len(images), 1, 1, 1), device=images.device)
    images = torch.where(kind == 1, blurred, images)
    return torch.where(kind == 2, noisy, images)


def build_classifier(classes: int) -> nn.Sequential:
    """Images (N, 3, S, S) -> logits (N, C): three convolutions, 384 pooled features, one linear layer."""
    layers, channels = [], 3
    for width in (24, 48, 96):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, classes))


def train_classifier(images: np.ndarray, labels: np.ndarray, device: torch.device, steps: int) -> nn.Sequential:
    """Train on real images, uint8 (N, S, S, 3), and their labels (N,)."""
    torch.manual_seed(0)
    classifier = build_classifier(int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,)).numpy()
        batch = disturb(to_float(images[rows], device))
        targets = torch.from_numpy(labels[rows]).to(device)
        loss = F.cross_entropy(classifier(batch), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def features(classifier: nn.Sequential, images: Tensor) -> Tensor:
    """The 384 numbers (N, 384) from which the classifier's last layer, classifier[-1], reads images (N, 3, S, S)."""
    return torch.cat([classifier[:-1](part) for part in images.split(500)])


def colour_purity(images: Tensor) -> float:
    """Share of the bright pixels whose nearest palette colour is the image's most frequent one; mean over images."""
    palette = torch.tensor([ImageColor.getrgb(colour) for colour in PALETTE]).float()
    palette = palette / palette.amax(1, keepdim=True)  # as bright as can be, since pixels at an edge are darker
    shares = []
    for pixels in images.flatten(2).mT:  #                                                        S * S, 3
        brightest = pixels.amax(1, keepdim=True)
        bright = (brightest > 0.4).flatten()
        nearest = torch.cdist((pixels / brightest)[bright], palette).argmin(1)
        shares.append(nearest.bincount(minlength=8).max() / max(1, len(nearest)))
    return torch.stack(shares).mean().item()


def table_row(name: str, classifier: nn.Sequential, images: Tensor, labels: Tensor) -> str:
    """One row of the table for images (N, 3, S, S) of the digits asked for, labels (N,)."""
    right = classifier[-1](features(classifier, images)).argmax(1) == labels
    shares = [right.float().mean()]
    shares += [right[labels == digit].float().mean() for digit in range(10)]
    cells = [f"{100 * share:.1f}" for share in [*shares, colour_purity(images)]]
    return f"| {name} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None):
    p = Parser(__doc__)
    p.add_argument("--run", type=Path, help="folder of a run (default: the newest in runs/)")
    p.add_argument("--guidance", type=float, nargs="+", help="guidance scales to try (default: the run's own)")
    p.add_argument("--n", type=int, default=500, help="samples of each guidance scale (default: 500)")
    p.add_argument("--seed", type=int, default=1, help="of the samples (default: 1)")
    p.add_argument("--blind", type=Path, help="only write this picture of 100 samples in random order, and its .json")
    args = p.parse_args(argv)
    run = args.run or newest_run("rar.pt")
    tokenizer, _ = load_model(run / "tokenizer.pt", "tokenizer")
    model, settings = load_model(run / "rar.pt", "rar")
    options = {"guidance_power": settings["guidance_power"], "generator": torch.Generator().manual_seed(args.seed)}
    options["order"] = scan_order(settings["scan"], tokenizer.config.grid_size)
    if args.blind:
        labels = torch.randperm(100, generator=options["generator"]) % 10
        tokens = model.generate(labels, guidance_scale=settings["guidance_scale"], **options)
        save_sheet(args.blind, tokenizer.decode(tokens), 10)
        args.blind.with_suffix(".json").write_text(json.dumps(labels.tolist()))
        return
    size = tokenizer.config.image_size
    images, labels, names = load_images("digits", "train", image_size=size)
    classifier = train_classifier(images, labels, CPU, steps=600)
    images, labels, _ = load_images("digits", "val", image_size=size)
    images, labels = to_float(images, CPU), torch.from_numpy(labels)
    print(f"| images, % | all | {' | '.join(names)} | pure colour |\n|{'---|' * 13}")
    print(table_row("real, held out", classifier, images, labels))
    print(table_row("reconstructed", classifier, tokenizer.decode(tokenizer.encode(images)), labels))
    labels = torch.arange(args.n) % 10
    for scale in args.guidance or [settings["guidance_scale"]]:
        tokens = model.generate(labels, guidance_scale=scale, **options)
        print(table_row(f"samples, guidance {scale:g}", classifier, tokenizer.decode(tokens), labels))


if __name__ == "__main__":
    run_main(main)
