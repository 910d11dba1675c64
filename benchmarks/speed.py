"""How fast sampling and training are on this machine: `python benchmarks/speed.py`, or with --full RAR-B too.

Share of peak: two operations for each weight, element and pass (a training step counts as three passes) over the time
taken, relative to this machine's own product of two 2048 x 2048 matrices in the same type, timed right before the case.
"Naive" computes all elements again at every step; before anything is timed, its logits must equal the cached ones.
`--random-weights NAME FILE` writes random numbers in the layout of the authors' files, where those cannot be had.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from rar import LEADING, RAR, TABLE_1, Cache, RARConfig, require, sample_orders
from tokenizer import VQConfig, VQTokenizer
from train_tiny import Parser, adamw, pick_device, run_main

SMALL = RARConfig(512, 10, 64, dim=256, depth=6, heads=8, mlp_dim=1024)


def released_config(name: str) -> RARConfig:
    """The sizes of a model of Tab. 1."""
    return RARConfig(1024, 1000, 256, heads=16, **TABLE_1[name])


def write_random_weights(name: str, path: str):
    """Write normal numbers, those of norms around 1, in the layout of the authors' file of this name."""
    require(name in (*TABLE_1, "tokenizer"), f"no weights are called {name!r}: {', '.join(TABLE_1)} or tokenizer")
    tokenizer = VQConfig(256, 1024, 256, 128, (1, 1, 2, 2, 4), 2, 32, released_shortcut=True)
    with torch.device("meta"):
        model = VQTokenizer(tokenizer) if name == "tokenizer" else RAR(released_config(name))
    weights = model.state_dict()
    for key, tensor in weights.items():
        is_norm = tensor.dim() == 1 and key.endswith("weight")
        weights[key] = torch.randn(tensor.shape) * 0.02 + is_norm
    torch.save(weights, path)


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median time of `runs` calls, after one that is not counted; with runs = 0 that of the first call."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:] or times)[runs // 2]


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of two 2048 x 2048 matrices; several are queued, as a GPU needs."""
    matrix = torch.randn(2048, 2048, device=device).to(dtype)
    return 10 * 2 * 2048**3 / seconds(lambda: [matrix @ matrix for _ in range(10)], 3)


def new_model(config: RARConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> RAR:
    """A model of random weights: a fresh one does nothing in its blocks."""
    model = RAR(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.to(device, dtype).eval()


@torch.no_grad()
def check_cache(model: RAR, device: torch.device):
    """Compare the logits of one pass with those computed element by element with a cache."""
    T = model.config.seq_len
    tokens = torch.randint(model.config.codebook_size, (4, T - 1), device=device)
    labels = torch.arange(4, device=device)
    orders = sample_orders(4, T, 1.0, device=device)
    cache = Cache(model, 4)
    cached = torch.cat([model(tokens[:, :n], labels, orders, cache) for n in range(T)], dim=1)
    difference = (cached - model(tokens, labels, orders)).abs().max().item()
    require(difference < 1e-3, f"cached and naive logits differ by {difference}: nothing timed")


def time_case(case: str, work: Callable, runs: int, model: RAR, elements: int, count: str, naive: float = 0.0) -> float:
    """Time some work on a number of elements, print a row, and return the seconds. `count` is as "64 images"."""
    c, weight = model.config, model.lm_head.weight
    peak = matmul_rate(weight.dtype, weight.device)
    elapsed = seconds(work, runs)
    weights = c.depth * (4 * c.dim**2 + 2 * c.dim * c.mlp_dim) + c.dim * c.codebook_size  # without those of adaLN
    share = 2 * weights * elements / elapsed / peak
    number, unit = count.split()
    ratio = f"{naive / elapsed:.1f}" if naive else ""
    print(f"| {case} | {elapsed:.3f} | {int(number) / elapsed:.4g} {unit}/s | {ratio} | {share:.0%} |", flush=True)
    return elapsed


def time_sampling(case: str, model: RAR, batch: int, runs: int, use_cache: bool = True, naive: float = 0.0) -> float:
    """Time the sampling of a batch with guidance, which runs every image with and without its class."""
    T = model.config.seq_len
    labels = torch.arange(batch, device=model.lm_head.weight.device) % model.config.num_classes
    elements = T + 1 if use_cache else sum(n + LEADING for n in range(T))  # of one sequence, over all steps
    work = partial(model.generate, labels, guidance_scale=4.0, use_cache=use_cache)
    return time_case(case, work, runs, model, 2 * batch * elements, f"{batch} images", naive)


def time_training(case: str, config: RARConfig, batch: int, device: torch.device):
    """Time a training step in float32: orders, forward, backward, clipping, AdamW."""
    model = RAR(config).to(device)
    optimizer = adamw(model, 0.03)
    tokens = torch.randint(config.codebook_size, (batch, config.seq_len), device=device)
    labels = torch.arange(batch, device=device) % config.num_classes

    def step():
        orders = sample_orders(batch, config.seq_len, 1.0, device=device)
        shuffled = tokens.gather(1, orders)
        logits = model(shuffled[:, :-1], labels, orders)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), shuffled.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    time_case(case, step, 5, model, 3 * batch * (config.seq_len + 1), f"{tokens.numel()} tokens")


def hardware(device: torch.device) -> str:
    """The name of the GPU, or what the processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1] if found else platform.processor()


def main(argv: list[str] | None = None):
    p = Parser(__doc__)
    p.add_argument("--full", action="store_true", help="RAR-B too, at batch 4, in float32 and bfloat16")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--random-weights", nargs=2, metavar=("NAME", "FILE"), help="only write FILE; rar_b or tokenizer")
    args = p.parse_args(argv)
    if args.random_weights:
        write_random_weights(*args.random_weights)
        return
    device = pick_device(args.device)
    model = new_model(SMALL, device)
    check_cache(model, device)
    dtypes = [torch.float32, torch.bfloat16] if args.full else [torch.float32]  # a CPU may lack fast bfloat16 products
    rates = [f"{matmul_rate(dtype, device) / 1e9:.0f} in {dtype}" for dtype in dtypes]
    print(f"{hardware(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"GFLOP/s of a matrix product: {', '.join(rates)}; dim 256, depth 6, batch 64:\n")
    print("| case | seconds | rate | naive / this | share of peak |\n|---|---|---|---|---|")
    naive = time_sampling("sampling, naive", model, 64, runs=0, use_cache=False)
    time_sampling("sampling, cached", model, 64, runs=3, naive=naive)
    time_training("training step", SMALL, 64, device)
    time_training("the same, dropout 0.1", replace(SMALL, dropout=0.1, attn_dropout=0.1), 64, device)
    for dtype in dtypes if args.full else ():
        model = new_model(released_config("rar_b"), device, dtype)
        time_sampling(f"sampling, RAR-B, batch 4, {dtype}", model, 4, runs=1)


if __name__ == "__main__":
    run_main(main)
