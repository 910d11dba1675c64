"""Write files in the released layout filled with random numbers: `python benchmarks/random_released.py rar_b OUT`.

They stand in for the authors' files where those cannot be had, to measure load time and memory of the real sizes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rar import RAR, TABLE_1, RARConfig
from tokenizer import VQConfig, VQTokenizer


def fill(model: torch.nn.Module, path: Path, std: float) -> None:
    """Save a state dict of normal numbers, norms around 1, with the shapes of a model on the meta device."""
    torch.manual_seed(0)
    weights = {name: torch.randn(p.shape) * std for name, p in model.state_dict().items()}
    for name, w in weights.items():
        if name.endswith("weight") and w.dim() == 1:
            w += 1
    torch.save(weights, path)
    print(f"{path}: {sum(w.numel() for w in weights.values()) / 1e6:.1f}M numbers, {path.stat().st_size / 1e9:.2f} GB")


def main(name: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sizes = {k: TABLE_1[name][k] for k in ("dim", "depth", "mlp_dim")}
    with torch.device("meta"):
        rar = RAR(RARConfig(1024, 1000, 256, heads=16, **sizes))
        tokenizer = VQTokenizer(VQConfig(256, 1024, 256, 128, (1, 1, 2, 2, 4), 2, 32, released_shortcut=True))
    fill(rar, out / f"{name}.bin", 0.02)
    fill(tokenizer, out / "maskgit-vqgan-imagenet-f16-256.bin", 0.02)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
