"""Draw images with a trained RAR: sheets, GIFs of generation, sets for FID evaluators, and inpainting.

`python sample.py` draws from the newest run in runs/; `--run DIR` names one. After annealing (Sec. 3.3) a model only
remembers the order that its training ended in. Other orders and inpainting therefore use the weights from just before
annealing, and the first line printed says so. What the command line leaves open comes from the run or from Tab. 6.

Letters: N images, S side of an image in pixels, T tokens of an image, K of them known, C classes.
"""

from __future__ import annotations

import train_tiny  # first, as it handles Ctrl-C during the slow imports below

# isort: split
import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rar import RAR, SCANS, TABLE_1, inpainting_order, reading, require, scan_order
from tokenizer import VQTokenizer
from train_tiny import load_model, make_sheet, read_image, save_sheet, to_float, to_uint8, write_atomically

# A line is an option, its type or its choices, its default (- is none), and its meaning.
OPTIONS = f"""
--run             path   -        folder of a run, or its name in runs/ (default: the newest)
--classes         text   -        class names or numbers, comma-separated (default: all in turn; no class for --inpaint)
--n               int    -        how many images (default: 8 of each class, at most 80)
--guidance-scale  float  1        classifier-free guidance; 1 is none (default: that of the run or Tab. 6, else 1)
--guidance-power  float  0        exponent of the power-cosine schedule; 0 is constant (default: likewise, else 0)
--temperature     float  1        divides the logits (default: 1, or that of Tab. 6)
--top-k           int    -        draw from the k likeliest codes (default: all)
--order           {"|".join(SCANS)}|random  -  order to draw in; --inpaint ignores it (default: the run's --scan)
--seed            int    0        the same command with the same seed draws the same images (default: 0)
--batch-size      int    100      images drawn at once (default: 100)
--out             path   -        one picture of all images (default: sheet.png, unless --gif or --npz is given)
--gif             path   -        the first ten rows of that picture as they fill in
--npz             path   -        write arr_0 (uint8 NHWC) and arr_1 (labels) for FID evaluators
--inpaint         path   -        an image; its part inside --mask is redrawn (default --out: inpainted.png)
--mask            text   -        x0,y0,x1,y1: the part to redraw, in pixels of the resized, cropped image
--rar             text   -        the authors' weights: a file, or a name to download: {", ".join(TABLE_1)}
--tokenizer       text   maskgit-vqgan-imagenet-f16-256  the authors' tokenizer, a file (default: downloaded)
--cache           path   ~/.cache/rar  where downloads go (default: ~/.cache/rar)
--dtype           float32|bfloat16|float16  -  type of the weights (default: as stored)
--device          text   -        cuda, mps or cpu (default: the first there is)
"""
REPOSITORIES = dict.fromkeys(TABLE_1, "yucornetto/RAR") | {"maskgit-vqgan-imagenet-f16-256": "fun-research/TiTok"}
TABLE_6 = {  # the authors' sampling settings, by the width of the model: RAR-B, L, XL, XXL
    768: {"guidance_scale": 16.0, "guidance_power": 2.75, "temperature": 1.0},
    1024: {"guidance_scale": 15.5, "guidance_power": 2.5, "temperature": 1.02},
    1280: {"guidance_scale": 6.9, "guidance_power": 1.5, "temperature": 1.02},
    1408: {"guidance_scale": 8.0, "guidance_power": 1.2, "temperature": 1.02},
}


def parse_args(**defaults: object) -> Namespace:
    """The options given on the command line, else these defaults, else those of OPTIONS.

    Called a second time once the model is known. Its defaults then include class_names, which is no option.
    """
    parser = train_tiny.Parser(__doc__, OPTIONS)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    require((args.inpaint is None) == (args.mask is None), "--inpaint IMAGE and --mask x0,y0,x1,y1 need each other")
    require(args.n is None or args.n > 0, f"--n must be 1 or more, got {args.n}")
    require(args.npz is None or args.npz.suffix == ".npz", f"--npz {args.npz} must end in .npz")
    require(args.batch_size > 0, f"--batch-size must be 1 or more, got {args.batch_size}")
    args.dtype = getattr(torch, args.dtype) if args.dtype else None
    return args


