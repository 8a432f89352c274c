"""The vision transformer that every method trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import MaskedPatchEmbed
from vitrail.kernels.patches import image_size

from .attention import Attention, AttentionBackend
from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from .batch_norm import BatchNorm
from .conv_stem import ConvStem, stem_flops
from .initialisation import moco_v3_init_, truncated_init_, xavier_init_
from .packing import Packing, pack
from .pixels import standardised
from .positions import resize_positions, sincos_positions
from .recompute import Recomputable, run

NORM_EPS = 1e-6  # of every LayerNorm (official MAE, MoCo v3 and DINO code)


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
    stem: Literal["patch", "conv"] = "patch"
    """One projection of each patch, or a stack of strided convolutions (ConvStem of MoCo v3)."""
    positions: Literal["sincos", "sincos_rows", "learned", "learned_sincos"] = "sincos"
    """Fixed sine-cosine table, its first half for the column (MAE) or for the row (MoCo v3), or a learned one.

    A learned one starts from noise, or from MAE's table: in a short run noise would have no time to become places.
    """
    position_offset: float = 0.0
    """What is added to the new grid before positions are stretched to it: 0.1 in DINO's and iBOT's released code."""
    init: Literal["mae", "moco_v3", "dino"] = "mae"
    """Whose initialisation."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
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
        unread = length * ((4 + 4 * self.mlp_ratio) * width**2 + 4 * (1 + length) * width)  # all tokens but one
        return self.region_flops - unread

    @property
    def region_flops(self) -> float:
        """Matrix products of one image, all tokens read."""
        length = self.grid[0] * self.grid[1]
        if self.stem == "conv":
            embed = stem_flops(self.size, self.patch_size, self.width)
        else:
            embed = 2.0 * length * 3 * self.patch_size**2 * self.width
        return embed + transformer_flops(
            tokens=1 + length, width=self.width, depth=self.depth, mlp_ratio=self.mlp_ratio
        )

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


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`[B, N, D]` and indices `[B, M]` to `[B, M, D]`, without an index of D columns."""
    B, N, D = x.shape
    flat = rows + torch.arange(B, device=rows.device)[:, None] * N
    return x.reshape(B * N, D).index_select(0, flat.reshape(-1)).view(B, -1, D)


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382), scaled so that the expectation is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Zero whole samples of `[B, ...]`, or images packed into `[1, N, D]`, with probability `rate` in training."""
        if not self.training or self.rate == 0.0:
            return x
        if packing is not None:
            keep = torch.rand(packing.images, device=x.device) >= self.rate
            keep = packing.spread(keep, x.shape[1])[None, :, None]
        else:
            keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate))


class MLP(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(Recomputable):
    """A pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def project(self, x: Tensor) -> Tensor:
        """The part that looks at each token alone: `LN1` and the qkv projection, `[..., D]` to `[..., 3D]`."""
        return self.attn.qkv(self.norm1(x))

    def forward(
        self, x: Tensor, qkv: Tensor | None = None, rows: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Apply the block, or exactly the part of it that is needed.

        Args:
            x: residual stream `[B, N, D]`.
            qkv: `project` of `x`, when the caller has it already, `[B, N, 3D]`.
            rows: indices `[B, M]` of the only tokens whose output is needed. Every token still serves as key and
                value; queries, output projection and MLP run for these rows alone, and their results are the same.
            packing: how several images lie in the one sequence `[1, N, D]`, which then do not see each other.

        Returns:
            `[B, N, D]`, or `[B, M, D]` with `rows`.
        """
        if rows is None:
            packed: tuple[Tensor, ...] = (self.project(x) if qkv is None else qkv,)
        else:
            packed = self._restricted(x, qkv, rows)
            x = take_rows(x, rows)
        x = x + self.drop_path(self.attn(*packed, packing=packing), packing)
        return x + self.drop_path(self.mlp(self.norm2(x)), packing)

    def _restricted(self, x: Tensor, qkv: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of `rows` alone `[B, M, D]`, keys and values of all tokens `[B, N, 2 D]`."""
        if qkv is not None:
            width = x.shape[-1]
            return take_rows(qkv[..., :width], rows), qkv[..., width:]
        normed = self.norm1(x)
        return self.attn.qkv(take_rows(normed, rows), "q"), self.attn.qkv(normed, "kv")


def build_blocks(config: ViTConfig) -> nn.ModuleList:
    """`depth` blocks with the drop-path rate rising linearly from 0."""
    rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
    return nn.ModuleList(
        Block(config.width, config.heads, mlp_ratio=config.mlp_ratio, drop_path=rate, attention=config.attention)
        for rate in rates
    )


def run_block(
    block: nn.Module,
    x: Tensor,
    *,
    qkv: Tensor | None = None,
    rows: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Call a block, recomputing its activations in the backward pass if it is set to."""
    return run(block, x, qkv, rows, packing)


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
            size = None if config.learns_positions else config.size  # learned positions follow the image
            self.patch_embed = MaskedPatchEmbed(
                image_size=size, patch_size=config.patch_size, embed_dim=config.width, mean=mean, std=std
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        by_row = config.positions == "sincos_rows"
        table = sincos_positions(config.width, self.grid, prefix=self.num_prefix, rows_first=by_row)
        if config.learns_positions:
            self.pos_embed: Tensor = nn.Parameter(table)
            if config.positions == "learned":
                nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            self.register_buffer("pos_embed", table)
        self.blocks = build_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        if config.init == "moco_v3":
            moco_v3_init_(self)
        elif config.init == "dino":
            truncated_init_(self)
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        else:
            xavier_init_(self)
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor | list[Tensor], indices: Tensor | None = None, pool: bool = False) -> Tensor:
        """Encode images.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, 3, H, W]` (normalised on the way in), or normalised-range floats
                as `vitrail.kernels.masked_patch_gather` takes them. With learned positions, any size that the patch
                divides: the positions are stretched to it. With `pool` also several such tensors: they share each
                layer's products, and attention keeps every image to itself.
            indices: patches to see, row-major numbers `[B, V]`; None means all.
            pool: return the class token alone; the last block then computes nothing for the others.

        Returns:
            Tokens after the final norm, class token first: `[B, 1 + V, D]`, or `[B, D]` with `pool`.
        """
        packing, first = None, None
        if isinstance(images, list):
            x, packing = pack([self._embed(group) for group in images])
            first = packing.starts(x.device)[None]
        else:
            x = self._embed(images, indices)
            if pool:
                first = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        for block in self.blocks[:-1]:
            x = run_block(block, x, packing=packing)
        x = self.norm(run_block(self.blocks[-1], x, rows=first, packing=packing))
        if packing is not None:
            return x[0]
        return x[:, 0] if pool else x

    def _embed(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        if self.config.pixels == "image":
            images = standardised(images)
        x = self.patch_embed(images) if indices is None else self.patch_embed(images, indices)
        table: Tensor = self.pos_embed
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

    def forward_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class token `[B, D]` and the patches' tokens `[B, T, D]`, row-major, after the final norm."""
        tokens = self(images)
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


def transformer_flops(*, tokens: float, width: int, depth: float, mlp_ratio: float = 4.0) -> float:
    """Floating-point operations of `depth` blocks on one image, forward, two per multiply-accumulate.

    Matrix products only: qkv and output projection `8 N D^2`, MLP `4 r N D^2`, attention `4 N^2 D`.
    """
    return depth * ((8 + 4 * mlp_ratio) * tokens * width**2 + 4 * tokens**2 * width)
