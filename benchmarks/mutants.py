"""Wrong edits, as a student might make them: `python benchmarks/mutants.py [NUMBER ...]`.

Each is made in a copy of the program, and the tests of its concept run there. The table says which test fails first and
what it says. Every edit must turn its tests red.
"""

import re
import sys

from exercises import ROOT, run_tests

# fmt: off
MUTANTS = [  # file, text, what replaces its first occurrence, `pytest -k` of the tests that must fail
    ("rar", "step >= anneal_end", "step > anneal_end", "random_ratio"),
    ("rar", "return 1.0 - (step - anneal_start)", "return (step - anneal_start)", "random_ratio"),
    ("rar", "torch.rand(batch_size, 1, generator", "torch.rand(1, 1, generator", "sample_orders"),
    ("rar", "torch.rand(batch_size, seq_len, generator", "torch.rand(1, seq_len, generator", "sample_orders"),
    ("rar", "torch.arange(seq_len) if base_order is None else base_order", "torch.arange(seq_len)", "sample_orders"),
    ("rar", "upcoming = orders + 2", "upcoming = orders.roll(1, 1) + 2", "target_aware"),
    ("rar", "positions[:, 1:] += F", "positions[:, :-1] += F", "target_aware"),
    ("rar", 'inwards if name == "spiral-in"', 'inwards if name == "spiral-out"', "scan_order"),
    ("rar", "permute(1, 3, 0, 2)", "permute(3, 1, 0, 2)", "scan_order"),
    ("rar", "grid[1::2] = grid[1::2].flip(1)", "grid[::2] = grid[::2].flip(1)", "scan_order"),
    ("rar", "is_causal=N > 1", "is_causal=False", "causal"),
    ("rar", "is_causal=N > 1", "is_causal=True", "attention or cache"),
    ("rar", "is_causal=N > 1)", "is_causal=N > 1, scale=1.0)", "attention"),
    ("rar", "self.k_norm(k)", "k", "qk_norm"),
    ("rar", "return x + x * scale + shift", "return x * (1 + scale) + shift", "adaln"),
    ("rar", "torch.arange(C + 1, device=labels.device), labels", "torch.arange(C + 1), labels.flip(0)", "adaln"),
    ("rar", "x = x[:, 1:]  # cls", "x = x[:, :-1]  # cls", "loss_alignment"),
    ("rar", "self.pos_embed[0])  #", "self.pos_embed[0].detach())  #", "loss_alignment"),
    ("rar", "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")', "golden"),
    ("rar", "shift1, scale1, gate1, shift2", "scale1, shift1, gate1, shift2", "golden"),
    ("rar", "scale, shift = modulation", "shift, scale = modulation", "golden"),
    ("rar", "return 1 + (scale - 1) *", "return scale *", "guidance"),
    ("rar", "(step / seq_len) ** power", "((step + 1) / seq_len) ** power", "guidance"),
    ("rar", "* (conditional - unconditional)", "* (unconditional - conditional)", "guidance or cache"),
    ("rar", "logits / temperature", "logits * temperature", "temperature"),
    ("rar", "logits < least", "logits <= least", "guidance"),
    ("rar", "torch.full_like(labels, self.config.num_classes)", "torch.zeros_like(labels)", "guidance or cache"),
    ("rar", "return self.keys[layer, :, :, :stop]", "return self.keys[layer]", "cache"),
    ("rar", "return self.keys[layer, :, :, :stop]", "return self.keys[0, :, :, :stop]", "cache"),
    ("rar", "        return self.keys[layer", "        self.length = stop\n        return self.keys[layer", "cache"),
    ("rar", "positions[:, start : n + 2]", "positions[:, : n + 2 - start]", "cache"),
    ("rar", "self.pos_embed[0, own[0, 1:]] +=", "self.pos_embed[0, own[0, :-1]] +=", "merge"),
    ("rar", "return tokens[:, order.argsort()]", "return tokens[:, order]", "prefix"),
    ("rar", "return order, int(known.sum())", "return order, int(known.sum()) - 1", "prefix"),
    ("rar", "descending=True", "descending=False", "prefix"),
    ("rar", "self.embeddings(labels + V + 1)", "self.embeddings(labels + V)", "null_class"),
    ("rar", "device=labels.device) < rate", "device=labels.device) > rate", "dropout"),
    ("rar", "self.dropout if self.training else 0.0", "self.dropout", "dropout"),
    ("tokenizer", "cdist(latents.float(), self.embedding.weight.float()", "mm(-latents, self.embedding.weight.T", "vq"),
    ("tokenizer", "return latents + (codes - latents).detach(), tokens", "return codes, tokens", "vq"),
    ("tokenizer", "F.mse_loss(latents, codes.detach())", "F.mse_loss(latents.detach(), codes)", "vq"),
    ("tokenizer", "codes.copy_(self.sums / self.counts[:, None])", "codes.copy_(self.sums)", "codebook"),
    ("tokenizer", "dead = self.counts < 0.02", "dead = self.counts < 0", "codebook"),
    ("tokenizer", "lerp_(counts / average, 1 - self.decay)", "lerp_(counts / average, self.decay)", "codebook"),
    ("tokenizer", "average = counts.mean()", "average = 1.0", "codebook"),
    ("tokenizer", "self.counts[dead] = 1.0", "pass", "codebook"),
    ("train_tiny", "return peak * (step + 1) / (warm_steps + 1)", "return peak", "schedule"),
    ("train_tiny", 'seed_of(seed, stage, "epoch", epoch)', "seed_of(seed)", "schedule"),
    ("train_tiny", "betas=(0.9, 0.96)", "betas=(0.9, 0.999)", "schedule or run"),
    ("train_tiny", "    nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", "", "schedule or run"),
    ("train_tiny", "images[:, :, ::-1]", "images[:, ::-1]", "run"),
    ("train_tiny", 'data["val_tokens"]', 'data["tokens"][:256]', "run"),
    ("train_tiny", "shuffled = tokens.gather(1, orders)  #", "shuffled = tokens  #", "run"),
    ("train_tiny", "args.anneal_end * args.steps", "args.steps", "run"),
    ("train_tiny", "            model.eval()\n", "", "run"),
    ("train_tiny", "drop_labels(labels, C, rate=0.1", "drop_labels(labels, C, rate=0.0", "run"),
    ("sample", "hole[y0:y1, x0:x1]", "hole[x0:x1, y0:y1]", "sample"),
    ("sample", "images = np.where(hole, images, image)", "pass", "sample"),
]
# fmt: on


def apply(number):
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
