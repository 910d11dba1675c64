"""Train RAR end to end on one machine: a VQ tokenizer, all images as tokens, and the transformer on these tokens.

    python train_tiny.py                                    # coloured digits, drawn here
    python train_tiny.py --config cifar10                   # downloaded, or --data-dir DIR
    python train_tiny.py --config imagenet64 --data-dir DIR # DIR/train_data_batch_*.npz, DIR/val_data.npz
    python train_tiny.py --config folder --data-dir DIR     # DIR/train/<class>/<image>, and DIR/val/<class>/<image>
    python train_tiny.py --tokens tokens.npz                # a transformer alone
    python train_tiny.py --resume                           # go on with the newest run, after it was stopped

A run keeps everything in one folder, which sample.py reads. The random draws of a step are functions of (seed, stage,
step), so a resumed run draws what an unbroken one would have drawn. The transformer goes on from its last evaluation; a
tokenizer whose training was stopped starts again.

Letters: B batch, N images, T tokens of an image, V codes, C classes, S side of an image in pixels. `args` holds the
options of the run, with args.out its folder, args.device and args.dtype as torch objects, and args.rank and args.world
the number of this process and of all processes.
"""

import argparse
import json
import math
import os
import sys
import tarfile
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from rar import RAR, SCANS, RARConfig, build_model, drop_labels, load_file, random_ratio, sample_orders, scan_order
from tokenizer import CodebookEMA, VQConfig, VQTokenizer, codes_used, flatten_latents

