"""The encoder that OpenAI published of DALL-E as .safetensors: `python -m vitrail.engine.interop.dall_e IN OUT`.

`encoder.pkl` is a pickled network, and unpickling it the usual way runs whatever code it names. Here nothing of it is
run: PyTorch's own restricted reader rebuilds tensors, and each class that such a network consists of is replaced by an
empty one that only holds what was written. A file that names anything else is refused.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.dall_e import DallEEncoder

CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)
"""What the published network is made of."""


class _Module:
    """Stands for a class of the file; its attributes are what was written, and it can do nothing."""


def read_encoder(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled encoder, read without running anything in the file.

    Args:
        path: `encoder.pkl`, in either of the formats of `torch.save`.

    Returns:
        Weights by name, as `DallEEncoder` has them.

    Raises:
        ValueError: the file is something else, or names other classes or functions; what and where.
    """
    stands_for = {name: type(name.rpartition(".")[2], (_Module,), {}) for name in CLASSES}
    try:
        with torch.serialization.safe_globals([(cls, name) for name, cls in stands_for.items()]):
            network = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} was refused, and nothing in it was run ({_reason(error)}); expected encoder.pkl as OpenAI "
            "published it, which holds an encoder of DALL-E and nothing else"
        ) from error
    if not isinstance(network, stands_for["dall_e.encoder.Encoder"]):
        raise ValueError(f"{path} holds a {type(network).__name__}; expected the network dall_e.encoder.Encoder")
    return dict(_tensors(network, "", path))


def _reason(error: Exception) -> str:
    """The line of PyTorch's message that says what was wrong; the others advise to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "global" in line.lower()), lines[-1] if lines else type(error).__name__)


def _tensors(module: Any, prefix: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a written module and of those below it, by dotted name."""
    if not isinstance(module, _Module):
        raise ValueError(f"{path}: {prefix or 'the network'} is a {type(module).__name__}; expected a module")
    parts = vars(module)
    for name, value in {**parts.get("_parameters", {}), **parts.get("_buffers", {})}.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {prefix}{name} is a {type(value).__name__}; expected a tensor")
        yield prefix + name, value.detach()
    for name, child in parts.get("_modules", {}).items():
        yield from _tensors(child, f"{prefix}{name}.", path)


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
    save_file({name: value.float().contiguous() for name, value in found.items()}, target)
    return sum(value.numel() for value in found.values())


def main() -> None:
    """The command; a file that is refused ends it with status 2."""
    parser = argparse.ArgumentParser(prog="python -m vitrail.engine.interop.dall_e", description=convert.__doc__)
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
