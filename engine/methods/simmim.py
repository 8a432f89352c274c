"""SimMIM (Xie et al., arXiv 2111.09886): hide large squares of an image, guess their pixels with one linear layer.

The method is described in `docs/methods/simmim.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import masked_patch_gather

from ..data.views import HorizontalFlip, RandomResizedCrop, View
from ..models.backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from ..models.block import take_rows
from ..models.pixels import standardised
from ..models.vit import ViTConfig, beit_vit, vit_base
from .base import DemoRun, Method, MethodConfig, Schedule
from .mae import Reconstruction, painting
from .masks import coarse_columns, coarse_masks


@dataclass(kw_only=True)
class SimMIMConfig(MethodConfig):
    """SimMIM."""

    encoder: BackboneConfig = field(default_factory=lambda: replace(beit_vit(vit_base()), drop_path=0.1))
    """The network that is kept after pre-training, with a mask token: a ViT or a Swin transformer."""
    mask_size: int = 32
    """Side of the squares that are hidden, in pixels."""
    mask_ratio: float = 0.6
    """Share of the squares that is hidden, rounded up."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Area of the random crop, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of the pixels, in 0-1 units."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations of the pixels, in 0-1 units."""

    @property
    def region(self) -> int:
        """Side in pixels of what a token of the encoder's output stands for: 16 of ViT-B/16, 32 of Swin."""
        height, width = self.encoder.size
        return math.isqrt(height * width // self.encoder.regions_at(self.encoder.size))

    @property
    def grid(self) -> tuple[int, int]:
        """Such tokens per (column, row)."""
        height, width = self.encoder.size
        return height // self.region, width // self.region

    def build(self) -> SimMIM:
        """Construct the network with freshly initialised weights."""
        return SimMIM(self)

    def demo(self) -> SimMIMConfig:
        """A small encoder, squares of 8 pixels; digits are neither mirrored nor cut up, and each has the same light."""
        encoder = replace(self.encoder.demo(), pixels="image")
        if isinstance(encoder, ViTConfig):
            # Tables that start at zero and branches that start at a tenth would take longer than a demo to matter.
            encoder = replace(encoder, positions="learned_sincos", layer_scale=0.0, key_bias=True, init="mae")
            encoder = replace(encoder, drop_path=0.0)
        # What is left of so simple a picture must not give the rest away.
        return replace(self, encoder=encoder, mask_size=8, mask_ratio=0.85, crop_scale=(0.7, 1.0), flip=0.0)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=64, lr=2e-3)


class Masks(NamedTuple):
    """What is hidden: `hidden`, bool `[B, T]`, and `places`, int64 `[B, M]`, the numbers of the regions that are."""

    hidden: Tensor
    places: Tensor


class PixelHead(nn.Conv2d):
    """The decoder: a linear map from a token to the pixels of its region.

    Weight `[3 S S, D, 1, 1]` and bias are laid out as those of the released code, channel by channel, for a side S.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__(width, 3 * side**2, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, M, D]` to `[B, M, 3 S S]` in the order (row, column, channel), in which pixels are gathered."""
        # Permuting parameters costs less than permuting predictions of a batch.
        assert self.bias is not None
        weight, bias = (p.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1) for p in (self.weight, self.bias))
        return F.linear(tokens, weight.flatten(1), bias)


