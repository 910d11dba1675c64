"""Wrong edits of the program, each of which the tests must catch: `python benchmarks/mutants.py [NUMBER ...]`.

Each is applied to a copy, the tests of its concept run there, and the table says which test failed first.
"""

# ruff: noqa: E501
from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# fmt: off
# file, text, what replaces its first occurrence, concept whose tests must fail
MUTANTS = [
    ('rar', 'step >= anneal_end', 'step > anneal_end', 'random_ratio'),
    ('rar', 'return 1.0 - (step - anneal_start)', 'return (step - anneal_start)', 'random_ratio'),
    ('rar', 'if step <= anneal_start:\n        return 1.0', 'if False:\n        return 1.0', 'random_ratio'),
    ('rar', 'torch.rand(batch_size, 1, generator', 'torch.rand(1, 1, generator', 'sample_orders'),
    ('rar', ') < ratio  # per', ') > ratio  # per', 'sample_orders'),
    ('rar', 'shuffled = torch.rand(batch_size, seq_len, generator=generator, device=source).argsort(1)', 'shuffled = torch.randint(seq_len, (batch_size, seq_len), generator=generator, device=source).argsort(1)', 'sample_orders'),
    ('rar', 'inwards if name == "spiral-in"', 'inwards if name == "spiral-out"', 'scan_order'),
    ('rar', 'permute(1, 3, 0, 2)', 'permute(3, 1, 0, 2)', 'scan_order'),
    ('rar', '((column >> b & 1) +', '((row >> b & 1) +', 'scan_order'),
    ('rar', 'following = orders + 2', 'following = orders.roll(1, 1) + 2', 'target_aware'),
    ('rar', 'following = orders + 2', 'following = orders + 3', 'target_aware'),
    ('rar', 'own = F.pad(orders[:, :-1] + 2, (2, 0))', 'own = F.pad(torch.arange(orders.shape[1] - 1).expand_as(orders[:, :-1]) + 2, (2, 0))', 'target_aware'),
    ('rar', 'F.pad(target_aware, (0, 0, 1, 0))', 'F.pad(target_aware, (0, 0, 0, 1))', 'target_aware'),
    ('rar', 'is_causal=N > 1', 'is_causal=False', 'causal'),
    ('rar', '(self.q_norm(q), self.k_norm(k), v)', '(self.q_norm(q), k, v)', 'qk_norm'),
    ('rar', '(self.q_norm(q), self.k_norm(k), v)', '(q, self.k_norm(k), v)', 'qk_norm'),
    ('train_tiny', 'targets = tokens.gather(1, orders)', 'targets = tokens', 'loss_alignment'),
    ('rar', 'self.lm_head(x[:, 1:])', 'self.lm_head(x[:, :-1])', 'loss_alignment'),
    ('rar', '(step / seq_len) ** power', '((step + 1) / seq_len) ** power', 'guidance'),
    ('rar', '* (conditional - null)', '* (null - conditional)', 'guidance'),
    ('rar', 'guidance_at(t, T,', 'guidance_at(t - K, T,', 'guidance'),
    ('rar', 'branches = 1 if guidance_scale == 1.0 else 2', 'branches = 2', 'guidance'),
    ('rar', 'logits / temperature', 'logits * temperature', 'guidance'),
    ('rar', 'logits < logits.topk(top_k)', 'logits <= logits.topk(top_k)', 'guidance'),
    ('rar', 'cache[0, :, :, start : start + N], cache[1, :, :, start : start + N] = k, v', 'cache[0, :, :, start - 1 : start - 1 + N], cache[1, :, :, start - 1 : start - 1 + N] = k, v', 'cache'),
    ('rar', 'piece[:, start - held : stop - held]', 'piece[:, max(0, start - held - 1) : stop - held - (start > held)]', 'cache'),
    ('rar', 'positions[:, start:stop]', 'positions[:, start - 1 : stop - 1]', 'cache'),
    ('rar', 'self.pos_embed[0, own[0, 1:]] +=', 'self.pos_embed[0, own[0, :-1]] +=', 'merge'),
    ('rar', 'scatter_(1, order.expand(B, T), ids[:B])', 'copy_(ids[:B])', 'prefix'),
    ('rar', 'ids[:, :K] = prefix.repeat(branches, 1)', 'ids[:B, :K] = prefix', 'guidance'),
    ('rar', 'known.int().argsort(descending=True', 'known.int().argsort(descending=False', 'prefix'),
    ('rar', 'return labels + self.config.codebook_size + 1', 'return labels + self.config.codebook_size', 'null_class'),
    ('rar', 'torch.full_like(labels, self.config.num_classes)', 'torch.full_like(labels, self.config.num_classes - 1)', 'null_class'),
    ('rar', 'generator=generator, device=labels.device) < rate', 'generator=generator, device=labels.device) > rate', 'dropout'),
    ('rar', 'self.attn_dropout if self.training else 0.0', 'self.attn_dropout', 'dropout'),
    ('rar', '("scale", "shift"))', '("shift", "scale"))', 'golden'),
    ('rar', 'shift1, scale1, gate1, shift2', 'scale1, shift1, gate1, shift2', 'golden'),
    ('rar', '[1 + piece if kind', '[piece if kind', 'golden'),
    ('rar', 'return y.transpose(0, 1).reshape', 'return y.reshape', 'cache_linear'),
    ('rar', 'drawn, right=True)', 'drawn)', 'guidance_draw'),
    ('rar', 'if (ids == self.config.codebook_size).any()', 'if False', 'bad_input_weights'),
    ('rar', '* cumulated[:, -1:]', '* 0.9', 'guidance'),
    ('rar', 'F.gelu(self.fc1(x))', "F.gelu(self.fc1(x), approximate='tanh')", 'golden'),
    ('rar', 'V + C + 2, D)', 'V + C + 1, D)', 'golden'),
    ('rar', 'T + SPARE_STEPS', 'T', 'golden'),
    ('rar', 'for i in following)]', 'for i in following[-1:] + following[:-1])]', 'worked_example'),
    ('tokenizer', 'torch.addmm(codes.square().sum(1), latents', 'torch.addmm(0 * codes.square().sum(1), latents', 'vq'),
    ('tokenizer', 'return latents + (codes - latents).detach(), tokens', 'return codes, tokens', 'vq'),
    ('tokenizer', 'F.mse_loss(latents, self.quantize.lookup(tokens, latents.shape[2]).detach())', 'F.mse_loss(latents.detach(), self.quantize.lookup(tokens, latents.shape[2]))', 'vq'),
    ('tokenizer', 'unflatten(1, (grid_size, -1)).permute(0, 3, 1, 2)', 'unflatten(1, (grid_size, -1)).permute(0, 3, 2, 1)', 'vq'),
    ('tokenizer', 'codes.copy_(self.sums / self.counts[:, None])', 'codes.copy_(self.sums)', 'codebook'),
    ('tokenizer', 'dead = self.counts < self.dead_below', 'dead = self.counts < 0', 'codebook'),
    ('tokenizer', 'dead = self.counts < self.dead_below', 'dead = counts < self.dead_below', 'codebook'),
    ('tokenizer', 'codes.copy_(latents[picks[torch.arange(len(codes), device=latents.device) % len(latents)]])', 'pass', 'codebook'),
    ('tokenizer', 'self.sums.lerp_(sums / fair_share, 1 - self.decay)', 'self.sums.lerp_(sums / fair_share, self.decay)', 'codebook'),
    ('train_tiny', 'return peak * (step + 1) / (warm_steps + 1)', 'return peak * (1 - step / (warm_steps + 1))', 'schedule'),
    ('train_tiny', 'clip_grad_norm_(model.parameters(), 1.0)', 'clip_grad_norm_(model.parameters(), 10.0)', 'schedule'),
    ('train_tiny', 'groups[p.dim() not in (2, 4) or "embedding" in name]', 'groups[True]', 'schedule'),
    ('train_tiny', 'np.random.default_rng([seed, epoch])', 'np.random.default_rng([seed])', 'schedule'),
    ('train_tiny', '[seed, *stage.encode(), step]', '[seed, step]', 'schedule'),
    ('train_tiny', 'rng = np.random.default_rng([0, split == "val"])', 'rng = np.random.default_rng([0])', 'data'),
    ('train_tiny', 'np.searchsorted(classes, kept)', 'kept - 1', 'data'),
    ('train_tiny', 'block[keep[f][first : first + len(block)]]', 'block[keep[f][: len(block)]]', 'data'),
    ('train_tiny', 'reshape(-1, 3, side, side).transpose(0, 2, 3, 1)', 'reshape(-1, side, side, 3)', 'data'),
    ('train_tiny', '(i % 10 == 9) == (split == "val")', '(i % 10 == 9) <= (split == "val")', 'data'),
    ('train_tiny', 'if len(found[name]) != 10000 * 3073 or', 'if', 'data'),
    ('train_tiny', '"ab" if have else "wb"', '"wb"', 'download'),
    ('train_tiny', 'have = have if response.status == 206 else 0', 'have = have', 'download'),
    ('train_tiny', '        part.unlink()\n        raise InputError(f"{url} sent', '        raise InputError(f"{url} sent', 'download'),
    ('train_tiny', 'if tokenizer and made !=', 'if False and made !=', 'tokens'),
    ('train_tiny', 'tokens.max() >= V', 'tokens.max() > V', 'tokens'),
    ('train_tiny', 'np.tile(source.labels, len(flips))', 'np.repeat(source.labels, len(flips))', 'run'),
    ('train_tiny', 'chunk[part, :, ::direction]', 'chunk[part, ::direction]', 'run'),
    ('train_tiny', 'drop_labels(labels, len(data["class_names"]), 0.1)', 'drop_labels(labels, len(data["class_names"]), 0.9)', 'run'),
    ('train_tiny', 'to_batch(data, "val_", slice', 'to_batch(data, "", slice', 'run'),
    ('train_tiny', '.index(state["step"])', '.index(state["step"]) - 1', 'run'),
    ('train_tiny', 'for v in state["losses"]]', 'for v in ()]', 'run'),
    ('train_tiny', 'optimizer.load_state_dict({"state": moments', '({"state": moments', 'run'),
    ('train_tiny', 'moments = [codebook.counts, codebook.sums] if codebook else None', 'moments = [codebook.counts * 0 + 1, codebook.sums] if codebook else None', 'run'),
    ('train_tiny', 'adamw(model, 0.03)', 'adamw(model, 0.0)', 'run'),
    ('sample', 'hole[:, :, y0:y1, x0:x1] = True', 'hole[:, :, x0:x1, y0:y1] = True', 'sample'),
    ('sample', 'torch.where(hole, tokenizer.decode(tokens), image)', 'tokenizer.decode(tokens)', 'sample'),
    ('sample', 'if any_order or order not in', 'if any_order and order not in', 'sample'),
    ('sample', 'torch.arange(T, device=order.device))', 'order)', 'sample'),
    ('train_tiny', 'temporary.unlink(missing_ok=True)', 'pass', 'bad_input'),
    ('rar', 'map_location=\"cpu\", weights_only=True', 'map_location=\"cpu\", weights_only=False', 'bad_input'),
    ('sample', 'i for i in range(len(names))}', 'i for i in range(len(names) + 1)}', 'bad_input'),
    ('train_tiny', 'sys.exit(2)', 'sys.exit(1)', 'bad_input'),
    ('rar', 'stop = t + 2  #', 'stop = t + 1  #', 'cache'),
    ('rar', 'shift2 + scale2 * self', 'scale2 + shift2 * self', 'golden'),
    ('tokenizer', 'self.counts.lerp_(counts / fair_share, 1 - self.decay)', 'pass', 'codebook'),
    ('train_tiny', 'labels = drop_labels(labels, len(data["class_names"]), 0.1)', '0', 'run'),
    ('train_tiny', 'orders = sample_orders(*tokens.shape, ratio, base_order=base)\n    labels', 'orders = sample_orders(*tokens.shape, ratio)\n    labels', 'run'),
    ('train_tiny', 'if r == 1 and (step + 1 == steps', 'if step + 1 == steps and (step + 1 == steps', 'run'),
    ('sample', '[:count]  # balanced', '.sort().values[:count]', 'sample'),
    ('train_tiny', 'rows[-1][4] == min(', 'rows[-1][4] == max(', 'run'),
    ('benchmarks/ablation', 'tried = {scale: sample(scale, 0)', 'tried = {scale: sample(scale, 1)', 'ablation'),
    ('benchmarks/ablation', '- 2 * cross)', '- cross)', 'ablation'),
    ('benchmarks/ablation', 'bench.data[key][:N] for', 'bench.data[key] for', 'ablation'),
    ('benchmarks/ablation', 'if not (out / name / "scores.json").exists()]', ']', 'ablation'),
    ('benchmarks/ablation', 'gap[i - 1] / (gap[i - 1] - gap[i])', 'gap[i] / (gap[i - 1] - gap[i])', 'ablation'),
    ('train_tiny', '        stale.unlink(missing_ok=True)', '        pass', 'run_stopped'),
    ('train_tiny', 'except (OSError, RuntimeError) as error:', 'except RuntimeError as error:', 'bad_input_never'),
    ('train_tiny', 'check_weights(model, step + 1, run)\n            if', 'if', 'run_never_saves'),
    ('train_tiny', 'seed_step(options["seed"], "tokenizer", step)', 'pass', 'run_resumed'),
    ('tokenizer', 'whole[share or slice(rank * n, (rank + 1) * n)] = part', 'whole[:n] = part', 'processes'),
    ('tokenizer', 'gather_rows(as_rows(latents.detach())), gather_rows(tokens.flatten())', 'as_rows(latents.detach()), tokens.flatten()', 'processes'),
    ('train_tiny', 'labels[mine], orders[mine]', 'labels[mine], orders[: len(tokens[mine])]', 'processes'),
    ('train_tiny', 'return nn.parallel.DistributedDataParallel(model) if', 'return model if', 'processes'),
]
# fmt: on


