"""Swin models of timm with the window attention of `vitrail.kernels`, in place."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import window_attention


def patch_timm_swin(model: nn.Module) -> int:
    """Replace the attention of every block of a timm `SwinTransformer`, with its rolls and partitions.

    Parameters, buffers and the state dict stay as they are, and so do values and gradients, up to rounding. A block
    that cannot be replaced is left as it is, with a warning that says why.

    Args:
        model: A model that holds `timm.models.swin_transformer.SwinTransformerBlock`s.

    Returns:
        How many blocks were replaced.

    Raises:
        ValueError: None was; the message lists why not.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, SwinTransformerBlock)]
    refused = [f"{name}: {reason}" for name, block in blocks for reason in _reasons(block)]
    fit = [block for _, block in blocks if not _reasons(block)]
    if not fit:
        why = "".join(f"\n  - {reason}" for reason in refused) or " it holds no SwinTransformerBlock"
        raise ValueError(f"no block of {type(model).__name__} can be replaced:{why}")
    if refused:
        warnings.warn(f"blocks left as they are: {'; '.join(refused)}", stacklevel=2)
    for block in fit:
        block._attn = MethodType(_attend, block)
    return len(fit)


def _reasons(block: Any) -> list[str]:
    """Why a block cannot be replaced."""
    reasons = []
    if len(set(block.window_size)) > 1 or len(set(block.shift_size)) > 1:
        reasons.append(f"window {block.window_size} and shift {block.shift_size} must be square")
    if max(block.window_size) > 16:
        reasons.append(f"window {block.window_size} is larger than 16")
    if block.attn.attn_drop.p > 0:
        reasons.append(f"attn_drop={block.attn.attn_drop.p}, but there is no dropout of probabilities; set it to 0")
    return reasons


def _attend(block: Any, x: Tensor) -> Tensor:
    """What `SwinTransformerBlock._attn` does to a map [B, H, W, C]."""
    attention = block.attn
    window, shift = block.window_size[0], block.shift_size[0]
    qkv, bias = attention.qkv(x), attention.qkv.bias
    height, width = x.shape[1:3]
    margin = (-width % window, -height % window)
    rolled = shift > 0 and any(margin)
    if rolled:
        # timm rolls before it pads, the kernel (as the official model) after: hand it a map that needs no padding.
        qkv = _padded(qkv.roll((-shift, -shift), (1, 2)), bias, *margin).roll((shift, shift), (1, 2))
    out = window_attention(
        qkv,
        attention.relative_position_bias_table,
        window_size=window,
        shift=shift,
        num_heads=attention.num_heads,
        scale=attention.scale,
        qkv_bias=bias,
    )
    if rolled:
        out = out.roll((-shift, -shift), (1, 2))[:, :height, :width].roll((shift, shift), (1, 2))
    return attention.proj_drop(attention.proj(out))


def _padded(qkv: Tensor, bias: Tensor | None, right: int, bottom: int) -> Tensor:
    """Append columns and rows that hold `bias`, as tokens of zeros do behind the projection."""
    canvas = F.pad(qkv, (0, 0, 0, right, 0, bottom))
    if bias is None:
        return canvas
    inside = F.pad(torch.ones(qkv.shape[1:3], dtype=torch.bool, device=qkv.device), (0, right, 0, bottom))
    return torch.where(inside[..., None], canvas, bias.to(canvas.dtype))
