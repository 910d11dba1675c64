"""The mutated inputs of fuzz.py: for each kind of file a function that writes a damaged one and says what to run.

Such a function gets a random generator and the folder of small valid files, writes below in/ or out/ of the current
folder, and returns a script (its module) and the arguments with which to run it there.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sample
import train_tiny

warnings.filterwarnings("ignore", module="torch|fuzz_inputs")  # of exotic tensors made on purpose
# fmt: off
TINY = "--tokenizer-steps 2 --tokenizer-batch 4 --steps 3 --batch-size 4 --dim 16 --depth 1 --heads 2 --channels 4"
TINY = [*TINY.split(), "--codebook-size", "16", "--dtype", "float32", "--device", "cpu", "--out", "out/run"]
SHEET = ["--device", "cpu", "--out", "out/sheet.png"]
BATCHES = [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]
NAN, INF = float("nan"), float("inf")
Rng = random.Random
# fmt: on


def scar(rng: Rng, data: bytes) -> bytes:
    """Random damage: flipped bits, cuts, splices, runs, and numbers where a length may be."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        b, at, length = bytearray(data or b"\0"), rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 64, 1000))
        number = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
        how = rng.choice(("flip", "flip", "cut", "drop", "splice", "run", "number", "number"))
        if how == "flip":
            b[at - 1] ^= 1 << rng.randrange(8)
        elif how == "number":
            b[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        else:
            start, run = rng.randrange(len(data) + 1), rng.choice((b"\0", b"\xff", b"9")) * length
            put = {"splice": data[start : start + length], "run": run}.get(how, b"")
            b[at : {"cut": None, "splice": at}.get(how, at + length)] = put
        data = bytes(b)
    return data


def zeros(gigabytes: float, wbits: int = -15, prefix: bytes = b"") -> bytes:
    """Deflated zeros after a prefix: a thousandth of their size."""
    packer = zlib.compressobj(9, wbits=wbits)
    pieces = [packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in (prefix, bytes(1 << 22))]
    return pieces[0] + pieces[1] * round(gigabytes * 256) + packer.flush()


def raw_zip(members: list[tuple[str, int, bytes, int]]) -> bytes:
    """A zip archive of (name, method, bytes as they stand there, size that they claim)."""
    body, directory = b"", b""
    for name, method, packed, size in members:
        crc = zlib.crc32(packed) if method == 0 else 0
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0, crc, len(packed), size, len(name), 0)
        directory += b"PK\1\2\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + fields + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


def stored(members: dict[str, bytes]) -> bytes:
    return raw_zip([(name, 0, content, len(content)) for name, content in members.items()])


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {m.filename: archive.read(m) for m in archive.infolist()}


def zip_attacks(data: bytes) -> list[bytes]:
    """Archives whose members are bombs, lie about their sizes, or are packed as nobody does."""
    members, attacks, bomb = [(n, 0, c, len(c)) for n, c in unzipped(data).items()], [], zeros(3)
    for at, (name, _, content, size) in enumerate(members[:6]):
        change = ((8, bomb, 3 << 30), (0, content, 3 << 30), (0, content, 0), (8, content, size), (14, content, 9))
        attacks += [raw_zip([*members[:at], (name, *c), *members[at + 1 :]]) for c in change]
        attacks += [raw_zip([*members, extra]) for extra in ((name, 99, b"x", 1), (f"../../{name}", 0, b"x", 1))]
    return [*attacks, data[:-30], data + b"x" * 70000, raw_zip([]), b"", b"PK\3\4", b"<html>404</html>"]


def damaged(rng: Rng, data: bytes, attacks: list[bytes], twisted: bytes) -> bytes:
    """An attack, other content, or bytes damaged anywhere, or in a member of a zip whose checksums are right."""
    how = rng.random()
    if how < 0.5:
        return rng.choice(attacks)
    if how < 0.8:
        return twisted
    if how < 0.9 or not data.startswith(b"PK"):
        return scar(rng, data)
    members = unzipped(data)
    name = rng.choice([n for n in members if n.endswith(("pkl", "npy"))] + list(members))
    return stored(members | {name: scar(rng, members[name])})


class Call:
    """Pickled, this calls a function as it is read."""

    def __init__(self, *call: object) -> None:
        self.call = call[0], call[1:]

    def __reduce__(self) -> tuple:
        return self.call


