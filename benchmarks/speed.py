"""How fast training and sampling are, against this machine's own matrix product and against the naive way.

`python benchmarks/speed.py` takes under 3 minutes on two cores; `--full` adds RAR-B and, on a GPU, RAR-XL with
detokenizing (the protocol of Tab. 5). One unit of time is a 2048 x 2048 x 2048 fp32 torch matmul measured in this run:
the median over measurements before and after each case, since a machine does not keep its speed.
The peak share counts 2 operations per weight that must be multiplied, per row and step (three times that in training).
The read share is the time in which this machine would read the weights and the cache once a step, over the time taken.
Cached sampling is compared with the naive path, which runs the whole prefix at every step, before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from rar import MODULATION_CHUNK, RAR, TABLE_1, RARConfig, sample_orders
from tokenizer import VQConfig, VQTokenizer
from train_tiny import PRESETS, adamw, autocast, pick_device, run_main, token_loss, update

SMALL = RARConfig(512, 10, 64, dim=256, depth=6, heads=8, mlp_dim=1024)


def seconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median time of `runs` calls, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def cpu_name() -> str:
    """What the processor calls itself: Linux tells in a file, Windows and macOS through platform."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def memory_in_use(device: torch.device) -> int:
    """The most memory, in bytes, that this process (on a GPU: its tensors) has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else 0


def matmul(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Median seconds of one size^3 product; on a GPU a hundred are queued at once."""
    a, count = torch.randn(size, size, device=device).to(dtype), 100 if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(count):
            a @ a

    return seconds(work, device, 7) / count


def read_rate(device: torch.device, size: int = 1 << 27) -> float:
    """Bytes a second at which memory is read, from the sum of a tensor far larger than the caches."""
    a, count = torch.ones(size, device=device), 20 if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(count):
            a.sum()

    return count * 4 * size / seconds(work, device, 5)


def bytes_read(config: RARConfig, rows: int, dtype: torch.dtype) -> int:
    """Weights and cache, each read once at every step of sampling `rows` sequences; the cache grows from nothing."""
    cache = config.depth * rows * (config.seq_len + 1) * config.dim  # keys and values, half of the places on average
    return config.seq_len * (weights_per_row(config) + cache) * dtype.itemsize


