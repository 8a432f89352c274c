"""The pairs of student and teacher rows, and their weights, as both implementations take them."""

import torch


def counts(match: torch.Tensor | None, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Returns how many teacher rows each student row has, [R] in the dtype of `like`."""
    if match is None:
        return like.new_ones(rows)
    return (match >= 0).sum(0).to(like.dtype)


def weights(weight: torch.Tensor | None, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight of each student row, at most 1, and the factor that all of them have in common.

    The factor is applied in float32 at the very end: weights of a mean over thousands of rows are too small for fp16.
    """
    if weight is None:  # the mean over pairs; over none, 0
        return torch.ones_like(count), 1 / count.sum().clamp(min=1)
    weight = weight.to(count.dtype)
    largest = weight.abs().amax()
    return weight / torch.where(largest > 0, largest, 1), largest
