"""Draw images with a trained RAR: sheets, GIFs of generation, sets for FID evaluators, and inpainting.

`python sample.py` draws from the newest run in runs/; `--run DIR` names one. An annealed model only remembers the order
that its training ended in (Sec. 3.3). Other orders and inpainting therefore use the weights from just before annealing,
and the first line printed says so.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # handles Ctrl-C during the slow imports below, before run_main does

    def stop(*_):
        print("stopped", file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, stop)

import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train_tiny
from rar import RAR, SCANS, TABLE_1, inpainting_order, reading, require, scan_order
from tokenizer import VQTokenizer
from train_tiny import download, load_model, make_sheet, read_image, save_sheet, to_float, to_uint8, write_atomically

TOKENIZER_FILE = "maskgit-vqgan-imagenet-f16-256.bin"
TABLE_6 = {  # the authors' sampling settings, by the width of the model: RAR-B, L, XL, XXL
    768: {"guidance_scale": 16.0, "guidance_power": 2.75, "temperature": 1.0},
    1024: {"guidance_scale": 15.5, "guidance_power": 2.5, "temperature": 1.02},
    1280: {"guidance_scale": 6.9, "guidance_power": 1.5, "temperature": 1.02},
    1408: {"guidance_scale": 8.0, "guidance_power": 1.2, "temperature": 1.02},
}
SAMPLING = ("guidance_scale", "guidance_power", "temperature", "top_k")  # options of RAR.generate


def load_run(args: Namespace) -> tuple[RAR, VQTokenizer, dict]:
    """A run's model, tokenizer and settings. Other orders and inpainting get the weights from before annealing."""
    run = args.run or train_tiny.newest_run("rar.pt")
    if not run.is_dir():
        run = Path("runs") / run
    path, note = run / "rar.pt", ""
    tokenizer, _ = load_model(run / "tokenizer.pt", "tokenizer")
    model, settings = load_model(path, "rar")
    scan = settings["scan"]
    if args.inpaint or args.order not in (None, scan):
        path, note = run / "rar_random.pt", f", the last weights with r = 1: rar.pt only remembers {scan} order"
        require(path.exists(), f"{run} has no rar_random.pt: it can only draw in {scan} order, and not inpaint")
        model, settings = load_model(path, "rar")
    matches = settings["tokenizer"] == train_tiny.weights_hash(tokenizer)
    require(matches, f"{path} was trained on the tokens of another tokenizer than {run / 'tokenizer.pt'}")
    print(f"drawing from {path}, {settings.get('step', '?')} steps{note}")
    return model, tokenizer, settings | {"order": scan}


def load_released(args: Namespace) -> tuple[RAR, VQTokenizer, dict]:
    """The authors' model and tokenizer, from files or by name, with the settings of Tab. 6 for a model of this size."""
    possible = not args.inpaint and args.order in (None, "row-major")
    require(possible, "the authors' weights are annealed: they draw in row-major order only, and do not inpaint")
    if args.rar in TABLE_1:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        args.rar = args.cache / f"{args.rar}.bin"
        download(f"{hub}/yucornetto/RAR/resolve/main/{args.rar.name}", args.rar)
        if args.tokenizer is None:
            args.tokenizer = args.cache / TOKENIZER_FILE
            download(f"{hub}/fun-research/TiTok/resolve/main/{TOKENIZER_FILE}", args.tokenizer)
    require(os.path.isfile(args.rar), f"--rar {args.rar} is no file and none of {', '.join(TABLE_1)}")
    require(args.tokenizer, f"--rar {args.rar} needs --tokenizer {TOKENIZER_FILE}, which turns its tokens into images")
    model = RAR.from_released(args.rar, args.dtype)
    tokenizer = VQTokenizer.from_released(args.tokenizer, args.dtype)
    config, vq = model.config, tokenizer.config
    fits = config.seq_len == vq.grid_size**2 and config.codebook_size == vq.codebook_size
    require(fits, f"{args.rar} does not fit {args.tokenizer} with {vq.grid_size**2} tokens of {vq.codebook_size} codes")
    settings = {"order": "row-major", "class_names": [str(c) for c in range(config.num_classes)]}
    settings |= TABLE_6.get(config.dim, {})
    print(f"drawing from {args.rar}")
    return model, tokenizer, settings


