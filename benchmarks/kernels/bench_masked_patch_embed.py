"""Embedding visible patches only, against embedding all patches by convolution and then choosing."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures
from bench.images import GRIDS, MEAN, STD, Grid, normalised, random_images
from torch.func import functional_call

from vitrail.kernels import MaskedPatchEmbed, random_masking

Tensor = torch.Tensor


def inputs(grid: Grid, batch: int, device: torch.device) -> dict[str, Tensor]:
    ids_keep, _, _ = random_masking(batch, grid.length, grid.keep, device=device)
    weight = torch.randn(grid.width, 3, grid.patch, grid.patch, device=device) / grid.values**0.5
    return {
        "images": random_images(batch, device),
        "indices": ids_keep,
        "weight": weight.bfloat16(),
        "bias": torch.randn(grid.width, device=device).bfloat16(),
    }


def eager(images: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pixels = normalised(images, torch.float64 if weight.dtype == torch.float64 else torch.float32).to(weight.dtype)
    tokens = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return tokens.take_along_dim(indices[..., None], 1)


def ours(grid: Grid) -> Any:
    module = MaskedPatchEmbed(224, grid.patch, grid.width, mean=MEAN, std=STD)

    def embed(images: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(module, {"proj.weight": weight, "proj.bias": bias}, (images, indices))

    return embed


def timm(grid: Grid) -> Any:
    from timm.layers import PatchEmbed

    module = PatchEmbed(224, grid.patch, embed_dim=grid.width)

    def embed(images: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"proj.weight": weight, "proj.bias": bias}
        tokens = functional_call(module, parameters, (normalised(images).to(weight.dtype),))
        return tokens.gather(1, indices[..., None].expand(-1, -1, grid.width))

    return embed


def transformers(grid: Grid) -> Any:
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEPatchEmbeddings

    module = ViTMAEPatchEmbeddings(ViTMAEConfig(image_size=224, patch_size=grid.patch, hidden_size=grid.width))

    def embed(images: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"projection.weight": weight, "projection.bias": bias}
        tokens = functional_call(module, parameters, (normalised(images).to(weight.dtype),))
        return tokens.gather(1, indices[..., None].repeat(1, 1, grid.width))

    return embed


def case(grid: Grid, batch: int) -> Case:
    rows, K, D = batch * grid.keep, grid.values, grid.width
    read = rows * (K + 8) + D * K * 2  # uint8 pixels, indices, weight
    return Case(
        op="masked_patch_embed",
        name=grid.name,
        shape={**grid.shape(batch), "width": D},
        dtype=torch.bfloat16,
        inputs=partial(inputs, grid, batch),
        truth=eager,
        implementations={
            "vitrail": partial(ours, grid),
            "eager": lambda: eager,
            "compiled": compiled(eager),
            "timm": partial(timm, grid),
            "transformers": partial(transformers, grid),
        },
        # Backward reads the pixels and the gradient of the tokens, and writes that of the weight.
        bytes={"forward": read + rows * D * 2, "forward+backward": 2 * read + 2 * rows * D * 2},
        flops={"forward": 2.0 * rows * K * D, "forward+backward": 4.0 * rows * K * D},
        differentiable=("weight", "bias"),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(grid, sizes.batch) for grid in GRIDS]


test_masked_patch_embed = measures(cases)
