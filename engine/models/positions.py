"""Fixed sine-cosine position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(
    width: int, grid: tuple[int, int], *, prefix: int = 1, temperature: float = 10000.0, rows_first: bool = False
) -> Tensor:
    """The two-dimensional table that MAE uses for its encoder and decoder, and MoCo v3 with its halves exchanged.

    A patch at (row r, column c) gets `[sin(c w) | cos(c w) | sin(r w) | cos(r w)]` with `width / 4` frequencies
    `w_k = temperature ** (-4 k / width)`: the first half encodes the column. Angles are computed in float64 and the
    result is rounded once, because float32 angles change a third of the entries of the released checkpoints.

    Args:
        width: embedding width, divisible by 4.
        grid: patches per column and per row, `(rows, columns)`.
        prefix: zero rows in front, one for a class token.
        temperature: base of the geometric frequency series.
        rows_first: whether the first half encodes the row, as MoCo v3's does.

    Returns:
        float32 `[1, prefix + rows * columns, width]`, patches row-major.

    Raises:
        ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}: choose another width")
    omega = temperature ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in grid)
    per_row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    per_column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    halves = [per_row, per_column] if rows_first else [per_column, per_row]
    table = torch.cat(halves, dim=2).reshape(1, grid[0] * grid[1], width)
    return torch.cat([table.new_zeros(1, prefix, width), table], dim=1).float()


def resize_positions(
    table: Tensor, grid: tuple[int, int], to: tuple[int, int], *, prefix: int = 1, offset: float = 0.0
) -> Tensor:
    """Stretch a learned table to another grid by bicubic interpolation without antialiasing; differentiable.

    A target patch i reads at `(i + 1/2) n / (m + offset) - 1/2` of n source patches, where m is the new count.

    Args:
        table: `[1, prefix + rows * columns, D]`.
        grid: (rows, columns) of the table.
        to: (rows, columns) wanted.
        prefix: leading rows that belong to no patch; they stay.
        offset: 0 for a plain resize. DINO's and iBOT's released code adds 0.1 to the new counts, to guard against
            rounding, and its checkpoints were trained with the slightly shifted positions that follow from it.

    Returns:
        `[1, prefix + to[0] * to[1], D]`; the table itself where the grids are equal.
    """
    if grid == to:
        return table
    patches = table[:, prefix:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    if offset:
        scale = [(new + offset) / old for new, old in zip(to, grid, strict=True)]
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        patches = F.interpolate(patches, size=to, mode="bicubic")
    return torch.cat([table[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)