def load_run(args: Namespace) -> tuple[RAR, VQTokenizer, Namespace]:
    """A run's model and tokenizer, and the options. Other orders and inpainting use weights from before annealing."""
    run = args.run or train_tiny.newest_run("rar.pt")
    if not run.is_dir():
        run = Path("runs") / run
    path, note = run / "rar.pt", ""
    tokenizer, _ = load_model(run / "tokenizer.pt", "tokenizer")
    model, saved = load_model(path, "rar")
    scan = saved["scan"]
    if args.inpaint or args.order not in (None, scan):
        path, note = run / "rar_random.pt", ", the last weights with r = 1, as other orders and inpainting need"
        require(path.exists(), f"{run} has no rar_random.pt: it can only draw in {scan} order, and not inpaint")
        model, saved = load_model(path, "rar")
    matches = saved["tokenizer"] == train_tiny.weights_hash(tokenizer)
    require(matches, f"{path} was trained on the tokens of another tokenizer than {run / 'tokenizer.pt'}")
    print(f"drawing from {path}, {saved['step']} steps{note}")
    kept = {name: saved[name] for name in ("guidance_scale", "guidance_power", "class_names")}
    return model, tokenizer, parse_args(order=scan, **kept)


def load_released(args: Namespace) -> tuple[RAR, VQTokenizer, Namespace]:
    """The authors' model and tokenizer, and the options with the settings of Tab. 6 for a model of this size."""
    possible = not args.inpaint and args.order in (None, "row-major")
    require(possible, "the authors' weights are annealed: they draw in row-major order only, and do not inpaint")
    path = find_released(args.rar, args.cache)
    model = RAR.from_released(path, args.dtype)
    tokenizer = VQTokenizer.from_released(find_released(args.tokenizer, args.cache), args.dtype)
    config, vq = model.config, tokenizer.config
    fits = config.seq_len == vq.grid_size**2 and config.codebook_size == vq.codebook_size
    require(fits, f"{path} does not fit a tokenizer with {vq.grid_size**2} tokens of {vq.codebook_size} codes")
    print(f"drawing from {path}")
    names = [str(c) for c in range(config.num_classes)]
    return model, tokenizer, parse_args(order="row-major", class_names=names, **TABLE_6.get(config.dim, {}))


def find_released(name: str, cache: Path) -> Path:
    """The file of this name, or one of the authors' files, which is downloaded if `cache` lacks it."""
    if name not in REPOSITORIES:
        require(os.path.isfile(name), f"{name} is neither a file nor one of {', '.join(REPOSITORIES)}")
        return Path(name)
    path = cache.expanduser() / f"{name}.bin"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    train_tiny.download(f"{hub}/{REPOSITORIES[name]}/resolve/main/{path.name}", path)
    return path


def pick_classes(text: str | None, names: list[str]) -> list[int]:
    """ "0,3,7" or class names, comma-separated -> class numbers; all classes if None. A name wins over a number."""
    if text is None:
        return list(range(len(names)))
    numbers = [str(number) for number in range(len(names))]
    picked = []
    for word in [text] if text in names else text.split(","):  # a name may contain a comma
        word = word.strip()
        choices = f"0..{len(names) - 1} or names such as {', '.join(names[:10])}"
        require(word in names or word in numbers, f"class {word!r} does not exist: choose from {choices}")
        number = names.index(word) if word in names else int(word)
        if word in numbers and number != int(word):
            print(f"class {word} is taken as the name of class number {number}")
        picked.append(number)
    return picked


