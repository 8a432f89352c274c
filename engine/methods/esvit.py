"""EsViT (Li et al., arXiv 2106.09785): DINO's loss of views, and the same between regions that look most alike.

The method is described in `docs/methods/esvit.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.kernels import region_match_crops

from ..models.backbone import BackboneConfig
from ..models.heads import head_flops
from ..models.multi_crop import group_views
from ..models.swin import swin_tiny
from .base import DemoRun, MethodConfig, Schedule
from .centers import Distilled
from .dino import DINO, GLOBAL_CROPS, DINOConfig
from .joint import spread


@dataclass(kw_only=True)
class EsViTConfig(DINOConfig):
    """EsViT."""

    encoder: BackboneConfig = field(default_factory=lambda: replace(swin_tiny(window=7), drop_path=0.1))
    """The network that is kept after pre-training; its stochastic depth is the student's alone."""
    norm_last_layer: bool = False
    """Prototypes stay of unit length, which is stabler; trained lengths are better at the end."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temp_epochs: int = 30
    """Epochs from the one temperature to the other."""
    region_loss: bool = True
    """Compare regions as well; without it this is DINO on the mean of the regions."""
    region_epoch: float = 0
    """Epoch from which regions are compared, and their head is trained."""

    @property
    def heads(self) -> tuple[str, ...]:
        """The head of views, and that of regions."""
        return ("head", "head_dense") if self.region_loss else ("head",)

    def build(self) -> EsViT:
        """Construct student and teacher, equal at the start."""
        return EsViT(self)

    def demo(self) -> EsViTConfig:
        """A small Swin with batch normalisation in its heads, few prototypes, two small crops of 16 pixels."""
        return replace(self, **self.shrunk() | {"momentum": 0.99, "region_epoch": 0})

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=128, lr=2e-3, weight_decay=0.04, rival_share=0.5)

    def demo_rivals(self) -> dict[str, MethodConfig]:
        """With and without the loss of regions, which is there to make regions find each other in a mirror image.

        Both see mirrored crops, which digits are told apart better without: the demo itself has none. And they do
        without batch normalisation in the heads, beside which the region loss shows only in a longer run.
        """
        if not self.region_loss:
            return {}
        balanced = replace(self, centering="sinkhorn", head_batch_norm=False, warmup_teacher_temp=0.04)
        mirrored = replace(balanced, flip=0.5, teacher_temp=0.04, momentum=0.97)
        return {"views and regions": mirrored, "views alone": replace(mirrored, region_loss=False)}


class Encoded(NamedTuple):
    """Vectors of some crops and of their regions, crop by crop."""

    views: Tensor
    """`[V n, D]`."""
    regions: Tensor
    """`[sum of T n, D]`: crop, image, region."""
    tokens: list[int]
    """Regions T of each crop."""


class EsViT(DINO):
    """DINO with a second head, for regions, and a second centre."""

    compares_regions = True

    config: EsViTConfig

    def __init__(self, config: EsViTConfig) -> None:
        if config.pack_crops:
            raise ValueError("pack_crops is DINO's: EsViT reads all tokens; pass --method.no-pack-crops")
        super().__init__(config)

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the loss of views and half that of regions."""
        if not self.config.region_loss:
            return super().forward(batch, schedule)
        crops, epoch = batch.views, schedule.epoch
        ours = encode_regions(self.student, crops)
        student = Distilled(*self.student_heads["head"](ours.views))
        with torch.no_grad():
            theirs = encode_regions(self.teacher, crops[:GLOBAL_CROPS])
            teacher = Distilled(*self.teacher_heads["head"](theirs.views))
            teacher_dense = Distilled(*self.teacher_heads["head_dense"](theirs.regions))
        self.centers.observe(teacher, teacher_dense)
        loss = self.view_loss(student, teacher, crops=len(crops), epoch=epoch)
        metrics = {"view_loss": loss.detach(), "feature_std": spread(student.features)}
        if epoch >= self.config.region_epoch:
            student_dense = Distilled(*self.student_heads["head_dense"](ours.regions))
            match, _ = region_match_crops(ours.regions.detach(), theirs.regions, ours.tokens, theirs.tokens)
            regions = self.region_loss(student_dense, teacher_dense, match, ours.tokens, epoch=epoch)
            metrics["region_loss"] = regions.detach()
            loss = 0.5 * loss + 0.5 * regions  # the paper adds them without the halves
        return loss, {"loss": loss.detach(), **metrics}

    def region_loss(
        self, student: Distilled, teacher: Distilled, match: Tensor, tokens: list[int], *, epoch: float
    ) -> Tensor:
        """Mean over the regions of a crop, then over images and over the pairs of a large crop and another crop.

        Args:
            student: rows crop by crop, image by image, region by region.
            teacher: rows of the large crops, likewise.
            match: `[2, R]`, the teacher's row that each region of the student's is most like, -1 in the same view.
            tokens: regions of each of the student's crops.
            epoch: epochs done, which decide the teacher's temperature.
        """
        images = len(student.features) // sum(tokens)
        pairs = GLOBAL_CROPS * (len(tokens) - 1)
        shares = student.features.new_tensor([1.0 / (count * images * pairs) for count in tokens])
        counts = torch.tensor([count * images for count in tokens], device=match.device)
        weight = shares.repeat_interleave(counts, output_size=len(student.features))
        return self.cross_entropy(student, teacher, 1, match, weight, epoch)

    def held(self) -> list[tuple[float, Sequence[nn.Parameter]]]:
        """The prototypes in the first epochs, and all of the regions' head until regions are compared."""
        if not self.config.region_loss:
            return super().held()
        return [*super().held(), (self.config.region_epoch, list(self.student_heads["head_dense"].parameters()))]

    def _crop_flops(self, size: tuple[int, int]) -> float:
        """Of one crop, forward; matching is not counted."""
        if not self.config.region_loss:
            return super()._crop_flops(size)
        encoder, dense = self.config.encoder, head_flops(self.student_heads["head_dense"])
        view = encoder.flops_at(size, regions=True) + head_flops(self.student_heads["head"])
        return view + encoder.regions_at(size) * dense


def encode_regions(network: Any, crops: list[Tensor]) -> Encoded:
    """Vectors of all images and all regions of some crops, in one pass for each size."""
    views, regions, tokens = [], [], []
    for images, count in group_views(crops):
        pooled, parts = network.forward_regions(images)
        views.append(pooled)
        regions.append(parts.flatten(0, 1))
        tokens += [parts.shape[1]] * count
    return Encoded(torch.cat(views), torch.cat(regions), tokens)
