"""Lists of tensors of awkward sizes for the ops over lists, and where their implementations can run here."""

from collections.abc import Iterable

import pytest
import torch

from vitrail.kernels import extension

CPU = torch.device("cpu")
CHUNK = 16_384  # elements that the extension takes at a time
SIZES = (1, 2, 3, 7, 63, 65, 127, 1023, 1025, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)

without_extension = pytest.mark.skipif(bool(extension.reasons(CPU)), reason="".join(extension.reasons(CPU)))
IMPLS = (pytest.param("cuda", marks=without_extension), "reference")


def randoms(
    sizes: Iterable[int | tuple[int, ...]] = SIZES,
    *,
    seed: int = 0,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    shift: int = 0,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Tensors of normal numbers, their dtypes taken in turn.

    Args:
        sizes: Numbers of elements, or shapes.
        seed: Of the numbers.
        dtypes: Tensor i has the dtype i modulo their number.
        shift: Elements between a 64-byte boundary and each tensor's first one.
        device: Where they live.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate(sizes):
        values = torch.randn(size, generator=generator).to(device, dtypes[index % len(dtypes)])
        buffer = values.new_empty(values.numel() + shift + 64)
        first = (-buffer.data_ptr() // buffer.element_size()) % (64 // buffer.element_size()) + shift
        made.append(buffer[first : first + values.numel()].view(values.shape).copy_(values))
    return made


def clones(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the same layout."""
    return [tensor.detach().clone(memory_format=torch.preserve_format) for tensor in tensors]


def same(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> bool:
    """Whether lists agree bit for bit."""
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(left, right, strict=True))