def mask_image(image: np.ndarray, mask: str, tokenizer: VQTokenizer) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Prepare an image, uint8 (S, S, 3), for redrawing its pixels inside the rectangle "x0,y0,x1,y1".

    Returns where these pixels are, bool (S, S, 3), the image with them covered, an order (T,) with the known cells
    first, and the tokens (1, K) of the known cells: the prefix of this order.
    """
    S, grid = len(image), tokenizer.config.grid_size
    hint = f"give x0,y0,x1,y1 with x0 < x1 and y0 < y1 in pixels of the {S}x{S} image"
    with reading(f"--mask {mask}", hint):
        x0, y0, x1, y1 = map(int, mask.split(","))
    require(0 <= x0 < x1 <= S and 0 <= y0 < y1 <= S, f"--mask {mask} is no part of the image: {hint}")
    hole = np.zeros(image.shape, bool)
    hole[y0:y1, x0:x1] = True
    grey = 0 if hole.all() else np.median(image[~hole])
    covered = np.where(hole, grey, image).astype(np.uint8)  # the encoder looks beyond a cell, so hide the hole
    touched = hole.reshape(grid, S // grid, grid, -1).any((1, 3))  # cells that are redrawn                 grid, grid
    order, K = inpainting_order(torch.from_numpy(~touched).flatten())
    prefix = tokenizer.encode(to_float(covered[None]))[:, order[:K]]
    return hole, covered, order, prefix


def save_gif(path: Path, images: Tensor, order: Tensor, columns: int):
    """Write a GIF of up to 65 frames: images (N, 3, S, S) filled in along the order (T,), the rest dark grey."""
    T, grid = len(order), math.isqrt(len(order))
    step = order.argsort().view(1, 1, grid, grid).float()  # when a cell is drawn
    step = F.interpolate(step, images.shape[-2:])
    counts = torch.linspace(0, T, min(T, 64) + 1)
    first, *others = [make_sheet(torch.where(step < count, images, 0.15), columns) for count in counts]
    times = [60] * len(others) + [2000]  # milliseconds; the GIF rests on the whole images
    write_atomically(path, lambda file: first.save(file, save_all=True, append_images=others, duration=times, loop=0))


def draw(
    args: Namespace, model: RAR, tokenizer: VQTokenizer, labels: Tensor, order: Tensor, prefix: Tensor
) -> np.ndarray:
    """Draw an image for each of labels (N,), with the tokens (1, K) of `prefix` given: uint8 (N, S, S, 3)."""
    sampling = {name: getattr(args, name) for name in ("guidance_scale", "guidance_power", "temperature", "top_k")}
    one_batch = len(labels) <= args.batch_size  # then the progress bar counts its tokens instead
    images = []  # uint8, as there may be many
    for part in tqdm(labels.split(args.batch_size), "batches", disable=one_batch):
        known = prefix.expand(len(part), -1)
        tokens = model.generate(part, order=order, prefix=known, progress=one_batch, **sampling)
        images.append(to_uint8(tokenizer.decode(tokens)))
    return np.concatenate(images)


def main():
    args = parse_args()
    device = train_tiny.pick_device(args.device)
    model, tokenizer, args = load_released(args) if args.rar else load_run(args)
    model.to(device, args.dtype)
    tokenizer.to(device)
    classes = pick_classes(args.classes, args.class_names)
    S, grid = tokenizer.config.image_size, tokenizer.config.grid_size
    torch.manual_seed(args.seed)
    if args.inpaint:
        image = read_image(args.inpaint, S)
        hole, covered, order, prefix = mask_image(image, args.mask, tokenizer)
        if args.classes is None:
            classes = [model.config.num_classes]  # the null class: what the image shows is not known
    else:
        order = torch.randperm(grid**2) if args.order == "random" else scan_order(args.order, grid)
        prefix = order[None, :0]  # nothing is known
    count = args.n or min(8 * len(classes), 80)
    labels = torch.tensor(classes, device=device)[torch.arange(count) % len(classes)]  # in turn
    images = tiles = draw(args, model, tokenizer, labels, order, prefix)
    columns = min(len(classes), count, 10)
    if args.inpaint:
        images = np.where(hole, images, image)
        tiles = np.stack([image, covered, *images])
        columns = min(count + 2, 10)
    elif len(classes) == 1:
        columns = math.ceil(count**0.5)  # about square
    if args.npz:
        write_atomically(args.npz, lambda file: np.savez(file, images, labels.cpu()))
        print(f"wrote {args.npz}: arr_0 {images.shape} uint8, arr_1 labels")
    if args.gif:
        save_gif(args.gif, to_float(tiles[: 10 * columns]), order, columns)
        print(f"wrote {args.gif}")
    if args.out or not (args.gif or args.npz):
        out = args.out or Path("inpainted.png" if args.inpaint else "sheet.png")
        save_sheet(out, to_float(tiles), columns)
        known = "the image, what is known of it, and " if args.inpaint else ""
        print(f"wrote {out}: {known}{count} new images, {columns} in a row")


if __name__ == "__main__":
    train_tiny.run_main(main)
