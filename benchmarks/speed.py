"""How fast sampling and training are on this machine: `python benchmarks/speed.py`.

Prints a markdown table of seconds, medians of several runs. `--against DIR` compares with the rar.py in another folder,
such as an older version: both run the same cases in turns, and the table has the ratio of this program's median time to
the other's.

`--presets` says what a preset of train_tiny.py costs: parameters and floating-point operations of both stages, the
hours of a machine that does 10^13 of these in a second, which is what a laptop GPU may reach, and the memory of a
training step with bfloat16 products: what autograd keeps for the backward pass, and 16 bytes for each parameter
(weight, gradient, and two averages of AdamW). CUDA itself and short-lived tensors come on top.
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
from torch.utils.flop_counter import FlopCounterMode

import rar
import train_tiny
from tokenizer import VQConfig, VQTokenizer
from train_tiny import make_optimizer, pick_device, update

SMALL = {"codebook_size": 512, "num_classes": 10, "seq_len": 64, "dim": 256, "depth": 6, "heads": 8, "mlp_dim": 1024}
BATCH = 64  # images


def load_program(folder):
    """The rar.py of another folder, as a module of another name."""
    spec = importlib.util.spec_from_file_location("other_rar", Path(folder) / "rar.py")
    sys.modules["other_rar"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(program, device, dropout=0.0):
    """A model of random weights: a fresh one does nothing in its blocks."""
    model = program.RAR(program.RARConfig(**SMALL, dropout=dropout)).to(device)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model


def sampling(program, device):
    """A function that samples a batch with guidance, which runs every image with and without its class."""
    model = build_model(program, device).eval()
    labels = torch.arange(BATCH, device=device) % SMALL["num_classes"]
    return lambda: model.generate(labels, guidance_scale=4.0)


def training(program, device, dropout=0.0):
    """A function that does a training step in float32: orders, forward, backward, clipping, AdamW."""
    model = build_model(program, device, dropout)
    optimizer = make_optimizer(model, weight_decay=0.03)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    tokens = torch.randint(SMALL["codebook_size"], (BATCH, SMALL["seq_len"]), device=device)
    labels = torch.arange(BATCH, device=device) % SMALL["num_classes"]

    def step():
        orders = program.sample_orders(*tokens.shape, 1.0, device=device)
        shuffled = tokens.gather(1, orders)
        update(model, optimizer, scaler, rar_loss(model, shuffled, labels, orders), lr=1e-4)

    return step


def rar_loss(model, tokens, labels, orders):
    logits = model(tokens[:, :-1], labels, orders)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def tokenizer_loss(model, images):
    return model(images)[1]["reconstruction"]


def measure_step(loss_of, model, *inputs):
    """Operations of a training step, and bytes of what it keeps."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # views share one storage
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *inputs)
        loss.backward()
    for p in model.parameters():
        kept[p.data_ptr()] = 0  # a weight that is kept for the backward pass is no copy
    return counter.get_total_flops(), sum(kept.values()) + 16 * count_parameters(model)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def print_presets():
    """A row for each preset, as if imagenet64 had 1,000 classes and the others 10."""
    print("| preset | M parameters | images seen | FLOP | hours at 10 TFLOP/s | GB |\n|---|---|---|---|---|---|")
    for name, preset in train_tiny.PRESETS.items():
        o, C = argparse.Namespace(**preset), 1000 if name == "imagenet64" else 10
        config = VQConfig(o.image_size, o.codebook_size, o.code_dim, o.channels, res_blocks=o.res_blocks)
        tokenizer, T = VQTokenizer(config), config.grid_size**2
        model = rar.RAR(rar.RARConfig(o.codebook_size, C, T, o.dim, o.depth, o.heads, 4 * o.dim, o.dropout))
        images = torch.rand(o.tokenizer_batch, 3, o.image_size, o.image_size)
        tokens = torch.randint(o.codebook_size, (o.batch_size, T))
        labels, orders = torch.randint(C, (o.batch_size,)), rar.sample_orders(o.batch_size, T, 1.0)
        flops1, bytes1 = measure_step(tokenizer_loss, tokenizer, images)
        flops2, bytes2 = measure_step(rar_loss, model, tokens, labels, orders)
        flops = flops1 * o.tokenizer_steps + flops2 * o.steps
        parameters = f"{count_parameters(tokenizer) / 1e6:.1f} + {count_parameters(model) / 1e6:.1f}"
        seen = f"{o.tokenizer_batch * o.tokenizer_steps:,} + {o.batch_size * o.steps:,}"
        cost = f"{flops:.1e} | {flops / 3.6e16:.2g} | {max(bytes1, bytes2) / 1e9:.1f}"
        print(f"| {name} | {parameters} | {seen} | {cost} |", flush=True)


def seconds(work):
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--presets", action="store_true", help="only say what the presets of train_tiny.py cost")
    p.add_argument("--against", metavar="DIR", help="compare with the rar.py in this folder")
    p.add_argument("--runs", type=int, default=5, help="of each case, after one that does not count (default: 5)")
    args = p.parse_args()
    if args.presets:
        return print_presets()
    device, _ = pick_device(None)
    cases = {"sampling": (sampling,), "training step": (training,), "training step, dropout 0.1": (training, 0.1)}
    programs = [rar, load_program(args.against)] if args.against else [rar]
    columns = "seconds | seconds, other | ratio" if args.against else "seconds"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}; dim 256, depth 6, batch {BATCH}\n")
    print(f"| case | {columns} |\n|{'---|' * (columns.count('|') + 2)}")
    for case, (build, *settings) in cases.items():
        works = [build(program, device, *settings) for program in programs]
        rounds = [[seconds(work) for work in works] for _ in range(args.runs + 1)]  # in turns
        figures = [statistics.median(times) for times in zip(*rounds[1:])]
        if args.against:
            figures.append(figures[0] / figures[1])
        print(f"| {case} | {' | '.join(f'{figure:.3f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