def first_failure(number: int) -> str:
    """Name of the first test that fails on this mutant; empty if none does."""
    file, text, replacement, concept = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for source in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(source, copy)
        (copy / "benchmarks").mkdir()
        shutil.copy(ROOT / "benchmarks" / "ablation.py", copy / "benchmarks")
        program = copy / f"{file}.py"
        content = program.read_text()
        if text not in content:
            raise SystemExit(f"mutant {number} no longer applies to {file}.py: {text}")
        program.write_text(content.replace(text, replacement, 1))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-qx",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "test_rar.py",
            "-k",
            concept,
        ]
        output = subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split("::")[-1].split(" - ")[0] if failed else ""


def main() -> None:
    numbers = [int(n) for n in sys.argv[1:]] or range(len(MUTANTS))
    caught = 0
    print("| # | file | edit | caught by |\n|---|---|---|---|")
    for number in numbers:
        file, text, replacement, _ = MUTANTS[number]
        test = first_failure(number)
        caught += bool(test)
        edit = f"{text.strip()[:50]} -> {replacement.strip()[:50]}".replace("\n", " ").replace("|", "/")
        print(f"| {number} | {file} | `{edit}` | {test or 'NONE'} |", flush=True)
    print(f"\n{caught} of {len(numbers)} caught")


if __name__ == "__main__":
    main()
