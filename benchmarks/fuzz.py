"""Mutated files through the program's own scripts, counted: `python benchmarks/fuzz.py [--count 2000] [--seed 0]`.

Each case lies in a folder of its own and is used as a user would: sampled with, trained on, resumed from, for a few
steps, in a process forked for it (so not on Windows). Half are attacks made by hand, half random damage, all written
by fuzz_inputs.py. An audit hook sees what is opened for writing, started or looked up to be unpickled. All 2000 take
about ten minutes on one core.

ok: the file was used to the end. refused: exit code 2 and one `error:` line. The others are failures: traceback (any
other exception, a dead process, an error line of over 1000 characters), hang (20 s), memory (2 GB more than after
imports), outside (a write elsewhere than to the output), executed (a process started, a class looked up). Some cases
run once more as scripts. `--only N` shows case N; `--keep DIR` keeps the files of failures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from fuzz_inputs import BATCHES, KINDS, TINY, Rng
from PIL import Image

import sample
import train_tiny
from rar import RAR, RARConfig
from tokenizer import VQConfig, VQTokenizer

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("ok", "refused", "traceback", "hang", "memory", "outside", "executed")


def call(module: object, argv: list) -> None:
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    train_tiny.run_main(module.main)


def build(base: Path) -> None:
    """Small valid files of every kind; a run of both stages, as it was when stopped in each and at its end."""
    rng, save_state = np.random.default_rng(0), train_tiny.save_state

    def keep(run: Path, stage: str, *args: object, **extra: object) -> None:
        save_state(run, stage, *args, **extra)
        shutil.copytree(run, base / f"stopped-{stage}", dirs_exist_ok=True)

    for name, i in ((name, i) for name in ("ant", "bee", "cat") for i in range(12)):
        (base / "data" / "train" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).resize((16, 16))
        picture.save(base / "data" / "train" / name / f"{i:02}.png")
    train_tiny.save_state = keep
    flags = ["--config", "folder", "--image-size", 16, "--data-dir", base / "data", *TINY, "--save-every", 2]
    call(train_tiny, [*flags, "--steps", 4, "--out", base / "run"])
    train_tiny.save_state = save_state
    torch.save(RAR(RARConfig(16, 3, 256, dim=32, depth=1, heads=2, mlp_dim=48)).state_dict(), base / "rar.bin")
    sizes = VQConfig(256, 16, 8, 32, (1, 1, 1, 1, 1), 1, 32, released_shortcut=True)
    torch.save(VQTokenizer(sizes).state_dict(), base / "vq.bin")
    for folder in ("imagenet64", "cifar10"):
        (base / folder).mkdir()
    for name in ("train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz"):
        np.savez(base / "imagenet64" / name, data=rng.integers(0, 255, (6, 192), np.uint8), labels=np.arange(6) % 3 + 1)
    for name in BATCHES:
        (base / "cifar10" / Path(name).name).write_bytes(rng.integers(0, 10, (3, 3073), np.uint8).tobytes())


class Enough(BaseException):
    """Ends a script that has used its input."""


def few(steps: object, interruptible: object = train_tiny.interruptible) -> object:
    """Training stops after a few steps, whatever a damaged run.json asks for, and at once with all of CIFAR-10."""
    for number, step in enumerate(interruptible(steps)):
        if number == 4 or Path("in/cifar-10-batches-bin").exists():
            raise Enough
        yield step


SEEN: list[tuple[str, str]] = []
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def is_inside(path: object) -> bool:
    """Whether scripts may write there: the output, and where the CIFAR-10 archive is unpacked."""
    real = os.path.realpath(os.fsdecode(path))
    return real == os.devnull or real.startswith(
        tuple(f"{os.getcwd()}/{d}" for d in ("out", "in/cifar-10-batches-bin"))
    )


def audit(event: str, args: tuple) -> None:
    """Note, and stop, what no data file may cause."""
    if event in STARTS:
        SEEN.append(("executed", f"{event} {args}"[:200]))
        raise PermissionError(event)
    writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    for path in args[:2] if event in WRITES else args[:1] if writing else ():
        if isinstance(path, (str, bytes, Path)) and not is_inside(path):
            SEEN.append(("outside", f"{event} {path!r}"))
            raise PermissionError(event)


def judge(module: object, argv: list, box: Path) -> tuple[str, str]:
    """Run a case, in a process that ends after it: its outcome and what it said."""
    statm = [int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split()[:2]]
    resource.setrlimit(resource.RLIMIT_AS, (statm[0] + (8 << 30),) * 2)  # memory that is asked for and never touched
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # is not counted; libraries in C write to stderr
    there, errors, train_tiny.interruptible = set(box.parent.rglob("*")), io.StringIO(), few
    maker = torch.load(box.parent / "base" / "run" / "rar.pt", weights_only=True)["tokenizer"]
    if module is sample:
        weights_hash = train_tiny.weights_hash
        train_tiny.weights_hash = lambda model: weights_hash(model) and maker  # as if a forger had entered it
    sys.addaudithook(audit)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            call(module, argv)
        outcome, note = "ok", ""
    except Enough:
        outcome, note = "ok", "stopped early"
    except SystemExit as end:
        lines = [line for line in re.split(r"[\r\n]+", errors.getvalue()) if line.startswith("error:")]
        plain = end.code == 2 and len(lines) == 1 and len(lines[0]) <= 1000
        outcome, note = "refused" if plain else "traceback", " ".join(lines)[:300]
    except BaseException as error:
        outcome = "memory" if isinstance(error, MemoryError) else "traceback"
        note = "".join(traceback.format_exception(error))[-600:]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - statm[1]
    if grown > 2 << 30:
        outcome, note = "memory", f"{grown / 2**30:.1f} GB {note}"
    new = [p for p in box.parent.rglob("*") if p not in there and not is_inside(p)]
    SEEN.extend(("executed" if p.name == "executed" else "outside", str(p)) for p in new)
    return (min(SEEN)[0], f"{SEEN[:3]} {note}") if SEEN else (outcome, note)


def make(number: int, seed: int, scratch: Path) -> tuple[object, list]:
    """Write the files of a case into a fresh folder, the current one; returns the script and its arguments."""
    for part in ("in", "out"):
        (scratch / "case" / part).mkdir(parents=True)
    os.chdir(scratch / "case")
    return list(KINDS.values())[number % len(KINDS)](Rng(f"{seed}/{number}"), scratch / "base")


def forked(module: object, argv: list, box: Path) -> tuple[str, str]:
    """Judge a case in a process of its own, for 20 seconds at most."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(judge(module, argv, box)))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(20) else ("hang", "over 20 s")
    except EOFError:
        process.join()
        return "traceback", f"the process died ({process.exitcode})"
    finally:
        process.kill()
        process.join()


