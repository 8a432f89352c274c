"""Initialisations of the published codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitrail.kernels import MaskedPatchEmbed

from .attention import QKVLinear
from .block import MLP

if TYPE_CHECKING:
    from .vit import VisionTransformer


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


def truncated_init_(module: nn.Module) -> None:
    """The initialisation of DINO, EsViT and the official Swin code: linear weights from a normal distribution.

    Its standard deviation is 0.02, cut off at 2 in absolute value, as PyTorch does where nothing else is said; biases
    of linear layers are zero. Convolutions keep PyTorch's default.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


BEIT_STD = 0.02


def beit_init_(vit: VisionTransformer) -> None:
    """The initialisation of BEiT and SimMIM: normal with a deviation of 0.02, cut off at one deviation.

    It covers linear layers, the patch projection, class and mask token; biases are zero. Weights that end a branch are
    then divided by `sqrt(2 i)`, i the number of the block from 1.
    """
    for part in vit.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            cut_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for token in (vit.cls_token, vit.mask_token):
        if token is not None:
            cut_normal_(token)
    with torch.no_grad():
        for i, block in enumerate(vit.blocks, start=1):
            mlp: Any = block.get_submodule("mlp")
            for last in (block.get_submodule("attn.proj"), mlp.fc2 if isinstance(mlp, MLP) else mlp.w3):
                last.weight /= (2 * i) ** 0.5


def cut_normal_(tensor: Tensor) -> None:
    """Fill from a normal distribution with a deviation of 0.02, cut off at one deviation; 0.0108 are left of it."""
    nn.init.trunc_normal_(tensor, std=BEIT_STD, a=-BEIT_STD, b=BEIT_STD)
