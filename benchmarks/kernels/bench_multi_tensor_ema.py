"""The moving average of a teacher, against PyTorch's foreach ops and the loop over parameters of the official code."""

from collections.abc import Callable
from functools import partial

import torch
from bench import Case, Sizes, measures

from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import vit_base, vit_huge
from vitrail.kernels import multi_tensor_ema_

Lists = dict[str, list[torch.Tensor]]
MOMENTUM = 0.996


def shapes_of(config: MAEConfig, count: int) -> list[torch.Size]:
    """The first parameters of a masked autoencoder."""
    with torch.device("meta"):
        return [parameter.shape for parameter in MAE(config).parameters()][:count]


def inputs(shapes: list[torch.Size], student: torch.dtype, device: torch.device) -> Lists:
    return {
        "teacher": [torch.randn(shape, device=device) for shape in shapes],
        "student": [torch.randn(shape, device=device, dtype=student) for shape in shapes],
    }


def ours(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> list[torch.Tensor]:
    multi_tensor_ema_(teacher, student, MOMENTUM)
    return teacher


def lerp(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> list[torch.Tensor]:
    if student[0].dtype != teacher[0].dtype:
        student = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)
    return teacher


def mul_add(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_mul_(teacher, MOMENTUM)
    torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)
    return teacher


def loop(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> list[torch.Tensor]:
    for average, weight in zip(teacher, student, strict=True):
        average.mul_(MOMENTUM).add_((1 - MOMENTUM) * weight)
    return teacher


def always(function: Callable[..., list[torch.Tensor]]) -> Callable[[], Callable[..., list[torch.Tensor]]]:
    return lambda: function


def case(name: str, shapes: list[torch.Size], student: torch.dtype = torch.float32) -> Case:
    count = sum(shape.numel() for shape in shapes)
    return Case(
        op="multi_tensor_ema",
        name=name,
        shape={"tensors": len(shapes), "parameters": count, "student": str(student).removeprefix("torch.")},
        dtype=torch.float32,
        inputs=partial(inputs, shapes, student),
        truth=loop,
        implementations={
            "vitrail": always(ours),
            "torch foreach": always(lerp),
            "torch mul_ add_": always(mul_add),
            "torch loop": always(loop),
        },
        bytes={"step": count * (8 + student.itemsize)},  # the teacher in and out, the student in
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    small = case("200 vectors of 768", [torch.Size([768])] * 200)
    if sizes.dry:
        return [small]
    config, name = (vit_huge(), "ViT-H/14") if sizes.batch >= 256 else (vit_base(), "ViT-B/16")
    shapes = shapes_of(MAEConfig(encoder=config), 200)
    return [case(f"{name}, 200 tensors", shapes), case(f"{name}, bf16 student", shapes, torch.bfloat16), small]


test_multi_tensor_ema = measures(cases)
