"""The windowed transformer of EsViT: Swin (Liu et al., arXiv 2103.14030)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import MaskedPatchEmbed, WindowAttention
from vitrail.kernels.patches import image_size

from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from .block import MLP, NORM_EPS, DropPath
from .initialisation import truncated_init_, xavier_init_
from .pixels import standardised
from .recompute import Recomputable, run


class StageSize(NamedTuple):
    """What the blocks of one stage are like."""

    width: int
    """Channels C."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    window: int
    """Side of a window in tokens."""
    shift: int
    """Shift of the windows in every second block, in tokens."""


@dataclass(kw_only=True)
class SwinConfig(BackboneConfig):
    """Size and options of a Swin transformer."""

    patch_size: int = 4
    """Side of a patch in pixels."""
    width: int = 96
    """Channels of the first stage; each further stage has twice as many and half the rows and columns."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """Attention heads of each stage."""
    window: int = 7
    """Side of an attention window in tokens, at most 16; smaller in stages whose map is smaller at `image_size`."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the channels."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    norm_eps: float = NORM_EPS
    """Epsilon of the LayerNorms: 1e-6 in EsViT, 1e-5 in SimMIM and timm."""
    mask_token: bool = False
    """Whether there is a learned token to stand in for masked patches."""
    init: Literal["swin", "xavier"] = "swin"
    """Normal with a deviation of 0.02, or Xavier-uniform: in a narrow network 0.02 leaves the blocks hardly any say."""

    def build(
        self,
        *,
        groups: int = 1,
        sync: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> SwinTransformer:
        """See `BackboneConfig.build`; there is no batch normalisation, so `groups` and `sync` change nothing."""
        return SwinTransformer(self, mean=mean, std=std)

    def demo(self) -> SwinConfig:
        """Two stages of two blocks, 32 and 64 wide, windows of 4 x 4 on the 8 x 8 patches of 32-pixel images."""
        return replace(
            self, image_size=32, width=32, depths=(2, 2), heads=(2, 4), window=4, drop_path=0.0, init="xavier"
        )

    @property
    def feature_width(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.depths) - 1)

    @property
    def stages(self) -> list[StageSize]:
        """What each stage is like. Window and shift follow from `image_size`, and other images do not change them.

        A window that is no smaller than the map shrinks to it and does not shift. At 224 pixels, windows of 7 shift
        by 3 in all stages but the last; windows of 14 do not shift in the third, and are 7 x 7 in the fourth. Crops
        of 96 pixels then meet the same windows, padded.

        Raises:
            ValueError: depths and heads differ in number, a width is not divisible by its heads, or the image is not
                divisible by the patch or too small for the stages.
        """
        height, width = self.size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image size {height}x{width} is not divisible by the patch size {self.patch_size}: change one of them"
            )
        if len(self.depths) != len(self.heads) or not self.depths:
            raise ValueError(f"depths {self.depths} and heads {self.heads} must have one entry for each stage")
        found = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            channels, side = self.width * 2**i, min(height, width) // self.patch_size // 2**i
            if side < 1:
                raise ValueError(f"nothing is left of images of {height}x{width} in stage {i + 1}: take fewer stages")
            if channels % heads:
                raise ValueError(f"stage {i + 1} is {channels} wide, which {heads} heads do not divide: change heads")
            whole = side <= self.window
            found.append(StageSize(channels, depth, heads, min(side, self.window), 0 if whole else self.window // 2))
        return found

    @property
    def flops(self) -> float:
        """Matrix products of one image of `image_size`."""
        return self.flops_at(self.size)

    def flops_at(self, size: tuple[int, int], *, regions: bool = False) -> float:
        """Matrix products of one image of another size, (height, width) in pixels, two per multiply-accumulate.

        Linear layers count the tokens of the map, without padding; attention pairs each of them with every position
        of its window.
        """
        rows, columns = (side // self.patch_size for side in size)
        macs = rows * columns * 3 * self.patch_size**2 * self.width
        for i, stage in enumerate(self.stages):
            if i:
                rows, columns = -(-rows // 2), -(-columns // 2)
                macs += rows * columns * 2 * stage.width**2
            linear = stage.width * (4 * stage.width + 2 * int(self.mlp_ratio * stage.width))
            macs += stage.depth * rows * columns * (linear + 2 * stage.window**2 * stage.width)
        return 2.0 * macs

    def regions_at(self, size: tuple[int, int]) -> int:
        """Tokens of the last stage."""
        rows, columns = (side // self.patch_size for side in size)
        for _ in self.depths[1:]:
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows * columns


def swin_tiny(window: int = 7, image_size: int | tuple[int, int] = 224) -> SwinConfig:
    """Swin-T: 96 wide, 2-2-6-2 blocks (arXiv 2103.14030, section 3.3)."""
    return SwinConfig(image_size=image_size, window=window)


def swin_small(window: int = 7, image_size: int | tuple[int, int] = 224) -> SwinConfig:
    """Swin-S: 96 wide, 2-2-18-2 blocks (arXiv 2103.14030, section 3.3)."""
    return SwinConfig(image_size=image_size, window=window, depths=(2, 2, 18, 2))


def swin_base(window: int = 7, image_size: int | tuple[int, int] = 224) -> SwinConfig:
    """Swin-B: 128 wide, 2-2-18-2 blocks (arXiv 2103.14030, section 3.3)."""
    return SwinConfig(image_size=image_size, window=window, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))


def swin_large(window: int = 7, image_size: int | tuple[int, int] = 224) -> SwinConfig:
    """Swin-L: 192 wide, 2-2-18-2 blocks (arXiv 2103.14030, section 3.3)."""
    return SwinConfig(image_size=image_size, window=window, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))


class SwinBlock(Recomputable):
    """A pre-norm block with attention within windows."""

    def __init__(self, stage: StageSize, *, shifted: bool, mlp_ratio: float, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        width = stage.width
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = WindowAttention(width, stage.heads, stage.window, stage.shift if shifted else 0)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Squares of 2 x 2 tokens become one token of twice the width."""

    def __init__(self, width: int, *, norm_eps: float = NORM_EPS) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, ceil(H / 2), ceil(W / 2), 2C]` in the same dtype."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        squares = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, row, W / 2, column, C]
        merged = squares.permute(0, 1, 3, 4, 2, 5).flatten(3)  # down each column first, as the released models do
        return self.reduction(self.norm(merged)).to(x.dtype)  # autocast: the residual stream stays in float32


class SwinStage(nn.Module):
    """The blocks of one resolution and the step down to the next."""

    def __init__(self, stage: StageSize, rates: list[float], *, mlp_ratio: float, norm_eps: float, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(stage, shifted=i % 2 == 1, mlp_ratio=mlp_ratio, drop_path=rate, norm_eps=norm_eps)
            for i, rate in enumerate(rates)
        )
        self.downsample = None if last else PatchMerging(stage.width, norm_eps=norm_eps)


class SwinPatchEmbed(MaskedPatchEmbed):
    """Patch projection of raw images, then a LayerNorm of each token."""

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        norm_eps: float,
    ) -> None:
        super().__init__(None, patch_size, width, mean=mean, std=std)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """`[B, H, W, 3]` or `[B, 3, H, W]` to `[B, H / P, W / P, C]`, float32 under autocast."""
        tokens = super().forward(images)
        if torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.float()
        height, width = image_size(images)
        return self.norm(tokens).unflatten(1, (height // self.patch_size, width // self.patch_size))


class SwinTransformer(nn.Module):
    """A Swin transformer that reads raw images of any size that the patch divides.

    State-dict keys and layouts are those of the checkpoints that EsViT released (arXiv 2106.09785), without
    `relative_position_index` and `attn_mask`, which hold nothing learned.
    """

    def __init__(
        self,
        config: SwinConfig,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config = config
        self.width = config.feature_width
        self.patch_embed = SwinPatchEmbed(config.patch_size, config.width, mean=mean, std=std, norm_eps=config.norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.mask_token else None
        steps = max(1, sum(config.depths) - 1)
        rates = (config.drop_path * i / steps for i in range(steps + 1))
        self.layers = nn.ModuleList(
            SwinStage(
                stage,
                [next(rates) for _ in range(stage.depth)],
                mlp_ratio=config.mlp_ratio,
                norm_eps=config.norm_eps,
                last=i == len(config.depths) - 1,
            )
            for i, stage in enumerate(config.stages)
        )
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps)
        (truncated_init_ if config.init == "swin" else xavier_init_)(self)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, images: Tensor, regions: bool = False, masked: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, 3, H, W]` (normalised on the way in), or floats as
                `vitrail.kernels.masked_patch_gather` takes them; H and W multiples of the patch.
            regions: return the tokens as well.
            masked: regions whose content the mask token hides, bool `[B, T]`: each hides all the patches, after their
                norm, that merge into it.

        Returns:
            The mean of the tokens after the final norm, `[B, D]`; with `regions` also those tokens, `[B, T, D]`,
            row by row.
        """
        tokens = self.norm(self._last_maps(images, 1, masked)[0]).flatten(1, 2)
        pooled = tokens.mean(dim=1)
        return (pooled, tokens) if regions else pooled

    def forward_features(self, images: Tensor) -> Tensor:
        """The mean of the tokens after the final norm, `[B, D]`."""
        return self(images)

    def forward_regions(self, images: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean of the tokens after the final norm, `[B, D]`, and the tokens, `[B, T, D]`, row by row.

        Regions of `masked`, bool `[B, T]`, are hidden by the mask token.
        """
        return self(images, True, masked)

    def forward_last_blocks(self, images: Tensor, count: int) -> Tensor:
        """What EsViT's linear probes read: the mean over the tokens after each of the last `count` blocks, in order.

        Blocks of the last stage pass through the final norm first.

        Returns:
            `[B, sum of the blocks' widths]`; 2304 for four blocks of Swin-T.

        Raises:
            ValueError: there are not as many blocks.
        """
        if not 1 <= count <= sum(self.config.depths):
            raise ValueError(
                f"count must be between 1 and {sum(self.config.depths)}, the number of blocks, got {count}"
            )
        plain = max(0, count - self.config.depths[-1])
        maps = enumerate(self._last_maps(images, count))
        return torch.cat([(x if i < plain else self.norm(x)).mean(dim=(1, 2)) for i, x in maps], dim=1)

    def _last_maps(self, images: Tensor, count: int, masked: Tensor | None = None) -> deque[Tensor]:
        """What the last `count` blocks return, `[B, H, W, C]` each."""
        return deque(self._maps(images, masked), maxlen=count)

    def _maps(self, images: Tensor, masked: Tensor | None) -> Iterator[Tensor]:
        """What each block returns, `[B, H, W, C]`."""
        x = self.patch_embed(standardised(images) if self.config.pixels == "image" else images)
        if masked is not None:
            x = self._hide(x, masked)
        for stage in self.layers:
            assert isinstance(stage, SwinStage)
            for block in stage.blocks:
                x = run(block, x)
                yield x
            if stage.downsample is not None:
                x = stage.downsample(x)

    def _hide(self, x: Tensor, masked: Tensor) -> Tensor:
        """Put the mask token in place of the patches `[B, H, W, C]` of the regions that are masked."""
        if self.mask_token is None:
            raise ValueError("regions are masked, but the network has no mask token: build it with mask_token=True")
        side = 2 ** (len(self.config.depths) - 1)
        height, width = (-(-length // side) for length in x.shape[1:3])
        cells = masked.view(-1, height, width).repeat_interleave(side, 1).repeat_interleave(side, 2)
        return torch.where(cells[:, : x.shape[1], : x.shape[2], None], self.mask_token.to(x.dtype), x)

    def first_layer(self) -> list[nn.Parameter]:
        """Parameters of the patch projection."""
        return list(self.patch_embed.proj.parameters())

    def freeze_patch_embed(self) -> None:
        """Keep the random patch projection (arXiv 2104.02057, section 4.2)."""
        self.patch_embed.proj.requires_grad_(False)
