"""The optimiser step as the engine takes it (PyTorch's fused AdamW), against other AdamW implementations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, measures

from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import ViTConfig, vit_huge, vit_small, vit_tiny

Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
LR, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.05  # MAE's


def inputs(encoder: ViTConfig, device: torch.device) -> dict[str, list[torch.Tensor]]:
    with torch.device("meta"):
        shapes = [p.shape for p in MAE(MAEConfig(encoder=encoder)).parameters() if p.requires_grad]
    params = [torch.randn(shape, device=device) for shape in shapes]
    return {"params": params, "grads": [torch.randn_like(p) for p in params]}


def stepping(build: Optimizer) -> Callable[..., Any]:
    """A function that steps parameters, with an optimiser that stays with the list it was first given."""
    owner: list[list[torch.Tensor]] = []
    optimizer: list[torch.optim.Optimizer] = []

    def step(params: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
        if not owner or owner[0] is not params:
            owner[:], optimizer[:] = [params], [build(params)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer[0].step()
        return params

    return step


def torchs(**kind: bool) -> Callable[..., Any]:
    return stepping(lambda params: torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=DECAY, **kind))


def deepspeeds(name: str) -> Callable[..., Any]:
    import deepspeed.ops.adam as adam

    kind = getattr(adam, name)
    return stepping(lambda params: kind(params, lr=LR, betas=BETAS, weight_decay=DECAY, adamw_mode=True))


def apexs() -> Callable[..., Any]:
    from apex.optimizers import FusedAdam

    return stepping(lambda params: FusedAdam(params, lr=LR, betas=BETAS, weight_decay=DECAY, adam_w_mode=True))


def case(name: str, encoder: ViTConfig) -> Case:
    count = sum(param.numel() for param in inputs(encoder, torch.device("meta"))["params"])
    return Case(
        op="adamw",
        name=name,
        shape={"parameters": count},
        dtype=torch.float32,
        inputs=partial(inputs, encoder),
        truth=torchs(foreach=False),
        implementations={
            "vitrail": partial(torchs, fused=True),
            "torch foreach": partial(torchs, foreach=True),
            "torch loop": partial(torchs, foreach=False),
            "DeepSpeed FusedAdam": partial(deepspeeds, "FusedAdam"),
            "DeepSpeed CPUAdam": partial(deepspeeds, "DeepSpeedCPUAdam"),
            "apex": apexs,
        },
        bytes={"step": count * 28},  # parameter and two moments in and out, the gradient in
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE ViT-Ti/16", vit_tiny())]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-S/16", vit_small())]


test_adamw = measures(cases)
