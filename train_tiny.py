"""Train RAR end to end on one machine: a VQ tokenizer, pre-tokenized images, and the transformer on their tokens.

`python train_tiny.py` draws its own data set of coloured digits and needs nothing else. `--config cifar10`,
`--config imagenet64` and `--config folder` read real images; `--tokens tokens.npz` skips images altogether.
Everything a run makes goes into one folder, which sample.py reads; `--resume` goes on where a stopped run stood: every
random draw of a step is a function of (seed, stage, step), so a resumed run draws what an unbroken one would have.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import timeit
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial, partialmethod
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import rar
from rar import RAR, SCANS, InputError, RARConfig, blaming, drop_labels, random_ratio, sample_orders, scan_order
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, as_rows, codes_used, gather_rows, process

# fmt: off
REAL = dict(image_size=64, codebook_size=1024, channels=64, multipliers=(1, 2, 4), res_blocks=2, code_dim=16,
            flip=True, tokenizer_steps=10000, tokenizer_batch=64, tokenizer_lr=1e-3,
            dim=384, depth=12, heads=6, dropout=0.1, steps=50000, batch_size=64, lr=4e-4,
            guidance_scale=3.0, guidance_power=1.0)
PRESETS = {
    "digits": dict(image_size=32, codebook_size=128, channels=16, multipliers=(1, 2, 4), res_blocks=1, code_dim=8,
                   flip=False, tokenizer_steps=400, tokenizer_batch=32, tokenizer_lr=2e-3,
                   dim=128, depth=4, heads=4, dropout=0.0, steps=750, batch_size=32, lr=6e-3,
                   guidance_scale=2.5, guidance_power=0.0, eval_every=250, save_every=250),
    "cifar10": REAL | dict(image_size=32, tokenizer_steps=20000, tokenizer_batch=128, steps=100000, batch_size=128),
    "imagenet64": REAL | dict(tokenizer_steps=30000, dim=512, depth=16, heads=8, steps=200000, guidance_scale=4.0),
    "folder": REAL,
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Files, errors, devices
# ---------------------------------------------------------------------------------------------------------------------


def run_main(main: Callable[[], None]) -> None:
    """Run a script; what a user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
        if process()[1] > 1:
            dist.destroy_process_group()
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        print(f"error: {' '.join(str(error).split())[:900] or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; a run in training goes on with --resume --out and its folder", file=sys.stderr)
        sys.exit(130)


# Under torchrun every process does the same with the same random draws, on its own share of each batch. Only the first
# one writes, and the others wait for it, so that what is read later is there.


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if it has; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if process()[0] > 0:  # one progress bar and one voice are enough
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
            sys.stdout = io.StringIO()
    return device


@contextmanager
def by_one_process() -> Iterator[bool]:
    """Whether this process is the one to do what follows; the others wait until it is done."""
    rank, world = process()
    wait = dist.barrier if world > 1 else lambda: None
    wait()  # none may still be asking whether a file is there
    yield rank == 0
    wait()


def share(count: int) -> slice:
    """This process's part of `count` rows."""
    rank, world = process()
    return slice(count * rank // world, count * (rank + 1) // world)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename it to `path`: a file is there whole or not at all."""
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    with by_one_process() as mine:
        if not mine:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter where there is no space
            reason = str(error).partition("\n")[0]
            raise OSError(f"{path} cannot be written: is the disk full, the folder read-only? ({reason})") from error
        finally:
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, kind: str, model: nn.Module, **extra: object) -> None:
    """Write config and weights as plain data that torch.load(weights_only=True) accepts."""
    content = {"kind": kind, "config": asdict(model.config), "weights": model.state_dict(), **extra}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_plain(path: Path, kind: str) -> dict:
    """Read a checkpoint of this kind without unpickling objects. Raises InputError, naming the file."""
    if not Path(path).is_file():
        raise InputError(f"{path} is not there: train a model first (python train_tiny.py) or name another run")
    content = rar.load_data(path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path} is no checkpoint of the kind {kind!r}, which is needed here")
    return content


def load_model(path: Path, kind: str, device: torch.device) -> tuple[nn.Module, dict]:
    """Rebuild an RAR ("rar") or VQTokenizer ("tokenizer") from its checkpoint, strictly; returns it and the rest."""
    content = load_plain(path, kind)
    model, config = (RAR, RARConfig) if kind == "rar" else (VQTokenizer, VQConfig)
    with blaming(path, f"it does not hold a whole {kind}"):
        model = rar.load_strictly(model, config(**content["config"]), dict(content["weights"]), torch.float32)
    return model.to(device), content