# ---------------------------------------------------------------------------------------------------------------------
# Presets: the value of each option in digits, cifar10, imagenet64 and folder, and what it means
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = {  # digits, cifar10, imagenet64, folder
    "image_size": (32, 32, 64, 64, "side of the images in pixels"),
    "codebook_size": (128, 1024, 1024, 1024, "number of codes"),
    "code_dim": (8, 16, 16, 16, "length of a code"),
    "channels": (16, 32, 64, 32, "width of the tokenizer"),
    "res_blocks": (1, 1, 1, 1, "residual blocks of the tokenizer at each resolution"),
    "flip": (False, True, True, True, "train on mirror images too"),
    "tokenizer_steps": (400, 5000, 30000, 1200, "training steps of the tokenizer"),
    "tokenizer_batch": (32, 32, 32, 32, "images per step of the tokenizer"),
    "tokenizer_lr": (2e-3, 2e-3, 1e-3, 2e-3, "peak learning rate of the tokenizer"),
    "dim": (128, 256, 384, 256, "width of the transformer"),
    "depth": (4, 6, 12, 6, "blocks of the transformer"),
    "heads": (4, 8, 6, 8, "attention heads"),
    "dropout": (0.0, 0.0, 0.0, 0.0, "dropout rate"),
    "target_aware": (True, True, True, True, "the second position table, Eq. 4"),
    "steps": (750, 6500, 150000, 5000, "training steps of the transformer"),
    "batch_size": (32, 64, 64, 16, "images per step of the transformer"),
    "lr": (6e-3, 2e-3, 1e-3, 1.5e-3, "peak learning rate of the transformer"),
    "warmup": (0.1, 0.05, 0.05, 0.05, "fraction of the steps in which the learning rate rises"),
    "anneal_start": (0.5, 0.35, 0.5, 0.5, "fraction of the steps in which all orders are random"),
    "anneal_end": (0.75, 0.6, 0.75, 0.75, "fraction of the steps after which none is random"),
    "guidance_scale": (1.5, 4.0, 3.0, 3.0, "classifier-free guidance of the samples; 1 is none"),
    "guidance_power": (0.0, 0.0, 0.0, 0.0, "exponent of the power-cosine guidance schedule; 0 is constant"),
    "eval_every": (125, 500, 1000, 500, "steps between evaluations, each with pictures and a checkpoint"),
    "seed": (0, 0, 0, 0, "seed of all random draws"),
}
PRESETS = {}
for i, name in enumerate(("digits", "cifar10", "imagenet64", "folder")):
    PRESETS[name] = {option: row[i] for option, row in SETTINGS.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Data: a reader yields a split, "train" or "val", in one block or in several, so that not all need fit in memory.
# A block is images, uint8 (N, S, S, 3), their labels, int (N,), and the names of all classes.
# ---------------------------------------------------------------------------------------------------------------------

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#b04be6", "#42d4f4", "#f5f5f5")


def read_digits(split, data_dir, image_size):
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
CIFAR10_RECORDS = 10000  # images in each of its files
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def read_cifar10(split, data_dir, image_size):
    """CIFAR-10's binary version, unpacked in a folder or as its archive, which is downloaded if both are missing.

    A file holds records of a label byte and three planes of 1024 bytes.
    """
    if image_size != 32:
        sys.exit(f"cifar10 images are 32x32: leave out --image-size {image_size}")
    files = ["test_batch.bin"] if split == "val" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = data_dir / "cifar-10-batches-bin"
    if folder.exists():
        content = b"".join((folder / file).read_bytes() for file in files)
    else:
        download(CIFAR10_URL, data_dir / "cifar-10-binary.tar.gz", CIFAR10_SHA256)
        with tarfile.open(data_dir / "cifar-10-binary.tar.gz") as tar:
            content = b"".join(tar.extractfile(f"{folder.name}/{file}").read() for file in files)
    if len(content) != len(files) * CIFAR10_RECORDS * 3073:
        sys.exit(
            f"{data_dir}: a file of CIFAR-10 does not hold {CIFAR10_RECORDS} images: delete it and download it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    yield images, records[:, 0].astype(int), CIFAR10_NAMES


def download(url, path, sha256=None):
    """Fetch `url` into `path`, with a progress bar, unless the file is there."""
    if not path.exists():
        print(f"downloading {url}; if this fails, fetch it by hand: curl -L -C - -o {path} {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)


def read_imagenet64(split, data_dir, image_size):
    """The npz files of the downsampled ImageNet, one after another. Labels are renumbered over the training files."""
    train = sorted(data_dir.glob("train_data_batch_*.npz"))
    if not train:
        sys.exit(f"{data_dir} holds no train_data_batch_*.npz: name their folder with --data-dir")
    classes = np.unique(np.concatenate([np.unique(np.load(path, allow_pickle=False)["labels"]) for path in train]))
    for path in train if split == "train" else [data_dir / "val_data.npz"]:
        arrays = np.load(path, allow_pickle=False)
        data, labels = arrays["data"], arrays["labels"]
        N, width = len(data), 3 * image_size**2
        if N == 0 or data.dtype != np.uint8 or data.shape != (N, width) or labels.shape != (N,):
            found = f"{data.dtype} {data.shape} and {labels.shape}"
            sys.exit(f"{path}: data must be uint8 (N, {width}), plane by plane, and labels (N,), but they are {found}")
        known = np.isin(labels, classes)  # always, in the training files
        if split == "val":
            print(f"val: {N - known.sum()} images are left out, as their classes are not in training")
            data, labels = data[known], labels[known]
        images = data.reshape(-1, 3, image_size, image_size).transpose(0, 2, 3, 1)
        yield images, np.searchsorted(classes, labels), [f"label-{c}" for c in classes]


def read_folder(split, data_dir, image_size):
    """DIR/train/<class>/<image> and DIR/val/<class>/<image>. Without val/ a tenth of each class is held out."""
    train = sorted(data_dir.glob("train/[!.]*/[!.]*"))  # no hidden files
    val = sorted(data_dir.glob("val/[!.]*/[!.]*"))
    names = sorted({path.parent.name for path in train})
    if not val:  # every tenth image of a class, from its second on
        for name in names:
            val += sorted((data_dir / "train" / name).glob("[!.]*"))[1::10]
        train = sorted(set(train) - set(val))
    paths = train if split == "train" else [path for path in val if path.parent.name in names]
    if not paths:
        sys.exit(f"{data_dir} has no images for {split}: put them into train/<class>/ (and val/<class>/) there")
    paths = np.random.default_rng(0).permutation(paths)  # so that any first block shows all classes
    for first in range(0, len(paths), 20000):
        images, labels = [], []
        for path in tqdm(paths[first : first + 20000], f"images of {split}"):
            try:
                images.append(read_image(path, image_size))
                labels.append(names.index(path.parent.name))
            except Exception as error:
                tqdm.write(f"skipped {path}: {error}")
        yield np.stack(images), np.array(labels), names


def read_image(path, image_size):
    """Any image that Pillow reads: upright, on white, scaled to cover SxS, cropped in the middle; uint8 (S, S, 3)."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * image_size, 2 * image_size))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (image_size, image_size), Image.LANCZOS))


READERS = {"digits": read_digits, "cifar10": read_cifar10, "imagenet64": read_imagenet64, "folder": read_folder}


def load_images(name: str, split: str, data_dir: str | Path = "data", image_size: int | None = None) -> tuple:
    """All images of a split, "train" or "val", uint8 (N, S, S, 3), their labels (N,), and the class names."""
    assert split in ("train", "val"), f"a split is train or val, not {split}"
    blocks = READERS[name](split, Path(data_dir), image_size or PRESETS[name]["image_size"])
    images, labels, names = zip(*blocks)
    return np.concatenate(images), np.concatenate(labels), names[0]


# ---------------------------------------------------------------------------------------------------------------------
# Files and pictures
# ---------------------------------------------------------------------------------------------------------------------


def tmp(path):
    """The name under which a file is written before publish() renames it; it has the same ending."""
    return path.with_name(f"tmp-{path.name}")


def publish(path):
    """Rename the file tmp(path) to `path`, so that a run that is killed leaves no half file of this name.

    On Windows that fails while another program has the old file open. After two seconds of trying, this raises for
    weights and tokens; a picture or metrics.csv is left as it was.
    """
    for _ in range(20):
        try:
            os.replace(tmp(path), path)
            return
        except PermissionError:
            time.sleep(0.1)
    if path.suffix in (".pt", ".npz"):
        raise PermissionError(f"{path} cannot be replaced: is it open in another program?")
    print(f"{path} was not written: is it open in another program?")


def save_model(path, model, **others):
    """Write config and weights of a model, and other plain values, as a file that weights_only accepts."""
    torch.save({"config": asdict(model.config), "weights": model.state_dict(), **others}, tmp(path))
    publish(path)


def build_tokenizer(saved):
    """The tokenizer that was saved as a dict of config and weights; None for None."""
    if saved is not None:
        return build_model(VQTokenizer, VQConfig(**saved["config"]), saved["weights"])


def load_run(folder: str | Path, weights: str = "rar.pt") -> tuple[RAR, VQTokenizer | None, dict]:
    """The model of a run, its tokenizer, if it has one, and what else the file holds. ValueError for a damaged file."""
    content = load_file(Path(folder) / weights)
    model = build_model(RAR, RARConfig(**content.pop("config")), content.pop("weights"))
    return model, build_tokenizer(content.pop("tokenizer")), content


def newest_run(holding):
    """The folder in runs/ whose file of this name was written last."""
    found = sorted(Path("runs").glob(f"*/{holding}"), key=os.path.getmtime)
    if not found:
        sys.exit(f"no folder in runs/ holds a {holding}: run python train_tiny.py first, or name a folder")
    return found[-1].parent


def to_uint8(images):
    """Float (N, 3, H, W) in [0, 1] -> uint8 (N, H, W, 3)."""
    return images.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images, device="cpu"):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1]. It copies, as torch.from_numpy refuses mirrored arrays."""
    return torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float() / 255


def make_sheet(images, columns):
    """One picture of float images (N, 3, S, S) in [0, 1], row by row, each enlarged to at least 64 pixels."""
    tiles = to_uint8(F.interpolate(images.float(), scale_factor=math.ceil(64 / images.shape[-1])))
    side = len(tiles[0]) + 2  # a white line around each
    sheet = Image.new("RGB", (columns * side, math.ceil(len(tiles) / columns) * side), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(tile), (column * side + 1, row * side + 1))
    return sheet


def save_sheet(path, images, columns):
    """Write the picture of make_sheet."""
    make_sheet(images, columns).save(tmp(path))
    publish(path)


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


def seed_of(*words):
    """A seed from words such as the run's seed, the stage and the step; hash() would change from run to run."""
    return zlib.crc32(" ".join(str(word) for word in words).encode())


@lru_cache(maxsize=2)  # a batch can lie in two epochs
def epoch_rows(epoch, count, seed, stage):
    """All of `count` samples in the random order of an epoch."""
    return np.random.default_rng(seed_of(seed, stage, "epoch", epoch)).permutation(count)


def batch_rows(step, batch_size, count, seed, stage):
    """Which of `count` samples a step takes: (batch_size,) int64. Every epoch is a fresh permutation of all of them."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_rows(place // count, count, seed, stage)[place % count] for place in places])


def make_optimizer(model, weight_decay):
    """AdamW as in Sec. 4.1. As in the authors' code, biases, norms, tables and adaln_before_head do not decay."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        is_free = p.dim() == 1 or "embed" in name or "adaln_before_head" in name
        (no_decay if is_free else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.96), fused=p.device.type != "mps")


def autocast(args):
    """Matrix products in the run's dtype, weights in float32."""
    return nullcontext() if args.dtype == torch.float32 else torch.autocast(args.device.type, args.dtype)


def update(model, optimizer, scaler, loss, lr):
    """One step of AdamW with the gradient norm clipped at 1 (Sec. 4.1). float16 skips it if a gradient overflowed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def check_loss(loss, scaler=None):
    """End a run whose loss is not finite. float16 skips such steps, so there the loss scale has to fall below 1."""
    diverged = not math.isfinite(loss)
    if scaler is not None and scaler.is_enabled():
        diverged = scaler.get_scale() < 1
    if diverged:
        sys.exit("the loss is not finite: try a lower learning rate, or --dtype float32")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the tokenizer, and all images as tokens
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(args, images, val_images):
    """Train on uint8 images (N, S, S, 3) and write tokenizer.pt; returns the model."""
    torch.manual_seed(args.seed)
    config = VQConfig(args.image_size, args.codebook_size, args.code_dim, args.channels, res_blocks=args.res_blocks)
    model = VQTokenizer(config).to(args.device)
    if args.device.type != "mps":
        model = model.to(memory_format=torch.channels_last)  # faster convolutions
    optimizer = make_optimizer(model, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    steps, codebook, figures = args.tokenizer_steps, None, {}
    bar = tqdm(range(steps), "tokenizer")
    for step in bar:
        torch.manual_seed(seed_of(args.seed, "tokenizer", step))  # for the random choice of new codes
        rows = batch_rows(step, args.tokenizer_batch, len(images), args.seed, "tokenizer")
        batch = to_float(images[rows], args.device)  #                                            B, 3, S, S
        if args.flip and step % 2:  # every other batch is mirrored
            batch = batch.flip(3)
        with autocast(args):
            # A plain autoencoder at first, so that codes start from useful latents.
            if codebook is None and step >= min(steps // 4, 500):
                latents = flatten_latents(model.encoder(batch).detach().float())
                if latents.isfinite().all():
                    codebook = CodebookEMA.from_latents(model.quantize, latents)
            _, losses = model(batch, codebook, quantize=codebook is not None)
        loss = losses["reconstruction"] + 0.25 * losses["commitment"]
        update(model, optimizer, scaler, loss, learning_rate(step, steps, args.tokenizer_lr, 0.05))
        check_loss(loss.item(), scaler)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            figures = evaluate_tokenizer(args, model, val_images)
        bar.set_postfix(mse=losses["reconstruction"].item(), **figures, refresh=False)
    save_model(args.out / "tokenizer.pt", model, **figures)
    return model


def evaluate_tokenizer(args, model, val_images):
    """PSNR in dB, mean over held-out images, and share of codes used; writes reconstructions.png."""
    images = to_float(val_images, args.device)
    with autocast(args):
        tokens = model.encode(images)
    decoded = model.decode(tokens)
    errors = (decoded - images).square().mean((1, 2, 3)).clamp(min=1e-10)
    pairs = torch.stack([images[:50], decoded[:50]], dim=1).flatten(0, 1)
    save_sheet(args.out / "reconstructions.png", pairs, 10)
    return {"dB": -10 * errors.log10().mean().item(), "codes_used": codes_used(tokens, model.config.codebook_size)}


def encode_images(args, model, images):
    """Tokens (N, T) int16 or int32 of uint8 images (N, S, S, 3)."""
    tokens = []
    for first in tqdm(range(0, len(images), 256), "tokens"):
        with autocast(args):
            tokens.append(model.encode(to_float(images[first : first + 256], args.device)).cpu())
    return torch.cat(tokens).numpy().astype(np.int16 if model.config.codebook_size <= 2**15 else np.int32)


def make_tokens(args):
    """Train the tokenizer, unless its file is there, and write tokens.npz: every image as tokens (Sec. 4.1).

    With --flip this includes mirror images of the training split. Of the first block of the validation split 256
    images are used, taken evenly over it, because it may be sorted by class.
    """
    reader, folder = READERS[args.config], Path(args.data_dir)
    val_images, val_labels, names = next(reader("val", folder, args.image_size))
    some = np.linspace(0, len(val_labels) - 1, min(len(val_labels), 256)).astype(int)
    val_images, val_labels = val_images[some], val_labels[some]
    model, tokens, labels = None, [], []
    if (args.out / "tokenizer.pt").exists():
        model = build_tokenizer(load_file(args.out / "tokenizer.pt")).to(args.device)
    for images, block_labels, _ in reader("train", folder, args.image_size):
        if model is None:  # the first block is enough to train the tokenizer
            model = train_tokenizer(args, images, val_images)
        for view in [images, images[:, :, ::-1]] if args.flip else [images]:
            tokens.append(encode_images(args, model, view))
            labels.append(block_labels)
    content = {"tokens": np.concatenate(tokens), "labels": np.concatenate(labels)}
    print(f"train: {len(content['labels']) // (1 + args.flip):,} images of {len(names)} classes")
    content |= {"val_tokens": encode_images(args, model, val_images), "val_labels": val_labels, "class_names": names}
    content |= {"codebook_size": model.config.codebook_size, "grid_size": model.config.grid_size}
    np.savez(tmp(args.out / "tokens.npz"), **content)
    publish(args.out / "tokens.npz")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the transformer
# ---------------------------------------------------------------------------------------------------------------------


def train_rar(args, data, saved):
    """Train on tokens; writes rar.pt, rar_random.pt (the last weights with r = 1), state.pt, metrics.csv and pictures.

    A row of metrics.csv holds r in 0..1, and losses in nats per token; the training loss is averaged since the row
    before. Returns all rows.
    """
    V, C, grid = int(data["codebook_size"]), len(data["class_names"]), int(data["grid_size"])
    steps, start, end = args.steps, args.anneal_start * args.steps, args.anneal_end * args.steps
    T, base = grid**2, scan_order(args.scan, grid)
    all_tokens, all_labels = torch.from_numpy(data["tokens"]), torch.from_numpy(data["labels"])
    assert all_tokens.shape[1] == T and all_tokens.max() < V, f"tokens.npz does not hold {T} tokens of {V} codes"
    torch.manual_seed(args.seed)
    config = RARConfig(V, C, T, args.dim, args.depth, args.heads, 4 * args.dim, args.dropout, args.target_aware)
    model = RAR(config).to(args.device)
    optimizer = make_optimizer(model, weight_decay=0.03)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    tokenizer = build_tokenizer(saved)
    first, metrics, losses = 0, [], []
    if args.resume and (args.out / "state.pt").exists():
        state = load_file(args.out / "state.pt")
        first, metrics = state["step"], state["metrics"]
        model.load_state_dict(state["weights"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = args.device.type != "mps"  # the run may have begun on another device
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run began in another dtype
            scaler.load_state_dict(state["scaler"])
    parallel = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    kept = {name: getattr(args, name) for name in ("steps", "scan", "guidance_scale", "guidance_power")}
    kept |= {"tokenizer": saved, "class_names": data["class_names"].tolist()}

    bar = tqdm(range(first, steps), "rar", steps, initial=first, disable=args.rank > 0)
    for step in bar:
        # All draws are functions of the step: images, dropped labels and orders on the CPU; dropout on each device.
        rows = batch_rows(step, args.batch_size, len(all_tokens), args.seed, "rar")
        generator = torch.Generator().manual_seed(seed_of(args.seed, "rar", step))
        torch.manual_seed(seed_of(args.seed, "rar", step, "rank", args.rank))

        tokens, labels = all_tokens[rows].long(), all_labels[rows].long()  #                      B, T and B
        # exercise: define r, and the loss of this process: its images are those of rows rank, rank + world, ...
        labels = drop_labels(labels, C, rate=0.1, generator=generator)
        r = random_ratio(step, start, end)  # Eq. (5)
        orders = sample_orders(args.batch_size, T, r, base_order=base, generator=generator)  # Eq. (3)
        mine = slice(args.rank, None, args.world)  # the images of this process
        tokens, labels, orders = (x[mine].to(args.device) for x in (tokens, labels, orders))
        shuffled = tokens.gather(1, orders)  #                                                    B, T
        with autocast(args):
            logits = parallel(shuffled[:, :-1], labels, orders)  #                                B, T, V
        loss = F.cross_entropy(logits.float().flatten(0, 1), shuffled.flatten())
        # end of exercise
        lr = learning_rate(step, steps, args.lr, args.warmup)
        update(model, optimizer, scaler, loss, lr)

        loss = loss.detach() / args.world
        if args.world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
        check_loss(losses[-1], scaler)
        bar.set_postfix(nats=losses[-1], r=r, lr=lr, refresh=False)
        if args.rank > 0:
            continue  # only the first process evaluates and writes
        # The last step with r = 1: these weights still know all orders. (If it is step 0, they have learnt nothing.)
        if r == 1 and step > 0 and random_ratio(step + 1, start, end) < 1:
            save_model(args.out / "rar_random.pt", model, step=step + 1, **kept)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            model.eval()
            val = validation_losses(args, model, data, base)
            check_loss(sum(val))
            metrics.append([step + 1, r, lr, sum(losses) / len(losses), *val])
            losses = []
            header = "step,r,lr,train_loss,val_loss_scan,val_loss_random"
            np.savetxt(tmp(args.out / "metrics.csv"), metrics, "%.6g", ",", header=header, comments="")
            publish(args.out / "metrics.csv")
            if tokenizer is not None:
                draw_samples(args, model, tokenizer.to(args.device), base, step + 1)
            save_model(args.out / "rar.pt", model, step=step + 1, **kept)
            training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "metrics": metrics}
            save_model(args.out / "state.pt", model, step=step + 1, **training)
            model.train()
    return metrics


@torch.no_grad()
def validation_losses(args, model, data, base):
    """Nats per held-out token: in the base order, then in random orders, which are always the same."""
    tokens = torch.from_numpy(data["val_tokens"]).long().to(args.device)
    labels = torch.from_numpy(data["val_labels"]).long().to(args.device)
    losses = []
    for ratio in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        orders = sample_orders(*tokens.shape, ratio, base_order=base, generator=generator, device=args.device)
        shuffled = tokens.gather(1, orders)
        with autocast(args):
            logits = model(shuffled[:, :-1], labels, orders)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), shuffled.flatten()).item())
    return losses


def draw_samples(args, model, tokenizer, order, step):
    """Write samples-<step>.png and samples.png: eight rows, a column for each of the first ten classes."""
    labels = torch.arange(min(model.config.num_classes, 10), device=args.device)
    guidance = {"guidance_scale": args.guidance_scale, "guidance_power": args.guidance_power}
    generator = torch.Generator(args.device).manual_seed(0)
    tokens = model.generate(labels.repeat(8), order=order, generator=generator, **guidance)
    images = tokenizer.decode(tokens)
    for name in (f"samples-{step:06}.png", "samples.png"):
        save_sheet(args.out / name, images, len(labels))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The options of a run: those on the command line, else those of --config; with --resume, the run's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=PRESETS, help="data set and sizes (default: digits)")
    parser.add_argument("--data-dir", help="folder of the data (default: data)")
    parser.add_argument("--tokens", help="train on this tokens.npz; pictures need the tokenizer.pt beside it")
    parser.add_argument("--out", help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out (default: the newest one)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of products (default: by device)")
    parser.add_argument("--order", choices=("rar", "raster", "random"), help="r falls from 1 to 0, stays 0, or stays 1")
    parser.add_argument("--scan", choices=SCANS, help="the fixed order that training ends in (default: row-major)")
    for name, (value, *_, meaning) in SETTINGS.items():
        kind = {"action": argparse.BooleanOptionalAction} if type(value) is bool else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=meaning, **kind)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "" in given.values():
        parser.error("--data-dir, --tokens and --out cannot be empty")
    if args.resume:
        args.out = given["out"] = args.out or newest_run("run.json")
        options = json.loads(Path(args.out, "run.json").read_text())
    else:
        config = args.config or "digits"
        if args.data_dir and config == "digits":
            parser.error("--config digits draws its own images: name another --config beside --data-dir")
        options = PRESETS[config] | {"config": config, "data_dir": "data", "order": "rar", "scan": "row-major"}
    args = argparse.Namespace(**vars(args) | options | given)  # later dicts win

    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if args.world > 1 and (not args.out or args.batch_size % args.world):
        parser.error("torchrun needs --out DIR, and a --batch-size that is a multiple of the processes")
    if args.tokens and not Path(args.tokens).exists():
        parser.error(f"--tokens {args.tokens} does not exist")
    if args.order != "rar":  # r is always 1 or always 0: the corners of Tab. 2
        args.anneal_start = args.anneal_end = 1.0 if args.order == "random" else 0.0
    for name in ("warmup", "anneal_start", "anneal_end", "dropout"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} is a fraction: it must lie in 0..1, not be {getattr(args, name)}")
    if args.anneal_start > args.anneal_end:
        parser.error(f"--anneal-start {args.anneal_start} lies behind --anneal-end {args.anneal_end}")
    if args.dim % args.heads:
        parser.error(f"--dim {args.dim} is not a multiple of --heads {args.heads}")
    return args


def pick_device(name, processes=1):
    """The device asked for; otherwise cuda, mps or cpu, whichever there is first; and why it was taken."""
    if name is not None:
        return torch.device(name), "as asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available() and processes == 1:  # gloo cannot add up tensors on mps
        return torch.device("mps"), "the GPU of this Mac"
    return torch.device("cpu"), f"torch {torch.__version__} finds no GPU"


def pick_dtype(name, device):
    """The dtype asked for; otherwise bfloat16 on CUDA where it is native, float16 on other CUDA, else float32."""
    if name is None and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "mps" and name not in (None, "float32") and torch.__version__ < "2.13":
        sys.exit(f"--dtype {name} needs torch 2.13 on a Mac: before, its causal attention was wrong")
    return getattr(torch, name or "float32")


def join_processes(args):
    """Make this one of the processes that torchrun started: each with a GPU of its own, or all on the CPU."""
    backend = "gloo"
    if args.device.type == "cuda":
        if args.world > torch.cuda.device_count():
            sys.exit(f"{args.world} processes need as many GPUs, but there are {torch.cuda.device_count()}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))


def claim_folder(args):
    """Make the folder of a new run, and never use one that exists: another run may own it."""
    for name in [args.out] if args.out else [f"runs/{args.config}-{i}" for i in range(1, 10000)]:
        try:
            Path(name).mkdir(parents=True)
            return Path(name)
        except FileExistsError:
            continue
    sys.exit(f"{args.out} exists: add --resume to go on with its run, or name another --out")


def main():
    began = time.time()
    sys.stdout.reconfigure(errors="replace")  # a file's name may hold letters that the console lacks
    args = parse_args()
    if args.rank == 0 and not args.resume:
        options = json.dumps(vars(args), indent=1)
        args.out = claim_folder(args)
        tmp(args.out / "run.json").write_text(options)
        publish(args.out / "run.json")
    args.out = Path(args.out)
    args.device, why = pick_device(args.device, args.world)
    args.dtype = pick_dtype(args.dtype, args.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    if args.world > 1:
        join_processes(args)
    tokens_path = Path(args.tokens or args.out / "tokens.npz")
    tokenizer_path = tokens_path.parent / "tokenizer.pt"
    if args.rank == 0:
        print(f"run {args.out}: {args.config} on {args.device} ({why}), {args.dtype}")
        if not tokens_path.exists():
            make_tokens(args)
    if args.world > 1:
        dist.barrier()  # the others wait until the first process has written the tokens
    data = dict(np.load(tokens_path, allow_pickle=False))
    saved = load_file(tokenizer_path) if tokenizer_path.exists() else None
    metrics = train_rar(args, data, saved)
    if args.world > 1:
        dist.barrier()  # torch may abort a process that ends while another one still runs
        dist.destroy_process_group()
    if args.rank == 0:
        if saved is not None:
            print(f"tokenizer: {saved['dB']:.2f} dB, {saved['codes_used']:.0%} of the codes used on held-out images")
        *_, val_scan, _ = metrics[-1]
        print(f"transformer: {val_scan:.3f} nats per held-out token in {args.scan} order")
        print(f"{(time.time() - began) / 60:.1f} minutes; pictures and metrics.csv are in {args.out}")
        print(f"next: python sample.py --run {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on, with the same --out if one was given")
