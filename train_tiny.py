"""Train RAR end to end on one machine: a VQ tokenizer, all images as tokens, and the transformer on these tokens.

`python train_tiny.py` draws its own data set of coloured digits and needs nothing else. `--config cifar10`,
`--config imagenet64` and `--config folder` read real images; `--tokens tokens.npz` skips images altogether. A run keeps
everything in one folder, which sample.py reads. `--resume` goes on after a run was stopped: the random draws of a step
are a function of (seed, stage, step), so a resumed run draws what an unbroken one would have drawn.

Letters: B batch, N images, T tokens of an image, V codes, C classes, S side of an image in pixels. `args` holds the
options of the run, with args.out its folder, and args.device and args.dtype as torch objects.
"""

from __future__ import annotations

import signal
import sys

if sys.argv[0].endswith(("train_tiny.py", "sample.py")):  # handles Ctrl-C during the slow imports, before run_main does

    def stop(*_):
        print("stopped", file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, stop)

import argparse
import hashlib
import json
import math
import os
import random
import tarfile
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import rar
from rar import RAR, InputError, RARConfig, load_file, reading, require, sample_orders
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, codes_used, flatten_latents

# The defaults of each --config. --help prints this table too.
TABLE = """
option            digits  cifar10  imagenet64  folder   meaning
image_size        32      32       64          64       side of the images in pixels
codebook_size     128     1024     1024        1024     number of codes
code_dim          8       16       16          16       length of a code
channels          16      64       64          64       width of the tokenizer
res_blocks        1       2        2           2        residual blocks of the tokenizer at each resolution
flip              false   true     true        true     train on mirror images too
tokenizer_steps   400     20000    30000       10000    training steps of the tokenizer
tokenizer_batch   32      128      64          64       images per step of the tokenizer
tokenizer_lr      2e-3    1e-3     1e-3        1e-3     peak learning rate of the tokenizer
dim               128     384      512         384      width of the transformer
depth             4       12       16          12       blocks of the transformer
heads             4       6        8           6        attention heads
dropout           0.0     0.1      0.1         0.1      dropout rate
adaln             true    true     true        true     adaptive LayerNorm; without it the paper's plain ViT
target_aware      true    true     true        true     the second position table, Eq. 4
steps             750     100000   200000      50000    training steps of the transformer
batch_size        32      128      64          64       images per step of the transformer
lr                6e-3    4e-4     4e-4        4e-4     peak learning rate of the transformer
warmup            0.1     0.1      0.1         0.1      fraction of the steps in which the learning rate rises
anneal_start      0.5     0.5      0.5         0.5      fraction of the steps in which all orders are random
anneal_end        0.75    0.75     0.75        0.75     fraction of the steps after which none is random
guidance_scale    1.5     3.0      4.0         3.0      classifier-free guidance of the samples; 1 is none
guidance_power    0.0     1.0      1.0         1.0      exponent of the power-cosine guidance schedule; 0 is constant
eval_every        125     1000     1000        1000     steps between evaluations, each with pictures and a checkpoint
seed              0       0        0           0        seed of all random draws
"""
HEADER, *SETTINGS = [line.split(maxsplit=5) for line in TABLE.strip().splitlines()]
# json.loads turns "true", "32" and "2e-3" into a bool, an int and a float.
PRESETS = {HEADER[i]: {row[0]: json.loads(row[i]) for row in SETTINGS} for i in range(1, 5)}


# ---------------------------------------------------------------------------------------------------------------------
# Processes, errors, devices
# ---------------------------------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
MINE = slice(RANK, None, WORLD)  # the share of a batch that this process trains on


def setup_ddp(device: torch.device):
    """Join the processes that torchrun started, if it did.

    Every process draws the same batches and trains on its share of them. Only the first one writes files and prints.
    """
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def run_main(main: Callable[[], None]):
    """Run a script; print user errors as one line and exit with code 2. After Ctrl-C the exit code is 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except (InputError, OSError) as error:
        message, code = f"error: {' '.join(str(error).split())}", 2
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "stopped", 130
    print(message, file=sys.stderr)  # not in `except`, where progress bars are still open and their lines unfinished
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with options from a table such as OPTIONS, without abbreviations, and with errors in one line."""

    def __init__(self, description: str, table: str = "", epilog: str = ""):
        formatter = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the epilog
        summary = description.split("\n\n")[0]
        super().__init__(description=summary, epilog=epilog, allow_abbrev=False, formatter_class=formatter)
        types = {"int": int, "float": float, "text": str, "path": Path}
        for line in table.strip().splitlines():
            name, kind, default, text = line.split(maxsplit=3)
            choices = None if kind in types else kind.split("|")
            default = None if default == "-" else default
            self.add_argument(name, type=types.get(kind), choices=choices, default=default, help=text)

    def error(self, message: str):
        raise InputError(f"{message} (--help lists all options)")


