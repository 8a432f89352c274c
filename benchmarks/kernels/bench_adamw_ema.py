"""AdamW and the teacher's average in one pass, against the fastest separate passes that PyTorch has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, measures

from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge, vit_small, vit_tiny
from vitrail.kernels import FusedAdamWEMA

Tensors = list[torch.Tensor]
Step = Callable[[Tensors, Tensors, Tensors], Any]
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
MOMENTUM = 0.996


def inputs(encoder: ViTConfig, device: torch.device) -> dict[str, Tensors]:
    with torch.device("meta"):
        shapes = [p.shape for p in MAE(MAEConfig(encoder=encoder)).parameters() if p.requires_grad]
    params = [torch.randn(shape, device=device) for shape in shapes]
    return {
        "params": params,
        "grads": [torch.randn_like(param) for param in params],
        "teacher": [torch.randn_like(param) for param in params],
    }


def stepping(build: Callable[[Tensors, Tensors], tuple[Callable[[], Any], list[Tensors]]]) -> Step:
    """A function that steps lists, with an optimiser that stays with the list it was first given."""
    made: list[Any] = []

    def step(params: Tensors, grads: Tensors, teacher: Tensors) -> list[Tensors]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if not made or made[0] is not params:
            made[:] = [params, *build(params, teacher)]
        made[1]()
        return [params, teacher, *made[2]]

    return step


def shadows(tensors: Tensors) -> Tensors:
    return [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]


def ours(copied: bool) -> Step:
    def build(params: Tensors, teacher: Tensors) -> tuple[Callable[[], Any], list[Tensors]]:
        copies = [shadows(params), shadows(teacher)] if copied else []
        names = ("param_copies", "teacher_copies")
        mappings: dict[str, Any] = {
            name: dict(zip(params, copy, strict=True)) for name, copy in zip(names, copies, strict=False)
        }
        pairs = dict(zip(params, teacher, strict=True))
        return FusedAdamWEMA(params, **OPTIONS, teacher=pairs, ema_momentum=MOMENTUM, **mappings).step, copies

    return stepping(build)


def theirs(copied: bool, **kind: bool) -> Step:
    def build(params: Tensors, teacher: Tensors) -> tuple[Callable[[], Any], list[Tensors]]:
        optimizer = torch.optim.AdamW(params, **OPTIONS, **kind)
        copies = [shadows(params), shadows(teacher)] if copied else []

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            torch._foreach_lerp_(teacher, params, 1 - MOMENTUM)
            for copy, source in zip(copies, (params, teacher), strict=False):
                torch._foreach_copy_(copy, source)

        return step, copies

    return stepping(build)


def case(name: str, encoder: ViTConfig, *, copied: bool) -> Case:
    count = sum(param.numel() for param in inputs(encoder, torch.device("meta"))["params"])
    return Case(
        op="adamw_ema",
        name=name + (", both bf16 copies" if copied else ""),
        shape={"parameters": count},
        dtype=torch.float32,
        inputs=partial(inputs, encoder),
        truth=theirs(copied, foreach=False),
        implementations={
            "vitrail": partial(ours, copied),
            "torch fused + foreach": partial(theirs, copied, fused=True),
            "torch foreach": partial(theirs, copied, foreach=True),
        },
        # Parameter, two moments and teacher in and out, the gradient in; the copies out.
        bytes={"step": count * (40 if copied else 36)},
        flops={},
        tolerance=2**-8 if copied else None,  # the copies are bf16
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE ViT-Ti/16", vit_tiny(), copied=copied) for copied in (False, True)]
    if sizes.batch >= 256:
        return [case("MAE ViT-H/14", vit_huge(), copied=copied) for copied in (False, True)]
    # Half the size with copies: everyone keeps states and copies, and float64 is checked against, in 24 GiB.
    return [case("MAE ViT-B/16", vit_base(), copied=False), case("MAE ViT-S/16", vit_small(), copied=True)]


test_adamw_ema = measures(cases)
