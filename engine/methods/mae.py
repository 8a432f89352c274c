"""Masked autoencoders (He et al., arXiv 2111.06377): see a quarter of the patches, paint the rest.

The method is described in `docs/methods/mae.md`; the numbers in the comments are those of the paper's appendix or
of the authors' released code, where the two differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels import masked_patch_gather, masked_patch_loss, random_masking

from ..data.views import HorizontalFlip, RandomResizedCrop, View
from ..models.backbone import IMAGENET_MEAN, IMAGENET_STD
from ..models.block import transformer_flops
from ..models.mae_decoder import MAEDecoder
from ..models.vit import VisionTransformer, ViTConfig, vit_base
from .base import Method, MethodConfig, Schedule


@dataclass(kw_only=True)
class MAEConfig(MethodConfig):
    """A masked autoencoder."""

    encoder: ViTConfig = field(default_factory=vit_base)
    """The vision transformer that is kept after pre-training."""
    decoder_width: int = 512
    """Width of the decoder, the same for every encoder size."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    mask_ratio: float = 0.75
    """Share of the patches that is hidden."""
    norm_pix: bool = True
    """Predict pixels normalised by their own patch's mean and standard deviation."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of the pixels, in 0-1 units."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations of the pixels, in 0-1 units."""

    def build(self) -> MAE:
        """Construct the autoencoder with freshly initialised weights."""
        return MAE(self)

    def demo(self) -> MAEConfig:
        """A ViT 128 wide on patches of 4 pixels, with a decoder to match; digits are neither mirrored nor cut up."""
        encoder = replace(self.encoder, image_size=32, patch_size=4, width=128, depth=4, heads=4)
        return replace(
            self,
            encoder=encoder,
            decoder_width=64,
            decoder_depth=2,
            decoder_heads=4,
            crop_scale=(0.7, 1.0),
            flip=0.0,
        )


class Masks(NamedTuple):
    """Which patches are seen: `keep [B, V]`, `mask [B, M]`, `restore [B, L]` as of `random_masking`."""

    keep: Tensor
    mask: Tensor
    restore: Tensor


class Reconstruction(NamedTuple):
    """What a masked autoencoder sees and paints, three uint8 tensors `[B, H, W, 3]`."""

    image: Tensor
    masked: Tensor
    painted: Tensor


def painting(
    images: Tensor,
    pixels: Tensor,
    pred: Tensor,
    hidden: Tensor,
    grid: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Reconstruction:
    """Put images together from what is seen of them and what is painted.

    Args:
        images: uint8 `[B, H, W, 3]`.
        pixels: their patches, normalised, `[B, L, 3 P P]`.
        pred: what was painted, the same.
        hidden: which patches are painted, bool `[B, L]`.
        grid: patches per (column, row).
        mean: channel means of the pixels, in 0-1 units.
        std: their standard deviations.
    """
    side = math.isqrt(pixels.shape[-1] // 3)
    scale, shift = (pixels.new_tensor(values).repeat(side**2) for values in (std, mean))

    def assembled(fill: Tensor) -> Tensor:
        patches = torch.where(hidden[..., None], fill, pixels * scale + shift)
        tiles = patches.view(-1, *grid, side, side, 3).transpose(2, 3)
        return (tiles.reshape(images.shape).clamp(0, 1) * 255).round().to(torch.uint8)

    return Reconstruction(images, assembled(torch.full_like(pixels, 0.5)), assembled(pred * scale + shift))


class MAE(Method):
    """Encoder on visible patches, light decoder, loss on masked patches in pixel space."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        if not 0.0 < config.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie strictly between 0 and 1, got {config.mask_ratio}")
        self.encoder = VisionTransformer(encoder, mean=config.mean, std=config.std)
        # Truncation, as in the released code: other roundings keep one token more at some ratios.
        self.visible = int(self.encoder.length * (1 - config.mask_ratio))
        self.decoder = MAEDecoder(
            encoder_width=encoder.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            grid=encoder.grid,
            patch_size=encoder.patch_size,
            attention=encoder.attention,
        )

    def views(self) -> list[View]:
        """One random crop, mirrored half of the time; no colour augmentation."""
        config = self.config
        crop = RandomResizedCrop(size=config.encoder.size, scale=config.crop_scale)
        return [View(name="crop", ops=(crop, HorizontalFlip(p=config.flip)))]

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction loss of a micro-batch, with a mask of its own for every image."""
        (images,) = batch.views
        noise = schedule.uniform(images.shape[0], self.encoder.length, images.device)
        loss = self.loss(images, self.masks(noise))
        return loss, {"loss": loss.detach()}

    def masks(self, noise: Tensor) -> Masks:
        """Masks from noise `[B, L]`: the patches with the smallest noise stay visible."""
        return Masks(*random_masking(noise.shape[0], noise.shape[1], self.visible, noise=noise))

    def loss(self, images: Tensor, masks: Masks) -> Tensor:
        """Mean squared error on the masked patches of `images`, scalar float32."""
        config = self.config
        latent = self.encoder(images, masks.keep)
        pred = self.decoder(latent, masks.keep, masks.restore, rows=masks.mask)
        return masked_patch_loss(
            pred,
            images,
            masks.mask,
            config.encoder.patch_size,
            norm_pix=config.norm_pix,
            mean=config.mean,
            std=config.std,
            pad_to=pred.shape[-1],
        )

    def backbone(self) -> VisionTransformer:
        """The encoder."""
        return self.encoder

    def features(self, images: Tensor) -> Tensor:
        """Mean of the patch tokens of the whole image, `[B, D]`."""
        return self.encoder(images)[:, self.encoder.num_prefix :].float().mean(dim=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Paint the masked patches of uint8 images `[B, H, W, 3]`.

        With `norm_pix` the network predicts normalised patches, and the true mean and standard deviation of each
        patch bring them back to colours: the picture shows learned structure under borrowed brightness.
        """
        patch, masks = self.config.encoder.patch_size, self.masks(noise)
        width = 3 * patch**2
        pred = self.decoder(self.encoder(images, masks.keep), masks.keep, masks.restore)[..., :width].float()
        every = torch.arange(self.encoder.length, device=images.device).expand(images.shape[0], -1)
        pixels = masked_patch_gather(
            images, every, patch, mean=self.config.mean, std=self.config.std, dtype=torch.float32
        )
        if self.config.norm_pix:
            var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        hidden = masks.restore >= self.visible
        return painting(images, pixels, pred, hidden, self.encoder.grid, self.config.mean, self.config.std)

    def flops(self, images: int) -> float:
        """Matrix products that the loss needs: three times the forward pass, skipped work not counted."""
        encoder, width, depth = self.config.encoder, self.config.decoder_width, self.config.decoder_depth
        patch = 3 * encoder.patch_size**2
        length, visible, masked = self.encoder.length, self.visible, self.encoder.length - self.visible
        forward = 2.0 * visible * patch * encoder.width
        forward += transformer_flops(
            tokens=1 + visible, width=encoder.width, depth=encoder.depth, mlp_ratio=encoder.mlp_ratio
        )
        forward += 2 * (1 + visible) * encoder.width * width
        forward += transformer_flops(tokens=1 + length, width=width, depth=depth)
        forward -= 6 * masked * width**2  # qkv of masked tokens in the first block: a table shared by the batch
        forward -= (1 + visible) * (20 * width**2 + 4 * (1 + length) * width)  # last block: no queries, no MLP
        forward += 2 * masked * width * patch
        return 3.0 * forward * images
