"""Lists of tensors of awkward sizes for the ops over lists, and where their implementations can run here."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from vitrail.kernels import extension

CPU = torch.device("cpu")
CHUNK = 16_384  # elements that the extension takes at a time
SIZES = (1, 2, 3, 7, 63, 65, 127, 1023, 1025, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
SHAPES = ((3,), (64, 129), (0, 4), (1, 1), (100, 200), (5, 3, 7, 7), (2, CHUNK + 1))  # of an optimiser's parameters
BOTH = (torch.float32, torch.bfloat16)

without_extension = pytest.mark.skipif(bool(extension.reasons(CPU)), reason="".join(extension.reasons(CPU)))
IMPLS = (pytest.param("cuda", marks=without_extension), "reference")


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test for a GPU alone, with the extension."""
    cuda = torch.device("cuda")
    missing = extension.reasons(cuda) if torch.cuda.is_available() else ["needs a CUDA GPU"]
    return pytest.mark.gpu(pytest.mark.skipif(bool(missing), reason="".join(missing))(test))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs what is inside, or a test that it decorates, with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def spacing(values: torch.Tensor) -> torch.Tensor:
    """The units in the last place."""
    return torch.nextafter(values.abs(), torch.tensor(math.inf)) - values.abs()


def parameters(
    shapes: Iterable[tuple[int, ...]] = SHAPES, *, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters, which have the same values whenever they are made."""
    return [torch.nn.Parameter(tensor) for tensor in randoms(shapes, dtypes=(dtype,))]


def give_gradients(step: int, *lists: list[torch.nn.Parameter]) -> None:
    """Puts the same gradients of this step on the parameters of every list."""
    grads = randoms([param.shape for param in lists[0]], seed=100 + step)
    for params in lists:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.dtype, copy=True)


def optimizer_lists(
    moments: int,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    grad_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    **options: Any,
) -> tuple[list[torch.Tensor], ...]:
    """What the op of an optimiser updates: parameters, gradients, one moment or two, and with two of them steps.

    Args:
        moments: 1 for LARS, 2 for the relatives of Adam.
        dtypes: Of the parameters, in turn.
        grad_dtypes: Of the gradients.
        state_dtypes: Of the moments.
        **options: Of :func:`randoms`.
    """
    params, grads, means, squares = (
        randoms(seed=seed, dtypes=kinds, **options)
        for seed, kinds in enumerate((dtypes, grad_dtypes, state_dtypes, state_dtypes))
    )
    if moments == 1:
        return params, grads, means
    steps = [torch.tensor(float(index % 5), device=param.device) for index, param in enumerate(params)]
    return params, grads, means, [square.abs_() for square in squares], steps
