"""The optimiser step as the engine takes it (PyTorch's fused AdamW), against other AdamW implementations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, measures
from bench.parameters import count, random_lists, stepping

from vitrail.engine.models.vit import ViTConfig, vit_huge, vit_small

LR, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.05  # MAE's


def torchs(**kind: bool) -> Callable[..., Any]:
    return stepping(lambda params: torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=DECAY, **kind).step)


def deepspeeds(name: str) -> Callable[..., Any]:
    import deepspeed.ops.adam as adam

    kind = getattr(adam, name)
    return stepping(lambda params: kind(params, lr=LR, betas=BETAS, weight_decay=DECAY, adamw_mode=True).step)


def apexs() -> Callable[..., Any]:
    from apex.optimizers import FusedAdam

    return stepping(lambda params: FusedAdam(params, lr=LR, betas=BETAS, weight_decay=DECAY, adam_w_mode=True).step)


def case(name: str, encoder: ViTConfig | None) -> Case:
    total = count(encoder)
    return Case(
        op="adamw",
        name=name,
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=lambda device: random_lists(encoder, "params", "grads", device=device),
        truth=torchs(foreach=False),
        implementations={
            "vitrail": partial(torchs, fused=True),
            "torch foreach": partial(torchs, foreach=True),
            "torch loop": partial(torchs, foreach=False),
            "DeepSpeed FusedAdam": partial(deepspeeds, "FusedAdam"),
            "DeepSpeed CPUAdam": partial(deepspeeds, "DeepSpeedCPUAdam"),
            "apex": apexs,
        },
        bytes={"step": total * 28},  # parameter and two moments in and out, the gradient in
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None)]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-S/16", vit_small())]


test_adamw = measures(cases)