def pick_classes(text: str | None, names: list[str]) -> list[int]:
    """ "0,3,7" or class names, comma-separated -> class numbers; all classes if None. A name wins over a number."""
    if text is None:
        return list(range(len(names)))
    numbers = {str(number): number for number in range(len(names))}
    known = numbers | {name: number for number, name in enumerate(names)}
    words = [text] if text in names else [word.strip() for word in text.split(",")]
    for word in words:
        choices = f"0..{len(names) - 1} or names such as {', '.join(names[:10])}"
        require(word in known, f"class {word!r} does not exist: choose from {choices}")
        if word in numbers and known[word] != numbers[word]:
            print(f"class {word} is taken as the name of class number {known[word]}")
    return [known[word] for word in words]


def mask_image(image: Tensor, mask: str, tokenizer: VQTokenizer, device: torch.device) -> tuple[Tensor, ...]:
    """Prepare an image (1, 3, S, S) for redrawing its pixels inside the rectangle "x0,y0,x1,y1".

    Returns these pixels as (S, S) bool, the image with them covered, an order (T,) with the known cells first, and the
    tokens (1, K) of the known cells: the prefix of this order.
    """
    S, grid = tokenizer.config.image_size, tokenizer.config.grid_size
    hint = f"give x0,y0,x1,y1 with x0 < x1 and y0 < y1 in pixels of the {S}x{S} image"
    with reading(f"--mask {mask}", hint):
        x0, y0, x1, y1 = map(int, mask.split(","))
    require(0 <= x0 < x1 <= S and 0 <= y0 < y1 <= S, f"--mask {mask} is no part of the image: {hint}")
    hole = torch.zeros(S, S, dtype=torch.bool)
    hole[y0:y1, x0:x1] = True
    touched = F.max_pool2d(hole.float()[None], S // grid).flatten() > 0  # cells of the grid, T
    order, known = inpainting_order(~touched)
    masked = torch.where(hole, image[:, :, ~hole].median(), image)  # no hint of what was in the hole
    return hole, masked, order, tokenizer.encode(masked.to(device))[:, order[:known]]


def save_gif(path: Path, images: Tensor, order: Tensor, columns: int):
    """Write a GIF of up to 65 frames: images (N, 3, S, S) filled in along the order (T,), the rest dark grey."""
    T, grid = len(order), math.isqrt(len(order))
    step = order.argsort().view(1, 1, grid, grid).float()  # when a cell is drawn
    step = F.interpolate(step, images.shape[-2:])
    counts = sorted({T * i // 64 for i in range(65)})
    first, *others = [make_sheet(torch.where(step < count, images, 0.15), columns) for count in counts]
    times = [60] * len(others) + [2000]  # milliseconds; the GIF rests on the whole images
    write_atomically(path, lambda file: first.save(file, save_all=True, append_images=others, duration=times, loop=0))


def parse_args() -> Namespace:
    """The options given on the command line."""
    parser = train_tiny.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run, or its name in runs/ (default: the newest)")
    add("--classes", help="class names or numbers, comma-separated (default: all in turn; none for --inpaint)")
    add("--n", type=int, help="how many images (default: 8 of each class, at most 80)")
    add("--guidance-scale", type=float, help="classifier-free guidance; 1 is none (default: the run's or Tab. 6's)")
    add("--guidance-power", type=float, help="exponent of the power-cosine schedule; 0 is constant (default: likewise)")
    add("--temperature", type=float, help="divides the logits (default: 1, or that of Tab. 6)")
    add("--top-k", type=int, help="draw from the k likeliest codes (default: all)")
    add("--order", choices=(*SCANS, "random"), help="order to draw in, not with --inpaint (default: the run's --scan)")
    add("--seed", type=int, default=0, help="the same command with the same seed draws the same images (default: 0)")
    add("--batch-size", type=int, default=100, help="images drawn at once (default: 100)")
    add("--out", type=Path, help="one picture of all images (default: sheet.png, unless --gif or --npz is given)")
    add("--gif", type=Path, help="the first ten rows of that picture as they grow")
    add("--npz", type=Path, help="write arr_0 (uint8 NHWC) and arr_1 (labels) for FID evaluators")
    add("--inpaint", type=Path, help="an image; its part inside --mask is redrawn (default --out: inpainted.png)")
    add("--mask", help="x0,y0,x1,y1: the part to redraw, in pixels of the resized, cropped image")
    add("--rar", help=f"the authors' weights: a file, or a name to download: {', '.join(TABLE_1)}")
    add("--tokenizer", help=f"the authors' tokenizer, {TOKENIZER_FILE}")
    add("--cache", type=Path, default=Path.home() / ".cache/rar", help="where downloads go (default: ~/.cache/rar)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default: as stored)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args()
    require((args.inpaint is None) == (args.mask is None), "--inpaint IMAGE and --mask x0,y0,x1,y1 need each other")
    require(args.n is None or args.n > 0, f"--n must be 1 or more, got {args.n}")
    require(args.npz is None or args.npz.suffix == ".npz", f"--npz {args.npz} must end in .npz")
    require(args.batch_size > 0, f"--batch-size must be 1 or more, got {args.batch_size}")
    return args


def main():
    args = parse_args()
    device = train_tiny.pick_device(args.device)
    args.dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer, settings = load_released(args) if args.rar else load_run(args)
    model.to(device, args.dtype)
    tokenizer.to(device)
    settings |= {name: value for name, value in vars(args).items() if value is not None}  # the command line wins
    options = {name: settings[name] for name in SAMPLING if name in settings}
    S, grid = tokenizer.config.image_size, tokenizer.config.grid_size
    classes = pick_classes(args.classes, settings["class_names"])
    if args.inpaint and args.classes is None:
        classes = [model.config.num_classes]  # the null class: what the image shows is not known
    count = args.n or min(8 * len(classes), 80)
    labels = torch.tensor(classes, device=device)[torch.arange(count) % len(classes)]  # in turn
    columns = min(len(classes), count, 10) if len(classes) > 1 else math.ceil(count**0.5)
    torch.manual_seed(args.seed)
    tiles, caption, prefix = [], f"{count} images", labels.new_empty(1, 0)  # tiles are uint8: there may be many
    if args.inpaint:
        image = read_image(args.inpaint, S)[None]
        hole, masked, order, prefix = mask_image(to_float(image, "cpu"), args.mask, tokenizer, device)
        tiles, caption = [image, to_uint8(masked)], f"the image, what is known of it, and {count} completions"
        columns = min(count + 2, 10)
    else:
        order = torch.randperm(grid**2) if args.order == "random" else scan_order(settings["order"], grid)
    one_batch = count <= args.batch_size  # then the progress bar counts its tokens instead
    for part in tqdm(labels.split(args.batch_size), "batches", disable=one_batch):
        known = prefix.expand(len(part), -1)
        tokens = model.generate(part, order=order, prefix=known, progress=one_batch, **options)
        tiles.append(to_uint8(tokenizer.decode(tokens)))
    images = np.concatenate(tiles)
    if args.inpaint:
        images = np.where(hole[..., None], images, image)
    if args.npz:
        write_atomically(args.npz, lambda file: np.savez(file, images[-count:], labels.cpu()))
        print(f"wrote {args.npz}: arr_0 {(count, S, S, 3)} uint8, arr_1 labels")
    if args.gif:
        save_gif(args.gif, to_float(images[: 10 * columns], "cpu"), order, columns)
        print(f"wrote {args.gif}")
    if args.out or not (args.gif or args.npz):
        out = args.out or Path("inpainted.png" if args.inpaint else "sheet.png")
        save_sheet(out, to_float(images, "cpu"), columns)
        print(f"wrote {out}: {caption}, {columns} in a row")


if __name__ == "__main__":
    train_tiny.run_main(main)
