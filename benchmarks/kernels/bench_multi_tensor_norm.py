"""Norms of gradients, each and all, against what PyTorch computes for them."""

import torch
from bench import Case, Sizes, measures
from bench.parameters import count, random_lists

from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge
from vitrail.kernels import multi_tensor_norm


def ours(grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return multi_tensor_norm(grads)[:2]


def foreach(grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    norms = torch.stack(torch._foreach_norm(grads))
    return norms.norm(), norms


def loop(grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    norms = torch.stack([grad.norm() for grad in grads])
    return norms.norm(), norms


def case(name: str, encoder: ViTConfig | None) -> Case:
    total = count(encoder)
    return Case(
        op="multi_tensor_norm",
        name=name,
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=lambda device: random_lists(encoder, "grads", device=device),
        truth=loop,
        implementations={"vitrail": lambda: ours, "torch foreach": lambda: foreach, "torch loop": lambda: loop},
        bytes={"forward": total * 4},
        flops={},
        tolerance=1e-3,  # PyTorch adds the squares of millions of elements in float32
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None)]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-B/16", vit_base())]


test_multi_tensor_norm = measures(cases)
