"""AdamW and the teacher's average in one pass, against the fastest separate passes that PyTorch has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, measures
from bench.parameters import Tensors, count, random_lists, stepping

from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge, vit_small
from vitrail.kernels import FusedAdamWEMA

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
MOMENTUM = 0.996


def inputs(encoder: ViTConfig | None, copied: bool, device: torch.device) -> dict[str, Tensors]:
    lists = random_lists(encoder, "params", "grads", "teacher", device=device)
    if copied:
        lists["param_copies"], lists["teacher_copies"] = (
            [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in lists[name]] for name in ("params", "teacher")
        )
    return lists


def ours() -> Callable[..., Any]:
    def build(params: Tensors, **others: Tensors) -> Callable[[], Any]:
        partners: dict[str, Any] = {name: dict(zip(params, tensors, strict=True)) for name, tensors in others.items()}
        return FusedAdamWEMA(params, **OPTIONS, ema_momentum=MOMENTUM, **partners).step

    return stepping(build)


def theirs(**kind: bool) -> Callable[..., Any]:
    def build(params: Tensors, teacher: Tensors, **copies: Tensors) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(params, **OPTIONS, **kind)
        sources = {"param_copies": params, "teacher_copies": teacher}

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            torch._foreach_lerp_(teacher, params, 1 - MOMENTUM)
            for name, copy in copies.items():
                torch._foreach_copy_(copy, sources[name])

        return step

    return stepping(build)


def case(name: str, encoder: ViTConfig | None, *, copied: bool) -> Case:
    total = count(encoder)
    return Case(
        op="adamw_ema",
        name=name + (", both bf16 copies" if copied else ""),
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=partial(inputs, encoder, copied),
        truth=theirs(foreach=False),
        implementations={
            "vitrail": ours,
            "torch fused + foreach": partial(theirs, fused=True),
            "torch foreach": partial(theirs, foreach=True),
        },
        # Parameter, two moments and teacher in and out, the gradient in; the copies out.
        bytes={"step": total * (40 if copied else 36)},
        flops={},
        tolerance=2**-8 if copied else None,  # the copies are bf16
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None, copied=copied) for copied in (False, True)]
    if sizes.batch >= 256:
        return [case("MAE ViT-H/14", vit_huge(), copied=copied) for copied in (False, True)]
    # Half the size with copies: everyone keeps states and copies, and float64 is checked against, in 24 GiB.
    return [case("MAE ViT-B/16", vit_base(), copied=False), case("MAE ViT-S/16", vit_small(), copied=True)]


test_adamw_ema = measures(cases)
