"""Draw images with a trained RAR: sheets, GIFs of generation, sets for FID evaluators, and inpainting.

    python sample.py                                              # from the newest run in runs/
    python sample.py --run DIR --classes 3,7 --n 20
    python sample.py --inpaint IMAGE --mask 0,16,32,32 --classes 3
    python sample.py --rar rar_b --classes 207                    # the authors' weights, downloaded

Once r has reached 0, a model only knows the order that its training ended in (Sec. 3.3). Other orders and inpainting
therefore use the weights from just before annealing, and the first line printed says which weights are used.

Letters: N images, S side of an image in pixels, T tokens of an image, K of them known, C classes.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train_tiny
from rar import RAR, SCANS, TABLE_1, inpainting_order, scan_order
from tokenizer import VQTokenizer
from train_tiny import load_run, make_sheet, publish, read_image, save_sheet, tmp, to_float, to_uint8

TOKENIZER = "maskgit-vqgan-imagenet-f16-256"
TABLE_6 = {  # the authors' sampling settings, by the width of the model: RAR-B, L, XL, XXL
    768: {"guidance_scale": 16.0, "guidance_power": 2.75, "temperature": 1.0},
    1024: {"guidance_scale": 15.5, "guidance_power": 2.5, "temperature": 1.02},
    1280: {"guidance_scale": 6.9, "guidance_power": 1.5, "temperature": 1.02},
    1408: {"guidance_scale": 8.0, "guidance_power": 1.2, "temperature": 1.02},
}


def corners(text):
    """ "x0,y0,x1,y1" as four numbers; argparse reports a ValueError in one line."""
    x0, y0, x1, y1 = (int(number) for number in text.split(","))
    return x0, y0, x1, y1


def parse_args(argv=None):
    """The options. What is None comes from the run, or from Tab. 6."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--run", help="folder of a run (default: the newest in runs/)")
    p.add_argument("--classes", help="names or numbers, comma-separated (default: all in turn; none for --inpaint)")
    p.add_argument("--n", type=int, help="how many images (default: 8 of each class, at most 80)")
    p.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is none (default: the run's)")
    p.add_argument("--guidance-power", type=float, help="of the power-cosine schedule; 0 is constant (the run's)")
    p.add_argument("--temperature", type=float, help="divides the logits (default: 1, or that of Tab. 6)")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest codes (default: all)")
    p.add_argument("--order", choices=(*SCANS, "random"), help="to draw in (default: the run's; --inpaint has its own)")
    p.add_argument("--seed", type=int, default=0, help="the same command with the same seed draws the same images")
    p.add_argument("--batch-size", type=int, default=100, help="images drawn at once (default: 100)")
    p.add_argument("--out", type=Path, help="picture of all images (default: sheet.png, if no --gif or --npz)")
    p.add_argument("--gif", type=Path, help="the first ten rows of that picture as they fill in")
    p.add_argument("--npz", type=Path, help="write arr_0 (uint8 NHWC) and arr_1 (labels) for FID evaluators")
    p.add_argument("--inpaint", help="an image; its part inside --mask is redrawn")
    p.add_argument("--mask", type=corners, help="x0,y0,x1,y1: the part to redraw, in pixels of the cropped image")
    p.add_argument("--rar", help=f"the authors' weights: a file, or a name to download: {', '.join(TABLE_1)}")
    p.add_argument("--tokenizer", default=TOKENIZER, help="the authors' tokenizer: a file (default: downloaded)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    if bool(args.inpaint) != bool(args.mask):
        p.error("--inpaint IMAGE and --mask x0,y0,x1,y1 need each other")
    if args.rar and (args.inpaint or args.order not in (None, "row-major")):
        p.error("the authors' weights are annealed: they draw in row-major order only, and do not inpaint")
    if not (args.out or args.gif or args.npz):
        args.out = Path("sheet.png")
    for name, endings in (("out", (".png", ".jpg", ".webp")), ("gif", (".gif",)), ("npz", (".npz",))):
        path = getattr(args, name)
        if path and (path.suffix not in endings or not os.access(path.parent, os.W_OK)):
            p.error(f"--{name} {path} cannot be written: it must end in {' or '.join(endings)}, in an existing folder")
    return args


def find_released(name):
    """The file of this name, or one of the authors' files, which is downloaded unless it is there."""
    if name != TOKENIZER and name not in TABLE_1:
        return name
    path = Path.home() / ".cache/rar" / f"{name}.bin"
    repository = "fun-research/TiTok" if name == TOKENIZER else "yucornetto/RAR"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    train_tiny.download(f"{hub}/{repository}/resolve/main/{path.name}", path)
    return path


def load_models(args):
    """The model, its tokenizer, and what else is known: class names, order and guidance."""
    if args.rar:
        model = RAR.from_released(find_released(args.rar))
        kept = {"class_names": [str(c) for c in range(model.config.num_classes)], "scan": "row-major"}
        return model, VQTokenizer.from_released(find_released(args.tokenizer)), kept | TABLE_6.get(model.config.dim, {})
    run = args.run or train_tiny.newest_run("rar.pt")
    weights = "rar.pt"
    model, tokenizer, kept = load_run(run)
    if args.inpaint or args.order not in (None, kept["scan"]):
        weights = "rar_random.pt"
        if not Path(run, weights).exists():
            sys.exit(f"{run} has no {weights}, written when r begins to fall: other orders and inpainting need it")
        model, tokenizer, kept = load_run(run, weights)
    if tokenizer is None:
        sys.exit(f"{run} was trained on tokens alone: without their tokenizer there are no pictures")
    print(f"drawing from {Path(run, weights)}, step {kept['step']} of {kept['steps']}")
    return model, tokenizer, kept


def pick_classes(text: str | None, names: list[str]) -> list[int]:
    """Class names or numbers, comma-separated, as numbers; all classes for None. A name wins over a number."""
    if text is None:
        return list(range(len(names)))
    words = [text] if text in names else [word.strip() for word in text.split(",")]  # a name may contain a comma
    for word in words:
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            sys.exit(f"--classes: there is no {word!r}; choose from 0..{len(names) - 1} or {', '.join(names[:10])}")
    return [names.index(word) if word in names else int(word) for word in words]


def mask_image(image, mask, tokenizer):
    """Prepare an image, uint8 (S, S, 3), for redrawing its pixels inside the rectangle (x0, y0, x1, y1).

    Returns where these pixels are, bool (S, S, 3), the image with them covered, an order (T,) that starts with the
    known cells, and the tokens (1, K) of these cells: the prefix of this order.
    """
    S, grid = len(image), tokenizer.config.grid_size
    x0, y0, x1, y1 = mask
    if not (0 <= x0 < x1 <= S and 0 <= y0 < y1 <= S):
        sys.exit(f"--mask {mask} is no part of the image: give x0,y0,x1,y1 in its {S}x{S} pixels")
    hole = np.zeros(image.shape, bool)
    hole[y0:y1, x0:x1] = True
    covered = np.where(hole, 128, image).astype(np.uint8)  # the encoder looks beyond a cell, so hide the hole
    touched = hole.reshape(grid, S // grid, grid, -1).any((1, 3))  # cells that are redrawn                 grid, grid
    order, K = inpainting_order(torch.from_numpy(~touched).flatten())
    tokens = tokenizer.encode(to_float(covered[None], tokenizer.quantize.embedding.weight.device))  #       1, T
    return hole, covered, order, tokens[:, order[:K].to(tokens.device)]


def save_gif(path, images, order, columns):
    """Write a GIF of up to 65 frames: images (N, 3, S, S) filled in along the order (T,), the rest dark grey."""
    T, grid = len(order), math.isqrt(len(order))
    step = order.argsort().view(1, 1, grid, grid).float()  # when a cell is drawn
    step = F.interpolate(step, images.shape[-2:])
    counts = torch.linspace(0, T, min(T, 64) + 1)
    frames = [make_sheet(torch.where(step < count, images, 0.15), columns) for count in counts]
    times = [60] * (len(frames) - 1) + [2000]  # milliseconds; the GIF rests on the whole images
    frames[0].save(tmp(path), save_all=True, append_images=frames[1:], duration=times, loop=0)
    publish(path)


def main():
    args = parse_args()
    try:
        model, tokenizer, kept = load_models(args)
    except (ValueError, KeyError, RuntimeError) as error:  # a damaged file, or one with other tensors
        sys.exit(f"the weights cannot be used: {error}")
    device, _ = train_tiny.pick_device(args.device)
    dtype = train_tiny.pick_dtype(args.dtype, device)
    model.to(device, dtype)
    tokenizer.to(device, dtype)
    torch.manual_seed(args.seed)
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = ("guidance_scale", "guidance_power", "temperature", "top_k")
    settings = {name: value for name, value in (kept | given).items() if name in names}
    classes = pick_classes(args.classes, kept["class_names"])
    grid = tokenizer.config.grid_size
    if args.inpaint:
        image = read_image(args.inpaint, tokenizer.config.image_size)
        hole, covered, order, prefix = mask_image(image, args.mask, tokenizer)
        if args.classes is None:
            classes = [model.config.num_classes]  # the null class: what the image shows is not known
    else:
        order = torch.randperm(grid**2) if args.order == "random" else scan_order(args.order or kept["scan"], grid)
        prefix = order[None, :0]  # nothing is known
    count = args.n or min(8 * len(classes), 80)
    labels = torch.tensor(classes, device=device)[torch.arange(count) % len(classes)]  # in turn
    images = []
    for part in tqdm(labels.split(args.batch_size), "batches"):
        tokens = model.generate(part, order=order, prefix=prefix.expand(len(part), -1), **settings)
        images.append(to_uint8(tokenizer.decode(tokens)))
    images = np.concatenate(images)
    tiles, columns = images, min(len(classes), count, 10)
    if args.inpaint:
        images = np.where(hole, images, image)
        tiles = np.stack([image, covered, *images])
    if args.inpaint or len(classes) == 1:
        columns = min(len(tiles), 10)
    if args.npz:
        np.savez(tmp(args.npz), images, labels.cpu())
        publish(args.npz)
    if args.gif:
        save_gif(args.gif, to_float(tiles[: 10 * columns]), order, columns)
    if args.out:
        save_sheet(args.out, to_float(tiles), columns)
    print("wrote", *filter(None, (args.npz, args.gif, args.out)))


if __name__ == "__main__":
    main()
