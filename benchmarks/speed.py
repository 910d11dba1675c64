"""How fast sampling and training are on this machine: `python benchmarks/speed.py`, or with --full RAR-B too.

Prints a markdown table of seconds, medians of several runs. "Naive" sampling computes all elements again at every step;
before anything is timed, its logits must equal the cached ones.

`--against DIR` compares with the rar.py in another folder, such as an older version: both run the same cases in turns,
and the table has the ratio of this program's median time to the other's.
`--random-weights NAME FILE` only writes random numbers in the layout of the authors' files, where those cannot be had;
NAME is rar_b, rar_l, rar_xl, rar_xxl or tokenizer.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

import rar
from tokenizer import VQConfig, VQTokenizer
from train_tiny import make_optimizer, pick_device

SMALL = {"codebook_size": 512, "num_classes": 10, "seq_len": 64, "dim": 256, "depth": 6, "heads": 8, "mlp_dim": 1024}
RELEASED = {"codebook_size": 1024, "num_classes": 1000, "seq_len": 256, "heads": 16}


def write_random_weights(name, path):
    """Write normal numbers, those of norms around 1, in the layout of the authors' file of this name."""
    with torch.device("meta"):
        if name == "tokenizer":
            config = VQConfig(256, 1024, 256, 128, (1, 1, 2, 2, 4), 2, 32, released_shortcut=True)
            weights = VQTokenizer(config).state_dict()
        else:
            weights = rar.RAR(rar.RARConfig(**RELEASED, **rar.TABLE_1[name])).state_dict()
    for key, tensor in weights.items():
        is_norm = tensor.dim() == 1 and key.endswith("weight")
        weights[key] = torch.randn(tensor.shape) * 0.02 + is_norm
    torch.save(weights, path)


def load_program(folder):
    """The rar.py of another folder, as a module of another name."""
    spec = importlib.util.spec_from_file_location("other_rar", Path(folder) / "rar.py")
    sys.modules["other_rar"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(program, sizes, device, dropout=0.0):
    """A model of random weights: a fresh one does nothing in its blocks."""
    config = program.RARConfig(**sizes, dropout=dropout)
    if hasattr(config, "attn_dropout"):  # older versions had two rates
        config.attn_dropout = dropout
    model = program.RAR(config).to(device)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model


def sampling(program, sizes, batch, device, dtype=torch.float32):
    """A function that samples a batch with guidance, which runs every image with and without its class."""
    model = build_model(program, sizes, device).to(dtype).eval()
    labels = torch.arange(batch, device=device) % sizes["num_classes"]
    return lambda: model.generate(labels, guidance_scale=4.0)


def naive_sampling(batch, device):
    """A function that does the work of sampling with guidance but no cache, once its logits have been checked."""
    model, T = build_model(rar, SMALL, device).eval(), SMALL["seq_len"]
    tokens = torch.randint(SMALL["codebook_size"], (2 * batch, T - 1), device=device)
    labels = torch.arange(2 * batch, device=device) % SMALL["num_classes"]
    orders = rar.sample_orders(2 * batch, T, 1.0, device=device)

    @torch.no_grad()
    def logits(cache=None):
        return torch.stack([model(tokens[:, :n], labels, orders, cache)[:, -1] for n in range(T)], dim=1)

    difference = (logits() - logits(rar.Cache(model, 2 * batch))).abs().max().item()
    assert difference < 1e-3, f"cached and naive logits differ by {difference}: nothing timed"
    return logits


def training(program, dropout, batch, device):
    """A function that does a training step in float32: orders, forward, backward, clipping, AdamW."""
    model = build_model(program, SMALL, device, dropout)
    optimizer = make_optimizer(model, weight_decay=0.03)
    tokens = torch.randint(SMALL["codebook_size"], (batch, SMALL["seq_len"]), device=device)
    labels = torch.arange(batch, device=device) % SMALL["num_classes"]

    def step():
        orders = program.sample_orders(*tokens.shape, 1.0, device=device)
        shuffled = tokens.gather(1, orders)
        logits = model(shuffled[:, :-1], labels, orders)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), shuffled.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(work):
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--full", action="store_true", help="RAR-B too, at batch 4, in float32 and bfloat16")
    p.add_argument("--against", metavar="DIR", help="compare with the rar.py in this folder")
    p.add_argument("--runs", type=int, default=5, help="of each case, after one that does not count (default: 5)")
    p.add_argument("--batch-size", type=int, default=64, help="images, but for RAR-B (default: 64)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--random-weights", nargs=2, metavar=("NAME", "FILE"), help="only write FILE; rar_b or tokenizer")
    args = p.parse_args()
    if args.random_weights:
        return write_random_weights(*args.random_weights)
    device, _ = pick_device(args.device)
    batch = args.batch_size
    large = RELEASED | rar.TABLE_1["rar_b"]
    cases = {"sampling": (sampling, SMALL, batch, device)}  # the function that builds the work, and its arguments
    cases["training step"] = (training, 0.0, batch, device)
    cases["training step, dropout 0.1"] = (training, 0.1, batch, device)
    if args.full:
        cases["sampling, RAR-B, batch 4"] = (sampling, large, 4, device)
        cases["the same in bfloat16"] = (sampling, large, 4, device, torch.bfloat16)
    programs = [rar, load_program(args.against)] if args.against else [rar]
    columns = "seconds | seconds, other | ratio" if args.against else "seconds"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}; dim 256, depth 6, batch {batch}\n")
    print(f"| case | {columns} |\n|{'---|' * (columns.count('|') + 2)}")
    if not args.against:
        print(f"| naive sampling | {seconds(naive_sampling(batch, device)):.3f} |", flush=True)
    for case, (build, *settings) in cases.items():
        works = [build(program, *settings) for program in programs]
        rounds = [[seconds(work) for work in works] for _ in range(args.runs + 1)]  # in turns
        figures = [statistics.median(times) for times in zip(*rounds[1:])]
        if args.against:
            figures.append(figures[0] / figures[1])
        print(f"| {case} | {' | '.join(f'{figure:.3f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
