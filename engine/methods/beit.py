"""BEiT (Bao et al., arXiv 2106.08254): hide blocks of patches, guess the visual words that a tokenizer has for them.

The method is described in `docs/methods/beit.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.views import ColorJitter, HorizontalFlip, Interpolation, Op, RandomResizedCrop, View
from ..models.initialisation import cut_normal_
from ..models.tokenizer import DallETokenizerConfig, KMeansTokenizerConfig, TokenizerConfig
from ..models.vit import VisionTransformer, ViTConfig, beit_vit, vit_base
from .base import DemoRun, Method, MethodConfig, Schedule
from .masks import BLOCK_COLUMNS, block_masks, masked_rows


@dataclass(kw_only=True)
class BEiTConfig(MethodConfig):
    """BEiT."""

    encoder: ViTConfig = field(default_factory=lambda: replace(beit_vit(vit_base()), drop_path=0.1))
    """The vision transformer that is kept after pre-training, with a mask token."""
    tokenizer: TokenizerConfig = field(default_factory=DallETokenizerConfig)
    """What names the patches; one token for each."""
    mask_count: int = 75
    """Patches to hide in an image, at most; of 196."""
    least_area: int = 16
    """Patches in the smallest block, but for the last ones, which fill up."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)
    """Strengths of the colour jitter: brightness, contrast, saturation."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel means of the pixels, in 0-1 units."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel standard deviations of the pixels, in 0-1 units."""

    @property
    def token_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image that the tokenizer sees."""
        rows, columns = self.encoder.grid
        return rows * self.tokenizer.stride, columns * self.tokenizer.stride

    def build(self) -> BEiT:
        """Construct the network with freshly initialised weights, and the tokenizer, not ready yet."""
        return BEiT(self)

    def missing(self) -> list[str]:
        """What the tokenizer misses."""
        return self.tokenizer.missing()

    def demo(self) -> BEiTConfig:
        """A small ViT, and names that k-means finds; digits are neither mirrored nor cut up."""
        # In a short run biases that start at zero do not become places, and small branches not large.
        encoder = replace(self.encoder.demo(), patch_size=8, pixels="image", drop_path=0.0)
        encoder = replace(encoder, positions="learned_sincos", layer_scale=0.0, init="mae")
        return replace(
            self,
            encoder=encoder,
            tokenizer=KMeansTokenizerConfig(patch_size=8, codes=64, images=2000, contrast=0.1),
            mask_count=6,
            least_area=1,
            crop_scale=(0.7, 1.0),
            flip=0.0,
            jitter=(0.0, 0.0, 0.0),
        )

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=8, batch_size=128, lr=1e-3)


class Masks(NamedTuple):
    """The patches that are hidden."""

    hidden: Tensor
    """bool `[B, L]`, True where hidden."""
    rows: Tensor
    """Places of the hidden ones among all `B * L`, int64 `[C]`, then padding."""
    real: Tensor
    """1 for hidden ones, 0 for padding, float32 `[C]`."""


class BEiT(Method):
    """An encoder that sees mask tokens in place of hidden patches, a linear layer over the vocabulary, a tokenizer."""

    def __init__(self, config: BEiTConfig) -> None:
        super().__init__()
        self.config = config
        if not config.encoder.mask_token:
            raise ValueError("BEiT puts a mask token where patches are hidden: build the encoder with mask_token=True")
        length = math.prod(config.encoder.grid)
        if not 0 < config.mask_count <= length:
            raise ValueError(f"mask_count must be from 1 to the {length} patches of an image, got {config.mask_count}")
        self.encoder = VisionTransformer(config.encoder, mean=config.mean, std=config.std)
        self.lm_head = nn.Linear(config.encoder.width, config.tokenizer.vocabulary)
        cut_normal_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)
        self.tokenizer = config.tokenizer.build()

    def views(self) -> list[View]:
        """The crop that the network sees, and, where the tokenizer wants another size, the same box in that size.

        The released code changes the colours of the whole image before it crops.
        """
        patches = View(name="patches", ops=self._ops(self.config.encoder.size, "bicubic"))
        if self.config.token_size == self.config.encoder.size:
            return [patches]
        return [patches, View(name="tokens", ops=self._ops(self.config.token_size, "lanczos"), like="patches")]

    def _ops(self, size: tuple[int, int], interpolation: Interpolation) -> tuple[Op, ...]:
        config = self.config
        ops: list[Op] = [RandomResizedCrop(size=size, scale=config.crop_scale, interpolation=interpolation)]
        if config.flip:
            ops.append(HorizontalFlip(p=config.flip))
        if any(config.jitter):
            brightness, contrast, saturation = config.jitter
            ops.append(ColorJitter(p=1.0, brightness=brightness, contrast=contrast, saturation=saturation, hue=0.0))
        return tuple(ops)

    def prepare(self, images: Callable[[View, int], Iterator[Tensor]]) -> None:
        """Make the tokenizer ready."""
        view = replace(self.views()[-1], like=None)  # it is alone
        self.tokenizer.prepare(lambda count: images(view, count))

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, with a mask of its own for every image."""
        images, pixels = batch.views[0], batch.views[-1]
        noise = schedule.uniform(images.shape[0], BLOCK_COLUMNS, images.device)
        masks = self.masks(noise)
        names = self.tokenizer(pixels, masks.rows)
        logits = self.predict(images, masks)
        loss = self.loss(logits, names, masks.real)
        right = mean_over((logits.detach().argmax(dim=-1) == names).float(), masks.real)
        return loss, {"loss": loss.detach(), "accuracy": right, "masked": masks.hidden.float().mean()}

    def masks(self, noise: Tensor) -> Masks:
        """Blocks of patches from noise `[B, BLOCK_COLUMNS]`; few images hide less than `mask_count`."""
        config = self.config
        counts = torch.full((noise.shape[0],), config.mask_count, device=noise.device)
        return self.listed(block_masks(noise, config.encoder.grid, counts, least_area=config.least_area))

    def listed(self, hidden: Tensor) -> Masks:
        """The list of hidden patches, `mask_count` for each image with padding, so that nobody waits for its length."""
        rows, weight = masked_rows(hidden, hidden.shape[0] * self.config.mask_count)
        return Masks(hidden, rows, (weight > 0).float())

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Logits of the hidden patches, `[C, vocabulary]`."""
        tokens = self.encoder(images, None, False, masks.hidden)
        prefix, length = self.encoder.num_prefix, self.encoder.length
        places = masks.rows + (torch.div(masks.rows, length, rounding_mode="floor") + 1) * prefix
        logits: Tensor = self.lm_head(tokens.flatten(0, 1).index_select(0, places))
        return logits

    def loss(self, logits: Tensor, names: Tensor, real: Tensor) -> Tensor:
        """Cross-entropy of `logits [C, vocabulary]` with `names [C]`, mean over the hidden patches, scalar float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return mean_over(F.cross_entropy(logits, names, reduction="none"), real)

    def undecayed(self) -> list[nn.Parameter]:
        """Class token and positions; mask token and the table of relative positions are decayed: released code."""
        spared = (self.encoder.cls_token, self.encoder.pos_embed)
        return [p for p in spared if isinstance(p, nn.Parameter)]

    def first_layer(self) -> list[nn.Parameter]:
        """The encoder's."""
        return self.encoder.first_layer()

    def chance_loss(self, images: int) -> float:
        """All tokens equally likely."""
        return math.log(self.config.tokenizer.vocabulary)

    def backbone(self) -> VisionTransformer:
        """The encoder."""
        return self.encoder

    def features(self, images: Tensor) -> Tensor:
        """Mean of the patch tokens of the whole image, `[B, D]`: what fine-tuning starts from."""
        return self.encoder.forward_regions(images)[1].float().mean(dim=1)

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the network's forward pass, once the tokenizer's."""
        config = self.config
        head = 2.0 * config.mask_count * config.encoder.width * config.tokenizer.vocabulary
        named = self.tokenizer.flops(images, *config.token_size, config.mask_count)
        return 3.0 * images * (config.encoder.region_flops + head) + named


def mean_over(values: Tensor, real: Tensor) -> Tensor:
    """Mean of `values [C]` where `real [C]` is 1; 0 where nothing is."""
    return (values * real).sum() / real.sum().clamp(min=1)
