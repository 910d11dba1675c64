"""Draw images with a trained RAR: sheets, GIFs of generation, sets for FID evaluators, and inpainting.

`python sample.py` draws from the newest run in runs/; `--run DIR` names one. An annealed model only remembers the order
it ended in (Sec. 3.3), so other orders and inpainting use the weights from just before annealing, and say so.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # until run_main takes over: a Ctrl-C during the slow imports below

    def stop(*_):
        print("stopped", file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, stop)

import math
import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import train_tiny
from rar import RAR, SCANS, TABLE_1, inpainting_order, reading, require, scan_order
from tokenizer import VQTokenizer

TOKENIZER_FILE = "maskgit-vqgan-imagenet-f16-256.bin"


def load_run(args: Namespace) -> tuple[RAR, VQTokenizer, dict]:
    """A run's model, tokenizer and settings; the weights from before annealing where the order needs them."""
    run = args.run or train_tiny.newest_run("rar.pt")
    if not run.is_dir():
        run = Path("runs") / run
    path = run / "rar.pt"
    tokenizer, _ = train_tiny.load_model(run / "tokenizer.pt", "tokenizer")
    model, settings = train_tiny.load_model(path, "rar")
    scan = settings["scan"]
    if args.inpaint or args.order not in (None, scan):
        path = run / "rar_random.pt"
        require(path.exists(), f"{run} was never trained in random orders alone, so it can only draw {scan}")
        model, settings = train_tiny.load_model(path, "rar")
    made_it = settings["tokenizer"] == train_tiny.weights_hash(tokenizer)
    require(made_it, f"{path} was trained on the tokens of another tokenizer than {run / 'tokenizer.pt'}")
    why = "" if path.name == "rar.pt" else f", the weights from before annealing: rar.pt only remembers {scan} order"
    print(f"drawing from {path}, {settings.get('step', '?')} steps{why}")
    return model.to(dtype=args.dtype), tokenizer, settings | {"scan": scan, "temperature": 1.0}


def load_released(args: Namespace) -> tuple[RAR, VQTokenizer, dict]:
    """The authors' weights, from files or by name, with Tab. 6's sampling settings for their size."""
    annealed = args.inpaint is None and args.order in (None, "row-major")
    require(annealed, "the authors' weights are annealed: they draw in row-major order only")
    if args.rar in TABLE_1:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        name, args.rar = args.rar, args.cache / f"{args.rar}.bin"
        train_tiny.download(f"{hub}/yucornetto/RAR/resolve/main/{name}.bin", args.rar)
        if args.tokenizer is None:
            args.tokenizer = args.cache / TOKENIZER_FILE
            train_tiny.download(f"{hub}/fun-research/TiTok/resolve/main/{TOKENIZER_FILE}", args.tokenizer)
    require(args.tokenizer, f"--rar {args.rar} needs --tokenizer {TOKENIZER_FILE}, which turns its tokens into images")
    model = RAR.from_released(args.rar, args.dtype)
    settings = {"guidance_scale": 1.0, "guidance_power": 0.0, "temperature": 1.0, "scan": "row-major"}
    settings["class_names"] = [str(c) for c in range(model.config.num_classes)]
    for size in TABLE_1.values():
        if (size["dim"], size["depth"]) == (model.config.dim, model.config.depth):
            settings |= {"guidance_scale": size["scale"], "guidance_power": size["power"]}
            settings |= {"temperature": size["temperature"]}
    print(f"drawing from {args.rar}")
    return model, VQTokenizer.from_released(args.tokenizer, args.dtype), settings


def pick_classes(text: str | None, names: list[str]) -> list[int]:
    """ "0,3,7" or class names, comma-separated -> class numbers; all classes if None. A name wins over a number."""
    if text is None:
        return list(range(len(names)))
    words = [text] if text in names else [word.strip() for word in text.split(",")]
    for word in words:
        is_number = word.isdecimal() and int(word) < len(names)
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        require(
            word in names or is_number, f"class {word!r} does not exist: choose from 0..{len(names) - 1} or {known}"
        )
        if word in names and is_number and names.index(word) != int(word):
            print(f"class {word} is taken as the name of class number {names.index(word)}")
    return [names.index(word) if word in names else int(word) for word in words]


