"""SiT (Atito, Awais, Kittler, arXiv 2104.03602): repair corrupted views, and know a view by the other one.

The method is described in `docs/methods/sit.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrail.kernels import info_nce_loss

from ..data.chains import byol_views
from ..data.views import View
from ..models.backbone import IMAGENET_MEAN, IMAGENET_STD
from ..models.heads import head_flops
from ..models.multi_crop import group_views
from ..models.pixels import PixelNormalisation, standardised
from ..models.sit_heads import ContrastiveHead, ReconstructionHead
from ..models.vit import ViTConfig, dino_vit, vit_small
from .base import DemoRun, Method, MethodConfig, MomentumPair, Schedule
from .corruption import Corrupted, Corruption, corrupt
from .joint import all_ranks, spread
from .mae import Reconstruction
from .schedules import cosine_momentum

VIEWS = 2
PAINTED_AT_ONCE = 1 << 20  # pixels whose errors are in memory at a time, in float32


@dataclass(kw_only=True)
class SiTConfig(MethodConfig):
    """SiT."""

    encoder: ViTConfig = field(default_factory=lambda: replace(dino_vit(vit_small()), drop_path=0.1))
    """The vision transformer that is kept after pre-training; its stochastic depth is the student's alone."""
    corruption: Corruption = field(default_factory=Corruption)
    """What is done to the student's views."""
    hidden: int = 4096
    """Width of the contrastive head's hidden layers."""
    dim: int = 256
    """Width of the vectors that are compared."""
    temperature: float = 0.2
    """Of the contrastive loss's softmax."""
    recon_weight: float = 1.0
    """Of the reconstruction in the loss; 5 for small data sets."""
    momentum: float = 0.996
    """Of the teacher at the start, rising to 1 along half a cosine."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crops, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of the colour jitter: brightness, contrast, saturation, hue."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of the pixels, in 0-1 units."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations of the pixels, in 0-1 units."""

    def build(self) -> SiT:
        """Construct student and teacher, equal at the start."""
        return SiT(self)

    def demo(self) -> SiTConfig:
        """A small ViT and narrower heads; a teacher that follows faster, as there are few steps."""
        # A network this small groups images by their light and does not come to shapes: each gets the same light.
        encoder = replace(self.encoder.demo(), pixels="image", patch_size=8, drop_path=0.0)
        encoder = replace(encoder, positions="learned_sincos", init="moco_v3")
        return replace(
            self,
            encoder=encoder,
            hidden=512,
            dim=128,
            momentum=0.9,
            crop_scale=(0.4, 1.0),
            flip=0.0,
            blur_sigma=(0.1, 0.6),
        )

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=128, lr=2e-3, weight_decay=0.04)


