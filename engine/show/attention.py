"""Where a network's last layer of attention looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from vitrail.kernels import WindowAttention, window_attention
from vitrail.kernels.patches import image_size

from ..data import DataConfig, Source
from ..models.block import Block
from ..models.swin import SwinTransformer
from ..models.vit import VisionTransformer, ViTConfig
from .pictures import some_images

HEADS = 12  # in a picture
OUTLINE = "deepskyblue"


def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the last block, head by head: where `class_attention` or `received_attention` finds it.

    Args:
        backbone: a vision transformer or a Swin transformer.
        images: uint8 `[B, H, W, 3]`, of a size that the backbone takes.

    Returns:
        float32 `[B, heads, rows, columns]`.

    Raises:
        ValueError: the backbone has no attention.
    """
    network = _transformer(backbone)
    if isinstance(network, VisionTransformer):
        return class_attention(network, images)
    return received_attention(network, images)


@torch.no_grad()
def class_attention(vit: VisionTransformer, images: Tensor) -> Tensor:
    """What the class token attends to in the last block (DINO, arXiv 2104.14294, figure 1).

    The last layer is computed in float32 under any autocast.

    Args:
        vit: the network.
        images: uint8 `[B, H, W, 3]`; sides are multiples of the patch.

    Returns:
        float32 `[B, heads, rows, columns]`, by patch; the sum over the patches is 1 less what the token keeps to
        itself.
    """
    block = vit.blocks[-1]
    assert isinstance(block, Block)
    seen: list[Tensor | None] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.extend((inputs[0], inputs[-1])))
    try:
        vit.forward_features(images)
    finally:
        hook.remove()
    x, bias = seen
    assert x is not None
    with torch.autocast(images.device.type, enabled=False):
        query, key, _ = block.project(x.float()).unflatten(-1, (3, block.attn.heads, -1)).unbind(2)
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias[:, 0]
    height, width = image_size(images)
    patch = vit.config.patch_size
    return scores.softmax(-1)[..., vit.num_prefix :].unflatten(-1, (height // patch, width // patch))


def received_attention(swin: SwinTransformer, images: Tensor) -> Tensor:
    """How much attention each token gets from those in its window, in the last block.

    There is no class token to ask, so this is the mean over all tokens' distributions of attention: the column sums
    of each window's matrix. They are the gradient of the summed output with respect to the values, which spares a
    second implementation of windows, shifts and padding.

    Args:
        swin: the network.
        images: uint8 `[B, H, W, 3]`; sides are multiples of the patch.

    Returns:
        float32 `[B, heads, rows, columns]`, by token of the last map; the sum over the tokens is 1 less what goes to
        padding.
    """
    attention = [module for module in swin.modules() if isinstance(module, WindowAttention)][-1]
    seen: list[Tensor | None] = []

    def keep(_: nn.Module, __: Any, projected: tuple[Tensor, Tensor | None]) -> None:
        # Copies: ZeRO-3 has the table gathered for as long as the module runs.
        parts = (*projected, attention.relative_position_bias_table)
        seen.extend(None if part is None else part.detach().float().clone() for part in parts)

    hook = attention.qkv.register_forward_hook(keep)
    try:
        with torch.no_grad():
            swin.forward_features(images)
    finally:
        hook.remove()
    qkv, bias, table = seen
    assert qkv is not None
    assert table is not None
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        out = window_attention(
            qkv.requires_grad_(),
            table,
            window_size=attention.window_size,
            shift=attention.shift,
            num_heads=attention.num_heads,
            qkv_bias=bias,
        )
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    received = gradient.unflatten(-1, (3, attention.num_heads, -1))[
        ..., 2, :, 0
    ]  # the same in every channel of a value
    return received.permute(0, 3, 1, 2) / (qkv.shape[1] * qkv.shape[2])


def mass_mask(attention: Tensor, share: float = 0.6) -> Tensor:
    """The fewest cells that together hold a share of each map's mass, as DINO's figures outline them.

    Cells are taken from the largest down while the mass of those that are left out is more than `1 - share`, so the
    cell that crosses the border is taken as well.

    Args:
        attention: `[..., rows, columns]`, not negative.
        share: of the mass, in (0, 1].

    Returns:
        bool `[..., rows, columns]`.

    Raises:
        ValueError: the share is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}; expected a share of the mass, above 0 and at most 1")
    flat = attention.double().flatten(-2)
    ascending, order = flat.sort(dim=-1, stable=True)
    mass = (ascending / ascending.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, mass > 1.0 - share)
    return kept.unflatten(-1, attention.shape[-2:])


def attention_size(backbone: nn.Module, side: int | None = None) -> tuple[int, int]:
    """(height, width) of the images whose attention is looked at.

    Args:
        backbone: a vision transformer or a Swin transformer.
        side: wanted, rounded down to a multiple of the patch. None takes more pixels than the training for a ViT
            whose positions follow the image, for a finer map: 480 after 224 as in DINO's figures, twice as many after
            others. For other networks it takes those of the training.

    Raises:
        ValueError: the network has no attention, or takes no images of this size.
    """
    config = _transformer(backbone).config
    height, width = config.size
    follows = isinstance(config, ViTConfig) and config.learns_positions
    if side is None:
        finer = (480, 480) if (height, width) == (224, 224) else (2 * height, 2 * width)
        height, width = finer if follows else (height, width)
    else:
        if isinstance(config, ViTConfig) and not follows and (side, side) != (height, width):
            raise ValueError(
                f"the network's positions are a fixed table for images of {height}x{width} pixels, not {side}x{side}: "
                "leave the size out"
            )
        height = width = side
    patch = config.patch_size
    if min(height, width) < patch:
        raise ValueError(f"images of {height}x{width} pixels hold no patch of {patch}x{patch}: take larger ones")
    return height - height % patch, width - width % patch


def _transformer(backbone: nn.Module) -> VisionTransformer | SwinTransformer:
    """The backbone, if it has attention to show."""
    if not isinstance(backbone, (VisionTransformer, SwinTransformer)):
        raise ValueError(f"{type(backbone).__name__} has no attention to show: expected a ViT or a Swin transformer")
    return backbone


def show_attention(
    backbone: nn.Module,
    source: Source,
    data: DataConfig,
    path: Path,
    *,
    device: torch.device,
    size: int | None = None,
    count: int = 8,
    rank: int = 0,
    note: str = "",
) -> None:
    """Draw the maps of some images; every rank computes, since ZeRO-3 needs them all, and rank 0 writes.

    Args:
        backbone: a vision transformer or a Swin transformer.
        source: images.
        data: decoding options.
        path: the PNG to write.
        device: where the backbone is.
        size: see `attention_size`.
        count: images, always the same random ones.
        rank: this process.
        note: a line above all.

    Raises:
        ValueError: as of `attention_size`.
    """
    images = some_images(source, attention_size(backbone, size), data, count=count, device=device)
    maps = attention_maps(backbone, images)
    if rank == 0:
        draw_attention(images, maps, path, note=note)


def draw_attention(images: Tensor, maps: Tensor, path: Path, *, share: float = 0.6, note: str = "") -> None:
    """Save a row for each image: itself, then the map of each head with the outline of `mass_mask`.

    Args:
        images: uint8 `[B, H, W, 3]`.
        maps: `[B, heads, rows, columns]`; of many heads the first twelve are drawn.
        path: the PNG to write.
        share: of the mass that the outline holds.
        note: a line above all.
    """
    height, width = images.shape[1:3]
    maps = maps[:, :HEADS].cpu()
    # Nearest-neighbour enlargement: a cell is a block of pixels.
    rows, columns = (
        torch.arange(side) * cells // side for side, cells in zip((height, width), maps.shape[2:], strict=True)
    )
    masks = mass_mask(maps, share)[..., rows[:, None], columns]
    large = maps[..., rows[:, None], columns].numpy()
    figure, axes = plt.subplots(
        len(images),
        1 + maps.shape[1],
        figsize=(1.3 * (1 + maps.shape[1]), len(images) * (1.3 * height / width + 0.1) + 0.4),
        squeeze=False,
    )
    for i, line in enumerate(axes):
        line[0].imshow(images[i].cpu().numpy(), interpolation="nearest")
        for head, axis in enumerate(line[1:]):
            axis.imshow(large[i, head], cmap="inferno", interpolation="nearest")
            edge = np.pad(masks[i, head].numpy().astype(np.uint8), 1)  # so that outlines close at the border
            lines = np.arange(-1, width + 1), np.arange(-1, height + 1)
            axis.contour(*lines, edge, levels=[0.5], colors=OUTLINE, linewidths=1)
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            if i == 0:
                axis.set_title(f"head {head + 1}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(note, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