def script(module: object, argv: list, box: Path) -> tuple[str, str]:
    """A case as the script itself: its exit code, and what it writes to stderr."""
    command = [sys.executable, "-B", ROOT / f"{module.__name__}.py", *map(str, argv)]
    try:
        done = subprocess.run(command, cwd=box, capture_output=True, timeout=60, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return "hang", "over 60 s"
    errors = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("error:")]
    good = done.returncode in (0, 2) and len(errors) == done.returncode // 2 and "Traceback" not in done.stderr
    return ("refused" if errors else "ok") if good else "traceback", done.stderr[-600:]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--count", type=int, default=2000)
    p.add_argument("--first", type=int, default=0, help="number of the first case")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="run this case alone, once more as a script too, and show what it says")
    p.add_argument("--scripts", type=int, default=20, help="how many cases to run once more as scripts")
    p.add_argument("--keep", type=Path, help="folder for the files of failures")
    args = p.parse_args()
    counts, names, again = {name: Counter() for name in [*KINDS, "real scripts"]}, list(KINDS), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        scratch = Path(root).resolve()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            build(scratch / "base")

        def count(name: str, number: int, way: object) -> None:
            outcome, note = way(*make(number, args.seed, scratch), scratch / "case")
            counts[name][outcome] += 1
            if outcome not in OUTCOMES[:2] or args.only is not None:
                print(f"case {number}, {name}: {outcome}: {note}", flush=True)
                if args.keep:
                    shutil.copytree(
                        scratch / "case", args.keep.resolve() / str(number), symlinks=True, dirs_exist_ok=True
                    )
            elif note != "stopped early" and names[number % len(names)] != "run.json" and way is forked:
                again.append(number)
            os.chdir(ROOT)
            shutil.rmtree(scratch / "case")

        numbers = range(args.first, args.first + args.count) if args.only is None else [args.only]
        for number in numbers:
            count(names[number % len(names)], number, forked)
        chosen = again[:: len(again) // (args.scripts + 1) + 1][: args.scripts]
        for number in chosen if args.only is None else numbers:
            count("real scripts", number, script)
    counts["all"] = sum(counts.values(), Counter())
    print(f"| input | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
    for name, row in counts.items():
        print(f"| {name} | {' | '.join(str(row[outcome]) for outcome in OUTCOMES)} |")
    sys.exit(any(row[outcome] for row in counts.values() for outcome in OUTCOMES[2:]))


if __name__ == "__main__":
    main()
