"""LARS as MoCo v3 takes it, over the weights of a masked autoencoder, against loops over tensors and lightly."""

from collections.abc import Callable
from typing import Any

import torch
from bench import Case, Sizes, measures
from bench.parameters import Tensors, count, random_lists, stepping, trained_shapes

from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge
from vitrail.kernels import FusedLARS

LR, MOMENTUM, DECAY, TRUST = 4.8, 0.9, 1e-6, 0.001  # of MoCo v3, ResNet-50, 300 epochs


def loop() -> Callable[..., Any]:
    """Tensor by tensor, in the order of operations of the official code of MoCo v3."""

    def build(params: Tensors) -> Callable[[], Any]:
        momenta = [torch.zeros_like(param) for param in params]

        @torch.no_grad()
        def step() -> None:
            for param, momentum in zip(params, momenta, strict=True):
                update = param.grad
                assert update is not None
                if param.ndim > 1:
                    update = update.add(param, alpha=DECAY)
                    weight, length = param.norm(), update.norm()
                    ratio = torch.where((weight > 0) & (length > 0), TRUST * weight / length, torch.ones_like(weight))
                    update = update.mul(ratio)
                momentum.mul_(MOMENTUM).add_(update)
                param.add_(momentum, alpha=-LR)

        return step

    return stepping(build)


def foreach() -> Callable[..., Any]:
    """The same with one call a list and operation."""

    def build(params: Tensors) -> Callable[[], Any]:
        momenta = [torch.zeros_like(param) for param in params]
        adapted = [index for index, param in enumerate(params) if param.ndim > 1]
        weights = [params[index] for index in adapted]

        @torch.no_grad()
        def step() -> None:
            updates = [param.grad for param in params if param.grad is not None]
            changed = torch._foreach_add([updates[index] for index in adapted], weights, alpha=DECAY)
            lengths, norms = torch._foreach_norm(changed), torch._foreach_norm(weights)
            ratios = [
                torch.where((norm > 0) & (length > 0), TRUST * norm / length, 1.0)
                for norm, length in zip(norms, lengths, strict=True)
            ]
            torch._foreach_mul_(changed, ratios)
            for index, update in zip(adapted, changed, strict=True):
                updates[index] = update
            torch._foreach_mul_(momenta, MOMENTUM)
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-LR)

        return step

    return stepping(build)


def ours() -> Callable[..., Any]:
    return stepping(lambda params: FusedLARS(params, LR, MOMENTUM, DECAY, TRUST).step)


def lightlys() -> Callable[..., Any]:
    """Its ratio is another one, by a millionth at this decay; it would adapt vectors too, were they not a group."""
    from lightly.utils.lars import LARS

    def build(params: Tensors) -> Callable[[], Any]:
        matrices, vectors = ([p for p in params if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors}]
        step: Callable[[], Any] = LARS(groups, lr=LR, momentum=MOMENTUM, trust_coefficient=TRUST).step
        return step

    return stepping(build)


def case(name: str, encoder: ViTConfig | None) -> Case:
    total = count(encoder)
    return Case(
        op="lars",
        name=name,
        shape={"parameters": total},
        dtype=torch.float32,
        inputs=lambda device: random_lists(encoder, "params", "grads", device=device),
        truth=loop(),
        implementations={
            "vitrail": ours,
            "torch foreach": foreach,
            "torch loop": loop,
            "lightly": lightlys,
        },
        # Parameter and momentum in and out, the gradient in; before, for norms, parameters and gradients of matrices.
        bytes={"step": total * 20 + 8 * sum(shape.numel() for shape in trained_shapes(encoder) if len(shape) > 1)},
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case("MAE of the demo", None)]
    return [case("MAE ViT-H/14", vit_huge()) if sizes.batch >= 256 else case("MAE ViT-B/16", vit_base())]


test_lars = measures(cases)
