"""Draw images with a trained RAR: sheets, GIFs of generation, sets for FID evaluators, and inpainting.

`python sample.py` takes the newest run in runs/; `--run DIR` names one. An annealed model has forgotten random orders
(Sec. 3.3), so other orders and inpainting use the weights from just before annealing, and say so.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import train_tiny
from rar import RAR, SCANS, TABLE_1, InputError, blaming, inpainting_order, scan_order
from tokenizer import VQTokenizer, gather_rows, process

HUB = "https://huggingface.co"
TOKENIZER_FILE = "maskgit-vqgan-imagenet-f16-256.bin"


def load_run(run: Path, order: str | None, any_order: bool, device: torch.device) -> tuple[RAR, VQTokenizer, dict]:
    """A run's model, tokenizer and settings; the weights from before annealing where the order asked for needs them."""
    tokenizer, _ = train_tiny.load_model(run / "tokenizer.pt", "tokenizer", device)
    model, settings = train_tiny.load_model(run / "rar.pt", "rar", device)
    if (scan := settings.get("scan")) not in SCANS:
        raise InputError(f"{run}: rar.pt does not say which order it ended in: it was not made by train_tiny.py")
    if any_order or order not in (None, scan):
        if not (run / "rar_random.pt").exists():
            raise InputError(f"{run} was never trained in random orders alone, so it can only draw {scan}")
        print(f"using {run / 'rar_random.pt'}, the weights from before annealing: rar.pt knows {scan} only")
        model, settings = train_tiny.load_model(run / "rar_random.pt", "rar", device)
        settings["scan"] = scan
    needed = {"guidance_scale": float, "guidance_power": float, "class_names": list}
    for name, kind in needed.items():
        if not isinstance(settings.get(name), kind):
            raise InputError(f"{run}: the checkpoint holds no {name}: it was not made by train_tiny.py")
    if [type(name) for name in settings["class_names"]] != [str] * model.config.num_classes:
        raise InputError(f"{run}: {model.config.num_classes} classes need as many names")
    if settings.get("tokenizer") != train_tiny.weights_hash(tokenizer):
        raise InputError(f"{run}: rar.pt was trained on the tokens of another tokenizer than tokenizer.pt")
    return model, tokenizer, settings | {"temperature": 1.0}


def load_released(args: Namespace, device: torch.device) -> tuple[RAR, VQTokenizer, dict]:
    """The authors' weights, from files or by name, with Tab. 6's sampling settings for their size."""
    if args.inpaint or args.order not in (None, "row-major"):
        raise InputError("the authors' weights are annealed: they draw in row-major order only")
    rar, tokenizer = args.rar, args.tokenizer
    if rar in TABLE_1:
        rar, fetched = fetch_released(rar, args.cache)
        tokenizer = tokenizer or fetched
    if tokenizer is None:
        raise InputError(f"--rar {rar} needs --tokenizer {TOKENIZER_FILE}, the file that makes images of its tokens")
    model = RAR.from_released(rar, args.dtype).to(device)
    decoder = VQTokenizer.from_released(tokenizer, args.dtype).to(device)
    config = model.config
    plain = {"scale": 1.0, "power": 0.0, "temperature": 1.0}
    size = next((t for t in TABLE_1.values() if (t["dim"], t["depth"]) == (config.dim, config.depth)), plain)
    settings = {"guidance_scale": size["scale"], "guidance_power": size["power"], "temperature": size["temperature"]}
    names = [str(c) for c in range(config.num_classes)]
    return model, decoder, settings | {"scan": "row-major", "class_names": names}


def fetch_released(name: str, cache: Path) -> tuple[Path, Path]:
    """Paths of a published RAR and of its tokenizer in the folder `cache`, downloaded if they are not there."""
    files = {f"{name}.bin": "yucornetto/RAR", TOKENIZER_FILE: "fun-research/TiTok"}
    try:
        for file, repository in files.items():
            if not (cache / file).is_file():
                train_tiny.download(f"{HUB}/{repository}/resolve/main/{file}", cache / file)
    except InputError as error:
        raise InputError(f"{error}; needed in {cache}: {' and '.join(files)}") from error
    return cache / f"{name}.bin", cache / TOKENIZER_FILE


def pick_classes(text: str | None, names: list[str]) -> list[int]:
    """ "0,3,7" or class names, comma-separated -> class numbers; all classes if None."""
    if text is None:
        return list(range(len(names)))
    numbers = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    for word in text.split(","):
        if word not in numbers:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise InputError(f"class {word!r} does not exist: choose from 0..{len(names) - 1} or {known}")
    return [numbers[word] for word in text.split(",")]