def sampling_memory(config: RARConfig, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """What sampling with guidance holds, in GB: weights, cache, and the modulations of some places at once."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in RAR(config).parameters())
    cache = 4 * config.depth * batch * (config.seq_len + 1) * config.dim
    conditions = min(batch, config.num_classes) + 1
    modulations = conditions * MODULATION_CHUNK * (6 * config.depth + 2) * config.dim
    parts = {"weights": weights, "cache": cache, "modulations": modulations}
    return {name: count * dtype.itemsize / 1e9 for name, count in parts.items()}


def weights_per_row(config: RARConfig) -> int:
    """Weights that each element is multiplied by; adaLN's are left out, they are applied once per class and place."""
    per_block = 4 * config.dim**2 + 2 * config.dim * config.mlp_dim
    return config.depth * per_block + config.dim * config.codebook_size


def new_model(config: RARConfig, device: torch.device, dtype: torch.dtype) -> RAR:
    torch.manual_seed(0)
    model = RAR(config)
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    return model.to(device, dtype).eval()


def check_cache(model: RAR, device: torch.device) -> float:
    """Largest difference of cached and naive logits over a short prefix."""
    labels = torch.zeros(2, dtype=torch.long, device=device)
    order = torch.arange(model.config.seq_len, device=device)
    ids = torch.randint(model.config.codebook_size, (2, model.config.seq_len), device=device)
    first, worst = model.config.seq_len - 40, 0.0
    streams = [model.stream_logits(ids, labels, order, first, use_cache) for use_cache in (True, False)]
    with torch.no_grad():
        for _, (cached, naive) in zip(range(40), zip(*streams)):
            worst = max(worst, (cached - naive).abs().max().item())
    return worst


def sampling(
    name: str,
    config: RARConfig,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    runs: int,
    naive: bool = False,
    tokenizer: VQTokenizer | None = None,
) -> dict:
    """Time drawing a batch with guidance on."""
    model = new_model(config, device, dtype)
    labels = torch.arange(batch, device=device) % config.num_classes

    def work() -> None:
        tokens = model.generate(labels, guidance_scale=4.0, guidance_power=1.0, use_cache=not naive)
        if tokenizer is not None:
            tokenizer.decode(tokens)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_in_use(device)
    elapsed = seconds(work, device, runs)
    added = memory_in_use(device) - before
    row = {"case": name, "seconds": elapsed, "rate": batch / elapsed, "unit": "images/s", "memory": added}
    row |= {"flop": 2 * weights_per_row(config) * 2 * batch * config.seq_len, "dtype": str(dtype)[6:]}
    return row | ({} if naive else {"bytes": bytes_read(config, 2 * batch, dtype)})


def training(name: str, config: RARConfig, batch: int, device: torch.device, dtype: torch.dtype, runs: int) -> dict:
    """Time one step: orders drawn, forward, backward, clipping, AdamW."""
    model = RAR(config).to(device).train()
    optimizer = adamw(model, 0.03)
    tokens = torch.randint(config.codebook_size, (batch, config.seq_len), device=device)
    labels = torch.randint(config.num_classes, (batch,), device=device)

    def work() -> None:
        orders = sample_orders(batch, config.seq_len, 1.0, device=device)
        with autocast(device, dtype):
            loss = token_loss(model, tokens, labels, orders)
        update(model, optimizer, loss, 1e-4)

    elapsed = seconds(work, device, runs)
    row = {"case": name, "seconds": elapsed, "rate": batch * config.seq_len / elapsed, "unit": "tokens/s"}
    return row | {"flop": 6 * weights_per_row(config) * batch * (config.seq_len + 1), "dtype": str(dtype)[6:]}


def released_config(name: str) -> RARConfig:
    """A model of Tab. 1."""
    return RARConfig(1024, 1000, 256, heads=16, **{k: TABLE_1[name][k] for k in ("dim", "depth", "mlp_dim")})


def cases(args: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[dict]:
    """Time one case after the other."""
    dropped = RARConfig(**vars(SMALL) | {"dropout": 0.1, "attn_dropout": 0.1})
    for dtype in dtypes:
        yield sampling("sample, dim 256, batch 64", SMALL, 64, device, dtype, 5)
        yield training("train step, dim 256, batch 64", SMALL, 64, device, dtype, 5)
        yield training("the same with dropout 0.1", dropped, 64, device, dtype, 5)
    yield sampling("sample, naive", SMALL, 64, device, dtypes[0], 0 if device.type == "cpu" else 2, naive=True)
    if not args.full:
        return
    for name in ("rar_b",) if device.type == "cpu" else ("rar_b", "rar_xl"):
        config = released_config(name)
        batch = 4 if device.type == "cpu" else 128
        released = VQConfig(256, 1024, 256, 128, (1, 1, 2, 2, 4), 2, 32, True)
        for dtype in dtypes:
            tokenizer = VQTokenizer(released).to(device, dtype).eval() if device.type == "cuda" else None
            yield sampling(f"sample {name}, batch {batch}", config, batch, device, dtype, 2, tokenizer=tokenizer)
    if device.type == "cuda":
        preset = PRESETS["cifar10"]
        sizes = {k: preset[k] for k in ("dim", "depth", "heads")} | {"mlp_dim": 4 * preset["dim"]}
        config = RARConfig(preset["codebook_size"], 10, 64, **sizes)
        yield training("train step, cifar10 preset", config, preset["batch_size"], device, torch.bfloat16, 20)


def report(rows: list[dict], units: dict[torch.dtype, list[float]], reading: float, hardware: str) -> None:
    """Print the table, and add to each row what it is in matmuls and in shares of the peak."""
    unit = statistics.median(units[torch.float32])
    peak = {str(dtype)[6:]: 2 * 2048**3 / statistics.median(times) for dtype, times in units.items()}
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peak.items())
    low, high = (1000 * bound(units[torch.float32]) for bound in (min, max))
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"one fp32 matmul of 2048: {unit * 1000:.2f} ms ({low:.2f} to {high:.2f})", end="; ")
    print(f"matmul peak: {rates}; reading {reading / 1e9:.0f} GB/s")
    for dtype in units:
        parts = sampling_memory(released_config("rar_xl"), 128, dtype)
        listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
        print(f"RAR-XL at batch 128 with guidance, {str(dtype)[6:]}, holds {sum(parts.values()):.1f} GB ({listed})")
    print("\n| case | dtype | time, s | rate | matmuls | share of peak | of reading | added memory | naive / this |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        row["matmuls"] = row["seconds"] / unit
        row["share"] = row["flop"] / row["seconds"] / peak[row["dtype"]]
        memory = f"{row['memory'] / 1e6:.0f} MB" if row.get("memory") else ""  # none if an earlier peak hides it
        read = f"{row['bytes'] / reading / row['seconds']:.0%}" if "bytes" in row else ""
        naive = f"{row['naive']:.1f}" if "naive" in row else ""
        print(
            f"| {row['case']} | {row['dtype']} | {row['seconds']:.3f} | {row['rate']:.3g} {row['unit']} |"
            f" {row['matmuls']:.1f} | {row['share']:.0%} | {read} | {memory} | {naive} |"
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--full", action="store_true", help="RAR-B too; on a GPU RAR-XL and the cifar10 preset")
    p.add_argument("--device", default=None)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: both")
    p.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    args = p.parse_args()
    device = pick_device(args.device)
    dtypes = [getattr(torch, args.dtype)] if args.dtype else [torch.float32, torch.bfloat16]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    difference = check_cache(new_model(SMALL, device, torch.float32), device)
    if not difference < 1e-4:
        raise SystemExit(f"cached and naive logits differ by {difference}: nothing timed")
    units, rows = {dtype: [matmul(device, dtype)] for dtype in (torch.float32, torch.bfloat16)}, []
    for row in cases(args, device, dtypes):
        rows.append(row)
        for dtype in units:
            units[dtype].append(matmul(device, dtype))
    naive = next(row for row in rows if row["case"] == "sample, naive")
    rows[0]["naive"] = naive["seconds"] / rows[0]["seconds"]
    reading = read_rate(device)  # last, since its tensor would hide what sampling adds to the peak of memory
    print(f"cached = naive to {difference:.0e}")
    report(rows, units, reading, hardware)
    if args.json:
        measured = {"matmul_seconds": units[torch.float32], "bytes_per_second": reading}
        args.json.write_text(json.dumps({"hardware": hardware, **measured, "rows": rows}, indent=1))


if __name__ == "__main__":
    run_main(main)
