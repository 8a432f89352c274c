"""What contrastive and distillation losses share: their features, their temperature, and the dtype of the products."""

import math

import torch
import torch.nn.functional as F

from . import checks
from .passes import MAX_BOUNDED_LOGIT, compute_dtype


def check_pair(**pair: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless two matrices [N, d] have one shape, dtype and device, and a row."""
    (first_name, first), (second_name, second) = pair.items()
    for name, tensor in pair.items():
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, ("N", "d"))
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have the same shape, one row for each image, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    if first.dtype != second.dtype:
        raise TypeError(f"{first_name} is {first.dtype} and {second_name} {second.dtype}; convert one of them")
    if first.shape[0] == 0:
        raise ValueError(f"{first_name} has no row: a mean over no image is undefined; skip the empty batch")
    checks.check_same_device(**pair)


def check_temperature(name: str, temperature: object) -> float:
    """Returns the temperature.

    Raises:
        TypeError: It is no number. That includes tensors, which would get no gradient.
        ValueError: It is not finite and positive.
    """
    if not isinstance(temperature, int | float):
        raise TypeError(f"{name} must be a number, got {temperature!r}; a tensor would get no gradient: pass .item()")
    if not 0 < temperature < math.inf:  # torch.compile cannot trace math.isfinite of a number that changes
        raise ValueError(f"{name} must be a finite positive number, got {temperature}")
    return float(temperature)


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Returns the rows divided by their L2 norms (at least 1e-12), in float32, or float64 for float64 features."""
    return F.normalize(features.to(compute_dtype(features)), dim=1, eps=1e-12)


def product_dtype(features: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the operands of the inner products: autocast's where it is on, else the features' own.

    Sums, exponentials and results are float32 whatever this is.
    """
    device = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def cosines_are_bounded(temperature: float) -> bool:
    """Whether cosines over this temperature are so small that no maximum need be subtracted from them."""
    # Rounding to bf16 makes unit rows up to half a percent longer, and their products one percent.
    return 1.01 / temperature <= MAX_BOUNDED_LOGIT
