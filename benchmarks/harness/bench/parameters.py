"""Lists of the parameters of a real model, and optimisers as functions of them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from vitrail.engine.methods.mae import MAEConfig
from vitrail.engine.models.vit import ViTConfig

Tensors: TypeAlias = list[torch.Tensor]


def trained_shapes(encoder: ViTConfig | None) -> list[torch.Size]:
    """The shapes of what is trained of a masked autoencoder; None is the small one of the demo, for dry runs."""
    config = MAEConfig().demo() if encoder is None else MAEConfig(encoder=encoder)
    with torch.device("meta"):
        return [param.shape for param in config.build().parameters() if param.requires_grad]


def count(encoder: ViTConfig | None) -> int:
    """The number of trained parameters of a masked autoencoder."""
    return sum(shape.numel() for shape in trained_shapes(encoder))


def random_lists(encoder: ViTConfig | None, *names: str, device: torch.device) -> dict[str, Tensors]:
    """Lists of normal numbers by name, each like the trained parameters of a masked autoencoder."""
    shapes = trained_shapes(encoder)
    return {name: [torch.randn(shape, device=device) for shape in shapes] for name in names}


def stepping(build: Callable[..., Callable[[], Any]]) -> Callable[..., list[Tensors]]:
    """A function that steps parameters with an optimiser that stays with the list it was first given.

    Args:
        build: Makes the step of `params` and of further lists, given by name; both are returned.
    """
    made: list[Any] = []

    def step(params: Tensors, grads: Tensors, **others: Tensors) -> list[Tensors]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if not made or made[0] is not params:
            made[:] = [params, build(params, **others)]
        made[1]()
        return [params, *others.values()]

    return step
