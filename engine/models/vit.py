"""The vision transformer that every method trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import MaskedPatchEmbed
from vitrail.kernels.patches import image_size

from .attention import AttentionBackend, RelativePositionBias
from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from .batch_norm import BatchNorm
from .block import NORM_EPS, Block, DropUnit, MLPKind, mlp_hidden, run_block, transformer_flops
from .conv_stem import ConvStem, stem_flops
from .initialisation import beit_init_, moco_v3_init_, truncated_init_, xavier_init_
from .packing import pack
from .pixels import standardised
from .positions import resize_positions, sincos_positions


@dataclass(kw_only=True)
class ViTConfig(BackboneConfig):
    """Size and options of a vision transformer."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    width: int = 768
    """Embedding width D."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads; the head dimension is width / heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over D."""
    mlp: MLPKind = "gelu"
    """Two linear layers around a GELU, or SwiGLU with two thirds of the hidden width."""
    layer_scale: float = 0.0
    """Value that the learned factors of each branch start from; 0: there are none."""
    key_bias: bool = True
    """Whether keys have a bias; BEiT's have none."""
    mask_token: bool = False
    """Whether there is a learned token to stand in for masked patches."""
    stem: Literal["patch", "conv"] = "patch"
    """One projection of each patch, or a stack of strided convolutions (ConvStem of MoCo v3)."""
    positions: Literal["sincos", "sincos_rows", "learned", "learned_sincos", "relative"] = "sincos"
    """Fixed sine-cosine table, its first half for the column (MAE) or for the row (MoCo v3), or a learned one.

    A learned one starts from noise, or from MAE's table: in a short run noise would have no time to become places.
    Relative ones are biases of the attention scores that all blocks share (BEiT); tokens then hold no positions.
    """
    position_offset: float = 0.0
    """What is added to the new grid before positions are stretched to it: 0.1 in DINO's and iBOT's released code."""
    init: Literal["mae", "moco_v3", "dino", "dinov2", "beit"] = "mae"
    """Whose initialisation."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    drop_path_rises: bool = True
    """Whether it rises; otherwise all blocks have the same (DINOv2)."""
    drop_path_by: DropUnit = "image"
    """Above a rate of 0.1: drop branches image by image, or compute them for a part of the images alone (DINOv2)."""
    attention: AttentionBackend = "auto"
    """auto: fused kernels on a GPU, explicit matrix products on a CPU."""

    @property
    def learns_positions(self) -> bool:
        """Whether positions are trained; they then follow the size of the image."""
        return self.positions.startswith("learned")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per (column, row).

        Raises:
            ValueError: the image is not divisible by the patch.
        """
        height, width = self.size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image size {height}x{width} is not divisible by the patch size {self.patch_size}: change one of them"
            )
        return height // self.patch_size, width // self.patch_size

    def build(
        self,
        *,
        groups: int = 1,
        sync: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> VisionTransformer:
        """See `BackboneConfig.build`; only the convolutional stem has batch normalisation."""
        vit = VisionTransformer(self, mean=mean, std=std)
        for module in vit.patch_embed.modules():
            if isinstance(module, BatchNorm):
                module.groups, module.sync = groups, sync
        return vit

    def demo(self) -> ViTConfig:
        """128 wide, four blocks, patches of 4 pixels of 32-pixel images."""
        return replace(self, image_size=32, patch_size=4, width=128, depth=4, heads=4)

    @property
    def feature_width(self) -> int:
        """Width D of the class token."""
        return self.width

    @property
    def flops(self) -> float:
        """Matrix products of one image, those of the last block for the class token alone."""
        length, width = self.grid[0] * self.grid[1], self.width
        unread = length * ((4 + 4 * self.mlp_cost) * width**2 + 4 * (1 + length) * width)  # all tokens but one
        return self.region_flops - unread

    @property
    def region_flops(self) -> float:
        """Matrix products of one image, all tokens read."""
        length = self.grid[0] * self.grid[1]
        if self.stem == "conv":
            embed = stem_flops(self.size, self.patch_size, self.width)
        else:
            embed = 2.0 * length * 3 * self.patch_size**2 * self.width
        return embed + transformer_flops(tokens=1 + length, width=self.width, depth=self.depth, mlp_ratio=self.mlp_cost)

    @property
    def mlp_cost(self) -> float:
        """Multiply-accumulates of an MLP for one token, in units of 2 D^2; mlp_ratio where it is not gated."""
        hidden = mlp_hidden(self.width, self.mlp_ratio, self.mlp)
        return hidden / self.width * (1.0 if self.mlp == "gelu" else 1.5)

    def regions_at(self, size: tuple[int, int]) -> int:
        """Patches."""
        return (size[0] // self.patch_size) * (size[1] // self.patch_size)


def vit_tiny(patch_size: int = 16, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-Ti: 192 wide, 12 blocks, 3 heads (DeiT, arXiv 2012.12877)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=192, depth=12, heads=3)


def vit_small(patch_size: int = 16, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-S: 384 wide, 12 blocks, 6 heads (DeiT)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=384, depth=12, heads=6)


def vit_base(patch_size: int = 16, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-B: 768 wide, 12 blocks, 12 heads (arXiv 2010.11929, table 1)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=768, depth=12, heads=12)


def vit_large(patch_size: int = 16, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-L: 1024 wide, 24 blocks, 16 heads (arXiv 2010.11929, table 1)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=1024, depth=24, heads=16)


def vit_huge(patch_size: int = 14, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-H: 1280 wide, 32 blocks, 16 heads (arXiv 2010.11929, table 1)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=1280, depth=32, heads=16)


def vit_giant(patch_size: int = 14, image_size: int | tuple[int, int] = 224) -> ViTConfig:
    """ViT-g as DINOv2 has it: 1536 wide, 40 blocks, 24 heads, SwiGLU (arXiv 2304.07193)."""
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=1536, depth=40, heads=24, mlp="swiglu")


def moco_vit(config: ViTConfig, *, heads: int | None = None, stem: Literal["patch", "conv"] = "patch") -> ViTConfig:
    """A ViT as MoCo v3 initialises it (arXiv 2104.02057), its positions by row first.

    Args:
        config: size.
        heads: attention heads where they differ: MoCo v3's ViT-S has 12.
        stem: `conv` replaces the patch projection by convolutions, and one block with it.
    """
    depth = config.depth - 1 if stem == "conv" else config.depth
    return replace(config, heads=heads or config.heads, depth=depth, stem=stem, positions="sincos_rows", init="moco_v3")


def dino_vit(config: ViTConfig, *, position_offset: float = 0.1) -> ViTConfig:
    """A ViT as DINO initialises it (arXiv 2104.14294), with learned positions that follow the size of the crop.

    Args:
        config: size.
        position_offset: 0.1 in DINO's and iBOT's released code, whose positions of smaller crops are therefore slightly
            shifted; 0 in EsViT's.
    """
    return replace(config, positions="learned", init="dino", position_offset=position_offset)


def dinov2_vit(config: ViTConfig) -> ViTConfig:
    """A ViT as DINOv2 trains it (arXiv 2304.07193): layer scale, a mask token, branches computed for a part of a batch.

    Args:
        config: size.
    """
    config = replace(config, positions="learned", init="dinov2", position_offset=0.1, layer_scale=1e-5)
    return replace(config, mask_token=True, drop_path_rises=False, drop_path_by="subset")


def beit_vit(config: ViTConfig, *, layer_scale: float = 0.1) -> ViTConfig:
    """A ViT as BEiT (arXiv 2106.08254) and SimMIM (arXiv 2111.09886) pre-train it.

    Args:
        config: size.
        layer_scale: start of each branch's factors: 0.1, and 1e-5 for ViT-L.
    """
    config = replace(config, positions="relative", init="beit", layer_scale=layer_scale)
    return replace(config, key_bias=False, mask_token=True)


def build_blocks(config: ViTConfig) -> nn.ModuleList:
    """`depth` blocks; the rate of stochastic depth rises linearly from 0, or is the same in all."""
    steps = max(1, config.depth - 1)
    rates = [config.drop_path * (i / steps if config.drop_path_rises else 1.0) for i in range(config.depth)]
    return nn.ModuleList(
        Block(
            config.width,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            mlp=config.mlp,
            layer_scale=config.layer_scale,
            key_bias=config.key_bias,
            drop_path=rate,
            drop_by=config.drop_path_by,
            attention=config.attention,
        )
        for rate in rates
    )


class VisionTransformer(nn.Module):
    """A ViT that reads raw images and embeds only the patches that it is asked to see.

    State-dict keys and layouts are those of timm and of the official MAE checkpoints.
    """

    num_prefix = 1  # the class token

    def __init__(
        self,
        config: ViTConfig,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = config.grid
        self.length = self.grid[0] * self.grid[1]
        self.width = config.width
        self.patch_embed: ConvStem | MaskedPatchEmbed
        if config.stem == "conv":
            self.patch_embed = ConvStem(
                image_size=config.size, patch_size=config.patch_size, embed_dim=config.width, mean=mean, std=std
            )
        else:
            size = None if config.learns_positions else config.size  # only learned positions follow the image
            self.patch_embed = MaskedPatchEmbed(
                image_size=size, patch_size=config.patch_size, embed_dim=config.width, mean=mean, std=std
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.mask_token else None
        self.pos_embed: Tensor | None = None
        self.rel_pos_bias: RelativePositionBias | None = None
        self._place_positions()
        self.blocks = build_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self._initialise()

    def _place_positions(self) -> None:
        config = self.config
        if config.positions == "relative":
            self.rel_pos_bias = RelativePositionBias(self.grid, config.heads)
            return
        by_row = config.positions == "sincos_rows"
        table = sincos_positions(config.width, self.grid, prefix=self.num_prefix, rows_first=by_row)
        if config.learns_positions:
            self.pos_embed = nn.Parameter(table)
            if config.positions == "learned":
                nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            del self.pos_embed
            self.register_buffer("pos_embed", table)

    def _initialise(self) -> None:
        init = self.config.init
        if init == "moco_v3":
            moco_v3_init_(self)
        elif init == "beit":
            beit_init_(self)
        elif init in ("dino", "dinov2"):
            truncated_init_(self)
            nn.init.trunc_normal_(self.cls_token, std=0.02 if init == "dino" else 1e-6)
        else:
            xavier_init_(self)
            nn.init.normal_(self.cls_token, std=0.02)

    @overload
    def forward(
        self,
        images: Tensor,
        indices: Tensor | None = ...,
        pool: bool = ...,
        masked: Tensor | None = ...,
        rows: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, images: list[Tensor], indices: None, pool: Literal[True], masked: Sequence[Tensor | None] | None = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: list[Tensor],
        indices: None = ...,
        pool: Literal[False] = ...,
        masked: Sequence[Tensor | None] | None = ...,
    ) -> list[Tensor]: ...

    def forward(
        self,
        images: Tensor | list[Tensor],
        indices: Tensor | None = None,
        pool: bool = False,
        masked: Tensor | Sequence[Tensor | None] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Encode images.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, 3, H, W]` (normalised on the way in), or normalised-range floats
                as `vitrail.kernels.masked_patch_gather` takes them. With learned positions, any size that the patch
                divides: the positions are stretched to it. Also several such tensors: they share each layer's
                products, and attention keeps every image to itself.
            indices: patches to see, row-major numbers `[B, V]`; None means all.
            pool: return the class token alone; the last block then computes nothing for the others.
            masked: patches whose content the mask token hides, bool `[B, L]`, or one such tensor or None for each of
                several `images`. Their positions stay.
            rows: of the tokens of all images, `[B (1 + V)]`, those that are needed, `[T]`; the last block then computes
                little for the others. Of one tensor of images.

        Returns:
            Tokens after the final norm, class token first: `[B, 1 + V, D]`, or `[B, D]` with `pool`. Of several
            `images`, the class tokens of all in order, `[sum of B, D]`, or without `pool` a list of `[B, 1 + V, D]`.
            With `rows`, `[T, D]`.

        Raises:
            ValueError: something is masked and there is no mask token, or several sizes meet relative positions.
        """
        packing, first = None, rows
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        if isinstance(images, list):
            masks = [None] * len(images) if masked is None else masked
            x, packing = pack([self._embed(group, None, mask) for group, mask in zip(images, masks, strict=True)])
            if pool:
                first = packing.starts(x.device)[None]
        else:
            assert masked is None or isinstance(masked, Tensor)
            x = self._embed(images, indices, masked)
            if pool:
                first = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        for block in self.blocks[:-1]:
            x = run_block(block, x, packing=packing, bias=bias)
        last_bias = bias[:, :1] if bias is not None and pool else bias  # the class token's queries alone
        x = self.norm(run_block(self.blocks[-1], x, rows=first, packing=packing, bias=last_bias))
        if packing is not None:
            return x[0] if pool else packing.unpack(x)
        return x[:, 0] if pool else x

    def _embed(self, images: Tensor, indices: Tensor | None, masked: Tensor | None) -> Tensor:
        if self.config.pixels == "image":
            images = standardised(images)
        x = self.patch_embed(images) if indices is None else self.patch_embed(images, indices)
        if masked is not None:
            if self.mask_token is None:
                raise ValueError("patches are masked, but the network has no mask token: build it with mask_token=True")
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        table = self.pos_embed
        if table is None:
            if indices is not None:
                raise ValueError("relative positions need all patches of an image: leave indices out")
            return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.config.learns_positions:
            height, width = image_size(images)
            grid = height // self.config.patch_size, width // self.config.patch_size
            table = resize_positions(table, self.grid, grid, prefix=self.num_prefix, offset=self.config.position_offset)
        positions = table[0, self.num_prefix :]
        x = x + (positions if indices is None else F.embedding(indices, positions))
        prefix = (self.cls_token + table[:, : self.num_prefix]).expand(x.shape[0], -1, -1)
        return torch.cat([prefix, x], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """The class token after the final norm, `[B, D]`."""
        return self(images, None, True)  # a call, so that ZeRO-3 finds the class token and the positions gathered

    def forward_packed(self, images: list[Tensor]) -> Tensor:
        """The class tokens of images of several sizes in one pass, `[sum of B, D]`, in order."""
        return self(images, None, True)

    def forward_regions(self, images: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The class token `[B, D]` and the patches' tokens `[B, T, D]`, row-major, after the final norm.

        Patches of `masked`, bool `[B, T]`, are hidden by the mask token.
        """
        tokens = self(images, None, False, masked)
        return tokens[:, 0], tokens[:, self.num_prefix :]

    def first_layer(self) -> list[nn.Parameter]:
        """Parameters of the patch projection, or of the stem's first convolution."""
        projection = self.patch_embed.proj
        return list((projection[0] if isinstance(projection, nn.Sequential) else projection).parameters())

    def freeze_patch_embed(self) -> None:
        """Keep the random patch projection (arXiv 2104.02057, section 4.2).

        Raises:
            ValueError: the stem is convolutional.
        """
        if not isinstance(self.patch_embed, MaskedPatchEmbed):
            raise ValueError(
                "freeze_patch_embed is on, but the convolutional stem has no patch projection: "
                "pass --method.no-freeze-patch-embed"
            )
        self.patch_embed.proj.requires_grad_(False)
