"""Argument checks, which raise, and reasons, which do not.

A check fails on a call that no implementation could run. A reason says why one implementation cannot run a call
that another can. Neither reads tensor values, which would wait for the device.
"""

import functools
import importlib.util
import os

import torch

MIN_CAPABILITY = (8, 0)


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all given tensors live on one device."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"all tensors must be on one device, got {where}; move them with .to(device)")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `tensor` has the expected sizes; a string names a free size."""
    matches = tensor.ndim == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not matches:
        want = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape [{want}], got {list(tensor.shape)}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless `tensor` is of a real floating dtype."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}; convert it with .float()")


def check_floating_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless `dtype` is a real floating dtype."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating dtype such as torch.bfloat16, got {dtype}")


def check_indices(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `tensor` is an int64 matrix. Its values are not read."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be of dtype torch.int64, got {tensor.dtype}; convert it with .long()")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape [B, count], got {list(tensor.shape)}")


@functools.cache
def triton_installed() -> bool:
    """Whether the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def triton_reasons(device: torch.device) -> list[str]:
    """Returns why no Triton kernel can run on `device`."""
    if not triton_installed():
        return ["triton is not installed; pip install triton"]
    if device.type == "cpu":
        if interpreting():
            return []
        return ["the tensors are on the CPU; move them to a CUDA device, or set TRITON_INTERPRET=1 to test the kernel"]
    if device.type != "cuda":
        return [f"the tensors are on {device}; move them to a CUDA device"]
    if capability(device) < MIN_CAPABILITY:
        have, want = (".".join(map(str, pair)) for pair in (capability(device), MIN_CAPABILITY))
        return [f"{device} has compute capability {have}; the kernels need {want} or newer"]
    return []


def dtype_reasons(allowed: tuple[torch.dtype, ...], **dtypes: torch.dtype | None) -> list[str]:
    """Returns one reason for each dtype outside `allowed`; None stands for an absent tensor."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return [
        f"{name} is {str(dtype).removeprefix('torch.')}; the kernel takes {names}; convert it, or use the reference"
        for name, dtype in dtypes.items()
        if dtype is not None and dtype not in allowed
    ]


def last_dim_reasons(**tensors: torch.Tensor | None) -> list[str]:
    """Returns one reason for each tensor whose last dimension is not contiguous; None stands for an absent one."""
    return [
        f"{name} has stride {tensor.stride(-1)} in its last dimension (strides {list(tensor.stride())}), "
        f"expected 1; pass {name}.contiguous()"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.numel() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    ]
