"""Clipping each gradient by its own norm, as DINO does, against the official loop that reads every norm on the host."""

from functools import partial

import torch
from bench import Case, Sizes, measures
from bench.parameters import count, trained_shapes

from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge
from vitrail.kernels import multi_tensor_clip_

LIMIT = 3.0


def inputs(encoder: ViTConfig | None, device: torch.device) -> dict[str, list[torch.Tensor]]:
    shapes = trained_shapes(encoder)
    # Half of the tensors are over the limit at first, and just at it in every repetition.
    scales = (4 * LIMIT if index % 2 else LIMIT / 2 for index in range(len(shapes)))
    return {
        "grads": [
            torch.nn.functional.normalize(torch.randn(shape, device=device).flatten(), dim=0).view(shape) * scale
            for shape, scale in zip(shapes, scales, strict=True)
        ]
    }


def ours(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    multi_tensor_clip_(grads, LIMIT, per_tensor=True)
    return grads


def foreach(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, [(LIMIT / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
    return grads


def loop(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    for grad in grads:
        coefficient = LIMIT / (grad.norm() + 1e-6)
        if coefficient < 1:  # waits for the device
            grad.mul_(coefficient)
    return grads


def case(name: str, encoder: ViTConfig | None) -> Case:
    total = count(encoder)
    return Case(
        op="multi_tensor_scale",
        name=name,
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=partial(inputs, encoder),
        truth=loop,
        implementations={"vitrail": lambda: ours, "torch foreach": lambda: foreach, "torch loop": lambda: loop},
        bytes={"clip": total * 4},  # once clipped, the gradients are within the limit and only read
        flops={},
        tolerance=1e-3,  # PyTorch adds the squares of millions of elements in float32
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None)]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-B/16", vit_base())]


test_multi_tensor_scale = measures(cases)
