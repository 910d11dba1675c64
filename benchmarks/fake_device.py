"""A device for computers that have none, and the tests that run on it: `pytest -k device`.

Inside `with fake_device() as reads:` there is a second device, "cpu:1", and scripts run on it with `--device cpu:1`.
Each of its tensors holds an ordinary CPU tensor, its twin, and operations run on twins. So numbers and random draws are
those of the CPU, and a run must leave the files of a run on the CPU. What CUDA forbids is forbidden: an operation
raises if it is given tensors of both devices, except copies, CPU tensors of no dimensions, and CPU indices into a
tensor of the device; `.numpy()` raises without `.cpu()`; a generator must be of the device that it draws on.

`reads` lists the operations at which Python would wait for a GPU: copies to the CPU, numbers taken out of a tensor, and
results whose size depends on numbers, such as those of nonzero, unique, and an index that is a mask.

test_rar.py imports this file in its last line, behind the fixtures and helpers that these tests need.
"""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_tiny
from rar import RAR, RARConfig
from test_rar import FROM_TOKENS, MINIATURE, fill, read_files, run_script, stop_in_front_of
from tokenizer import VQConfig, VQTokenizer

DEVICE = torch.device("cpu:1")  # every build of torch takes it for another device than "cpu"
COPIES = ("copy_", "_to_copy")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # torch's own marks of such operations


class DeviceTensor(torch.Tensor):
    """A tensor on the fake device; `twin` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, twin):
        layout = {"strides": twin.stride(), "storage_offset": twin.storage_offset(), "dtype": twin.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, twin.shape, device=DEVICE, **layout)
        self.twin = twin
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} got a tensor of the fake device outside of fake_device()")

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.detach().twin.__reduce_ex__(protocol)

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()


class DeviceGenerator(torch.Generator):
    """A CPU generator that says it is of the device it was made for. `made` keeps those of the fake device."""

    made = {}  # noqa: RUF012

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.made_for = torch.device(device)
        if self.made_for == DEVICE:
            cls.made[self._cdata] = self
        return self

    device = property(lambda self: self.made_for)


def replace(x, kind, change):
    """Arguments or results of an operation with change(tensor) in place of each tensor of this kind."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)([replace(part, kind, change) for part in x])
    return x


class Operations(TorchDispatchMode):
    """Runs each operation of torch, below autograd and autocast, on twins, if CUDA would run it on these devices."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, []
        name, wanted, generator = func.overloadpacket.__name__, kwargs.get("device"), kwargs.get("generator")
        replace([*args, *kwargs.values()], torch.Tensor, tensors.append)
        ours = [x for x in tensors if isinstance(x, DeviceTensor)]
        indices = [x for x in args[1] if x is not None] if name in INDEXING else []
        on_device = isinstance(args[0], DeviceTensor) if name == "copy_" else len(ours) > 0
        if wanted is not None:
            on_device = torch.device(wanted) == DEVICE

        if ours and name not in COPIES:
            fitting = ours + indices if isinstance(args[0], DeviceTensor) else ours
            for x in tensors:
                if x.dim() > 0 and not any(x is other for other in fitting):
                    raise RuntimeError(
                        f"{name} got tensors of both devices: one of shape {tuple(x.shape)} is on the CPU"
                    )
        if generator is not None and (generator._cdata in DeviceGenerator.made) != on_device:
            raise RuntimeError(f"{name} got a generator of the other device")
        by_mask = any(x.dtype == torch.bool for x in indices)
        to_cpu = name in COPIES and not on_device
        if ours and (by_mask or to_cpu or (READS.intersection(func.tags) and not indices)):
            self.reads.append(name)

        twins = replace(args, DeviceTensor, lambda x: x.twin)
        named = {key: replace(x, DeviceTensor, lambda x: x.twin) for key, x in kwargs.items()}
        if on_device and wanted is not None:
            named["device"] = "cpu"
        result = func(*twins, **named)
        if not on_device:
            return result
        known = {id(x.twin): x for x in ours}  # an operation in place returns its own argument
        return replace(result, torch.Tensor, lambda x: known[id(x)] if id(x) in known else DeviceTensor(x))


@contextmanager
def fake_device():
    """The fake device; gives the list of reads."""

    def tensor(data, device="cpu", create=torch.tensor, **options):  # torch.tensor is no operation that a mode sees
        return create(data, **options).to(device)

    operations = Operations()
    with pytest.MonkeyPatch.context() as patch, operations:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "Generator", DeviceGenerator)
        # Without this setting of torch's own, module.to() would keep the old twins.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        yield operations.reads


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # float16 has a loss scale
def test_device_trains_and_resumes(dtype, here):
    """Each stage is stopped on the device. Then the run goes on on the CPU, and from there on the device again."""
    with fake_device():
        stop_in_front_of("tokens.npz", f"{MINIATURE} --dtype {dtype} --out new --device cpu:1")
        stop_in_front_of("samples-000008.png", "train_tiny.py --resume --out new --device cpu:1")
        stop_in_front_of("samples-000012.png", "train_tiny.py --resume --out new --device cpu")
        run_script("train_tiny.py --resume --out new --device cpu:1")
    if dtype == "float32":
        found, expected = (Path(run, "metrics.csv").read_bytes() for run in ("new", "run"))
        assert found == expected, "metrics.csv must be that of a run on the CPU, byte for byte"


MODES = {
    "classes": "--classes cat,0 --n 3 --batch-size 2 --guidance-scale 2 --guidance-power 1 --temperature 0.9 --top-k 5",
    "order": "--n 2 --order random --gif new.gif",
    "half": "--n 2 --npz new.npz --dtype float16",
    "inpaint": "--n 2 --inpaint data/train/ant/0.png --mask 0,0,8,8 --gif new.gif --out new.png",
}


def check_drawing(command):
    """Draw on the CPU, then on the device."""
    run_script(command)
    expected = read_files(".")
    with fake_device():
        run_script(f"{command} --device cpu:1")
    assert read_files(".") == expected, "pictures must be those that the CPU draws, byte for byte"


@pytest.mark.parametrize("mode", MODES)
def test_device_draws(mode, here):
    check_drawing(f"sample.py --run run {MODES[mode]}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_draws_with_the_authors_weights(dtype, tmp_path, monkeypatch):
    """Random ones in their layout: 2x2 tokens make an image of 256x256 pixels here."""
    monkeypatch.chdir(tmp_path)
    torch.save(fill(RAR(RARConfig(16, 3, 4, 32, 1, 2, 48)), 0.3).state_dict(), "rar.bin")
    config = VQConfig(256, 16, 4, 32, (1,) * 8, groups=32, released_shortcut=True)
    torch.save(VQTokenizer(config).state_dict(), "vq.bin")
    check_drawing(f"sample.py --rar rar.bin --tokenizer vq.bin --n 1 --guidance-scale 4 --dtype {dtype}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_is_read_once_a_step(dtype, here, monkeypatch):
    """Four steps, up to the first evaluation. Nothing but the loss that is printed may be waited for."""
    monkeypatch.setattr(train_tiny, "validation_losses", Mock(side_effect=InterruptedError))
    with fake_device() as reads, pytest.raises(InterruptedError):
        run_script(f"{FROM_TOKENS} --dtype {dtype} --out new --device cpu:1")
    claim = "a step must take one number from the device, its loss (torch calls that _local_scalar_dense); four took"
    assert reads == ["_local_scalar_dense"] * 4, f"{claim} {reads}"


__all__ = [name for name in dir() if name.startswith("test_device")]