def pick_device(name: str | None) -> torch.device:
    """The device asked for; otherwise cuda, mps or cpu, whichever exists first. float32 on CUDA uses TF32."""
    torch.set_float32_matmul_precision("high")
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if WORLD > 1 and name == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with reading(f"device {name}", "choose another, such as --device cpu"):
        torch.zeros(1, device=name).item()
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; otherwise bfloat16 on CUDA where it is native, float16 on other CUDA, else float32."""
    if name is None and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, name or "float32")


def autocast(args: Namespace) -> AbstractContextManager:
    """Matrix products in the run's dtype, weights in float32."""
    return nullcontext() if args.dtype == torch.float32 else torch.autocast(args.device.type, args.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]):
    """Call write(temporary path), then rename that file to `path`, which is never half-written."""
    if RANK > 0:
        return
    temporary = path.parent / f"tmp-{path.name}"  # the ending stays, as Pillow and NumPy go by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:  # the last two come from torch and Pillow
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be written ({reason}): check its name, folder and free space") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, kind: str, model: nn.Module, **extra: object):
    """Write config and weights as plain data that torch.load(weights_only=True) accepts."""
    content = extra | {"kind": kind, "config": asdict(model.config), "weights": model.state_dict()}
    write_atomically(path, partial(torch.save, content))


def build_config(config_class: type, args: Namespace, **others: object) -> object:
    """A config whose fields come from the options of the same name and from `others`."""
    fields = {name: getattr(args, name) for name in config_class.__dataclass_fields__ if name in args}
    return config_class(**fields | others)


def load_model(path: Path, kind: str) -> tuple[nn.Module, dict]:
    """Rebuild a RAR ("rar") or a VQTokenizer ("tokenizer") from its checkpoint; returns it and the whole file."""
    content = load_file(path)
    model_class, config_class = (RAR, RARConfig) if kind == "rar" else (VQTokenizer, VQConfig)
    with reading(path, f"it is not a {kind} checkpoint of train_tiny.py"):
        config, weights = config_class(**content["config"]), content["weights"]
    return rar.load_weights(model_class, config, weights, str(path)), content


def weights_hash(model: nn.Module) -> str:
    """A hash of all weights. It ties tokens to the tokenizer that made them."""
    weights = sorted(model.state_dict().items())
    content = b"".join(name.encode() + tensor.cpu().numpy().tobytes() for name, tensor in weights)
    return hashlib.sha256(content).hexdigest()[:16]


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (N, 3, H, W) in [0, 1] -> uint8 (N, H, W, 3)."""
    return images.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1]. It copies, as torch takes no mirrored arrays."""
    return torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float() / 255


def make_sheet(images: Tensor, columns: int) -> Image.Image:
    """One picture of float images (N, 3, S, S) in [0, 1], row by row, each enlarged to at least 64 pixels."""
    tiles = to_uint8(F.interpolate(images.float(), scale_factor=math.ceil(64 / images.shape[-1])))
    side, rows = len(tiles[0]) + 2, math.ceil(len(tiles) / columns)  # a white line around each
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(tile), (column * side + 1, row * side + 1))
    return sheet


def save_sheet(path: Path, images: Tensor, columns: int):
    """Write the picture of make_sheet."""
    write_atomically(path, make_sheet(images, columns).save)


# ---------------------------------------------------------------------------------------------------------------------
# Data: a reader yields a split, "train" or "val", in one part or in several, so that not all images must fit in memory
# ---------------------------------------------------------------------------------------------------------------------

Parts = Iterator[tuple[np.ndarray, np.ndarray, list[str]]]  # images (n, S, S, 3), labels (n,), names of all classes


def read_parts(name: str, split: str, data_dir: str | Path | None, image_size: int | None) -> Parts:
    """The parts of a split, each read when its turn comes."""
    readers = {"digits": digits, "cifar10": cifar10, "imagenet64": imagenet64, "folder": class_folders}
    return readers[name](split, Path(data_dir or "data"), image_size or PRESETS[name]["image_size"])


