"""Masks for a whole batch at once: the random cells of SimMIM, the blocks of BEiT, iBOT and DINOv2.

Nothing here draws numbers. Every function takes noise, U[0, 1) float32 with one row for each image, and an image's
mask depends on its own row alone. The functions that say how many tokens to mask run on a CPU as well as on a GPU: a
method that draws them on the CPU knows, without waiting for a GPU, how many masked tokens there can be.

    method   counts                                    least_area                      most_area
    BEiT     75 of 14 x 14                             16                              None
    iBOT     ibot_counts                               (min(grid) // 3) ** 2           None
    DINOv2   dinov2_counts                             4                               half of the tokens

Sources: SimMIM (arXiv 2111.09886), BEiT (arXiv 2106.08254), iBOT (arXiv 2111.07832), DINOv2 (arXiv 2304.07193) and
the code released with each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ATTEMPTS = 64
"""Rectangles that an image may try: of a million images of each setting above none wanted more than 58."""
BLOCK_COLUMNS = 3 * BLOCK_ATTEMPTS
"""Columns of `block_masks`: area, aspect and place of each attempt."""


def coarse_columns(grid: tuple[int, int], scale: int) -> int:
    """Columns that `coarse_masks` needs: one for each cell of `scale x scale` tokens.

    Raises:
        ValueError: The cells do not tile the grid.
    """
    if scale < 1 or grid[0] % scale or grid[1] % scale:
        raise ValueError(f"cells of {scale} x {scale} tokens do not tile a grid of {grid[0]} x {grid[1]}")
    return grid[0] // scale * (grid[1] // scale)


def coarse_masks(noise: Tensor, grid: tuple[int, int], *, scale: int, ratio: float) -> Tensor:
    """Mask random cells of `scale x scale` tokens, as SimMIM does: the same number in every image.

    Args:
        noise: U[0, 1) `[B, coarse_columns(grid, scale)]`; the cells with the smallest numbers are masked.
        grid: rows and columns of tokens.
        scale: side of a cell, in tokens.
        ratio: share of the cells to mask, rounded up: 0.6 of 49 cells are 30.

    Returns:
        bool `[B, g_h * g_w]`, True where masked.

    Raises:
        ValueError: The cells do not tile the grid, the ratio is not in 0 to 1, or the noise has other columns.
    """
    cells = coarse_columns(grid, scale)
    _check_columns(noise, cells)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be from 0 to 1, got {ratio}")
    chosen = noise.topk(math.ceil(ratio * cells), dim=1, largest=False, sorted=False).indices
    masked = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter_(1, chosen, True)
    masked = masked.view(-1, grid[0] // scale, 1, grid[1] // scale, 1)
    return masked.expand(-1, -1, scale, -1, scale).reshape(noise.shape[0], -1)


def block_masks(
    noise: Tensor,
    grid: tuple[int, int],
    counts: Tensor,
    *,
    least_area: float,
    most_area: float | None = None,
    aspect: float = 0.3,
    tries: int = 10,
    rounds: int = 20,
) -> Tensor:
    """Mask rectangles until each image has the number it wants, or no further rectangle is found: BEiT's rule.

    As long as an image misses tokens, it tries rectangles: an area uniform between `least_area` and the missing tokens
    (in whichever order these are), a log-uniform aspect, sides rounded to tokens, smaller than the grid in both
    directions, and a uniform place. The first that masks anything new, but no more than is missing, is kept. An image
    that fails `tries` times in a row stays as it is: a count is an upper bound, and often reached.

    Attempt j of an image takes the columns 3j, 3j + 1 and 3j + 2 of its noise, in float64, so that CPU and GPU agree.

    Args:
        noise: U[0, 1) `[B, 3 * attempts]`, `BLOCK_COLUMNS` as a rule; an image that has used it up stays as it is.
        grid: rows and columns of tokens.
        counts: `[B]`, tokens to mask, whole or not; 0 masks nothing.
        least_area: one end of the range of areas, in tokens.
        most_area: cap on the other end, and on what one rectangle masks; None for none.
        aspect: smallest height over width; the largest is its inverse.
        tries: attempts in a row that may fail.
        rounds: rectangles that an image may keep. A GPU computes all rounds, so that nothing has to be waited for; the
            CPU stops when all images are done. Of a million images of each setting above, also on 16 x 16 tokens, none
            wanted more than 19; on 37 x 37, take 32.

    Returns:
        bool `[B, g_h * g_w]`, True where masked.

    Raises:
        ValueError: The noise is not in threes, or the counts are not one for each row of it.
    """
    _check_blocks(noise, counts, aspect, least_area)
    B, attempts = noise.shape[0], noise.shape[1] // 3
    table = _attempts(noise, aspect, tries)
    reach = torch.arange(tries, device=noise.device)
    first = torch.arange(B, device=noise.device) * (attempts + tries)
    missing = counts.double().clamp(min=0)
    mask = torch.zeros(B, *grid, dtype=torch.int32, device=noise.device)
    for _ in range(rounds):
        active = _unfinished(missing)
        if not len(active):
            break
        begin, left = first.index_select(0, active), missing.index_select(0, active)
        before = mask.index_select(0, active)
        draws = table.index_select(1, (begin.unsqueeze(1) + reach).flatten()).view(4, -1, tries)
        cap = (left if most_area is None else left.clamp(max=most_area)).unsqueeze(1)
        boxes = _rectangles(draws, cap, grid, least_area)
        new = boxes[2] * boxes[3] - _covered(before, boxes)
        found, taken = ((new > 0) & (new <= cap)).max(dim=1, keepdim=True)
        box = boxes.gather(2, taken.expand(4, -1, -1)) * found
        mask.index_copy_(0, active, torch.maximum(before, _painted(box, grid)))
        # An image that found nothing wants nothing any more.
        left = torch.where(found, left.unsqueeze(1) - new.gather(1, taken), 0.0).squeeze(1)
        missing.index_copy_(0, active, left)
        first.index_copy_(0, active, begin + ((taken + 1) * found).squeeze(1))
    return mask.flatten(1).bool()


def _unfinished(missing: Tensor) -> Tensor:
    """Images that still miss tokens, int64; on a GPU, where finding them out would mean waiting, all images."""
    if missing.device.type == "cpu":
        return missing.nonzero().squeeze(1)
    return torch.arange(len(missing), device=missing.device)


def _attempts(noise: Tensor, aspect: float, tries: int) -> Tensor:
    """Area, root of the aspect, its inverse and place of every attempt, float64 `[4, B * (attempts + tries)]`.

    Behind an image's attempts lie `tries` of no size, which mask nothing.
    """
    area, shape, place = noise.double().view(noise.shape[0], -1, 3).unbind(2)
    root = torch.exp((0.5 - shape) * math.log(aspect))
    drawn = torch.stack([area, root, root.reciprocal(), place])
    return torch.cat([drawn, drawn.new_zeros(*drawn.shape[:2], tries)], dim=2).flatten(1)


def _rectangles(draws: Tensor, cap: Tensor, grid: tuple[int, int], least_area: float) -> Tensor:
    """Top, left, height and width, float64 `[4, B, tries]`, from the attempts `draws [4, B, tries]` and `cap [B, 1]`.

    What is as high or as wide as the grid has no size.
    """
    area, root, inverse, place = draws
    side = (least_area + area * (cap - least_area)).sqrt()
    height, width = (side * root).round(), (side * inverse).round()
    fits = (height < grid[0]) & (width < grid[1])
    height, width = height * fits, width * fits
    # One number chooses among all places, each as likely as any other up to the 24 bits of the noise.
    columns = grid[1] + 1 - width
    spot = (place * (grid[0] + 1 - height) * columns).floor()
    top = torch.div(spot, columns, rounding_mode="floor")
    return torch.stack([top, spot - top * columns, height, width])


def _covered(mask: Tensor, boxes: Tensor) -> Tensor:
    """How many tokens of each rectangle are masked already, int32 `[B, tries]`, for int32 masks `[B, H, W]`."""
    sums = F.pad(mask.cumsum(2, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    top, left, height, width = boxes.long()
    pitch = sums.shape[2]
    start, down = top * pitch + left, height * pitch
    corners = torch.stack([start, start + width, start + down, start + down + width], dim=1)
    a, b, c, d = sums.flatten(1).gather(1, corners.flatten(1)).view(corners.shape).unbind(1)
    return d - c - b + a


def _painted(box: Tensor, grid: tuple[int, int]) -> Tensor:
    """One rectangle for each image, `[4, B, 1]`, as int32 masks `[B, H, W]`."""
    top, left, height, width = box.int()
    y, x = (torch.arange(side, dtype=torch.int32, device=box.device) for side in grid)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return rows.int().unsqueeze(2) * columns.int().unsqueeze(1)


def ibot_columns(ratios: Sequence[float] = (0.0, 0.3)) -> int:
    """Columns that `ibot_counts` needs: one for each ratio and one for the choice."""
    return len(ratios) + 1


def ibot_counts(
    noise: Tensor,
    tokens: int,
    *,
    ratios: Sequence[float] = (0.0, 0.3),
    variances: Sequence[float] = (0.0, 0.2),
) -> Tensor:
    """Tokens to mask in each crop: iBOT leaves half of the crops whole, and masks U(0.1, 0.5) of the others.

    Args:
        noise: U[0, 1) `[B, ibot_columns(ratios)]`: a draw for each ratio, then the choice among them.
        tokens: tokens of a crop.
        ratios: shares of the tokens, one of which is chosen with equal chances.
        variances: half-width of the uniform distribution around each ratio.

    Returns:
        float64 `[B]`, not rounded: `block_masks` masks at most the whole part, which `counts.long().sum()` bounds.

    Raises:
        ValueError: The noise has other columns, or there are not as many variances as ratios.
    """
    _check_columns(noise, ibot_columns(ratios))
    if len(ratios) != len(variances):
        raise ValueError(f"variances must be one for each of {len(ratios)} ratios, got {len(variances)}")
    draws = noise.double()
    chosen = (draws[:, -1] * len(ratios)).long()
    share = torch.zeros_like(draws[:, 0])
    for i, (ratio, variance) in enumerate(zip(ratios, variances, strict=True)):
        share = torch.where(chosen == i, ratio + variance * (2 * draws[:, i] - 1), share)
    return share * tokens


def ranks(noise: Tensor) -> Tensor:
    """Place of each number in ascending order, int64 of the shape of `noise`: a random permutation."""
    return noise.flatten().argsort().argsort().view(noise.shape)


def dinov2_counts(
    order: Tensor,
    noise: Tensor,
    tokens: int,
    *,
    share: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
) -> tuple[Tensor, int]:
    """Tokens to mask in each crop of the global batch: DINOv2 spreads the shares evenly over the crops that it masks.

    Of `n` crops `M = int(share * n)` get a mask. The range of ratios is cut into M equal parts, and one crop draws
    from each: the batch masks nearly the same number of tokens in every step.

    Args:
        order: which part each crop draws from, a permutation of `0 .. n - 1` of any shape, such as `ranks` of noise
            over the global batch; a crop whose number is M or more is not masked.
        noise: U[0, 1), the shape of `order`.
        tokens: tokens of a crop.
        share: share of the crops that get a mask.
        ratios: smallest and largest share of a crop's tokens.

    Returns:
        int64 counts of the shape of `order`, and the largest sum that they can have.

    Raises:
        ValueError: The shapes differ.
    """
    if order.shape != noise.shape:
        raise ValueError(f"order and noise must have one shape, got {tuple(order.shape)} and {tuple(noise.shape)}")
    low, high = ratios
    masked = int(share * order.numel())
    width = (high - low) / max(masked, 1)
    counts = (tokens * (low + width * (order + noise.double()))).long()
    bound = sum(int(tokens * (low + width * (i + 1))) for i in range(masked))
    return torch.where(order < masked, counts, 0), bound


def masked_rows(masks: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The masked tokens of a batch in a list of fixed length, found without waiting for a GPU.

    Args:
        masks: bool `[B, L]`.
        capacity: length of the list, at least the number of masked tokens: known from the counts on the host.

    Returns:
        Indices into the flattened `[B * L]`, int64 `[capacity]` in ascending order, then 0 as padding; and weights,
        float32 `[capacity]`: 1 over the masked tokens of the token's image, and 0 for padding.

    Raises:
        ValueError: The capacity is not positive, or too small, which only the CPU can tell; a GPU leaves out the rest.
    """
    if capacity <= 0:
        raise ValueError(f"capacity must be positive, got {capacity}; where nothing is masked, leave out the loss")
    each = masks.sum(1)
    total = each.sum()
    if masks.device.type == "cpu" and int(total) > capacity:
        raise ValueError(f"{int(total)} tokens are masked and capacity is {capacity}; sum the counts of these images")
    index = torch.nonzero_static(masks.flatten(), size=capacity, fill_value=0).squeeze(1)
    real = torch.arange(capacity, device=masks.device) < total
    weight = each.clamp(min=1).float().reciprocal()[index // masks.shape[1]]
    return index, torch.where(real, weight, 0.0)


def _check_columns(noise: Tensor, columns: int) -> None:
    if noise.ndim != 2 or noise.shape[1] != columns:
        raise ValueError(f"noise must be [B, {columns}], got {tuple(noise.shape)}")


def _check_blocks(noise: Tensor, counts: Tensor, aspect: float, least_area: float) -> None:
    if noise.ndim != 2 or noise.shape[1] % 3 or not noise.shape[1]:
        raise ValueError(f"noise must be [B, 3 * attempts], got {tuple(noise.shape)}; draw BLOCK_COLUMNS columns")
    if counts.shape != noise.shape[:1] or counts.device != noise.device:
        raise ValueError(
            f"counts must be [{noise.shape[0]}] on {noise.device} as the noise is, got {list(counts.shape)} on "
            f"{counts.device}; give one for each image, moved there"
        )
    if not 0.0 < aspect <= 1.0:
        raise ValueError(f"aspect must be over 0 and at most 1, got {aspect}; its inverse is the other end")
    if least_area < 0:
        raise ValueError(f"least_area must not be negative, got {least_area}")