def pick_order(name: str, grid_size: int, generator: torch.Generator) -> Tensor:
    """A scan of Fig. 6, or "random": a fresh permutation (T,)."""
    if name == "random":
        return torch.randperm(grid_size**2, generator=generator, device=generator.device)
    return scan_order(name, grid_size)


def draw_batches(
    model: RAR, tokenizer: VQTokenizer, labels: Tensor, args: Namespace, order: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) in [0, 1] and the order (T,) they were drawn in, batch after batch of labels (N,)."""
    for part in tqdm(labels.split(args.batch_size), desc="batches", disable=len(labels) <= args.batch_size):
        path, mine = pick_order(order, tokenizer.config.grid_size, generator), train_tiny.share(len(part))
        alone = len(labels) <= args.batch_size
        own = part[mine] if mine.stop > mine.start else part[:1]  # with nothing to do, a process draws in vain
        tokens = model.generate(own, order=path, generator=generator, progress=alone, **sampling_options(args))
        yield gather_rows(tokenizer.decode(tokens)[: mine.stop - mine.start], mine, len(part)), path


SETTINGS = ("guidance_scale", "guidance_power", "temperature")  # whose defaults come with the weights


def sampling_options(args: Namespace) -> dict:
    """The options that generate takes as they are."""
    return {name: getattr(args, name) for name in (*SETTINGS, "top_k")}


def growth(images: Tensor, order: Tensor, columns: int, frames: int = 64, zoom: int = 3) -> list[Image.Image]:
    """Images (N, 3, H, W) growing cell by cell in their order; cells that are still to come are dark grey."""
    T, size = len(order), images.shape[-1]
    grid = math.isqrt(T)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(T, device=order.device))  # when a cell is drawn
    when = rank.view(1, 1, grid, grid).repeat_interleave(size // grid, 2).repeat_interleave(size // grid, 3)
    shots = []
    for count in sorted({round(T * i / min(T, frames)) for i in range(min(T, frames) + 1)}):
        tiles = train_tiny.to_uint8(torch.where(when.to(images.device) < count, images, torch.full_like(images, 0.15)))
        rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles) - columns + 1, columns)]
        shot = Image.fromarray(np.concatenate(rows, 0))
        shots.append(shot.resize((shot.width * zoom, shot.height * zoom), Image.Resampling.NEAREST))
    return shots


def save_gif(shots: list[Image.Image], path: Path) -> None:
    """Write pictures as a GIF that rests on the last one."""
    options = {"append_images": shots[1:], "duration": [60] * (len(shots) - 1) + [2000], "loop": 0}
    train_tiny.save_picture(path, partial(shots[0].save, save_all=True, **options))


def inpaint(model: RAR, tokenizer: VQTokenizer, args: Namespace, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw a rectangle of an image: (N + 2, 3, H, W), first the image, then what is known of it, then completions."""
    size, grid = tokenizer.config.image_size, tokenizer.config.grid_size
    image = train_tiny.to_float(train_tiny.read_image(Path(args.inpaint), size)[None], labels.device)
    with blaming(f"--mask {args.mask}", f"give x0,y0,x1,y1 in pixels of the {size}x{size} image, x0 < x1, y0 < y1"):
        x0, y0, x1, y1 = (int(v) for v in args.mask.split(","))
        if not (0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size):
            raise ValueError("no part of the image")
    hole = torch.zeros(1, 1, size, size, dtype=torch.bool, device=labels.device)
    hole[:, :, y0:y1, x0:x1] = True
    cells = hole.view(grid, size // grid, grid, size // grid).amax((1, 3)).flatten()  # touched by the hole      T
    order, known = inpainting_order(~cells)
    outside = image[:, :, ~hole[0, 0]] if known else image.flatten(2)
    blank = outside.median(2).values[..., None, None]  # so that nothing of the hole leaks into the codes around it
    masked = torch.where(hole, blank, image)
    prefix = tokenizer.encode(masked)[:, order[:known]].expand(len(labels), -1)
    tokens = model.generate(labels, order=order, prefix=prefix, generator=generator, **sampling_options(args))
    drawn = torch.where(hole, tokenizer.decode(tokens), image)  # what was known stays as it was
    return torch.cat([image, masked, drawn])


CLASHES = (("gif", "npz"), ("out", "npz"), ("gif", "inpaint"), ("npz", "inpaint"), ("order", "inpaint"), ("run", "rar"))


def parse_args() -> Namespace:
    p = train_tiny.Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--run", type=Path, default=None, help="folder of a run (default: the newest in runs/)")
    p.add_argument("--classes", default=None, help="class numbers or names, comma-separated (default: all, in turn)")
    p.add_argument("--n", type=int, default=None, help="how many images (default: 8 per class, at most 80)")
    p.add_argument("--guidance-scale", "--guidance", type=float, help="1 is none (default: the run's)")
    p.add_argument("--guidance-power", type=float, help="of the power-cosine, 0 is constant (default: the run's)")
    p.add_argument("--temperature", type=float, help="above 0 (default: 1, or Tab. 6's)")
    p.add_argument("--top-k", type=int, default=None, help="sample among the k likeliest codes (default: all)")
    p.add_argument("--order", choices=(*SCANS, "random"), default=None, help="default: the one the run ended in")
    p.add_argument("--seed", type=train_tiny.seed_number, default=0, help="one seed draws the same images (default: 0)")
    p.add_argument("--batch-size", type=int, default=100, help="images drawn at once (default: 100)")
    p.add_argument("--out", type=Path, default=None, help="picture of all images (default: sheet.png)")
    p.add_argument("--gif", type=Path, default=None, help="write generation, token by token, as a GIF")
    p.add_argument("--npz", type=Path, default=None, help="write arr_0 (uint8 NHWC) and arr_1 (labels) for FID tools")
    p.add_argument("--inpaint", default=None, help="image of which to redraw a part, with --mask")
    p.add_argument("--mask", default=None, help="x0,y0,x1,y1: the part, in pixels of the resized image")
    p.add_argument("--rar", default=None, help=f"the authors' weights: a file, or one of {', '.join(TABLE_1)} to fetch")
    p.add_argument("--tokenizer", default=None, help=f"their tokenizer: {TOKENIZER_FILE}")
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rar", help="folder of what was fetched")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    p.add_argument("--device", default=None, help="cuda, mps, cpu (default: the first there is)")
    args = p.parse_args()
    given = {name for name, value in vars(args).items() if value is not None}
    for option, other in CLASHES:
        if {option, other} <= given:
            p.error(f"--{option} does nothing beside --{other}: leave one of them out")
    for option, other in (("mask", "inpaint"), ("tokenizer", "rar")):
        if option in given and other not in given:
            p.error(f"--{option} does nothing without --{other}")
    return args


def main() -> None:
    args = parse_args()
    device = train_tiny.join_processes(train_tiny.pick_device(args.device))
    args.dtype = getattr(torch, args.dtype) if "dtype" in args else None
    if args.rar:
        model, tokenizer, settings = load_released(args, device)
    else:
        run = args.run or train_tiny.newest_run("rar.pt")
        model, tokenizer, settings = load_run(run, args.order, args.inpaint is not None, device)
        model = model.to(dtype=args.dtype)
    T, V = model.config.seq_len, model.config.codebook_size
    if (T, V) != (tokenizer.config.grid_size**2, tokenizer.config.codebook_size):
        raise InputError(f"{args.rar or run} has {T} tokens of {V} codes, its tokenizer does not")
    args = Namespace(**{name: settings[name] for name in SETTINGS} | vars(args))
    classes = pick_classes(args.classes, settings["class_names"])
    count = args.n if args.n is not None else min(8 * len(classes), 80)
    if count < 1 or args.batch_size < 1:
        raise InputError("--n and --batch-size must be 1 or more")
    labels = torch.tensor(classes, device=device).repeat(math.ceil(count / len(classes)))[:count]  # balanced
    rank, world = process()
    generator = torch.Generator(device).manual_seed((args.seed * world + rank) % 2**63)
    columns = min(len(classes), count, 10)
    if args.inpaint is not None:
        if args.classes is None:  # which class the image has is not known
            labels = torch.full((args.n or 8,), model.config.num_classes, device=device)
        out = args.out or Path("inpainted.png")
        images = inpaint(model, tokenizer, args, labels, generator)
        train_tiny.save_sheet(images, out, columns=min(len(images), 10))
        print(f"wrote {out}: the image, what is known of it, {len(labels)} completions")
        return
    batches = draw_batches(model, tokenizer, labels, args, args.order or settings["scan"], generator)
    if args.npz:
        arr_0 = np.concatenate([train_tiny.to_uint8(images) for images, _ in batches])
        train_tiny.write_npz(args.npz, {"arr_0": arr_0, "arr_1": labels.cpu().numpy()})
        print(f"wrote {args.npz}: arr_0 {arr_0.shape} uint8, arr_1 labels")
        return
    drawn = list(batches)
    images = torch.cat([images for images, _ in drawn])
    if args.gif:
        save_gif(growth(drawn[0][0], drawn[0][1].cpu(), min(columns, args.batch_size)), args.gif)
        print(f"wrote {args.gif}")
    if args.out or not args.gif:
        out = args.out or Path("sheet.png")
        train_tiny.save_sheet(images, out, columns)
        print(f"wrote {out}: {count} images, {columns} in a row")


if __name__ == "__main__":
    train_tiny.run_main(main)
