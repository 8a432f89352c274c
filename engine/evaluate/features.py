"""Features of a whole split, collected over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import DataConfig, Source, evaluation_batches
from ..data.views import CenterCrop, Resize, View


class Features(NamedTuple):
    """`vectors` float32 `[N, D]` and `labels` int64 `[N]`, on the same device, in the order of the split."""

    vectors: Tensor
    labels: Tensor


def evaluation_view(size: tuple[int, int]) -> View:
    """The view that images are judged in: resize the shorter side, crop the centre.

    At 224 pixels the shorter side becomes 256, as everywhere in the literature; at other sizes the crop keeps it all.
    """
    side = 256 if size == (224, 224) else max(size)
    return View(name="evaluation", ops=(Resize(size=side), CenterCrop(size=size)))


@contextmanager
def evaluation_mode(module: nn.Module, precision: str = "bf16") -> Iterator[None]:
    """Run the body without gradients, without stochastic depth, and under autocast where `precision` is "bf16"."""
    was_training = module.training
    device = next(module.parameters()).device
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        module.train(was_training)


def extract(
    features: Callable[[Tensor], Tensor],
    source: Source,
    view: View,
    data: DataConfig,
    *,
    batch: int,
    device: torch.device,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Features:
    """Run a feature function over a labelled split.

    Collective when `world` is more than 1: every rank must call it, and every rank gets the whole result.

    Args:
        features: uint8 images `[B, H, W, 3]` to vectors `[B, D]`.
        source: labelled images.
        view: the evaluation view.
        data: decoding options.
        batch: images at a time on a rank.
        device: where the images go.
        limit: use only this many images, spread evenly over the split.
        rank: this process.
        world: processes that share the work.

    Raises:
        ValueError: the images have no labels.
    """
    vectors, labels, indices = [], [], []
    for images in evaluation_batches(
        source, view, batch=batch, rank=rank, world=world, device=device, config=data, limit=limit
    ):
        if images.labels is None:
            raise ValueError("features are collected with their labels, and these images have none")
        vectors.append(features(images.views[0]).float())
        labels.append(images.labels)
        indices.append(images.indices)
    return _gathered(torch.cat(vectors), torch.cat(labels), torch.cat(indices), world)


def _gathered(vectors: Tensor, labels: Tensor, indices: Tensor, world: int) -> Features:
    """Put the parts of all ranks together, in the order of the split; parts may differ in length."""
    if world > 1:
        parts: list[tuple[Tensor, ...]] = [()] * world
        torch.distributed.all_gather_object(parts, (vectors.cpu(), labels.cpu(), indices.cpu()))
        vectors, labels, indices = (torch.cat([p[i] for p in parts]).to(vectors.device) for i in range(3))
    order = indices.argsort()
    return Features(vectors[order], labels[order])
