"""Swin as EsViT's released code runs it on crops of any size, of timm's parts.

timm's own Swin shifts a map before it pads it, the released one after; on maps that windows do not divide, such as
those of 96-pixel crops, these are different networks. What a block does around its attention is therefore written here:
pad, shift, partition, attend under a mask of -100, and all of it back.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import PatchMerging, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from vitrail.engine.models.swin import StageSize, SwinConfig

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PlainBlock(nn.Module):
    """A block; the masks of the maps in `sides` are made beforehand."""

    def __init__(self, stage: StageSize, *, shifted: bool, mlp_ratio: float, sides: set[int]) -> None:
        super().__init__()
        self.window, self.shift = stage.window, stage.shift if shifted else 0
        self.norm1 = LayerNorm(stage.width)
        self.attn = WindowAttention(stage.width, stage.heads, window_size=stage.window)
        self.norm2 = LayerNorm(stage.width)
        self.mlp = Mlp(stage.width, int(stage.width * mlp_ratio))
        padded = {-(-side // self.window) * self.window for side in sides}
        self.masks = {side: shifted_mask(side, self.window, self.shift) for side in padded} if self.shift else {}

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`, H and W equal."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """Attention within windows, padded tokens included."""
        side, window, shift = x.shape[1], self.window, self.shift
        x = F.pad(x, (0, 0, 0, -side % window, 0, -side % window))
        padded = x.shape[1]
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        windows = window_partition(x, (window, window)).flatten(1, 2)
        windows = self.attn(windows, self.masks[padded] if shift else None)
        x = window_reverse(windows.unflatten(1, (window, window)), (window, window), padded, padded)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return x[:, :side, :side].contiguous()


def shifted_mask(side: int, window: int, shift: int) -> Tensor:
    """-100 between tokens of a window that were apart before the map was shifted, `[windows, N, N]`."""
    part = torch.zeros(side, dtype=torch.long)
    part[-window:-shift], part[-shift:] = 1, 2
    parts = window_partition((3 * part[:, None] + part)[None, :, :, None].float(), (window, window)).flatten(1)
    return -100.0 * (parts[:, None] != parts[:, :, None])


class PlainStage(nn.Module):
    """The blocks of a resolution and the step down to the next."""

    def __init__(self, config: SwinConfig, i: int, sides: set[int]) -> None:
        super().__init__()
        stage = config.stages[i]
        self.blocks = nn.Sequential(
            *(
                PlainBlock(stage, shifted=j % 2 == 1, mlp_ratio=config.mlp_ratio, sides=sides)
                for j in range(stage.depth)
            )
        )
        last = i == len(config.depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(stage.width, norm_layer=LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, 2C]`, or the same shape in the last stage."""
        return self.downsample(self.blocks(x))


class PlainSwin(nn.Module):
    """The network, for square crops of some sides in pixels; parameters are called as in the released checkpoints."""

    def __init__(self, config: SwinConfig, sides: set[int]) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(
            patch_size=config.patch_size,
            embed_dim=config.width,
            norm_layer=LayerNorm,
            flatten=False,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        maps = {side // config.patch_size for side in sides}
        stages = []
        for i in range(len(config.depths)):
            stages.append(PlainStage(config, i, maps))
            maps = {-(-side // 2) for side in maps}
        self.layers = nn.Sequential(*stages)
        self.norm = LayerNorm(config.feature_width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, H, W]` to their vectors `[B, D]` and regions `[B, T, D]`."""
        regions = self.norm(self.layers(self.patch_embed(images)).flatten(1, 2))
        return regions.mean(1), regions
