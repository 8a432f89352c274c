"""The matrix of prototypes, out of whatever layer holds it."""

import torch
from torch import nn

from .. import checks


def prototype_weight(name: str, prototypes: torch.Tensor | nn.Module) -> torch.Tensor:
    """Returns the prototypes [K, d] of a linear layer, or those given as they are.

    Weight normalisation is applied, in its present form (`torch.nn.utils.parametrizations`) and in the older one
    (`torch.nn.utils.weight_norm`), whose `weight` attribute is stale between the optimiser's step and the next forward.

    Raises:
        TypeError: It is neither a tensor nor a layer with a weight.
        ValueError: The layer has a bias, or the weight is not a matrix.
    """
    if isinstance(prototypes, nn.Module):
        if getattr(prototypes, "bias", None) is not None:
            raise ValueError(
                f"{name} has a bias, but the loss factorises only where logits are linear in the features; "
                "build the layer with bias=False"
            )
        direction, length = (getattr(prototypes, attribute, None) for attribute in ("weight_v", "weight_g"))
        if isinstance(direction, torch.Tensor) and isinstance(length, torch.Tensor):
            checks.check_shape(f"weight_g of {name}", length, (direction.shape[0], 1))
            prototypes = torch._weight_norm(direction, length, 0)
        else:
            prototypes = getattr(prototypes, "weight", None)  # type: ignore[assignment]
    if not isinstance(prototypes, torch.Tensor):
        raise TypeError(f"{name} must be a matrix [K, d] or a linear layer without bias, got {type(prototypes)}")
    checks.check_floating(name, prototypes)
    checks.check_shape(name, prototypes, ("K", "d"))
    return prototypes