class Network(nn.Module):
    """A backbone with both heads, named as in the released checkpoints.

    Args:
        backbone: a vision transformer.
        config: sizes of the heads.
    """

    def __init__(self, backbone: nn.Module, config: SiTConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.backbone: Any = backbone
        self.head = ContrastiveHead(width, config.hidden, config.dim)
        self.head_recons = ReconstructionHead(width, config.encoder.patch_size)


class SiT(Method):
    """A student that sees corrupted views, and a teacher that sees them as they are and follows it."""

    compares_images = True

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        config.corruption.check(encoder.size)
        # The student gets pixels that are normalised already: there zero is the colour that hides them.
        ready = replace(encoder, pixels="dataset").build(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.student = Network(ready, config)
        self.teacher = Network(replace(encoder, drop_path=0.0).build(mean=config.mean, std=config.std), config)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.normalisation = PixelNormalisation(config.mean, config.std)

    def views(self) -> list[View]:
        """Two crops; the first always blurred, the second seldom but sometimes solarised."""
        config = self.config
        return byol_views(
            config.encoder.size,
            scale=config.crop_scale,
            flip=config.flip,
            sigma=config.blur_sigma,
            jitter=config.jitter,
        )

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of both losses; every view of every image is corrupted in its own way."""
        ((images, _),) = group_views(batch.views)
        noise = schedule.uniform(len(images) // VIEWS, VIEWS * self.config.corruption.columns, images.device)
        return self.losses(images, self.corrupt(images, torch.cat(noise.chunk(VIEWS, dim=1)), batch=len(noise)))

    def corrupt(self, images: Tensor, noise: Tensor, *, batch: int) -> Corrupted:
        """What the student sees of raw views `[N, H, W, 3]`, as `corruption.corrupt` says."""
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.normalisation.mean.dtype
        return corrupt(self.targets(images), noise, self.config.corruption, self.normalise, batch=batch, dtype=dtype)

    def targets(self, images: Tensor) -> Tensor:
        """Raw pixels as they are corrupted and painted: on each image's own scale, where the encoder has them so."""
        return standardised(images) if self.config.encoder.pixels == "image" else images

    def normalise(self, images: Tensor) -> Tensor:
        """Raw pixels `[N, H, W, 3]` to normalised ones, float32 or the method's dtype."""
        return self.normalisation(images).permute(0, 2, 3, 1)

    def losses(self, images: Tensor, corrupted: Corrupted) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of two views of some images, view by view.

        Args:
            images: raw, `[2 n, H, W, 3]`, what the teacher sees.
            corrupted: what the student sees.

        Returns:
            The scalar loss, and detached scalar tensors to log.
        """
        config = self.config
        raw, mask = self.targets(images), corrupted.mask
        if self.paints_selected(images.device):
            selected = self._in_patches(mask).any(dim=(1, 2)).nonzero()[:, 0]
            classes, tokens = self._encode_selected(corrupted.images, selected)
            raw, mask = self._in_patches(raw)[selected], self._in_patches(mask)[selected]
        else:
            tokens = self.student.backbone(corrupted.images)
            classes, tokens = tokens[:, 0], tokens[:, 1:]
        queries = self.student.head(classes)
        with torch.no_grad():
            keys = self.teacher.head(self.teacher.backbone.forward_features(images))
        contrastive = self.contrastive(queries, keys)
        painted = self.student.head_recons(tokens)
        reconstruction = corrupted_l1(painted, raw, mask, self.normalise, group=all_ranks())
        loss = contrastive + config.recon_weight * reconstruction
        metrics = {
            "loss": loss,
            "contrastive": contrastive,
            "reconstruction": reconstruction,
            "feature_std": spread(classes),
            "corrupted": corrupted.mask.float().mean(),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    def paints_selected(self, device: torch.device) -> bool:
        """Whether patches without a corrupted pixel are left out; a GPU's host would have to wait for their number."""
        return device.type == "cpu"

    def _in_patches(self, pixels: Tensor) -> Tensor:
        """`[N, H, W, ...]` to `[N L, P, P, ...]`, patches row-major."""
        side = self.config.encoder.patch_size
        return pixels.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)

    def _encode_selected(self, images: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens `[N, D]`, and those of the `selected` of all patches, `[T]` of `[N L]`, as `[T, 1, D]`."""
        patches = self.student.backbone.length
        places = selected + selected // patches + 1  # a class token is before each image's patches
        firsts = torch.arange(len(images), device=images.device) * (1 + patches)
        tokens = self.student.backbone(images, rows=torch.cat([firsts, places]))
        return tokens[: len(images)], tokens[len(images) :, None]

    def contrastive(self, queries: Tensor, keys: Tensor) -> Tensor:
        """InfoNCE of each view's queries with the keys of the other view, over the images of all ranks."""
        first_queries, second_queries = queries.chunk(VIEWS)
        first_keys, second_keys = keys.chunk(VIEWS)
        temperature, group = self.config.temperature, all_ranks()
        loss = info_nce_loss(first_queries, second_keys, temperature, group=group)
        loss = loss + info_nce_loss(second_queries, first_keys, temperature, group=group)
        return 2 * temperature * loss

    def momentum_pairs(self) -> list[MomentumPair]:
        """Backbone and both heads; running statistics are not averaged, the teacher has its own."""
        return [MomentumPair(self.teacher, self.student)]

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """The teacher follows the weights that the step has made, with the momentum of that step."""
        return cosine_momentum(taken.step / taken.total_steps, self.config.momentum)

    def first_layer(self) -> list[nn.Parameter]:
        """The student's patch projection."""
        return self.student.backbone.first_layer()

    def backbone(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.backbone

    def features(self, images: Tensor) -> Tensor:
        """The teacher's class token, before the head: `[B, D]`."""
        return self.teacher.backbone.forward_features(images).float()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Corrupt uint8 images `[B, H, W, 3]` by noise `[B, config.corruption.columns]`, and paint what is lost.

        The student does, as it was trained to. Images are shown as it knows them: with `pixels="image"` on the scale
        that each of them gets.
        """
        clean = self.targets(images)
        corrupted = self.corrupt(images, noise, batch=len(images))
        painted = as_images(self.student.head_recons(self.student.backbone(corrupted.images)[:, 1:]), images)
        painted = torch.where(corrupted.mask[..., None], painted, corrupted.images)
        return Reconstruction(clean, *(self._shown(pixels) for pixels in (corrupted.images, painted)))

    def _shown(self, pixels: Tensor) -> Tensor:
        """Normalised pixels to uint8."""
        pixels = pixels.float() * self.normalisation.std + self.normalisation.mean
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass of the student, once that of the teacher.

        All patches count, though some have nothing to repair and may be left out in the end.
        """
        encoder, head = self.config.encoder, head_flops(self.student.head)
        painting = encoder.regions_at(encoder.size) * self.student.head_recons.flops
        student = encoder.region_flops + head + painting
        return VIEWS * images * (3 * student + encoder.flops + head)


def corrupted_l1(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    normalise: Callable[[Tensor], Tensor],
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean absolute error of painted patches on the corrupted pixels, those of all ranks.

    Args:
        pred: `[N, L, 3 P P]`, L patches row-major, pixels of a patch in the order (row, column, channel).
        images: raw, `[N, H, W, 3]`, the targets.
        mask: corrupted pixels, bool `[N, H, W]`.
        normalise: brings raw pixels to zero mean and unit deviation, `[N, H, W, 3]`, float32 at least.
        group: ranks whose pixels are counted. The ranks' losses and gradients then have the mean over all pixels as
            their mean, though one rank may have more of them than another.

    Returns:
        A scalar, float32 at least. There is no gradient to the images.
    """
    count = 3 * mask.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
        count = count / dist.get_world_size(group)
    return _CorruptedL1.apply(pred, images, mask, count, normalise)


def as_images(patches: Tensor, images: Tensor) -> Tensor:
    """Patches `[N, L, 3 P P]` as images of the shape of `images`, `[N, H, W, 3]`."""
    return _in_rows(patches, images.shape).reshape(images.shape)


def _in_rows(patches: Tensor, shape: torch.Size) -> Tensor:
    """Patches `[N, L, 3 P P]` in the order of an image's pixels, as a view `[N, H / P, P, W / P, 3 P]`."""
    _, height, width, channels = shape
    side = math.isqrt(patches.shape[-1] // channels)
    tiles = patches.unflatten(1, (height // side, width // side)).unflatten(3, (side, side * channels))
    return tiles.transpose(2, 3)


class _CorruptedL1(torch.autograd.Function):
    """The loss, and on the way the sign of each error, which is all that its gradient needs: a byte per value."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, images: Tensor, mask: Tensor, count: Tensor, normalise: Callable[[Tensor], Tensor]
    ) -> Tensor:
        painted = _in_rows(pred, images.shape)
        signs = torch.empty_like(pred, dtype=torch.int8)
        total = []
        step = max(1, PAINTED_AT_ONCE // mask.shape[1:].numel())
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            error = normalise(images[part]).view(painted[part].shape).sub_(painted[part])
            error.view_as(images[part]).masked_fill_(~mask[part][..., None], 0)
            total.append(error.abs().sum())
            _in_rows(signs[part], images.shape).copy_(error.sign_().neg_())
        ctx.save_for_backward(signs, count)
        ctx.dtype = pred.dtype
        return torch.stack(total).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        signs, count = ctx.saved_tensors
        return signs.to(ctx.dtype).mul_(grad / count), None, None, None, None
