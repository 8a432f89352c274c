"""The vision transformer that every method trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.kernels import MaskedPatchEmbed

from .attention import Attention, AttentionBackend, QKVLinear
from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from .batch_norm import BatchNorm
from .conv_stem import ConvStem, stem_flops
from .positions import sincos_positions

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
    positions: Literal["sincos", "sincos_rows", "learned"] = "sincos"
    """Fixed sine-cosine table, its first half for the column (MAE) or for the row (MoCo v3), or a learned one."""
    init: Literal["mae", "moco_v3"] = "mae"
    """Whose initialisation."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    attention: AttentionBackend = "auto"
    """auto: fused kernels on a GPU, explicit matrix products on a CPU."""

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
        length = self.grid[0] * self.grid[1]
        tokens, width, ratio = 1 + length, self.width, self.mlp_ratio
        if self.stem == "conv":
            embed = stem_flops(self.size, self.patch_size, width)
        else:
            embed = 2.0 * length * 3 * self.patch_size**2 * width
        blocks = transformer_flops(tokens=tokens, width=width, depth=self.depth, mlp_ratio=ratio)
        unread = length * ((4 + 4 * ratio) * width**2 + 4 * tokens * width)  # of all tokens but one in the last block
        return embed + blocks - unread


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

    def forward(self, x: Tensor) -> Tensor:
        """Zero whole samples of `[B, ...]` with probability `rate` in training."""
        if not self.training or self.rate == 0.0:
            return x
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


class Block(nn.Module):
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
        self.recompute = False  # activation checkpointing, see `run_block`
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def project(self, x: Tensor) -> Tensor:
        """The part that looks at each token alone: `LN1` and the qkv projection, `[..., D]` to `[..., 3D]`."""
        return self.attn.qkv(self.norm1(x))

    def forward(self, x: Tensor, qkv: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Apply the block, or exactly the part of it that is needed.

        Args:
            x: residual stream `[B, N, D]`.
            qkv: `project` of `x`, when the caller has it already, `[B, N, 3D]`.
            rows: indices `[B, M]` of the only tokens whose output is needed. Every token still serves as key and
                value; queries, output projection and MLP run for these rows alone, and their results are the same.

        Returns:
            `[B, N, D]`, or `[B, M, D]` with `rows`.
        """
        if rows is None:
            packed: tuple[Tensor, ...] = (self.project(x) if qkv is None else qkv,)
        else:
            packed = self._restricted(x, qkv, rows)
            x = take_rows(x, rows)
        x = x + self.drop_path(self.attn(*packed))
        return x + self.drop_path(self.mlp(self.norm2(x)))

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


def run_block(block: nn.Module, x: Tensor, *, qkv: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """Call a block, recomputing its activations in the backward pass if it is set to.

    Only non-reentrant checkpointing is correct here: the reentrant form computes wrong gradients under ZeRO-3 for
    modules that are applied more than once in a step.
    """
    assert isinstance(block, Block)
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, x, qkv, rows, use_reentrant=False)
    return block(x, qkv, rows)


def xavier_init_(module: nn.Module) -> None:
    """The initialisation of the official MAE code: Xavier-uniform matrices, zero biases, unit LayerNorms.

    The patch projection is treated as the matrix `[D, 3 P P]`; its bias keeps PyTorch's convolution default.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.view(part.weight.shape[0], -1))


def moco_v3_init_(vit: VisionTransformer) -> None:
    """The initialisation of the official MoCo v3 code.

    Xavier-uniform matrices with the joint qkv projection as three of its kind, zero biases, the patch projection as
    the matrix `[D, 3 P P]`; convolutions of the other stem keep PyTorch's default.
    """
    for module in vit.modules():
        if isinstance(module, QKVLinear):
            bound = (6.0 / (2 * module.in_features)) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    if isinstance(vit.patch_embed, MaskedPatchEmbed):
        projection = vit.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.data.view(projection.weight.shape[0], -1))
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)


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
        stem = ConvStem if config.stem == "conv" else MaskedPatchEmbed
        self.patch_embed: ConvStem | MaskedPatchEmbed = stem(
            image_size=config.size, patch_size=config.patch_size, embed_dim=config.width, mean=mean, std=std
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.positions != "learned":
            by_row = config.positions == "sincos_rows"
            table = sincos_positions(config.width, self.grid, prefix=self.num_prefix, rows_first=by_row)
            self.register_buffer("pos_embed", table)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix + self.length, config.width))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = build_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        if config.init == "moco_v3":
            moco_v3_init_(self)
        else:
            xavier_init_(self)
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, indices: Tensor | None = None, pool: bool = False) -> Tensor:
        """Encode images.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, 3, H, W]` (normalised on the way in), or normalised-range floats
                as `vitrail.kernels.masked_patch_gather` takes them.
            indices: patches to see, row-major numbers `[B, V]`; None means all.
            pool: return the class token alone; the last block then computes nothing for the others.

        Returns:
            Tokens after the final norm, class token first: `[B, 1 + V, D]`, or `[B, D]` with `pool`.
        """
        x = self._embed(images, indices)
        for block in self.blocks[:-1]:
            x = run_block(block, x)
        first = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device) if pool else None
        x = self.norm(run_block(self.blocks[-1], x, rows=first))
        return x[:, 0] if pool else x

    def _embed(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        x = self.patch_embed(images) if indices is None else self.patch_embed(images, indices)
        positions = self.pos_embed[0, self.num_prefix :]
        x = x + (positions if indices is None else F.embedding(indices, positions))
        prefix = (self.cls_token + self.pos_embed[:, : self.num_prefix]).expand(x.shape[0], -1, -1)
        return torch.cat([prefix, x], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """The class token after the final norm, `[B, D]`."""
        return self(images, None, True)  # a call, so that ZeRO-3 finds the class token and the positions gathered

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
