"""LAMB with clipping by the global norm, against loops over tensors and apex."""

from collections.abc import Callable
from typing import Any

import torch
from bench import Case, Sizes, measures
from bench.parameters import Tensors, count, random_lists, stepping

from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge
from vitrail.kernels import FusedLAMB

LR, BETAS, EPS, DECAY, LIMIT = 1e-3, (0.9, 0.999), 1e-6, 0.01, 1.0  # apex's defaults


def loop() -> Callable[..., Any]:
    """Tensor by tensor, as the paper's algorithm with bias correction."""

    def build(params: Tensors) -> Callable[[], Any]:
        means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
        counter = [0]

        @torch.no_grad()
        def step() -> None:
            counter[0] += 1
            first, second = (1 - beta ** counter[0] for beta in BETAS)
            norm = torch.stack([param.grad.norm() for param in params if param.grad is not None]).norm()
            clip = (LIMIT / (norm + 1e-6)).clamp(max=1)
            for param, mean, square in zip(params, means, squares, strict=True):
                assert param.grad is not None
                grad = param.grad * clip
                mean.lerp_(grad, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
                update = (mean / first) / ((square / second).sqrt() + EPS) + DECAY * param
                weight, length = param.norm(), update.norm()
                ratio = torch.where((weight > 0) & (length > 0), weight / length, torch.ones_like(weight))
                param.sub_(LR * ratio * update)

        return step

    return stepping(build)


def foreach() -> Callable[..., Any]:
    """The same with one call a list and operation."""

    def build(params: Tensors) -> Callable[[], Any]:
        means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
        counter = [0]

        @torch.no_grad()
        def step() -> None:
            counter[0] += 1
            first, second = (1 - beta ** counter[0] for beta in BETAS)
            given = [param.grad for param in params if param.grad is not None]
            norm = torch.stack(torch._foreach_norm(given)).norm()
            grads = torch._foreach_mul(given, (LIMIT / (norm + 1e-6)).clamp(max=1))
            torch._foreach_lerp_(means, grads, 1 - BETAS[0])
            torch._foreach_mul_(squares, BETAS[1])
            torch._foreach_addcmul_(squares, grads, grads, 1 - BETAS[1])
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_div_(denominators, second**0.5)
            torch._foreach_add_(denominators, EPS)
            updates = torch._foreach_mul(params, DECAY)
            torch._foreach_addcdiv_(updates, means, denominators, 1 / first)
            lengths, weights = torch._foreach_norm(updates), torch._foreach_norm(params)
            steps = [
                -LR * torch.where((weight > 0) & (length > 0), weight / length, 1.0)
                for weight, length in zip(weights, lengths, strict=True)
            ]
            torch._foreach_mul_(updates, steps)
            torch._foreach_add_(params, updates)

        return step

    return stepping(build)


def ours() -> Callable[..., Any]:
    return stepping(lambda params: FusedLAMB(params, LR, BETAS, EPS, DECAY, max_grad_norm=LIMIT).step)


def apexs() -> Callable[..., Any]:
    from apex.optimizers import FusedLAMB as ApexLAMB

    def build(params: Tensors) -> Callable[[], Any]:
        step: Callable[[], Any] = ApexLAMB(
            params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, max_grad_norm=LIMIT
        ).step
        return step

    return stepping(build)


def case(name: str, encoder: ViTConfig | None) -> Case:
    total = count(encoder)
    return Case(
        op="lamb",
        name=name,
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=lambda device: random_lists(encoder, "params", "grads", device=device),
        truth=loop(),
        implementations={"vitrail": ours, "torch foreach": foreach, "torch loop": loop, "apex": apexs},
        # The gradient for the norm; all four in, the moments out; parameter and moments in, the parameter out.
        bytes={"step": total * 44},
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None)]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-B/16", vit_base())]


test_lamb = measures(cases)