def load_images(
    name: str, split: str = "train", data_dir: str | Path | None = None, image_size: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All images of a split ("train" or "val"), uint8 (N, S, S, 3), labels (N,) int64, and the class names."""
    images, labels, names = zip(*read_parts(name, split, data_dir, image_size))
    return np.concatenate(images), np.concatenate(labels), names[0]


Image.MAX_IMAGE_PIXELS = None  # no limit by Pillow: read_image has one with a clearer message

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#b04be6", "#42d4f4", "#f5f5f5")


def digits(split: str, data_dir: Path, image_size: int) -> Parts:
    """Digits in eight colours on near-black, random size, place and slant, in Pillow's own font, with a fixed seed."""
    rng = np.random.default_rng([0, split == "val"])
    labels = np.arange(12000 if split == "train" else 1000) % 10
    images = []
    for label in labels:
        glyph = Image.new("L", (64, 64))
        font = ImageFont.load_default(int(rng.integers(58, 69)))
        place = tuple(32 + rng.uniform(-2, 2, 2))
        ImageDraw.Draw(glyph).text(place, str(label), 255, font, "mm", stroke_width=1)
        glyph = glyph.rotate(rng.uniform(-10, 10), Image.BILINEAR)
        image = ImageOps.colorize(glyph, "#08080c", PALETTE[rng.integers(8)])
        images.append(np.asarray(image.resize((image_size, image_size), Image.BOX)))
    yield np.stack(images), labels, list("0123456789")


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(split: str, data_dir: Path, image_size: int) -> Parts:
    """CIFAR-10's binary version, from a folder or else from its archive, which is downloaded if it is missing.

    A file holds records of a label byte and three planes of 1024 bytes.
    """
    require(image_size == 32, f"cifar10 images are 32x32: leave out --image-size {image_size}")
    files = ["test_batch.bin"] if split == "val" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = data_dir if (data_dir / files[0]).is_file() else data_dir / "cifar-10-batches-bin"
    source = folder
    if not (folder / files[-1]).is_file():
        source = data_dir / "cifar-10-binary.tar.gz"
        download(CIFAR10_URL, source, CIFAR10_SHA256)
    with reading(source, f"download it again from {CIFAR10_URL}"):
        if source == folder:
            content = [(folder / file).read_bytes() for file in files]
        else:
            with tarfile.open(source) as tar:
                content = [tar.extractfile(f"{folder.name}/{file}").read() for file in files]
        records = np.frombuffer(b"".join(content), np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    yield images, records[:, 0].astype(int), CIFAR10_NAMES


def download(url: str, path: Path, sha256: str | None = None):
    """Fetch `url` into `path`, with a progress bar, unless the file is there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with reading(url, f"fetch it by hand: curl -L -C - -o {path} {url}"):
        torch.hub.download_url_to_file(url, str(path), sha256)


def imagenet64(split: str, data_dir: Path, image_size: int) -> Parts:
    """The npz files of the downsampled ImageNet. Labels are renumbered over the classes of the training files.

    Validation images of other classes are left out.
    """
    train = sorted(data_dir.glob("train_data_batch_*.npz"))
    require(train, f"{data_dir} holds no train_data_batch_*.npz: name their folder with --data-dir")
    classes = np.unique(np.concatenate([read_array(path, "labels") for path in train]))
    names = [f"label-{c}" for c in classes]
    for path in train if split == "train" else [data_dir / "val_data.npz"]:
        labels, data = read_array(path, "labels"), read_array(path, "data")
        known = np.isin(labels, classes)
        if not known.all():  # only then, as this copies the whole file
            labels, data = labels[known], data[known]
        with reading(path, f"check that it holds {image_size}x{image_size} images"):
            images = data.reshape(len(labels), 3, image_size, image_size).transpose(0, 2, 3, 1)
        yield images, np.searchsorted(classes, labels), names


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an npz file."""
    with reading(path, "fetch it again"), np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def class_folders(split: str, data_dir: Path, image_size: int) -> Parts:
    """DIR/train/<class>/<image> and DIR/val/<class>/<image>. Without val/ a tenth of train/ is held out."""
    train = list_images(data_dir / "train")
    sizes = Counter(path.parent.name for path in train)
    names = sorted(sizes)
    if (data_dir / "val").is_dir():
        val = list_images(data_dir / "val", tuple(names))
    else:
        spare = [path for path in train if sizes[path.parent.name] > 1]  # a class of one image stays in training
        val = spare[9::10] or spare[-1:]
        train = sorted(set(train) - set(val))
    require(val, f"{data_dir} has no image to spare for validation: add images, or DIR/val/<class>/<image>")
    paths = train if split == "train" else val
    paths = random.Random(0).sample(paths, len(paths))  # shuffled, so that any first part shows all classes
    for first in range(0, len(paths), 20000):
        part = paths[first : first + 20000]
        images = np.stack([read_image(path, image_size) for path in tqdm(part, f"images of {split}", disable=RANK > 0)])
        yield images, np.array([names.index(path.parent.name) for path in part]), names


@lru_cache  # both splits list train/, and what is passed over is said once
def list_images(folder: Path, classes: tuple[str, ...] = ()) -> list[Path]:
    """All images FOLDER/<class>/<image> of these classes, or of all, sorted. Says what it passes over."""
    inside = [path for path in sorted(folder.glob("[!.]*/[!.]*")) if path.parent.name != "__MACOSX"]
    images = [path for path in inside if path.suffix.lower() in Image.registered_extensions()]
    folders = sum(path.is_dir() for path in inside)
    others = len(inside) - len(images) - folders
    if others or folders:
        print(f"only images right inside {folder}/<class>/ are read: passed over {others} files, {folders} folders")
    if classes:
        images = [path for path in images if path.parent.name in classes]
    names = {path.name for path in folder.glob("[!.]*") if path.is_dir()} - {"__MACOSX"}
    left_out = names - {path.parent.name for path in images}
    if left_out:
        print(f"{folder}: left out, as they hold no images or are not in train/: {', '.join(sorted(left_out))}")
    require(images, f"{folder} holds no images: lay them out as {folder}/<class>/<image>")
    return images


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Any image that Pillow reads, upright, on white, resized to cover SxS, then cropped: uint8 (S, S, 3)."""
    with reading(path, "check that it is an image that can be opened"), Image.open(path) as image:
        require(image.width * image.height < 89e6, f"{path} has {image.width}x{image.height} pixels: make it smaller")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey
            upright = Image.fromarray((np.asarray(upright) / 257).astype(np.uint8))
        upright = upright.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
        return np.asarray(ImageOps.fit(image, (image_size, image_size), Image.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------------
# Training, for both stages: schedules and draws are pure functions of the step
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the fraction `warmup` of all steps, then cosine to peak / 40 (Sec. 4.1: 4e-4 to 1e-5)."""
    warm_steps = warmup * steps
    if step < warm_steps:
        return peak * (step + 1) / (warm_steps + 1)
    progress = (step - warm_steps) / (steps - warm_steps)
    return peak * (0.025 + 0.975 * (1 + math.cos(math.pi * progress)) / 2)


@lru_cache(maxsize=2)  # a batch can lie in two epochs
def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Which of `count` samples a step takes: (batch_size,) int64. Every epoch is a fresh permutation of all of them."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_permutation(count, seed, place // count)[place % count] for place in places])


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as in Sec. 4.1. As in the authors' code, biases, norms, tables and the last adaLN layer do not decay."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        no_decay = p.dim() == 1 or "embed" in name or "adaln_before_head" in name
        groups[no_decay]["params"].append(p)
    return torch.optim.AdamW(groups, betas=(0.9, 0.96), fused=p.device.type != "mps")


DIVERGED = "the run has diverged, try a lower learning rate"


class Training:
    """One stage of a run: model, optimizer, progress bar, and the state.pt from which they go on after a stop."""

    def __init__(self, stage: str, model: nn.Module, steps: int, weight_decay: float, args: Namespace):
        self.stage, self.args = stage, args
        self.shown, self.state = {}, {"step": 0}
        scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
        self.stateful = {"model": model, "optimizer": adamw(model, weight_decay), "scaler": scaler}
        if (args.out / "state.pt").exists():
            state = load_file(args.out / "state.pt")
            require("stage" in state, f"{args.out / 'state.pt'} was not written by train_tiny.py")
            if state["stage"] == stage:
                self.state = state
                for name, part in self.stateful.items():
                    if state[name]:  # the scaler of a float32 run saves {}, which that of a float16 run refuses
                        part.load_state_dict(state[name])
        self.parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model  # waits until all are here
        first = self.state["step"]
        self.bar = tqdm(range(first, steps), stage, steps, initial=first, disable=RANK > 0)
        # From here on there is a run that --resume can go on with.
        write_atomically(args.out / "run.json", lambda path: path.write_text(json.dumps(args.options, indent=1)))

    def steps(self) -> Iterator[tuple[int, bool]]:
        """The steps that are left, and whether this process evaluates and saves after the step.

        torch is seeded anew for each, so that its draws do not depend on earlier ones.
        """
        for step in self.bar:
            torch.manual_seed(zlib.crc32(f"{self.args.seed} {self.stage} {step}".encode()))
            is_due = (step + 1) % self.args.eval_every == 0 or step + 1 == self.bar.total
            self.bar.set_description(f"{self.stage}, evaluating" if is_due else self.stage, refresh=is_due)
            yield step, is_due and RANK == 0

    def update(self, loss: Tensor, lr: float) -> float:
        """One optimizer step with the gradient norm clipped at 1 (Sec. 4.1); returns the mean loss of all processes.

        A gradient that is not finite stops the run before it overwrites a checkpoint; with float16 the step is skipped.
        """
        model, optimizer, scaler = self.stateful.values()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        require(scaler.is_enabled() or norm.isfinite(), f"the gradient is not finite: {DIVERGED}")
        scaler.step(optimizer)
        scaler.update()
        loss = loss.detach() / WORLD
        if WORLD > 1:
            dist.all_reduce(loss)
        return loss.item()

    def show(self, **figures: float):
        """Put figures at the end of the progress bar, beside those shown before."""
        self.shown |= figures
        self.bar.set_postfix(self.shown, refresh=False)

    def save(self, step: int, **extra: object):
        """Write state.pt: all that this stage changes as it trains."""
        content = {name: part.state_dict() for name, part in self.stateful.items()}
        content |= {"kind": "state", "stage": self.stage, "step": step + 1, **extra}
        write_atomically(self.args.out / "state.pt", partial(torch.save, content))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the tokenizer, and all images as tokens
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(args: Namespace, images: np.ndarray, held_out: np.ndarray) -> VQTokenizer:
    """Train on uint8 images (N, S, S, 3) and write tokenizer.pt; or load that file, if it is there."""
    path = args.out / "tokenizer.pt"
    if path.exists():
        return load_model(path, "tokenizer")[0].to(args.device)
    torch.manual_seed(args.seed)
    model = VQTokenizer(build_config(VQConfig, args)).to(args.device)
    if args.device.type != "mps":
        model = model.to(memory_format=torch.channels_last)  # faster convolutions
    steps = args.tokenizer_steps
    training = Training("tokenizer", model, steps, 0.0, args)
    codebook = training.state.get("codebook")
    if codebook is not None:
        codebook = CodebookEMA(*(tensor.to(args.device) for tensor in codebook))
    for step, is_due in training.steps():
        rows = batch_indices(step, args.tokenizer_batch, len(images), args.seed)
        batch = to_float(images[rows], args.device)
        if args.flip and step % 2:  # every other batch is mirrored
            batch = batch.flip(3)
        with autocast(args):
            if step == min(steps // 4, 500):  # until now a plain autoencoder, so that codes start from useful latents
                latents = model.encoder(batch).detach().float()
                codebook = CodebookEMA.from_latents(model.quantize, flatten_latents(latents))
            _, losses = training.parallel(batch[MINE], codebook, quantize=codebook is not None)
        loss = losses["reconstruction"] + 0.25 * losses["commitment"]
        training.update(loss, learning_rate(step, steps, args.tokenizer_lr, 0.05))
        training.show(mse=losses["reconstruction"].item())
        if is_due:
            psnr, used = evaluate_tokenizer(args, model, held_out)
            training.show(val_dB=psnr, codes_in_use=used)
            training.save(step, codebook=codebook and [codebook.counts, codebook.sums])
    save_checkpoint(path, "tokenizer", model)
    return model


def evaluate_tokenizer(args: Namespace, model: VQTokenizer, held_out: np.ndarray) -> tuple[float, float]:
    """PSNR (dB, mean over images) and share of codes used on 256 held-out images; writes reconstructions.png."""
    images = to_float(held_out[:256], args.device)
    with autocast(args):
        tokens = model.encode(images)
    decoded = model.decode(tokens)
    errors = (decoded - images).square().mean((1, 2, 3)).clamp(min=1e-10)
    pairs = torch.stack([images[:50], decoded[:50]], dim=1).flatten(0, 1)
    save_sheet(args.out / "reconstructions.png", pairs, 10)
    return -10 * errors.log10().mean().item(), codes_used(tokens, args.codebook_size)


def encode_images(args: Namespace, model: VQTokenizer, images: np.ndarray) -> np.ndarray:
    """Tokens (N, T) int32 of uint8 images (N, S, S, 3)."""
    tokens = []
    for batch in tqdm(np.array_split(images, len(images) // 256 + 1), "tokens", disable=RANK > 0):
        with autocast(args):
            tokens.append(model.encode(to_float(batch, args.device)).int().cpu())
    return torch.cat(tokens).numpy()


def make_tokens(args: Namespace):
    """Train the tokenizer, unless it is there, and write tokens.npz: every image as tokens (Sec. 4.1).

    With --flip this includes mirror images of the training split. Only the first part of the validation split is used.
    """
    rar.scan_order(args.scan, build_config(VQConfig, args).grid_size)  # raises if the grid does not allow this scan
    held_out, val_labels, names = next(read_parts(args.config, "val", args.data_dir, args.image_size))
    model, tokens, labels = None, [], []
    for images, part_labels, _ in read_parts(args.config, "train", args.data_dir, args.image_size):
        if model is None:  # the first part is enough to train the tokenizer
            model = train_tokenizer(args, images, held_out)
        for view in [images, images[:, :, ::-1]] if args.flip else [images]:
            tokens.append(encode_images(args, model, view))
            labels.append(part_labels)
    content = {"tokens": np.concatenate(tokens), "labels": np.concatenate(labels)}
    content |= {"val_tokens": encode_images(args, model, held_out), "val_labels": val_labels}
    content |= {"codebook_size": model.config.codebook_size, "grid_size": model.config.grid_size}
    content |= {"class_names": names, "tokenizer": weights_hash(model)}
    write_atomically(args.out / "tokens.npz", partial(np.savez, **content))


def load_tokens(path: Path) -> tuple[dict, VQTokenizer | None]:
    """Read and check a tokens.npz and the tokenizer.pt beside it, if there is one.

    Raises InputError if the file is damaged or was not made by that tokenizer.
    """
    with reading(path, "check its name, or make it again"), np.load(path, allow_pickle=False) as arrays:
        data = dict(arrays)
        V, T, C = data["codebook_size"], data["grid_size"] ** 2, len(data["class_names"])
        for prefix in ("", "val_"):
            tokens, labels = data[f"{prefix}tokens"], data[f"{prefix}labels"]
            fits = tokens.shape == (len(labels), T) and 0 <= tokens.min() <= tokens.max() < V
            fits = fits and 0 <= labels.min() <= labels.max() < C
            require(fits, f"{path}: {prefix}tokens do not fit {T} places, {V} codes and {C} classes")
        made_by, beside = str(data["tokenizer"]), path.parent / "tokenizer.pt"
    if not beside.exists():
        return data, None
    tokenizer, _ = load_model(beside, "tokenizer")
    require(made_by == weights_hash(tokenizer), f"{path} was not made by {beside}: move one of them away")
    return data, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the transformer
# ---------------------------------------------------------------------------------------------------------------------


def token_batch(data: dict, prefix: str, rows: np.ndarray | slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and labels (B,) of these rows, int64."""
    tokens, labels = data[f"{prefix}tokens"][rows], data[f"{prefix}labels"][rows]
    return torch.from_numpy(tokens).long().to(device), torch.from_numpy(labels).long().to(device)


@torch.no_grad()
def validation_losses(args: Namespace, model: RAR, data: dict, base: Tensor) -> list[float]:
    """Nats per token on the first 256 held-out images: in the base order, then in random orders, always the same."""
    tokens, labels = token_batch(data, "val_", slice(256), args.device)
    losses = []
    for ratio in (0.0, 1.0):
        generator = torch.Generator().manual_seed(args.seed)
        orders = sample_orders(*tokens.shape, ratio, base_order=base, generator=generator, device=args.device)
        shuffled = tokens.gather(1, orders)
        with autocast(args):
            logits = model(shuffled[:, :-1], labels, orders)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), shuffled.flatten()).item())
    require(math.isfinite(sum(losses)), f"validation loss {losses}: {DIVERGED}")
    return losses


def train_rar(args: Namespace, data: dict, tokenizer: VQTokenizer | None):
    """Train on tokens; writes rar.pt, rar_random.pt (the last weights with r = 1), metrics.csv and sample sheets."""
    torch.manual_seed(args.seed)
    V, C, grid = int(data["codebook_size"]), len(data["class_names"]), int(data["grid_size"])
    sizes = {"codebook_size": V, "num_classes": C, "seq_len": grid**2, "mlp_dim": 4 * args.dim}
    model = RAR(build_config(RARConfig, args, attn_dropout=args.dropout, **sizes)).to(args.device)
    base, steps = rar.scan_order(args.scan, grid), args.steps
    start, end = args.anneal_start * steps, args.anneal_end * steps
    settings = args.options | {"class_names": data["class_names"].tolist(), "tokenizer": str(data["tokenizer"])}
    training = Training("rar", model, steps, 0.03, args)
    metrics, losses = training.state.get("metrics", []), []
    for step, is_due in training.steps():
        rows = batch_indices(step, args.batch_size, len(data["tokens"]), args.seed)
        tokens, labels = token_batch(data, "", rows, args.device)
        labels = rar.drop_labels(labels, C, rate=0.1)
        r = rar.random_ratio(step, start, end)  # Eq. (5)
        orders = sample_orders(*tokens.shape, r, base_order=base, device=args.device)  # Eq. (3): one order per image
        tokens, labels, orders = tokens[MINE], labels[MINE], orders[MINE]
        shuffled = tokens.gather(1, orders)  #                                                    B, T
        with autocast(args):
            logits = training.parallel(shuffled[:, :-1], labels, orders)  #                       B, T, V
        loss = F.cross_entropy(logits.float().flatten(0, 1), shuffled.flatten())
        lr = learning_rate(step, steps, args.lr, args.warmup)
        losses.append(training.update(loss, lr))
        training.show(nats=losses[-1], r=r, lr=lr)
        # Keep the last weights with r = 1. With start = 0 they would come from the very first step, and be of no use.
        if start > 0 and r == 1 and rar.random_ratio(step + 1, start, end) < 1:
            save_checkpoint(args.out / "rar_random.pt", "rar", model, step=step + 1, **settings)
        if is_due:
            model.eval()
            val = validation_losses(args, model, data, base)
            metrics.append([step + 1, r, lr, sum(losses) / len(losses), *val])
            write_metrics(args.out / "metrics.csv", metrics)
            if tokenizer is not None:
                draw_samples(args, model, tokenizer, base, step)
            training.show(val_nats=val[0])
            training.save(step, metrics=metrics)
            losses = []
            model.train()
    save_checkpoint(args.out / "rar.pt", "rar", model, step=steps, **settings)


def write_metrics(path: Path, rows: list):
    """Write metrics.csv: r in 0..1, losses in nats per token, the training loss averaged since the previous row."""
    header = "step,r,lr,train_loss,val_loss_scan,val_loss_random"
    write_atomically(path, partial(np.savetxt, X=rows, fmt="%.6g", delimiter=",", header=header, comments=""))


def draw_samples(args: Namespace, model: RAR, tokenizer: VQTokenizer, order: Tensor, step: int):
    """Write samples-<step>.png and samples.png: eight rows, a column for each of the first ten classes."""
    labels = torch.arange(min(model.config.num_classes, 10), device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    scale, power = args.guidance_scale, args.guidance_power
    tokens = model.generate(
        labels.repeat(8), guidance_scale=scale, guidance_power=power, order=order, generator=generator
    )
    images = tokenizer.decode(tokens)
    for name in (f"samples-{step + 1:06}.png", "samples.png"):
        save_sheet(args.out / name, images, len(labels))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

# A line is an option, its type or its choices, its default (- is none), and its meaning.
OPTIONS = f"""
--config    {"|".join(PRESETS)}   digits     data set and sizes (default: digits)
--data-dir  text                               -          folder of the data (default: data)
--tokens    text                               -          train on this tokens.npz, without images
--out       path                               -          folder of the run (default: a new one in runs/)
--device    text                               -          cuda, mps or cpu (default: the first there is)
--dtype     float32|bfloat16|float16           -          of matrix products (default: by device)
--order     rar|raster|random                  rar        r falls from 1 to 0, stays 0, or stays 1 (default: rar)
--scan      {"|".join(rar.SCANS)}               row-major  the fixed order, in which rar ends (default: row-major)
"""


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The options of a run: those on the command line, else the defaults of --config; with --resume, the run's."""
    parser = Parser(__doc__, OPTIONS, epilog=f"defaults of each --config:\n{TABLE}")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out (default: the newest one)")
    for name, *_, text in SETTINGS:
        kind = type(PRESETS["digits"][name])
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(option(name), help=text, **how)
    args = parser.parse_args(argv)  # this pass is for --config and --resume, which decide on the defaults
    saved = {}
    if args.resume:
        run = args.out or newest_run("run.json")
        with reading(run / "run.json", "leave out --resume to start a run"):
            saved = json.loads((run / "run.json").read_text()) | {"out": run}
            args.config = saved["config"]
    parser.set_defaults(**PRESETS[args.config] | saved)
    args = parser.parse_args(argv)
    for name in saved.keys() - {"data_dir"}:  # the data may have been moved
        require(getattr(args, name) == saved[name], f"--resume keeps the run's options: leave out {option(name)}")
    check_args(args)
    numbered = (Path(f"runs/{args.config}-{i}") for i in range(1, 10**6))
    args.out = args.out or next(run for run in numbered if not run.exists())
    if args.order != "rar":  # r is always 1 or always 0: the corners of Tab. 2
        args.anneal_start = args.anneal_end = 1.0 if args.order == "random" else 0.0
    is_run = (args.out / "run.json").exists()
    require(args.resume or not is_run, f"{args.out} holds a run: add --resume or name another --out")
    args.options = {name: value for name, value in vars(args).items() if name not in ("out", "device", "resume")}
    return args


def option(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_args(args: Namespace):
    """Raise InputError, naming the option, for a value outside its range."""
    for name in PRESETS["digits"]:
        value = getattr(args, name)
        least = 1 if type(value) is int and name != "seed" else 0
        require(value >= least, f"{option(name)} must be {least} or more, got {value}")
    require(args.dropout < 1, f"--dropout must be below 1, got {args.dropout}")
    start, end = args.anneal_start, args.anneal_end
    require(start <= end <= 1, f"--anneal-start {start} and --anneal-end {end} must be fractions with start <= end")
    RARConfig(1, 1, 1, dim=args.dim, heads=args.heads)  # raises if --heads does not divide --dim
    for batch in (args.batch_size, args.tokenizer_batch):
        require(batch % WORLD == 0, f"batches of {batch} cannot be shared by {WORLD} processes")


def newest_run(holding: str) -> Path:
    """The folder in runs/ whose file of this name was written last."""
    found = sorted(Path("runs").glob(f"*/{holding}"), key=os.path.getmtime)
    require(found, f"no folder in runs/ holds a {holding}: run python train_tiny.py first, or name a folder")
    return found[-1].parent


def run_stages(args: Namespace):
    """Train what the run still lacks."""
    path = Path(args.tokens or args.out / "tokens.npz")
    if not args.tokens and not path.exists():
        make_tokens(args)
    if WORLD > 1:
        dist.barrier()  # until the first process has written the tokens
    data, tokenizer = load_tokens(path)
    if tokenizer is not None:
        tokenizer.to(args.device)
        if args.tokens:  # sample.py looks for the tokenizer in the folder of the run
            save_checkpoint(args.out / "tokenizer.pt", "tokenizer", tokenizer)
    if not (args.out / "rar.pt").exists():
        train_rar(args, data, tokenizer)
    if RANK == 0:
        (args.out / "state.pt").unlink(missing_ok=True)
    if WORLD > 1:
        dist.barrier()  # torch may abort a process that ends while another one still runs


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    setup_ddp(args.device)
    print(f"run {args.out}: {args.config} on {args.device}, {args.dtype}")
    try:
        run_stages(args)
    except KeyboardInterrupt:
        begun = (args.out / "run.json").exists()
        go_on = f"to go on: python train_tiny.py --resume --out {args.out}" if begun else "nothing was trained yet"
        raise KeyboardInterrupt(f"stopped; {go_on}") from None
    if (args.out / "tokenizer.pt").exists():
        print(f"pictures: {args.out / 'samples.png'} and, one for each evaluation, {args.out / 'samples-*.png'}")
        print(f"next: python sample.py --run {args.out} --n 40")
    else:
        print(f"no pictures: put the tokenizer.pt that made {args.tokens} into {args.out} to draw samples")
    tokens = args.tokens or args.out / "tokens.npz"
    print(f"another transformer on the same tokens: python train_tiny.py --config {args.config} --tokens {tokens}")


if __name__ == "__main__":
    run_main(main)
