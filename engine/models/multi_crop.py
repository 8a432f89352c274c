"""Crops of several sizes through one network: those of equal size in one pass (arXiv 2006.09882, section 3.2)."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def group_views(views: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Put each run of consecutive views of equal size into one batch.

    Views that lie one behind the other in memory, as loaders hand them out, are not copied: the batch is a view of the
    same memory. Others are concatenated.

    Args:
        views: Images, one tensor `[b, height, width, 3]` per view, any dtype, on one device.

    Returns:
        For each run in order, its images `[n * b, height, width, 3]`, view by view, and the number n of its views.
    """
    runs = [list(run) for _, run in groupby(views, key=lambda view: view.shape)]
    return [(run[0] if len(run) == 1 else _joined(run), len(run)) for run in runs]


def _joined(views: list[Tensor]) -> Tensor:
    first = views[0]
    if not _adjacent(views):
        return torch.cat(views)
    return first.as_strided((len(views) * len(first), *first.shape[1:]), first.stride())


def _adjacent(views: list[Tensor]) -> bool:
    """Whether contiguous tensors of one shape follow each other in one storage."""
    first = views[0]
    return all(
        view.is_contiguous()
        and view.dtype == first.dtype
        and not view.requires_grad  # the batch is a view of the first alone: no gradient would reach the others
        and view.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and view.storage_offset() == first.storage_offset() + place * first.numel()
        for place, view in enumerate(views)
    )
