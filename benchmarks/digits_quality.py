"""How good a digits run's samples are: `python benchmarks/digits_quality.py --run runs/digits-1`.

A classifier trained apart on real digits names generated ones; the share that it names as the class asked for is the
accuracy. Colour, height and slant of generated digits are compared with real ones: total variation distance between
the histograms of palette colours, and mean and standard deviation of height (pixels) and slant (degrees).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor, nn

from rar import scan_order
from train_tiny import PALETTE, load_images, load_model, newest_run, run_main, to_float, to_uint8


def train_classifier(images: np.ndarray, labels: np.ndarray, steps: int = 600, seed: int = 0) -> nn.Module:
    """A small convolutional network on real images (N, S, S, 3), with small shifts as augmentation."""
    torch.manual_seed(seed)
    layers, channels = [], 3
    for width in (24, 48, 96):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
    optimizer, data = None, to_float(images, torch.device("cpu"))
    for _step in range(steps):
        rows = torch.randint(len(data), (128,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(model(data[rows].roll(shift, (2, 3))), torch.from_numpy(labels)[rows])
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (classifier(images).argmax(1) == labels).float().mean().item()


def looks(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Palette index, height in pixels and slant in degrees of each digit in uint8 images (N, S, S, 3)."""
    palette = np.array([ImageColor.getrgb(c) for c in PALETTE], dtype=float)
    colours, heights, slants = [], [], []
    for image in images.astype(float):
        ink = image.max(2)
        weight = np.clip(ink - 60, 0, None)
        y, x = np.mgrid[: len(ink), : len(ink)]
        total = weight.sum() + 1e-9
        mean = (image * weight[..., None]).sum((0, 1)) / total
        mean *= 255 / max(mean.max(), 1)
        bright = palette * (255 / palette.max(1, keepdims=True))
        colours.append(((bright - mean) ** 2).sum(1).argmin())
        rows = np.flatnonzero((ink > 100).any(1))
        heights.append(rows[-1] - rows[0] + 1 if len(rows) else 0)
        cx, cy = (x * weight).sum() / total, (y * weight).sum() / total
        skew = ((x - cx) * (y - cy) * weight).sum() / (((y - cy) ** 2 * weight).sum() + 1e-9)
        slants.append(np.degrees(np.arctan(-skew)))
    return np.array(colours), np.array(heights), np.array(slants)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", type=Path)
    p.add_argument("--n", type=int, default=500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--guidance", type=float, nargs="*", help="scales to try (default: the run's own)")
    args = p.parse_args()
    run, cpu = args.run or newest_run("rar.pt"), torch.device("cpu")
    tokenizer, _ = load_model(run / "tokenizer.pt", "tokenizer", cpu)
    model, stored = load_model(run / "rar.pt", "rar", cpu)
    classifier = train_classifier(*load_images("digits")[:2])
    real, real_labels, _ = load_images("digits", "val")
    labels = torch.arange(args.n) % 10
    decoded = tokenizer.decode(tokenizer.encode(to_float(real, cpu)))
    sets = [
        ("real", to_float(real, cpu), torch.from_numpy(real_labels)),
        ("decoded", decoded, torch.from_numpy(real_labels)),
    ]
    for scale in args.guidance or [stored["guidance_scale"]]:
        generator = torch.Generator().manual_seed(args.seed)
        order = scan_order(stored["scan"], tokenizer.config.grid_size)
        power = stored["guidance_power"]
        tokens = model.generate(labels, guidance_scale=scale, guidance_power=power, order=order, generator=generator)
        sets.append((f"guidance {scale:g}", tokenizer.decode(tokens), labels))
    shares = None
    print(f"{'':>12} {'named right':>12} {'colours TV':>11} {'height':>12} {'slant':>13}")
    for name, images, wanted in sets:
        colours, heights, slants = looks(to_uint8(images))
        found = np.bincount(colours, minlength=len(PALETTE)) / len(colours)
        shares = found if shares is None else shares
        print(
            f"{name:>12} {accuracy(classifier, images, wanted):>12.1%} {np.abs(found - shares).sum() / 2:>11.3f}"
            f" {heights.mean():>6.1f}+-{heights.std():<4.1f} {slants.mean():>6.1f}+-{slants.std():<5.1f}"
        )


if __name__ == "__main__":
    run_main(main)
