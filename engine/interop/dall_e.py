"""The encoder that OpenAI published of DALL-E as .safetensors: `python -m vitrail.engine.interop.dall_e IN OUT`.

`encoder.pkl` is a pickled network, and unpickling it the usual way runs whatever code it names. Here it is read as
data: each class that such a network consists of is replaced by an empty one that holds what was written, tensors are
noted down and then taken from the file, and a file that names anything else is refused.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.dall_e import DallEEncoder

ENCODER = "dall_e.encoder.Encoder"
MODULES = (
    ENCODER,
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)
"""What the published network is made of."""
DTYPES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}


class _Module:
    """Stands for a module of the file; its attributes are what was written, and it can do nothing."""


class _Storage(NamedTuple):
    """Numbers that lie elsewhere in the file."""

    dtype: torch.dtype
    key: str
    length: int


class _Noted(NamedTuple):
    """A tensor as the file describes it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Unpickles what a network of `MODULES` is written with, and stops at any other name."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.modules = {name: type(name.rpartition(".")[2], (_Module,), {}) for name in MODULES}
        self._known: dict[str, Any] = {
            **self.modules,
            **DTYPES,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,
            "torch.device": lambda *name: None,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _Noted(
                storage, offset, size, stride
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str) -> Any:
        """One of the stand-ins, in place of what the file names."""
        if f"{module}.{name}" not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        """A storage; or a class, beside which files of PyTorch before 1.6 keep its source."""
        kind, first, *rest = pid
        return first if kind == "module" else _Storage(first, str(rest[0]), int(rest[2]))


def read_encoder(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled encoder, read without running anything in the file.

    Args:
        path: `encoder.pkl`, in either of the formats of `torch.save`.

    Returns:
        Weights by name, as `DallEEncoder` has them.

    Raises:
        ValueError: the file is something else, or names other classes or functions; what is wrong.
    """
    try:
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except OSError:
        raise
    except Exception as error:  # garbage may raise anything
        raise ValueError(
            f"{path} was refused, and nothing in it was run ({error or type(error).__name__}); expected encoder.pkl as "
            "OpenAI published it, which holds an encoder of DALL-E and nothing else"
        ) from error


def _read_zip(file: IO[bytes]) -> dict[str, Tensor]:
    """The format since PyTorch 1.6: an archive with the pickle and a member for each storage."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix(".pkl")
        with archive.open(pickled) as data:
            noted = _noted(_Reader(data))
        return {name: _tensor(tensor, archive.read(f"{root}/{tensor.storage.key}")) for name, tensor in noted.items()}


def _read_legacy(file: IO[bytes]) -> dict[str, Tensor]:
    """The format before: three pickles about the version, the network, the keys of the storages, and these."""
    file.seek(0)
    for _ in range(3):
        _Reader(file).load()
    noted = _noted(_Reader(file))
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in noted.values()}
    storages = {}
    for key in _Reader(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        storages[key] = file.read(count * sizes[key])
    return {name: _tensor(tensor, storages[tensor.storage.key]) for name, tensor in noted.items()}


def _noted(reader: _Reader) -> Mapping[str, _Noted]:
    """The network's tensors by name."""
    network = reader.load()
    if type(network) is not reader.modules[ENCODER]:
        raise ValueError(f"it holds a {type(network).__name__} and no {ENCODER}")
    return dict(_walk(network, ""))


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, _Noted]]:
    """Parameters of a written module and of those below it, by dotted name."""
    if not isinstance(module, _Module):
        raise ValueError(f"{prefix} is a {type(module).__name__} and no module")
    parts = vars(module)
    for name, value in parts["_parameters"].items():
        if not isinstance(value, _Noted):
            raise ValueError(f"{prefix}{name} is a {type(value).__name__} and no tensor")
        yield prefix + name, value
    for name, child in parts["_modules"].items():
        yield from _walk(child, f"{prefix}{name}.")


def _tensor(noted: _Noted, data: bytes) -> Tensor:
    """A tensor of its own memory, out of the bytes of its storage."""
    numbers = torch.frombuffer(bytearray(data), dtype=noted.storage.dtype, count=noted.storage.length)
    return numbers.as_strided(noted.size, noted.stride, noted.offset).clone(memory_format=torch.contiguous_format)


def convert(source: Path, target: Path) -> int:
    """Write the weights of a pickled encoder as float32 .safetensors.

    Returns:
        Number of weights.

    Raises:
        ValueError: the source is refused, or is no encoder of the published size; what differs is listed.
    """
    found = read_encoder(source)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in DallEEncoder().state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        first = ", ".join(f"{name} {shapes.get(name)} instead of {wanted.get(name)}" for name in wrong[:3])
        raise ValueError(f"{source} is an encoder of another size; {len(wrong)} tensors differ: {first}")
    save_file({name: value.float() for name, value in found.items()}, target)
    return sum(value.numel() for value in found.values())


def main() -> None:
    """The command; a file that is refused ends it with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vitrail.engine.interop.dall_e", description="Write DALL-E's pickled encoder as .safetensors."
    )
    parser.add_argument("source", type=Path, help="encoder.pkl of OpenAI's DALL-E")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    arguments = parser.parse_args()
    try:
        count = convert(arguments.source, arguments.target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one line that the user must see
        raise SystemExit(2) from None
    print(f"{count} weights in {arguments.target}")  # noqa: T201


if __name__ == "__main__":
    main()
