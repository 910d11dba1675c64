"""Sixty wrong edits, as a student might make them: `python benchmarks/mutants.py [NUMBER ...]`.

Each is made in a copy of the program, and the tests of its concept run there. The table says which test fails first and
what it says. Every edit must turn its tests red.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exercises import ROOT, run_tests

# fmt: off
MUTANTS = [  # file, text, what replaces its first occurrence, `pytest -k` of the tests that must fail
    ("rar", "step >= anneal_end", "step > anneal_end", "random_ratio"),
    ("rar", "return 1.0 - (step - anneal_start)", "return (step - anneal_start)", "random_ratio"),
    ("rar", "torch.rand(batch_size, 1, generator", "torch.rand(1, 1, generator", "sample_orders"),
    ("rar", "torch.rand(batch_size, seq_len, generator", "torch.rand(1, seq_len, generator", "sample_orders"),
    ("rar", ") < ratio", ") > ratio", "sample_orders"),
    ("rar", ".argsort(1)  # all", ".mul(seq_len).long()  # all", "sample_orders"),
    ("rar", "torch.arange(seq_len) if base_order is None else base_order", "torch.arange(seq_len)", "sample_orders"),
    ("rar", "upcoming = orders + LEADING", "upcoming = orders.roll(1, 1) + LEADING", "target_aware"),
    ("rar", "F.pad(upcoming[:, :-1]", "F.pad(torch.arange(orders.shape[1] - 1)[None] + LEADING", "target_aware"),
    ("rar", "positions[:, 1:] +=", "positions[:, :-1] +=", "target_aware"),
    ("rar", 'inwards if name == "spiral-in"', 'inwards if name == "spiral-out"', "scan_order"),
    ("rar", "permute(1, 3, 0, 2)", "permute(3, 1, 0, 2)", "scan_order"),
    ("rar", "grid[1::2] = grid[1::2].flip(1)", "grid[::2] = grid[::2].flip(1)", "scan_order"),
    ("rar", "is_causal=N == S", "is_causal=False", "causal"),
    ("rar", "self.k_norm(k)", "k", "qk_norm"),
    ("rar", "self.q_norm(q)", "q", "qk_norm"),
    ("rar", "self.lm_head(x[:, 1:] if", "self.lm_head(x[:, :-1] if", "loss_alignment"),
    ("rar", "[class_ids[:, None], tokens]", "[tokens, class_ids[:, None]]", "golden"),
    ("rar", "self.config.attn_dropout if self.training else 0.0", "self.config.attn_dropout", "dropout"),
    ("rar", "device=labels.device) < rate", "device=labels.device) > rate", "dropout"),
    ("rar", "nn.GELU()", 'nn.GELU(approximate="tanh")', "golden"),
    ("rar", "return x + x * scale + shift", "return x * scale + shift", "golden"),
    ("rar", "shift1, scale1, gate1, shift2", "scale1, shift1, gate1, shift2", "golden"),
    ("rar", "scale, shift = modulation", "shift, scale = modulation", "golden"),
    ("rar", "return 1.0 + (scale - 1.0) *", "return scale *", "guidance"),
    ("rar", "(step / seq_len) ** power", "((step + 1) / seq_len) ** power", "guidance"),
    ("rar", "* (conditional - unconditional)", "* (unconditional - conditional)", "guidance"),
    ("rar", "logits / temperature", "logits * temperature", "guidance"),
    ("rar", "logits < least", "logits <= least", "guidance"),
    ("rar", "torch.full_like(labels, self.config.num_classes)", "torch.zeros_like(labels)", "null_class or guidance"),
    ("rar", "return stored", "return stored[0], stored[1].roll(1, 2)", "cache"),
    ("rar", "cache.length = stop", "cache.length = stop - 1", "cache"),
    ("rar", "cache.modulations = [m[:, N:] for m in ahead]", "cache.modulations = ahead", "cache"),
    ("rar", "positions[:, start:stop]", "positions[:, : stop - start]", "cache"),
    ("rar", ".tril(S - N)", ".tril()", "cache or prefix"),
    ("rar", "self.pos_embed[0, own[0, 1:]] +=", "self.pos_embed[0, own[0, :-1]] +=", "merge"),
    ("rar", "return tokens[:, order.argsort()]", "return tokens", "prefix"),
    ("rar", "return tokens[:, order.argsort()]", "return tokens[:, order]", "prefix"),
    ("rar", "else prefix.to(labels.device)", "else prefix.to(labels.device).roll(1, 1)", "prefix"),
    ("rar", "known.int().argsort(descending=True", "known.int().argsort(descending=False", "prefix"),
    ("tokenizer", "cdist(latents.float(), self.embedding.weight.float()", "mm(-latents, self.embedding.weight.T", "vq"),
    ("tokenizer", "return latents + (codes - latents).detach(), tokens", "return codes, tokens", "vq"),
    ("tokenizer", "F.mse_loss(latents, codes.detach())", "F.mse_loss(latents.detach(), codes)", "vq"),
    ("tokenizer", "movedim(-1, 1)", "movedim(-1, 1).mT", "vq"),
    ("tokenizer", "codes.copy_(self.sums / self.counts[:, None])", "codes.copy_(self.sums)", "codebook"),
    ("tokenizer", "dead = self.counts < 0.02", "dead = self.counts < 0", "codebook"),
    ("tokenizer", "self.counts.lerp_(counts / average, 1 - self.decay)", "pass", "codebook"),
    ("tokenizer", "average = counts.mean()", "average = 1.0", "codebook"),
    ("train_tiny", "return peak * (step + 1) / (warm_steps + 1)", "return peak", "schedule"),
    ("train_tiny", "np.random.default_rng([seed, epoch])", "np.random.default_rng([seed])", "schedule"),
    ("train_tiny", '[0, split == "val"]', "[0]", "data"),
    ("train_tiny", "images[:, :, ::-1]", "images[:, ::-1]", "run"),
    ("train_tiny", 'token_batch(data, "val_"', 'token_batch(data, ""', "run"),
    ("train_tiny", "shuffled = tokens.gather(1, orders)  #", "shuffled = tokens  #", "run"),
    ("train_tiny", "(0, 1), shuffled.flatten())\n        lr", "(0, 1), tokens.flatten())\n        lr", "run"),
    ("train_tiny", "args.anneal_end * steps", "steps", "run"),
    ("train_tiny", "model.eval()\n            val", "val", "run"),
    ("train_tiny", "rar.drop_labels(labels, C, rate=0.1)", "labels", "run"),
    ("sample", "hole[y0:y1, x0:x1]", "hole[x0:x1, y0:y1]", "sample"),
    ("sample", "images = np.where(hole, images, image)", "pass", "sample"),
]
# fmt: on


def apply(number: int) -> tuple[str, str]:
    """The file that a mutant changes and its content with the edit. Exits if the edit no longer fits the program."""
    name, text, replacement, _ = MUTANTS[number]
    file = f"{name}.py"
    source = (ROOT / file).read_text(encoding="utf-8")
    if text not in source:
        sys.exit(f"mutant {number} no longer applies: {file} does not contain {text!r}")
    content = source.replace(text, replacement, 1)
    compile(content, file, "exec")
    return file, content


def main():
    edits = [apply(number) for number in range(len(MUTANTS))]  # all of them, before any test runs
    numbers = [int(word) for word in sys.argv[1:]] or range(len(edits))
    caught = 0
    print("| # | file | edit | caught by | message |\n|---|---|---|---|---|")
    for number in numbers:
        name, text, replacement, tests = MUTANTS[number]
        output = run_tests(*edits[number], "-x", "-k", tests)
        found = re.search(r"^(?:FAILED|ERROR) \S*::(\S+)(?: - (.*))?", output, re.MULTILINE)
        test, message = found.groups("") if found else ("NONE", "")
        edit = f"`{text}` -> `{replacement}`".replace("\n", " ")
        print(f"| {number} | {name} | {edit} | {test} | {message} |", flush=True)
        caught += found is not None
    print(f"\n{caught} of {len(numbers)} caught")
    sys.exit(caught < len(numbers))


if __name__ == "__main__":
    main()