LAUGHS = ["ha"]  # prints as 2 ** 40 words
for _ in range(40):
    LAUGHS = [LAUGHS, LAUGHS]
PLAIN = [None, True, -1, 0, 3, 100, 2**31, 2**70, 0.5, 1e308, NAN, INF, "", "x" * 5000, "../../etc", "a\nb", "\ud800"]
PLAIN += [[], {}, [[]], {"a": {}}, [1, "a"]]
ODD = [*PLAIN, (), b"\0\xff", 1j, {1, 2}, LAUGHS, torch.zeros(0), torch.tensor(1), torch.tensor(NAN), torch.zeros(3, 3)]
CALLS = [Call(os.mkdir, "executed"), Call(eval, "1"), Call(bytearray, 3 << 30), Call(torch.Tensor, 1 << 15, 1 << 15)]
CALLS += [Call(torch.storage.UntypedStorage, 3 << 30), Call(subprocess.call, ["true"]), LAUGHS]


def twist(rng: Rng, node: object, odd: list) -> object:
    """A copy of nested plain data with one thing in it replaced, lost, doubled or renamed."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.95:
        copy, key, how = (
            node.copy(),
            rng.choice(list(node) if isinstance(node, dict) else range(len(node))),
            rng.random(),
        )
        if how < 0.06:
            del copy[key]
        elif how < 0.12:
            name = rng.choice(("x", "blocks.9.x", "blocks.", "encoder.down.9.block.0", 7 if odd is ODD else "7"))
            copy = {name: copy.pop(key), **copy} if isinstance(node, dict) else copy * 2
        else:
            copy[key] = twist(rng, node[key], odd)
        return copy
    if isinstance(node, torch.Tensor) and rng.random() < 0.8:
        return twist_tensor(rng, node)
    if isinstance(node, (int, float)) and rng.random() < 0.5:
        return type(node)(rng.choice((-node, node + 1, node * 2, node // 2, 2**31, 10**12)))
    return rng.choice(odd)


def twist_tensor(rng: Rng, w: torch.Tensor) -> object:
    """Another tensor than belongs there: in type, values, layout, device or shape."""
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.cfloat)
    ways = [lambda kind=kind: w.to(kind) for kind in kinds]
    ways += [lambda factor=factor: w * factor for factor in (NAN, INF, 1e38, 0, -1)]
    ways += [lambda: w.to_sparse(), lambda: w.to("meta"), lambda: w.flatten()[:1].clone().expand(w.shape)]
    ways += [lambda: w[..., :-1], lambda: w[None], lambda: w.flatten(), lambda: w.T, lambda: w.tolist()]
    ways += [lambda: torch.zeros(1).expand(*w.shape[:-1], 10**9), lambda: torch.nn.Parameter(w)]
    ways += [lambda: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), lambda: torch.nested.nested_tensor([w])]
    with contextlib.suppress(Exception), torch.no_grad():
        return rng.choice(ways)()
    return torch.zeros(2)


def packed(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@lru_cache
def checkpoint_attacks(data: bytes) -> list[bytes]:
    """What can be made of a file of torch.save: code, claims, bombs, things that are no data."""
    content, members = torch.load(io.BytesIO(data), weights_only=True), unzipped(data)
    attacks = [make(e) for e in [*CALLS, [], {}, "x"] for make in (packed, lambda e: packed(e, True), pickle.dumps)]
    attacks += [packed(content | {key: e}, e is LAUGHS) for key in list(content)[:6] for e in (CALLS[0], *CALLS[2:])]
    deep = [b"]" * n + b"a" * (n - 1) for n in (2000, 200000)]
    bodies = [b"\x80\2" + d + b"." for d in deep] + [b"\x80\2}X\4\0\0\0kind" + d + b"s." for d in deep]
    bodies += [b"\x80\2X\xff\xff\xff\xffx.", b"\x80\2\x8b\xff\xff\xff\x7f1.", b"\x80\2" + b"(" * 1000, b"."]
    attacks += [stored({n: body if n.endswith("data.pkl") else c for n, c in members.items()}) for body in bodies]
    for n in (3 << 28, (1 << 31) - 1):  # a tensor that says it holds billions of numbers, as a lie and as a bomb
        claim = (b"M\x39\x30", b"J" + struct.pack("<I", n))
        lie, old = (packed({"kind": "rar", "weights": {"w": torch.zeros(12345)}}, legacy) for legacy in (False, True))
        parts = {k: c.replace(*claim) for k, c in unzipped(lie).items()}
        bomb = [(k, 0, c, len(c)) if len(c) < 9999 else (k, 8, zeros(3), 3 << 30) for k, c in parts.items()]
        attacks += [lie.replace(*claim), old.replace(*claim), stored(parts), raw_zip(bomb)]
    tar = tarfile.TarInfo("storages").tobuf() + bytes(1024)
    return [*attacks, *bodies, tar, *zip_attacks(data)]


def damage_checkpoint(rng: Rng, path: Path) -> None:
    data, content = path.read_bytes(), torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 1, 3))):
        twisted = twist(rng, content, ODD)
    old = packed(content, legacy=True)
    twisted = packed(twisted, legacy=rng.random() < 0.2)
    path.write_bytes(damaged(rng, rng.choice((data, data, old)), checkpoint_attacks(data), twisted))


def in_run(name: str, rng: Rng, base: Path) -> tuple:
    shutil.copytree(base / "run", "in/run")
    damage_checkpoint(rng, Path("in/run", name))
    return sample, ["--run", "in/run", "--n", 2, *SHEET, *(["--order", "random"] if "random" in name else [])]


def released(name: str, rng: Rng, base: Path) -> tuple:
    for file in ("rar.bin", "vq.bin"):
        shutil.copy(base / file, "in")
    damage_checkpoint(rng, Path("in", name))
    dtype = rng.choice(([], [], ["--dtype", "float32"], ["--dtype", "bfloat16"]))
    return sample, ["--rar", "in/rar.bin", "--tokenizer", "in/vq.bin", "--n", 1, *SHEET, *dtype]


def resumed(name: str, rng: Rng, base: Path) -> tuple:
    """A run that stopped in one of its two stages."""
    path = Path(shutil.copytree(base / rng.choice(("stopped-tokenizer", "stopped-rar")), "out/run"), name)
    if name == "state.pt":
        damage_checkpoint(rng, path)
    else:
        data = path.read_bytes()
        texts = [b"", b"null", b"[]", b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000, b"\xff\xfe", b'{"lr": 1e999}']
        twisted = [json.dumps(twist(rng, json.loads(data), PLAIN)).encode() for _ in range(9)]
        path.write_bytes(damaged(rng, data, texts + twisted, twisted[0]))
    return train_tiny, ["--resume", "--out", "out/run"]


# fmt: off
SHAPES = ("(1000000000000,)", "(4611686018427387904, 4)", "(-1, 192)", "(3000000000,)", "(3000000000, 192)", "()",
          "'x'", "(2, 2, 2)", "(1.5,)", "None", "(True, 192)", "(" * 5000, "-" * 9000 + "1", "(0, 192)", "[6, 192]")
DTYPES = ("'|O'", "'|V1000000000'", "'<U1000000000'", "'<f9'", "'|S0'", "'u1,u1'", "'<M8[s]'", "'<c16'", "'>i8'",
          "'|b1'", "'<f8'", "[('a', '<i4')]", "('|u1', (100000, 100000))", "{}", "1", "'" + "x" * 9000 + "'")
# fmt: on


def npy(dtype: str, shape: str, body: bytes, fortran: object = False, version: int = 1) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


@lru_cache
def npz_attacks(data: bytes) -> list[bytes]:
    """Headers that lie, bombs, arrays that would have to be unpickled, and what is no npz file."""
    members, attacks = unzipped(data), zip_attacks(data)
    for name, content in members.items():
        body, rest = content[128:], [(n, 0, c, len(c)) for n, c in members.items() if n != name]
        lies = [npy("'|u1'", shape, body) for shape in SHAPES] + [npy(dtype, "(6,)", body) for dtype in DTYPES]
        lies += [npy("'|u1'", "(6, 192)", body, True), npy("'|u1'", "(6,)", body, 7), content[:9], b"", body]
        lies += [npy("'|u1'", "(6,)", body, version=version) for version in (2, 3, 9)]
        attacks += [stored(members | {name: lie}) for lie in lies]
        for dtype, count in (("'|u1'", 3 << 30), ("'<i8'", 3 << 27), ("'<U1'", 3 << 28)):
            prefixes = [npy(dtype, shape, b"") for shape in (f"({count},)", f"({count // 192}, 192)")]
            attacks += [raw_zip([*rest, (name, 8, zeros(3, prefix=p), (3 << 30) + len(p))]) for p in prefixes]
    lies = [npy("'|O'", "(1,)", pickle.dumps(CALLS[0])), npy("'|u1'", "(3000000000,)", b""), pickle.dumps(CALLS[0])]
    return [*attacks, *lies]


def twist_array(rng: Rng, a: np.ndarray) -> np.ndarray:
    """Another array than belongs there: in type, values, order or shape."""
    kinds = (float, bool, complex, "U5", "S3", object, np.uint8, np.int8, np.float16, ">i4", np.uint64, "M8[s]")
    ways = [lambda kind=kind: a.astype(kind) for kind in kinds]
    ways += [lambda k=k: a.astype(np.int64) + k for k in (1, -1, -(10**6), 1 << 40, -(1 << 63))]
    ways += [lambda v=v: np.where(np.arange(a.size).reshape(a.shape) == 0, v, a.astype(float)) for v in (NAN, INF, 0.5)]
    ways += [lambda: a[:-1], lambda: a[:0], lambda: a[None], lambda: a.reshape(-1, 1), lambda: a.T, lambda: np.r_[a, a]]
    ways += [lambda: np.array([CALLS[0]], dtype=object), lambda: np.zeros((10**5, 64), np.uint8), lambda: a[..., :1]]
    ways += [lambda v=v: np.array(v) for v in (-1, 0, 10**9, 1 << 62, NAN, "x", "x" * 10**5, ["a"] * 10**5)]
    with contextlib.suppress(Exception):
        return rng.choice(ways)()
    return np.zeros(3)


def damage_npz(rng: Rng, path: Path) -> None:
    data, file = path.read_bytes(), io.BytesIO()
    with np.load(path) as content:
        arrays = dict(content)
    for name in rng.sample(list(arrays), rng.choice((1, 1, 2))):
        arrays[name] = twist_array(rng, arrays[name])
    rng.choice((np.savez, np.savez_compressed))(file, **arrays)
    path.write_bytes(damaged(rng, data, npz_attacks(data), file.getvalue()))


def tokens(rng: Rng, base: Path) -> tuple:
    for file in ("tokens.npz", "tokenizer.pt")[: rng.choice((1, 2))]:
        shutil.copy(base / "run" / file, "in")
    damage_npz(rng, Path("in/tokens.npz"))
    return train_tiny, ["--tokens", "in/tokens.npz", *TINY]


def imagenet64(rng: Rng, base: Path) -> tuple:
    shutil.copytree(base / "imagenet64", "in/data")
    damage_npz(rng, Path("in/data", rng.choice(("train_data_batch_1.npz", "val_data.npz"))))
    return train_tiny, ["--config", "imagenet64", "--image-size", 8, "--data-dir", "in/data", *TINY]


def cifar10(rng: Rng, base: Path) -> tuple:
    path = Path(shutil.copytree(base / "cifar10", "in/data"), f"data_batch_{rng.randrange(2, 6)}.bin")
    raw = path.read_bytes()
    cases = [b"", raw[:-5], b"\x0a" + raw[1:], raw[:3073] + b"\xff" + raw[3074:], raw + b"x", raw[:3073], raw * 9]
    content = rng.choice((scar(rng, raw), rng.choice([*cases, "folder", "missing", "link"])))
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "missing":
        path.mkdir() if content == "folder" else path.symlink_to(path)
    return train_tiny, ["--config", "cifar10", "--data-dir", "in/data", *TINY]


def entry(name: str, size: int = 10000 * 3073, **fields: object) -> bytes:
    """A header block of a tar archive."""
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@lru_cache
def tar_fronts() -> list[bytes]:
    """What may stand, gzipped, in front of a good archive."""
    link = dict(size=0, linkname="/etc/passwd")
    odd = [entry(BATCHES[0], type=kind, **link) for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"Z")]
    odd += [entry("cifar-10-batches-bin", 0, type=b"2", linkname="../../.."), entry(BATCHES[0], 3073) + bytes(3584)]
    odd += [entry(n, 10) + b"x" * 512 for n in ("../escaped.bin", "/tmp/escaped.bin", BATCHES[0], "x" * 99, "\n", "..")]
    odd += [entry("x", n, type=t) for n in (-512, -1024, -1, 1 << 40, 1 << 62) for t in (b"0", b"x", b"L", b"S", b"g")]
    records = [b"11 path=..\n", b"30 size=99999999999999999999\n", b"13 size=-512\n", b"22 GNU.sparse.major=1\n" * 2]
    odd += [entry("x", len(r), type=t) + r.ljust(512, b"\0") for r in records for t in (b"x", b"g", b"L", b"K")]
    odd += [(entry("x", 9, type=b"x") + b"9 a=bcde\n".ljust(512, b"\0")) * 3000, entry("x", 0) * 2000, b"x" * 512]
    fronts = [gzip.compress(o) for o in [*odd, entry("x", 1 << 19, type=b"x") + b"1" * (1 << 19)]]
    fronts += [zeros(3, 31, entry("x", 3 << 30, type=t)) for t in (b"x", b"L", b"0", b"g")]
    return [*fronts, zeros(8, 31), gzip.compress(entry("x", 0) * 20000) * 20]


@lru_cache
def good_batch() -> bytes:
    return gzip.compress(bytes(10000 * 3073 + 240), 1)


def cifar10_archive(rng: Rng, base: Path) -> tuple:
    """The archive with something in front of it or in place of a batch, a damaged header, or a damaged gzip stream."""
    headers, how, bad = [gzip.compress(entry(name)) for name in BATCHES], rng.random(), rng.randrange(6)
    if how < 0.6:
        front = rng.choice(tar_fronts())
        headers[0] = rng.choice((front, front + headers[0]))
    elif how < 0.8:
        raw = scar(rng, entry(BATCHES[bad]))
        total = b"%06o\0 " % (sum(raw[:148]) + sum(raw[156:512]) + 256)
        headers[bad] = gzip.compress(raw[:148] + total + raw[156:] if rng.random() < 0.7 else raw)
    archive = b"".join(header + good_batch() for header in headers[: rng.choice((1, 2, 6))]) + gzip.compress(
        bytes(1024)
    )
    if how >= 0.8:
        archive = rng.choice((scar(rng, archive), b"", b"\x1f\x8b", archive[:-9], b"BZh9" + archive, raw_zip([])))
    Path("in/cifar-10-binary.tar.gz").write_bytes(archive)
    return train_tiny, ["--config", "cifar10", "--data-dir", "in", *TINY]


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def plain_png(width: int, height: int, depth: int, colour: int, pixels: bytes, *extra: tuple) -> bytes:
    head = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, depth, colour, 0, 0, 0)
    return png([(b"IHDR", head), *extra, (b"IDAT", pixels), (b"IEND", b"")])


@lru_cache
def good_images() -> list[bytes]:
    """A small picture in the formats and modes that Pillow writes."""
    picture, found = Image.effect_mandelbrot((20, 14), (-2, -1, 1, 1), 20).convert("RGB"), []
    frames, kinds = dict(save_all=True, append_images=[picture] * 3), "GIF WEBP TIFF PNG JPEG BMP ICO PPM TGA PCX AVIF"
    for kind in f"{kinds} JPEG2000 DDS QOI SGI ICNS IM SPIDER XBM EPS".split():
        for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA", "YCbCr"):
            with contextlib.suppress(Exception), io.BytesIO() as file:
                picture.convert(mode).save(file, kind, **(frames if kind in ("GIF", "WEBP", "TIFF") else {}))
                found.append(file.getvalue())
    return found


# fmt: off
TEXTS = [b"P6 99999 99999 255\n", b"P6 " + b"9" * 5000, b"P5 -5 5 255\n12345", b"P4 0 0\n", b"<svg/>", b"", b"x",
         b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n%%EOF\n", bytes(5000),
         b"not a picture", b"SIMPLE  =  T" + b" " * 3000, b"\xd7\xcd\xc6\x9a" + bytes(99), b"PF 9 9 nan\n" + bytes(999),
         b"GIF89a\xff\xff\xff\xff\0\0\0,", b"#define x_width 9999999\n#define x_height 9999999\n"]
SIZES = ((10**5, 10**5), (13000, 13000), (0, 0), (-1, -1), (1 << 31, 1), (1, 8 * 10**7), (8 * 10**7, 1), (9000, 9000))
# fmt: on


@lru_cache
def image_attacks() -> list[bytes]:
    """Claims of absurd sizes, bombs, broken metadata, text that is called a picture, PostScript."""
    line, bomb, broken = zlib.compress(bytes(100)), zeros(2.5, 15), b"\xff\xff" + b"\x01\x12" * 50
    attacks = [plain_png(*s, d, c, line) for s in SIZES for d, c in ((8, 2), (8, 6), (16, 6), (1, 0), (8, 3), (3, 9))]
    real = ((13000, 2, 0.5), (9400, 6, 0.34), (9400, 2, 0.26), (20, 2, 2.5))
    attacks += [plain_png(w, w, 8, colour, zeros(gigabytes, 15)) for w, colour, gigabytes in real]
    chunks = [[(b"zTXt", b"a\0\0" + bomb)], [(b"iTXt", b"a\0\1\0\0\0" + bomb)], [(b"iCCP", b"a\0\0" + bomb)]]
    chunks += [[(b"tEXt", b"a\0" + b"x" * 9**6)] * 90, [(b"eXIf", b"MM\0*\0\0\0\x08" + broken)], [(b"acTL", broken)]]
    attacks += [plain_png(9, 9, 8, 2, zlib.compress(bytes(252)), *extra) for extra in chunks]
    for extra in (dict(exif=b"Exif\0\0II*\0" + broken), dict(icc_profile=b"x" * 500), dict(comment=b"x" * 60000)):
        with io.BytesIO() as file:
            Image.new("RGB", (8, 8)).save(file, "JPEG", **extra)
            attacks.append(file.getvalue())
    for w, h in ((99999, 99999), (-9, 9), (9, -(2**31))):
        attacks.append(b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, w, h, 1, 24, 0, 0, 0, 0, 0, 0))
    return attacks + TEXTS


def damaged_image(rng: Rng) -> bytes:
    data, how = rng.choice(good_images()), rng.random()
    if how < 0.5:
        return rng.choice(image_attacks()) if how < 0.4 else data
    if not data.startswith(b"\x89PNG") or how < 0.7:
        return scar(rng, data)
    chunks, at = [], 8  # a damaged chunk of a PNG with the right checksum
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    bad = rng.randrange(len(chunks))
    return png([(kind, scar(rng, body) if i == bad else body) for i, (kind, body) in enumerate(chunks)])


def folder(rng: Rng, base: Path) -> tuple:
    train, how = Path(shutil.copytree(base / "data", "in/data"), "train"), rng.randrange(12)
    name = rng.choice(("x.png", "x.jpg", "x.txt", "00.png", "\n", "\udcff.png"))
    (train / "ant" / name).write_bytes(damaged_image(rng))
    if how == 0:
        (train / os.fsdecode(rng.choice((b"\xff\xfe", b"\n", b"a" * 200, b"%s", b"$(touch executed)")))).mkdir()
    elif how == 1:
        os.mkfifo(train / "ant" / "fifo.png")
    elif how == 2:
        (train / "ant" / "link.png").symlink_to(rng.choice(("link.png", "/dev/zero", "/etc/passwd", "..")))
    return train_tiny, ["--config", "folder", "--image-size", 16, "--data-dir", "in/data", *TINY]


def inpaint(rng: Rng, base: Path) -> tuple:
    Path("in/x.png").write_bytes(damaged_image(rng))
    return sample, ["--run", base / "run", "--inpaint", "in/x.png", "--mask", "4,4,12,12", "--n", 1, *SHEET]


KINDS = {name: partial(in_run, name) for name in ("rar.pt", "rar_random.pt", "tokenizer.pt")}
KINDS |= {name: partial(resumed, name) for name in ("state.pt", "run.json")}
KINDS |= {"released RAR": partial(released, "rar.bin"), "released tokenizer": partial(released, "vq.bin")}
KINDS |= {"tokens.npz": tokens, "imagenet64 npz": imagenet64, "CIFAR-10 records": cifar10}
KINDS |= {"CIFAR-10 archive": cifar10_archive, "folder of images": folder, "image to inpaint": inpaint}