def weights_hash(model: nn.Module) -> str:
    """A hash of all weights: says which tokenizer made which tokens."""
    parts = [name.encode() + w.cpu().numpy().tobytes() for name, w in sorted(model.state_dict().items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or cuda, mps or cpu, whichever is there first."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    with blaming(f"device {name!r}", "leave out --device to take the first there is"):
        torch.empty(1, device=name).item()  # which a device without memory cannot give
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; else bfloat16 where it is faster: on a GPU that has it, on a CPU if two matmuls say so."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    faster = 1.3 * matmul_seconds(torch.bfloat16) < matmul_seconds(torch.float32)
    return torch.bfloat16 if gather_rows(torch.tensor([int(faster)])).all() else torch.float32  # all take the same


def matmul_seconds(dtype: torch.dtype, size: int = 1024) -> float:
    """The fastest of a few square matrix products on the CPU, in seconds."""
    a = torch.ones(size, size, dtype=dtype)
    return min(timeit.repeat(lambda: a @ a, number=1, repeat=5))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`, parameters in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write float images (N, 3, H, W) in [0, 1] as one picture, row by row, enlarged to at least 64 pixels each."""
    N, _, H, W = images.shape
    rows, zoom, gap = math.ceil(N / columns), max(1, 64 // H), 2
    sheet = Image.new("RGB", (columns * (W * zoom + gap) + gap, rows * (H * zoom + gap) + gap), "white")
    for i, array in enumerate(to_uint8(images)):
        tile = Image.fromarray(array).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + i % columns * (W * zoom + gap), gap + i // columns * (H * zoom + gap)))
    save_picture(Path(path), sheet.save)


def save_picture(path: Path, save: Callable[[Path], object]) -> None:
    """Write a Pillow picture; the ending of `path` says in which format."""
    try:
        write_atomically(path, save)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give the picture a name that ends in .png") from error


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (N, 3, H, W) in [0, 1] -> uint8 (N, H, W, 3)."""
    return images.float().mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1], channels last in memory, as CPU convolutions like it."""
    return torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A split of a data set: labels (N,) in 0..C-1, class names, and its images, uint8 (n, H, W, 3) a chunk."""

    labels: np.ndarray
    names: list[str]
    chunks: Callable[[], Iterator[np.ndarray]]


def load_images(
    name: str, split: str = "train", data_dir: str | Path | None = None, image_size: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All images of a split ("train" or "val"), uint8 (N, H, W, 3), labels (N,) int64, and the class names."""
    source = open_source(name, split, data_dir, image_size)
    return np.concatenate(list(source.chunks())), source.labels, source.names


def open_source(name: str, split: str, data_dir: str | Path | None = None, image_size: int | None = None) -> Source:
    """Find a data set's split and read its labels; images are read chunk by chunk later. Raises InputError."""
    readers = {"digits": digits, "cifar10": cifar10, "imagenet64": imagenet64, "folder": folder}
    if name not in readers or split not in ("train", "val"):
        raise InputError(f"unknown data {name!r} / {split!r}: choose one of {', '.join(readers)} and train or val")
    source = readers[name](split, Path(data_dir or "data"), image_size or PRESETS[name]["image_size"])
    if not len(source.labels):
        raise InputError(f"{name}: the {split} split holds no images: check --data-dir {data_dir or 'data'}")
    return source


PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#b04be6", "#42d4f4", "#f5f5f5")


def digits(split: str, data_dir: Path, image_size: int) -> Source:
    """Digits 0-9 in eight colours on near-black, of random size, place and slant, drawn with Pillow's own font."""
    labels = np.arange({"train": 12000, "val": 1000}[split]) % 10
    return Source(labels, [str(d) for d in range(10)], lambda: iter([draw_digits(len(labels), split, image_size)]))


@lru_cache(maxsize=2)
def draw_digits(count: int, split: str, image_size: int) -> np.ndarray:
    """Image i shows digit i % 10: uint8 (count, S, S, 3); the same on every call, others for each split."""
    rng = np.random.default_rng([0, split == "val"])
    fonts = {size: ImageFont.load_default(size) for size in range(52, 69)}  # at twice the final size
    images = []
    for i in range(count):
        canvas, glyph = Image.new("RGB", (64, 64), "#08080c"), Image.new("L", (64, 64))
        x, y = 32 + rng.uniform(-4, 4, 2)
        font = fonts[int(rng.integers(52, 69))]
        ImageDraw.Draw(glyph).text((x, y), str(i % 10), fill=255, font=font, anchor="mm", stroke_width=1)
        glyph = glyph.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
        canvas.paste(Image.new("RGB", (64, 64), PALETTE[rng.integers(len(PALETTE))]), mask=glyph)
        images.append(np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BOX)))
    return np.stack(images)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(split: str, data_dir: Path, image_size: int) -> Source:
    """CIFAR-10's binary version: records of a label byte and 3072 planar pixels; downloaded if it is not there."""
    if image_size != 32:
        raise InputError("cifar10 images are 32x32: leave out --image-size")
    files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}[split]
    folder = data_dir if (data_dir / files[0]).is_file() else data_dir / "cifar-10-batches-bin"
    if not (folder / files[0]).is_file():
        archive = data_dir / "cifar-10-binary.tar.gz"
        with by_one_process() as mine:
            if mine and not archive.is_file():
                download(CIFAR10_URL, archive, CIFAR10_MD5)
        unpack_cifar10(archive)
    records = []
    for name in files:
        raw = np.fromfile(folder / name, np.uint8)
        if len(raw) == 0 or len(raw) % 3073 or raw[::3073].max() > 9:
            raise InputError(f"{folder / name} is not a whole CIFAR-10 batch: delete it and run again")
        records.append(raw.reshape(-1, 3073))
    labels = np.concatenate([r[:, 0] for r in records]).astype(np.int64)
    return Source(labels, CIFAR10_NAMES, lambda: (planar_to_images(r[:, 1:]) for r in records))


def planar_to_images(rows: np.ndarray) -> np.ndarray:
    """uint8 rows (N, 3*S*S), all red then all green then all blue -> (N, S, S, 3)."""
    side = math.isqrt(rows.shape[1] // 3)
    return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)


def unpack_cifar10(archive: Path) -> None:
    """Take the six batches, by name and as plain files of the one right size, out of the archive.

    A header is 512 bytes: name, size in octal, type. Some versions of tarfile can be made to loop or fill the memory.
    """
    names = [f"cifar-10-batches-bin/{n}.bin" for n in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    found, at = {}, 0
    with blaming(archive, "it is damaged: delete it and run again"):
        with gzip.open(archive) as packed:
            tar = packed.read(1 << 28)  # more than the right one holds; of a bomb no more
        while len(found) < len(names):
            name, size = tar[at : at + 100].rstrip(b"\0").decode(), int(tar[at + 124 : at + 136].strip(b"\0 "), 8)
            if name in names:
                found[name] = tar[at + 512 : at + 512 + size]
                if len(found[name]) != 10000 * 3073 or tar[at + 156] not in b"0\0":
                    raise ValueError(f"{name} is no CIFAR-10 batch")
            at += 512 + max(0, -(-size // 512) * 512)
    for name, content in found.items():
        write_atomically(archive.parent / name, partial(Path.write_bytes, data=content))


def download(url: str, path: Path, md5: str | None = None, tries: int = 5) -> None:
    """Fetch `url` into `path`, going on after a break; checked against `md5`, or a sha256 the server states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        try:
            stated = fetch_rest(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if attempt == tries - 1 or getattr(error, "code", 500) in (401, 403, 404, 410):  # refusals are final
                hint = f"download it yourself and put it at {path}, or run again to go on"
                raise InputError(f"{url} cannot be fetched ({error}): {hint}") from error
            time.sleep(attempt)
    digest, expected = hashlib.new("md5" if md5 else "sha256"), md5 or stated
    with open(part, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if expected and digest.hexdigest() != expected:
        part.unlink()
        raise InputError(f"{url} sent something else ({digest.name} {digest.hexdigest()}, not {expected}): run again")
    os.replace(part, path)


class Answers(urllib.request.HTTPRedirectHandler):
    """Follows redirects, remembering the sha256 that Hugging Face states on the first answer only."""

    stated = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.stated = headers.get("X-Linked-ETag", self.stated)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_416(self, req, fp, code, msg, headers):
        return fp  # an answer like any other: the server has nothing beyond what is here


def fetch_rest(url: str, part: Path) -> str | None:
    """Append what `part` lacks of `url`, with a progress bar; returns a sha256 stated. OSError if it breaks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    answers = Answers()
    with urllib.request.build_opener(answers).open(request, timeout=30) as response:
        stated = (answers.stated or response.headers.get("X-Linked-ETag", "")).strip('"')
        stated = stated if re.fullmatch("[0-9a-f]{64}", stated) else None
        if response.status == 416:  # nothing beyond what is here
            if (response.headers.get("Content-Range") or "*").rpartition("/")[2] not in ("*", str(have)):
                part.unlink()
                raise OSError("what is here is longer than the file: start again")
            return stated
        have = have if response.status == 206 else 0  # a server without ranges starts again
        total = have + int(response.headers.get("Content-Length", 0))
        bar = tqdm.wrapattr(response, "read", total or None, initial=have, desc=part.stem)
        with bar as body, open(part, "ab" if have else "wb") as f:
            shutil.copyfileobj(body, f)
    if part.stat().st_size < total:
        raise OSError(f"broke off after {part.stat().st_size} of {total} bytes")
    return stated


def imagenet64(split: str, data_dir: Path, image_size: int, rows: int = 10000) -> Source:
    """The downsampled-ImageNet npz files; labels are made gapless over the classes that the training files hold."""
    train = sorted(data_dir.glob("train_data_batch_*.npz"))
    files = train if split == "train" else [data_dir / "val_data.npz"]
    if not train or not all(f.is_file() for f in files):
        raise InputError(f"{data_dir} needs train_data_batch_*.npz and val_data.npz: name their folder with --data-dir")
    classes = np.unique(np.concatenate([npz_labels(f) for f in train]))
    labels = {f: npz_labels(f) for f in files}
    keep = {f: np.isin(labels[f], classes) for f in files}

    def chunks() -> Iterator[np.ndarray]:
        for f in files:
            for first, block in npz_rows(f, 3 * image_size**2, len(labels[f]), rows):
                yield planar_to_images(block[keep[f][first : first + len(block)]])

    kept = np.concatenate([labels[f][keep[f]] for f in files])
    return Source(np.searchsorted(classes, kept), [f"label-{c}" for c in classes], chunks)


def npz_labels(path: Path) -> np.ndarray:
    """The `labels` of one npz file, without reading its images."""
    with blaming(path, "fetch it again"), rar.checked_zip(path), np.load(path, allow_pickle=False) as content:
        return content["labels"].astype(np.int64, casting="same_kind").reshape(-1)


def npz_rows(path: Path, width: int, count: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Stream `data` (count, width) uint8 out of an npz file, `rows` at a time, each after its first row's number."""
    hint = "check --image-size, or fetch it again"
    with blaming(path, hint), zipfile.ZipFile(path) as archive, archive.open("data.npy") as f:
        np.lib.format.read_magic(f)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        if shape != (count, width) or fortran or dtype != np.uint8:
            raise ValueError(f"{dtype} {shape}, not uint8 {(count, width)}")
        for first in range(0, count, rows):
            block = f.read(min(rows, count - first) * width)
            yield first, np.frombuffer(block, np.uint8).reshape(min(rows, count - first), width)


def folder(split: str, data_dir: Path, image_size: int, rows: int = 1000) -> Source:
    """DIR/train/<class>/* and, if there, DIR/val/<class>/*; otherwise every tenth training image is for validation."""
    names = sorted(d.name for d in (data_dir / "train").glob("*") if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise InputError(f"{data_dir / 'train'} holds no class folders: lay images out as DIR/train/<class>/<image>")
    has_val = (data_dir / "val").is_dir()
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(f for f in (data_dir / (split if has_val else "train") / name).glob("*") if f.is_file())
        if not has_val:
            found = [f for i, f in enumerate(found) if (i % 10 == 9) == (split == "val")]
        files += found
        labels += [label] * len(found)

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, len(files), rows):
            yield np.stack([read_image(f, image_size) for f in files[first : first + rows]])

    return Source(np.array(labels, dtype=np.int64), names, chunks)


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Any image Pillow reads, its short side resized to image_size and its centre cropped: uint8 (S, S, 3)."""
    with blaming(path, "mend or remove it"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        EpsImagePlugin.gs_binary = False  # PostScript is a program: Ghostscript would run it
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and draws: pure functions of the step
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float = 0.025) -> float:
    """Linear warm-up over the fraction `warmup` of all steps, then cosine to floor * peak (Sec. 4.1: 4e-4 to 1e-5)."""
    warm_steps = warmup * steps
    if step < warm_steps:
        return peak * (step + 1) / (warm_steps + 1)
    progress = (step - warm_steps) / max(1, steps - warm_steps)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def seed_step(seed: int, stage: str, step: int) -> None:
    """Seed torch's generators for one step, so that its draws do not depend on how the run got there."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(1)[0]))


@lru_cache(maxsize=2)
def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Which of `count` samples step takes: (batch_size,) int64; every epoch is a fresh permutation of all of them."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_permutation(count, seed, int(p // count))[p % count] for p in places])


def anneal_window(options: dict) -> tuple[float, float]:
    """Steps at which r starts and ends its fall (Eq. 5); raster and random order are its two corners (Tab. 2)."""
    windows = {"rar": (options["anneal_start"], options["anneal_end"]), "raster": (0, 0), "random": (1, 1)}
    return tuple(fraction * options["steps"] for fraction in windows[options["order"]])


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as in Sec. 4.1; weight decay on the matrices, not on biases, norms and embedding tables."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        groups[p.dim() not in (2, 4) or "embedding" in name]["params"].append(p)
    return torch.optim.AdamW(groups, betas=(0.9, 0.96), fused=p.device.type in ("cpu", "cuda"))


def in_parallel(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over all processes; the model itself if there is only one."""
    return nn.parallel.DistributedDataParallel(model) if process()[1] > 1 else model


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> Tensor:
    """One optimizer step with the gradient norm clipped at 1 (Sec. 4.1); returns the loss of all processes' batches."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return gather_rows(loss.detach()[None]).mean()


BEGIN_AGAIN = "delete it to begin the stage again"


def stopped_in(stage: str, run: Path) -> dict | None:
    """What a run that was stopped in this stage has saved; None if it was not."""
    state = load_plain(run / "state.pt", "state") if (run / "state.pt").exists() else {"stage": None}
    if state.get("stage", "unknown") not in (None, "tokenizer", "rar"):
        raise InputError(f"{run / 'state.pt'} is of no known stage: {BEGIN_AGAIN}")
    return state if state["stage"] == stage else None


def restore(state: dict, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take weights and moments from a state.pt; returns the step to go on at. Raises something if they do not fit."""
    model.load_state_dict(state["model"])
    parameters, moments = [p for group in optimizer.param_groups for p in group["params"]], {}
    for i, stored in state["optimizer"]["state"].items():
        moments[i] = {k: copy_as(parameters[i], stored[k]) for k in ("exp_avg", "exp_avg_sq")}
        moments[i]["step"] = torch.tensor(float(stored["step"]))
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return range(steps + 1).index(state["step"])  # an error where it is none of these


@torch.no_grad()
def copy_as(like: Tensor, stored: Tensor) -> Tensor:
    """A copy in the dtype, layout and place of another tensor of the same shape."""
    return torch.empty_like(like).copy_(stored.view_as(like))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the tokenizer; pre-tokenization
# ---------------------------------------------------------------------------------------------------------------------


def draw_pool(source: Source, limit: int = 30000) -> np.ndarray:
    """Up to `limit` images spread evenly over a split: uint8 (N, S, S, 3), what the tokenizer is trained on."""
    stride = math.ceil(len(source.labels) / limit)
    return np.concatenate([chunk[::stride].copy() for chunk in source.chunks()])  # a view would keep the whole chunk


def vq_config(options: dict) -> VQConfig:
    """The tokenizer that the options ask for."""
    return VQConfig(**{k: options[k] for k in VQConfig.__dataclass_fields__ if k in options})


def train_tokenizer(run: Path, options: dict, sources: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Train the tokenizer on the source "train" and write tokenizer.pt and reconstructions.png; goes on if stopped."""
    images, held_out = draw_pool(sources["train"]), draw_pool(sources["val"], 10000)
    torch.manual_seed(options["seed"])
    model = VQTokenizer(vq_config(options)).to(device).to(memory_format=torch.channels_last)
    optimizer, codebook, first = adamw(model, 0.0), None, 0
    steps, peak, batch_size = (options[k] for k in ("tokenizer_steps", "tokenizer_lr", "tokenizer_batch"))
    if state := stopped_in("tokenizer", run):
        with blaming(run / "state.pt", BEGIN_AGAIN):
            first, codes = restore(state, steps, model, optimizer), model.quantize.embedding.weight
            if state["codebook"] is not None:
                counts, sums = state["codebook"]
                codebook = CodebookEMA(copy_as(codes[:, 0], counts), copy_as(codes, sums))
    begin_codes = min(steps // 4, 500)  # until then a plain autoencoder, so that codes start from useful latents
    used, parallel = 0.0, in_parallel(model)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="tokenizer", dynamic_ncols=True)
    for step, stop in interruptible(bar):
        seed_step(options["seed"], "tokenizer", step)
        if step == begin_codes:
            sample = images[:: max(1, len(images) * model.config.grid_size**2 // 65536)]
            codebook = CodebookEMA.from_latents(model.quantize, encode(model, sample, dtype, tokens=False))
        rows = batch_indices(step, batch_size, len(images), options["seed"])[share(batch_size)]
        direction = -1 if options["flip"] and step % 2 else 1
        batch = to_float(images[rows, :, ::direction], device)
        with autocast(device, dtype):
            _, losses = parallel(batch, codebook, quantize=codebook is not None)
        loss = losses["reconstruction"] + 0.25 * losses["commitment"]
        loss = update(model, optimizer, loss, learning_rate(step, steps, peak, 0.05))
        if due(step, options["eval_every"], steps):
            used = codes_used(encode(model, held_out[:1000], dtype), model.config.codebook_size)
        if step % 10 == 0:
            show(bar, batch_size, loss=check_finite(loss, step + 1, run), codes_in_use=used)
        if due(step, options["save_every"], steps) or stop:
            check_weights(model, step + 1, run)
            moments = [codebook.counts, codebook.sums] if codebook else None
            save_state(run, "tokenizer", step + 1, model, optimizer, stop, codebook=moments)
    finish_tokenizer(run, model, held_out, dtype)


@torch.no_grad()
def encode(model: VQTokenizer, images: np.ndarray, dtype: torch.dtype, tokens: bool = True) -> Tensor:
    """Tokens (N*T,) of uint8 images (N, S, S, 3), or else the encoder's outputs, as rows (N*T, D)."""
    device, rows = next(model.parameters()).device, []
    for first in range(0, max(1, len(images)), 256):  # a process's share may be empty
        with autocast(device, dtype):
            latents = as_rows(model.encoder(to_float(images[first : first + 256], device)).float())
        rows.append(model.quantize.nearest(latents) if tokens else latents)
    return torch.cat(rows)


def finish_tokenizer(run: Path, model: VQTokenizer, held_out: np.ndarray, dtype: torch.dtype) -> None:
    """Measure PSNR (dB, mean over images) and codes used on held-out images, show pairs of them, write tokenizer.pt."""
    model.eval()
    device = next(model.parameters()).device
    tokens, decibels = encode(model, held_out, dtype).view(len(held_out), -1), []
    for first, part in zip(range(0, len(tokens), 256), tokens.split(256)):
        errors = model.decode(part) - to_float(held_out[first : first + 256], device)
        decibels.append(-10 * errors.square().mean((1, 2, 3)).clamp(min=1e-10).log10())
    pairs = torch.stack([to_float(held_out[:50], device), model.decode(tokens[:50])], 1).flatten(0, 1)
    psnr, used = torch.cat(decibels).mean().item(), codes_used(tokens, model.config.codebook_size)
    print(f"tokenizer: {psnr:.2f} dB PSNR on {len(held_out)} held-out images, {used:.1%} of the codes used")
    save_sheet(pairs, run / "reconstructions.png", columns=10)
    save_checkpoint(run / "tokenizer.pt", "tokenizer", model, psnr=psnr, codes_used=used)


def pretokenize(run: Path, options: dict, sources: dict, tokenizer: VQTokenizer, dtype: torch.dtype) -> None:
    """Write tokens.npz: every image, and with `flip` its mirror image too, as tokens (Sec. 4.1)."""
    content = {}
    for split, prefix in (("train", ""), ("val", "val_")):
        source, first = sources[split], 0
        flips = (1, -1) if options["flip"] and split == "train" else (1,)
        N, T = len(source.labels), tokenizer.config.grid_size**2
        tokens = np.empty((len(flips), N, T), np.uint16 if tokenizer.config.codebook_size <= 1 << 16 else np.int32)
        with tqdm(total=N, desc=f"tokens of {split}", unit="img", dynamic_ncols=True) as bar:
            for chunk in source.chunks():
                part, end = share(len(chunk)), first + len(chunk)
                for view, direction in enumerate(flips):
                    codes = encode(tokenizer, chunk[part, :, ::direction], dtype).view(-1, T)
                    tokens[view, first:end] = gather_rows(codes, part, len(chunk)).cpu()
                first = end
                bar.update(len(chunk))
        content[prefix + "tokens"] = tokens.reshape(-1, T)
        content[prefix + "labels"] = np.tile(source.labels, len(flips))
    content |= {"class_names": np.array(sources["train"].names), "tokenizer": np.array(weights_hash(tokenizer))}
    content |= {"codebook_size": tokenizer.config.codebook_size, "grid_size": tokenizer.config.grid_size}
    write_npz(run / "tokens.npz", content)


def write_npz(path: Path, arrays: dict) -> None:
    """Write arrays by name; through a file object, since numpy would add .npz to the temporary name."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)

    write_atomically(path, write)


def load_tokens(path: Path, tokenizer: VQTokenizer | None) -> dict:
    """Read and check a tokens.npz; refused if `tokenizer` is given and did not make it."""
    with blaming(path, "make it again"), rar.checked_zip(path), np.load(path, allow_pickle=False) as content:
        data = {name: content[name] for name in content.files}
        V, grid, C = int(data["codebook_size"]), int(data["grid_size"]), len(data["class_names"])
        for prefix in ("", "val_"):
            tokens, labels = data[prefix + "tokens"], data[prefix + "labels"]
            fits = labels.ndim == 1 and tokens.shape == (len(labels), grid**2) and tokens.size > 0 < grid
            fits = fits and {tokens.dtype.kind, labels.dtype.kind} <= {"i", "u"}
            if not fits or min(tokens.min(), labels.min()) < 0 or tokens.max() >= V or labels.max() >= C:
                raise ValueError(f"{prefix}tokens {tokens.shape} do not fit {V} codes, {grid}^2 places, {C} classes")
        made = (str(data["tokenizer"]), V, grid)
    if tokenizer and made != (weights_hash(tokenizer), tokenizer.config.codebook_size, tokenizer.config.grid_size):
        raise InputError(f"{path} was not made by this run's tokenizer.pt: delete it, or bring the tokenizer it names")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the transformer
# ---------------------------------------------------------------------------------------------------------------------


def token_loss(model: RAR, tokens: Tensor, labels: Tensor, orders: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token along orders (B, T) (Eq. 3)."""
    targets = tokens.gather(1, orders)  # logits[b, t] predicts the token at orders[b, t]          B, T
    return F.cross_entropy(model(tokens, labels, orders).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: RAR, data: dict, base: Tensor, ratio: float, options: dict, dtype: torch.dtype) -> float:
    """Nats per token on up to 500 held-out images: ratio 0 in the base order, 1 in random orders, always the same."""
    device, total = next(model.parameters()).device, 0.0
    generator = torch.Generator().manual_seed(options["seed"])
    held_out = to_batch(data, "val_", slice(min(500, len(data["val_tokens"]))), device)
    model.eval()
    for tokens, labels in zip(*(part.split(options["batch_size"]) for part in held_out)):
        orders = sample_orders(*tokens.shape, ratio, base_order=base, generator=generator, device=device)
        with autocast(device, dtype):
            total += token_loss(model, tokens, labels, orders).item() * len(tokens)
    model.train()
    return total / len(held_out[0])


def to_batch(data: dict, prefix: str, rows: np.ndarray | slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and labels (B,) of these rows, int64."""
    arrays = (data[prefix + "tokens"][rows], data[prefix + "labels"][rows])
    return tuple(torch.from_numpy(a.astype(np.int64)).to(device) for a in arrays)


def rar_config(options: dict, codebook_size: int, num_classes: int, grid_size: int) -> RARConfig:
    """The transformer that the options ask for."""
    sizes = {k: options[k] for k in ("dim", "depth", "heads", "dropout", "adaln", "target_aware")}
    sizes |= {"mlp_dim": 4 * options["dim"], "attn_dropout": options["dropout"]}
    return RARConfig(codebook_size, num_classes, grid_size**2, **sizes)


def draw_batch(data: dict, options: dict, base: Tensor, ratio: float, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """This process's part of a step's tokens (B, T), labels (B,), some dropped, and orders (B, T), random or `base`."""
    seed, B, mine = options["seed"], options["batch_size"], share(options["batch_size"])
    seed_step(seed, "rar", step)
    rows = batch_indices(step, B, len(data["tokens"]), seed)
    tokens, labels = to_batch(data, "", rows, torch.device("cpu"))
    orders = sample_orders(*tokens.shape, ratio, base_order=base)
    labels = drop_labels(labels, len(data["class_names"]), 0.1)
    if process()[0] > 0:  # orders and dropped labels are drawn alike for the whole batch, dropout is not
        seed_step(seed, f"rar dropout {process()[0]}", step)
    return tokens[mine], labels[mine], orders[mine]


def train_rar(
    run: Path, options: dict, data: dict, tokenizer: VQTokenizer | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Train the transformer on tokens; writes three checkpoints, metrics.csv and, with a tokenizer, samples.png.

    rar.pt is the last step's, rar_random.pt the last one's with r = 1, rar_best.pt that of the lowest validation loss.
    """
    grid = int(data["grid_size"])
    torch.manual_seed(options["seed"])
    model = RAR(rar_config(options, int(data["codebook_size"]), len(data["class_names"]), grid)).to(device).train()
    optimizer, first, rows, losses = adamw(model, 0.03), 0, [], []
    if state := stopped_in("rar", run):
        with blaming(run / "state.pt", BEGIN_AGAIN):
            first = restore(state, options["steps"], model, optimizer)
            rows = [[float(row[i]) for i in range(6)] for row in state["rows"]]
            losses = [torch.tensor(float(v), device=device) for v in state["losses"]]
    steps, window, base = options["steps"], anneal_window(options), scan_order(options["scan"], grid)
    settings = {k: options[k] for k in ("scan", "order", "guidance_scale", "guidance_power")}  # what sample.py needs
    settings |= {"class_names": [str(n) for n in data["class_names"]], "tokenizer": str(data["tokenizer"])}
    parallel = in_parallel(model)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="rar", dynamic_ncols=True)
    for step, stop in interruptible(bar):
        r, lr = random_ratio(step, *window), learning_rate(step, steps, options["lr"], options["warmup"])
        batch = draw_batch(data, options, base, r, step)
        with autocast(device, dtype):
            loss = token_loss(parallel, *(part.to(device) for part in batch))
        loss = update(model, optimizer, loss, lr)
        losses.append(loss)
        if step % 10 == 0:
            show(bar, options["batch_size"], loss=check_finite(loss, step + 1, run), r=r, lr=lr)
        if due(step, options["eval_every"], steps):
            held_out = [validation_loss(model, data, base, ratio, options, dtype) for ratio in (0.0, 1.0)]
            rows.append([step + 1, r, lr, torch.stack(losses).mean().item(), *held_out])
            losses = []
            write_metrics(run, rows)
            if rows[-1][4] == min(row[4] for row in rows):  # where raster order overfits, this is the one to keep
                save_checkpoint(run / "rar_best.pt", "rar", model, step=step + 1, **settings)
        if r == 1 and (step + 1 == steps or random_ratio(step + 1, *window) < 1):  # the last step before annealing
            save_checkpoint(run / "rar_random.pt", "rar", model, **settings)
        if (saving := due(step, options["save_every"], steps)) or stop:
            check_weights(model, step + 1, run)
            if tokenizer is not None and saving:  # before the state, so that a kill in between draws them again
                draw_samples(run, model, tokenizer, options)
            save_state(run, "rar", step + 1, model, optimizer, stop, rows=rows, losses=losses)
    save_checkpoint(run / "rar.pt", "rar", model, **settings)


def interruptible(steps: Iterable[int]) -> Iterator[tuple[int, list]]:
    """Steps, each with a list that Ctrl-C fills, so that a step is whole when a run stops; a second Ctrl-C kills."""
    pressed = []

    def note(signal_number: int, frame: object) -> None:
        pressed.append(signal_number)
        signal.signal(signal.SIGINT, previous)  # which the second one meets

    previous = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # signals can be had in the main thread only; several processes would stop apart
        if process()[1] == 1:
            signal.signal(signal.SIGINT, note)
    try:
        for step in steps:
            yield step, pressed
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, previous)


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps, and at the end, is to be done after this step."""
    return (step + 1) % every == 0 or step + 1 == steps


def show(bar: tqdm, batch_size: int, **figures: float) -> None:
    """Put figures and images/s at the end of the progress bar."""
    rate = (bar.format_dict["rate"] or 0) * batch_size
    bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in figures.items()) + f", {rate:.0f} img/s")


def draw_samples(run: Path, model: RAR, tokenizer: VQTokenizer, options: dict, rows: int = 8) -> None:
    """Write samples.png: a column per class, at most ten of them."""
    C, device = model.config.num_classes, next(model.parameters()).device
    labels = torch.arange(min(C, 10), device=device).repeat(rows)
    order = scan_order(options["scan"], tokenizer.config.grid_size)
    guidance = {"guidance_scale": options["guidance_scale"], "guidance_power": options["guidance_power"]}
    generator = torch.Generator(device).manual_seed(options["seed"])
    model.eval()
    tokens = model.generate(labels, order=order, generator=generator, **guidance)
    model.train()
    save_sheet(tokenizer.decode(tokens), run / "samples.png", columns=min(C, 10))


METRICS = "step,r,lr,train_loss,val_loss_raster,val_loss_random"


def write_metrics(run: Path, rows: list) -> None:
    """Write metrics.csv: r in 0..1, losses in nats per token, the train loss a mean since the row before."""
    save = partial(np.savetxt, X=rows, fmt="%.6g", delimiter=",", header=METRICS, comments="")
    write_atomically(run / "metrics.csv", save)


def check_weights(model: nn.Module, step: int, run: Path) -> None:
    """Stop a run that has diverged before anything good is overwritten."""
    check_finite(sum(w.detach().sum() for w in model.parameters()), step, run, "weights add up to")


def check_finite(loss: Tensor, step: int, run: Path, what: str = "the loss is") -> float:
    """The loss as a number; stops a run that has diverged."""
    if math.isfinite(value := loss.item()):
        return value
    kept = f"{run / 'state.pt'} is the last good checkpoint" if (run / "state.pt").exists() else "nothing was saved yet"
    raise InputError(f"{what} {value} at step {step}; {kept}; try a lower --lr")


def save_state(
    run: Path, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, stop: list, **extra: object
) -> None:
    """Write state.pt, all that --resume needs beside the seed; ends the run if Ctrl-C has filled `stop`."""
    content = {"kind": "state", "stage": stage, "step": step, "model": model.state_dict()}
    content |= {"optimizer": optimizer.state_dict(), **extra}
    write_atomically(run / "state.pt", lambda temporary: torch.save(content, temporary))
    if stop:
        raise InputError(f"stopped after {step} steps of {stage}; go on: python train_tiny.py --resume --out {run}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

DEFAULTS = dict(data_dir=None, tokens=None, seed=0, device=None, dtype=None, out=None, resume=False)
DEFAULTS |= dict(order="rar", anneal_start=0.5, anneal_end=0.75, scan="row-major", target_aware=True, adaln=True)
DEFAULTS |= dict(warmup=0.1, eval_every=1000, save_every=2000)


class Parser(argparse.ArgumentParser):
    """Options that are not given stay absent, so that presets and stored runs can fill them in; errors are one line."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the options)")


def seed_number(text: str) -> int:
    """A seed that numpy and torch both take: 0 to 2^63 - 1."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: take a whole number from 0 to 2^63 - 1")
    return int(text)


def parse_options(argv: list[str] | None = None) -> dict:
    """Command line -> what was given, by name; nothing else is filled in."""
    p = Parser(description=__doc__.split("\n\n")[0])
    flag = argparse.BooleanOptionalAction
    p.add_argument("--config", choices=PRESETS, help="data set and sizes (default: digits)")
    p.add_argument("--data-dir", help="folder of the data (default: data)")
    p.add_argument("--tokens", help="train on this tokens.npz alone, without images")
    p.add_argument("--out", help="folder of the run (default: a new one in runs/)")
    p.add_argument("--resume", action="store_true", help="go on where the run in --out, or the newest, stood")
    p.add_argument("--order", choices=("rar", "raster", "random"), help="training orders (default: rar)")
    p.add_argument("--anneal-start", type=float, help="where r starts to fall, as a fraction (default: 0.5)")
    p.add_argument("--anneal-end", type=float, help="where r reaches 0, as a fraction (default: 0.75)")
    p.add_argument("--scan", choices=SCANS, help="the order that r decays to (default: row-major)")
    p.add_argument("--target-aware", action=flag, help="the second position table, Eq. 4 (default: on)")
    p.add_argument("--adaln", action=flag, help="adaptive LayerNorm, off for the plain ViT (default: on)")
    p.add_argument("--flip", action=flag, help="mirror images left to right (default: by preset)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products (default: the faster)")
    p.add_argument("--device", help="cuda, mps, cpu (default: the first there is)")
    p.add_argument("--seed", type=seed_number, help="of every draw (default: 0)")
    whole = ("image-size", "codebook-size", "channels", "tokenizer-steps", "tokenizer-batch", "steps", "batch-size")
    for name in (*whole, "dim", "depth", "heads", "eval-every", "save-every"):
        p.add_argument(f"--{name}", type=int, help="(default: by preset)")
    for name in ("lr", "tokenizer-lr", "dropout", "warmup", "guidance-scale", "guidance-power"):
        p.add_argument(f"--{name}", type=float, help="(default: by preset)")
    return vars(p.parse_args(argv))


def check_options(options: dict) -> None:
    """Raise InputError for values outside their ranges."""
    for name, value in options.items():
        if type(value) is int and value < 1 and name != "seed":
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not 0 <= options["anneal_start"] <= options["anneal_end"] <= 1:
        raise InputError("--anneal-start and --anneal-end are fractions of training: 0 <= start <= end <= 1")
    if not (options["lr"] > 0 and options["tokenizer_lr"] > 0 and 0 <= options["dropout"] < 1):
        raise InputError("--lr and --tokenizer-lr must be above 0, --dropout in 0..1")


def newest_run(holding: str, root: Path = Path("runs")) -> Path:
    """The run folder whose file of this name was written last."""
    found = sorted(root.glob(f"*/{holding}"), key=lambda f: f.stat().st_mtime)
    if not found:
        raise InputError(f"no folder in {root}/ holds a {holding}: run python train_tiny.py first, or name a folder")
    return found[-1].parent


def open_run(given: dict) -> tuple[Path, dict]:
    """The run folder and its options: a stored run's with --resume, else preset and defaults under what was given."""
    if given.get("resume"):
        run = Path(given["out"]) if "out" in given else newest_run("run.json")
        with blaming(run / "run.json", "leave out --resume to start a run"):
            options = json.loads((run / "run.json").read_text())
            for name, like in {**DEFAULTS, **PRESETS[options["config"]]}.items():
                also = {type(None): str, tuple: list}.get(type(like))
                if name not in ("out", "resume") and type(options[name]) not in (type(like), also):
                    raise ValueError(f"{name} is of another type than {like!r}")
            parse_options([f"--{name}={options[name]}" for name in ("order", "scan", "seed", "dtype")])
            check_options(options)
        changed = [k for k in given if k not in ("resume", "out", "device", "data_dir") and given[k] != options.get(k)]
        if changed:
            raise InputError(f"--resume keeps the run's own options: leave out --{changed[0].replace('_', '-')}")
        return run, options | given
    options = {**DEFAULTS, **PRESETS[given.get("config", "digits")], "config": "digits", **given}
    check_options(options)
    names = (Path("runs") / f"{options['config']}-{i}" for i in range(1, 1_000_000))
    run = Path(given["out"]) if "out" in given else next(d for d in names if not d.exists())
    if (run / "run.json").exists():
        raise InputError(f"{run} already holds a run: add --resume to go on with it, or name another --out")
    return run, options


def prepare(run: Path, options: dict) -> dict:
    """What the stages read: sources of images, or data of a ready tokens.npz. Whatever does not fit is refused here."""
    tokens = Path(options["tokens"] or run / "tokens.npz")
    if options["tokens"] or tokens.exists():
        beside = tokens.parent / "tokenizer.pt"
        tokenizer = load_model(beside, "tokenizer", torch.device("cpu"))[0] if beside.exists() else None
        ready = {"data": load_tokens(tokens, tokenizer)}
        grid, C = int(ready["data"]["grid_size"]), len(ready["data"]["class_names"])
        if tokenizer is not None and run != tokens.parent:  # sampling needs it in the run
            write_atomically(run / "tokenizer.pt", lambda temporary: shutil.copyfile(beside, temporary))
    else:
        where = (options["data_dir"], options["image_size"])
        ready = {"sources": {split: open_source(options["config"], split, *where) for split in ("train", "val")}}
        grid, C = vq_config(options).grid_size, len(ready["sources"]["train"].names)
    rar_config(options, options["codebook_size"], C, grid)
    scan_order(options["scan"], grid)
    return ready


def main() -> None:
    run, options = open_run(parse_options())
    device = join_processes(pick_device(options["device"]))
    if any(options[k] % process()[1] for k in ("batch_size", "tokenizer_batch")):
        raise InputError(f"--batch-size and --tokenizer-batch must be multiples of the {process()[1]} processes")
    ready = prepare(run, options)
    dtype = pick_dtype(options["dtype"], device)
    options["dtype"] = str(dtype).removeprefix("torch.")
    stored = {k: v for k, v in options.items() if k not in ("resume", "out")}
    write_atomically(run / "run.json", lambda temporary: temporary.write_text(json.dumps(stored, indent=1)))
    for stale in run.glob("tmp-[0-9]*-*") if options["resume"] else ():  # of a write that a kill cut short
        stale.unlink(missing_ok=True)  # another process may have been first
    print(f"run {run}: {options['config']} on {device.type}, {options['dtype']}")
    if "sources" in ready and not (run / "tokenizer.pt").exists():
        train_tokenizer(run, options, ready["sources"], device, dtype)
    tokenizer = None  # with tokens alone: the transformer needs no images
    if (run / "tokenizer.pt").exists():
        tokenizer, _ = load_model(run / "tokenizer.pt", "tokenizer", device)
    if "sources" in ready:
        pretokenize(run, options, ready["sources"], tokenizer, dtype)
        ready["data"] = load_tokens(run / "tokens.npz", tokenizer)
    if not (run / "rar.pt").exists():
        train_rar(run, options, ready["data"], tokenizer, device, dtype)
    (run / "state.pt").unlink(missing_ok=True)
    print(f"done: everything is in {run}")
    if tokenizer is None:
        print(f"to see images, put the tokenizer.pt that made {options['tokens']} into {run}")
    print(f"next: python sample.py --run {run} --n 40 --out sheet.png")


if __name__ == "__main__":
    run_main(main)
