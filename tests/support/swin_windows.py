"""Swin's window attention as it is usually written: pad, roll, partition, mask, and all of that backwards."""

import torch
import torch.nn.functional as F
from ladder import Problem


def relative_index(window: int) -> torch.Tensor:
    """Row of the bias table for each pair of tokens of a window, [w², w²]."""
    axis = torch.arange(window)
    positions = torch.cartesian_prod(axis, axis)
    delta = positions[:, None] - positions + window - 1
    return delta[..., 0] * (2 * window - 1) + delta[..., 1]


def partition(canvas: torch.Tensor, window: int) -> torch.Tensor:
    """[B, H, W, ...] to [B, windows, w², ...]."""
    parts = canvas.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
    return parts.flatten(3, 4).flatten(1, 2)


def region_mask(height: int, width: int, window: int, shift: int) -> torch.Tensor:
    """Which pairs of each window are kept apart, on a padded map; [windows, w², w²]."""
    labels = torch.zeros(1, height, width)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in bands for c in bands):
        labels[:, rows, columns] = number
    labels = partition(labels, window)[0]
    return labels[:, :, None] != labels[:, None]


def eager(qkv, bias_table, *, window_size, num_heads, shift=0, scale=None, qkv_bias=None):
    """The same arguments and result as `window_attention`."""
    height, width = qkv.shape[1:3]
    margin = (0, 0, 0, -width % window_size, 0, -height % window_size)
    canvas = F.pad(qkv, margin)
    if qkv_bias is not None:
        canvas = canvas + (1 - F.pad(torch.ones_like(qkv[..., :1]), margin)) * qkv_bias
    canvas = canvas.roll((-shift, -shift), (1, 2))
    padded = canvas.shape[1:3]
    q, k, v = partition(canvas, window_size).unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + bias_table[relative_index(window_size)].permute(2, 0, 1)
    if shift:
        # Published models add -100 here, which leaves 4e-44 of a gradient where there should be none.
        mask = region_mask(*padded, window_size, shift).to(scores.device)
        scores = scores.masked_fill(mask[:, None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
    out = out.unflatten(1, (-1, padded[1] // window_size)).unflatten(3, (window_size, window_size))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.roll((shift, shift), (1, 2))[:, :height, :width]


def windows(
    size: tuple[int, int] = (9, 12),
    window: int = 7,
    shift: int = 3,
    heads: int = 2,
    width: int = 16,
    batch: int = 2,
    bias: bool = True,
    **options: object,
) -> Problem:
    """A call of `window_attention` on random values; a bias of the scores that matters."""
    generator = torch.Generator().manual_seed(window)
    channels = 3 * heads * width
    inputs = {
        "qkv": torch.randn(batch, *size, channels, generator=generator),
        "bias_table": torch.randn((2 * window - 1) ** 2, heads, generator=generator),
    }
    if bias:
        inputs["qkv_bias"] = torch.randn(channels, generator=generator)
    sizes = {"window_size": window, "shift": shift, "num_heads": heads}
    return Problem({**inputs, **sizes, **options}, differentiable=tuple(inputs))
