"""Sums of rows by index, in a fixed order on every device: the gradient of a gather."""

import torch

_LIBRARY = torch.library.Library("vitrail_internal", "DEF")
_LIBRARY.define("scatter_rows(Tensor rows, Tensor index, SymInt size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _scatter_rows(rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    # What is dropped lands in a surplus row: choosing the rows that stay would wait for the device.
    out = rows.new_zeros((size + 1, *rows.shape[1:]))
    index = torch.where(index < 0, size, index)
    if rows.device.type == "cpu":
        out.index_add_(0, index, rows)  # one row after the other; index_put_ divides them among threads
    else:
        out.index_put_((index,), rows, accumulate=True)  # sorts the indices first; index_add_ adds atomically
    return out[:size]


def _fake(rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    return rows.new_empty((size, *rows.shape[1:]))


# An op of its own: torch.compile would turn the accumulating index_put_ into atomic additions.
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("scatter_rows", _scatter_rows, _key)
torch.library.register_fake("vitrail_internal::scatter_rows", _fake, lib=_LIBRARY)


def scatter_rows(rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Adds rows up by index: `out[j] = Σ rows[i] over all i with index[i] == j`, bit-identical from run to run.

    For use in backward passes: it has no gradient, checks no argument and waits for no device.

    Args:
        rows: [R, d] or [R], float32 or float64, in which the sums are formed too.
        index: [R] int64, below `size`; a negative one drops its row.
        size: Number of rows of the result.

    Returns:
        [size, d] or [size], contiguous, zero where no index points.
    """
    result: torch.Tensor = torch.ops.vitrail_internal.scatter_rows(rows, index, size)
    return result