class SimMIM(Method):
    """An encoder that sees mask tokens in place of hidden squares, and a linear decoder."""

    encoder: Any

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__()
        self.config = config
        if not getattr(config.encoder, "mask_token", False):
            raise ValueError("SimMIM hides patches behind a mask token: build the encoder with mask_token=True")
        if not 0.0 < config.mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio must lie above 0 and be at most 1, got {config.mask_ratio}")
        if config.mask_size % config.region:
            raise ValueError(
                f"mask_size {config.mask_size} is not a multiple of {config.region}, the side of what a token of the "
                "encoder stands for: change it"
            )
        self.scale = config.mask_size // config.region
        self.cells = coarse_columns(config.grid, self.scale)
        self.hidden = math.ceil(config.mask_ratio * self.cells) * self.scale**2
        self.encoder = config.encoder.build(mean=config.mean, std=config.std)
        self.decoder = nn.Sequential(PixelHead(config.encoder.feature_width, config.region))

    def views(self) -> list[View]:
        """One random crop, mirrored half of the time; no colour augmentation."""
        config = self.config
        crop = RandomResizedCrop(size=config.encoder.size, scale=config.crop_scale, interpolation="bilinear")
        return [View(name="crop", ops=(crop, HorizontalFlip(p=config.flip)))]

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, with a mask of its own for every image."""
        (images,) = batch.views
        noise = schedule.uniform(images.shape[0], self.cells, images.device)
        loss = self.loss(images, self.masks(noise))
        return loss, {"loss": loss.detach()}

    def masks(self, noise: Tensor) -> Masks:
        """Masks from noise `[B, cells]`: the squares with the smallest noise are hidden, the same number everywhere."""
        config = self.config
        hidden = coarse_masks(noise, config.grid, scale=self.scale, ratio=config.mask_ratio)
        # How many there are is known: nothing has to be waited for.
        places = torch.nonzero_static(hidden.flatten(), size=hidden.shape[0] * self.hidden)
        return Masks(hidden, (places % hidden.shape[1]).view(hidden.shape[0], -1))

    def loss(self, images: Tensor, masks: Masks) -> Tensor:
        """Mean absolute error on the hidden pixels of `images`, scalar float32."""
        pred = self.predict(images, masks)
        dtype = torch.promote_types(pred.dtype, torch.float32)
        target = self._pixels(self._lit(images), masks.places, dtype)
        pixels = target.numel() // 3
        return F.l1_loss(pred.to(dtype), target, reduction="sum") / (pixels + 1e-5) / 3  # epsilon: released code

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Normalised pixels of the hidden regions, `[B, M, 3 S S]`, in the order (row, column, channel)."""
        _, tokens = self.encoder.forward_regions(images, masks.hidden)
        pred: Tensor = self.decoder(take_rows(tokens, masks.places))
        return pred

    def _lit(self, images: Tensor) -> Tensor:
        """Images in the light in which the encoder sees them: nothing that it sees tells of another."""
        return standardised(images) if self.config.encoder.pixels == "image" else images

    def _pixels(self, images: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised pixels of some regions, `[B, M, 3 S S]`."""
        config = self.config
        return masked_patch_gather(images, places, config.region, mean=config.mean, std=config.std, dtype=dtype)

    def undecayed(self) -> list[nn.Parameter]:
        """A ViT's class token and positions, a Swin transformer's mask token.

        A ViT's mask token and both kinds of tables of relative positions are decayed: released code.
        """
        encoder = self.encoder
        spared = (encoder.cls_token, encoder.pos_embed) if hasattr(encoder, "cls_token") else (encoder.mask_token,)
        return [p for p in spared if isinstance(p, nn.Parameter)]

    def first_layer(self) -> list[nn.Parameter]:
        """The encoder's."""
        layer: list[nn.Parameter] = self.encoder.first_layer()
        return layer

    def backbone(self) -> nn.Module:
        """The encoder."""
        network: nn.Module = self.encoder
        return network

    def features(self, images: Tensor) -> Tensor:
        """Mean of the regions' tokens of the whole image, `[B, D]`: what fine-tuning starts from."""
        regions: Tensor = self.encoder.forward_regions(images)[1]
        return regions.float().mean(dim=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Paint the hidden squares of uint8 images `[B, H, W, 3]`, all in the light in which the encoder sees them."""
        config, masks, lit = self.config, self.masks(noise), self._lit(images)
        every = torch.arange(masks.hidden.shape[1], device=images.device).expand(len(images), -1)
        pixels = self._pixels(lit, every, torch.float32)
        pred = self.predict(images, masks).float()
        painted = pixels.scatter(1, masks.places[..., None].expand_as(pred), pred)
        return painting(lit, pixels, painted, masks.hidden, config.grid, config.mean, config.std)

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass, the decoder on hidden regions alone."""
        encoder, region = self.config.encoder, self.config.region
        return 3.0 * images * (encoder.region_flops + 2.0 * self.hidden * encoder.feature_width * 3 * region**2)
