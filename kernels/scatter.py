"""Sums of rows by index, in a fixed order on every device."""

import torch


def scatter_rows(rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Adds rows that share an index, without atomics.

    Args:
        rows: [R, ...] float32 or float64.
        index: [R] int64 below `size`; a row with a negative index is dropped.
        size: Number of rows of the result.

    Returns:
        [size, ...] of the same dtype: row j is the sum of the rows whose index is j, 0 without any.
    """
    # What is dropped goes to one more row; selecting the others would have to wait for their number.
    total = rows.new_zeros((size + 1, *rows.shape[1:]))
    index = torch.where(index < 0, size, index)
    if rows.device.type == "cpu":
        return total.index_add_(0, index, rows)[:size]  # one after the other
    return total.index_put_((index,), rows, accumulate=True)[:size]  # sorted by index; index_add_ would use atomics
