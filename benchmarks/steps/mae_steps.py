"""Steps of MAE: ours, and transformers' ViTMAE.

A step is forward, backward and a fused AdamW update under bf16 autocast. Every implementation starts from the same
weights and sees the same images and masks; all get uint8 images, which ours normalises in its kernels and transformers'
needs normalised before.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from work import Work

from vitrail.engine.interop.mae import from_hf, load_exactly
from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import IMAGENET_MEAN, IMAGENET_STD, vit_base, vit_huge, vit_large, vit_small
from vitrail.engine.train.host_memory import keep_freed_memory

MODELS = {"small": vit_small, "base": vit_base, "large": vit_large, "huge": vit_huge}
IMPLEMENTATIONS = {"mae": ("vitrail", "vitrail compiled", "transformers", "transformers compiled")}


def prepare(work: Work, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """Build model and data.

    Returns:
        A function that trains one step and returns its loss, and the operations of a step.
    """
    config = configured(work)
    with torch.device(device):  # a GPU initialises large models in no time
        model = build(work)
        torch.manual_seed(1)
        images = torch.randint(0, 256, (work.batch, work.image_size, work.image_size, 3), dtype=torch.uint8)
        noise = torch.rand(work.batch, math.prod(config.encoder.grid))
    model.to(device).train()
    if work.implementation.endswith("compiled"):
        compile_(model, work.backend)
    return stepper(model, images, noise), skeleton(config).flops(work.batch)


def configured(work: Work) -> MAEConfig:
    """The autoencoder, with the published 512 x 8 decoder."""
    config = MAEConfig(encoder=MODELS[work.model](image_size=work.image_size), mask_ratio=work.mask_ratio)
    if not work.depth:
        return config
    encoder = replace(config.encoder, depth=min(work.depth, config.encoder.depth))
    return replace(config, encoder=encoder, decoder_depth=min(work.depth, config.decoder_depth))


def build(work: Work) -> nn.Module:
    """The model of an implementation; the weights are those that transformers draws."""
    torch.manual_seed(0)
    config = configured(work)
    theirs = transformers_model(config)
    if work.implementation.startswith("transformers"):
        return theirs
    # All of its parameters and buffers come from the other model, so that initialising them would be for nothing.
    ours = skeleton(config).to_empty(device=next(theirs.parameters()).device)
    load_exactly(ours, from_hf(theirs.state_dict()))
    return ours


def skeleton(config: MAEConfig) -> MAE:
    """Our model without values."""
    with torch.device("meta"):
        return MAE(config)


def load() -> tuple[Callable[..., Any], Callable[..., nn.Module]]:
    """Import what all implementations import, so that they hold the same libraries.

    Returns:
        Transformers' configuration and model.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEConfig, ViTMAEForPreTraining


def transformers_model(config: MAEConfig) -> nn.Module:
    """Transformers' ViTMAE of the same size."""
    settings, model = load()
    encoder = config.encoder
    return model(
        settings(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            hidden_size=encoder.width,
            intermediate_size=4 * encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            decoder_hidden_size=config.decoder_width,
            decoder_intermediate_size=4 * config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    )


def compile_(model: nn.Module, backend: str) -> None:
    """Compile as a user would: ours block by block, as its trainer does, and theirs as a whole."""
    if isinstance(model, MAE):
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.compile(backend=backend)
    else:
        model.compile(backend=backend)


def stepper(model: nn.Module, images: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """A function that trains one step and returns the loss."""
    device = images.device
    if isinstance(model, MAE) and device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if isinstance(model, MAE):
                loss = model.loss(images, model.masks(noise))
            else:
                pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
                loss = model(pixels, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