def growing_frames(images: Tensor, order: Tensor, columns: int) -> list[Image.Image]:
    """Up to 65 sheets of images (N, 3, S, S) that grow in their order (T,); cells still to come are dark grey."""
    T, grid = len(order), math.isqrt(len(order))
    step = order.argsort().view(1, 1, grid, grid).float()  # when a cell is drawn
    step = F.interpolate(step, images.shape[-2:])
    counts = sorted({T * i // 64 for i in range(65)})
    return [train_tiny.make_sheet(torch.where(step < count, images, 0.15), columns) for count in counts]


def parse_mask(text: str, S: int) -> Tensor:
    """The pixels (S, S) bool inside the rectangle "x0,y0,x1,y1"."""
    with reading(f"--mask {text}", f"give x0,y0,x1,y1 in pixels of the {S}x{S} image"):
        x0, y0, x1, y1 = (int(number) for number in text.split(","))
    inside = 0 <= x0 < x1 <= S and 0 <= y0 < y1 <= S
    require(inside, f"--mask {text} must be x0,y0,x1,y1 with x0 < x1 and y0 < y1 inside the {S}x{S} image")
    hole = torch.zeros(S, S, dtype=torch.bool)
    hole[y0:y1, x0:x1] = True
    return hole


def inpaint(model: RAR, tokenizer: VQTokenizer, args: Namespace, labels: Tensor, options: dict) -> Tensor:
    """Redraw a part of an image: (N + 2, 3, S, S), first the image, then what is known of it, then completions."""
    S, grid, device = tokenizer.config.image_size, tokenizer.config.grid_size, labels.device
    image = train_tiny.to_float(train_tiny.read_image(args.inpaint, S)[None], device)
    hole = parse_mask(args.mask, S).to(device)
    touched = F.max_pool2d(hole.float()[None], S // grid).flatten() > 0  # cells of the grid, T
    order, known = inpainting_order(~touched)
    masked = torch.where(hole, image[:, :, ~hole].median(), image)  # no hint of what was in the hole
    prefix = tokenizer.encode(masked)[:, order[:known]].expand(len(labels), -1)
    tokens = model.generate(labels, order=order, prefix=prefix, **options)
    return torch.cat([image, masked, torch.where(hole, tokenizer.decode(tokens), image)])


def draw(model: RAR, tokenizer: VQTokenizer, labels: Tensor, order: Tensor, batch_size: int, options: dict) -> Tensor:
    """Images (N, 3, S, S) in [0, 1] for labels (N,), on the CPU."""
    images, alone = [], len(labels) <= batch_size
    for part in tqdm(labels.split(batch_size), "batches", disable=alone):
        tokens = model.generate(part, order=order, progress=alone, **options)
        images.append(tokenizer.decode(tokens).cpu())
    return torch.cat(images)


def save_gif(path: Path, frames: list[Image.Image]):
    """Write pictures as a GIF that rests on the last one."""
    durations = [60] * (len(frames) - 1) + [2000]  # milliseconds
    save = partial(frames[0].save, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    train_tiny.write_atomically(path, save)


def parse_args() -> Namespace:
    p = train_tiny.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--run", type=Path, help="folder of a run, or its name in runs/ (default: the newest)")
    p.add_argument("--classes", help="class names or numbers, comma-separated (default: all, in turn)")
    p.add_argument("--n", type=int, help="how many images (default: 8 of each class, at most 80)")
    p.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is none (default: as trained)")
    p.add_argument("--guidance-power", type=float, help="of the power-cosine; 0 is constant (default: as trained)")
    p.add_argument("--temperature", type=float, help="of the softmax (default: 1, or that of Tab. 6 with --rar)")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest codes (default: all)")
    p.add_argument("--order", choices=(*SCANS, "random"), help="order of generation (default: what the run ended in)")
    p.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (default: 0)")
    p.add_argument("--batch-size", type=int, default=100, help="images drawn at once (default: 100)")
    p.add_argument("--out", type=Path, help="picture of all images (default: sheet.png)")
    p.add_argument("--gif", type=Path, help="write the images as they grow, token by token")
    p.add_argument("--npz", type=Path, help="write arr_0 (uint8 NHWC) and arr_1 (labels) for FID evaluators")
    p.add_argument("--inpaint", type=Path, help="image of which --mask is redrawn")
    p.add_argument("--mask", help="x0,y0,x1,y1: the part to redraw, in pixels of the resized image")
    p.add_argument("--rar", help=f"the authors' weights: a file, or a name to download: {', '.join(TABLE_1)}")
    p.add_argument("--tokenizer", type=Path, help=f"their tokenizer, {TOKENIZER_FILE}")
    p.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/rar", help="of downloads (default: ~/.cache/rar)"
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args()
    require(
        (args.inpaint is None) == (args.mask is None), "--inpaint needs --mask x0,y0,x1,y1, and --mask needs --inpaint"
    )
    require(args.n is None or args.n > 0, f"--n must be 1 or more, got {args.n}")
    require(args.batch_size > 0, f"--batch-size must be 1 or more, got {args.batch_size}")
    return args


def main():
    args = parse_args()
    device = train_tiny.pick_device(args.device)
    args.dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer, settings = load_released(args) if args.rar else load_run(args)
    model, tokenizer = model.to(device), tokenizer.to(device)
    grid, codes = tokenizer.config.grid_size, tokenizer.config.codebook_size
    fits = (model.config.seq_len, model.config.codebook_size) == (grid**2, codes)
    require(fits, f"the model does not fit the tokenizer, which has {grid}x{grid} tokens of {codes} codes")
    classes = pick_classes(args.classes, settings["class_names"])
    count = args.n or min(8 * len(classes), 80)
    labels = torch.tensor(classes, device=device).repeat(count // len(classes) + 1)[:count]  # balanced
    generator = torch.Generator(device).manual_seed(args.seed)
    options = {"top_k": args.top_k, "generator": generator}
    for name in ("guidance_scale", "guidance_power", "temperature"):
        given = getattr(args, name)
        options[name] = settings[name] if given is None else given
    columns = min(len(classes), count, 10) if len(classes) > 1 else math.ceil(math.sqrt(count))
    if args.inpaint:
        if args.classes is None:  # the class of the image is unknown
            labels = torch.full((args.n or 8,), model.config.num_classes, device=device)
        images = inpaint(model, tokenizer, args, labels, options)
        train_tiny.save_sheet(args.out or Path("inpainted.png"), images, min(len(images), 10))
        print(f"wrote {args.out or 'inpainted.png'}: the image, what is known of it, and {len(labels)} completions")
        return
    order = scan_order(settings["scan"] if args.order in (None, "random") else args.order, grid)
    if args.order == "random":
        order = torch.randperm(len(order), generator=generator, device=device)
    images = draw(model, tokenizer, labels, order, args.batch_size, options)
    if args.npz:
        arrays = {"arr_0": train_tiny.to_uint8(images), "arr_1": labels.cpu().numpy()}
        train_tiny.write_atomically(args.npz, partial(np.savez, **arrays))
        print(f"wrote {args.npz}: arr_0 {arrays['arr_0'].shape} uint8, arr_1 labels")
    if args.gif:
        save_gif(args.gif, growing_frames(images[: 10 * columns], order.cpu(), columns))
        print(f"wrote {args.gif}")
    if args.out or not (args.gif or args.npz):
        train_tiny.save_sheet(args.out or Path("sheet.png"), images, columns)
        print(f"wrote {args.out or 'sheet.png'}: {count} images, {columns} in a row")


if __name__ == "__main__":
    train_tiny.run_main(main)
