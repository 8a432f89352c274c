"""iBOT (Zhou et al., arXiv 2111.07832): DINO, and from hidden patches what the teacher makes of the same, seen.

The method is described in `docs/methods/ibot.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..models.backbone import BackboneConfig
from ..models.heads import DINOHead, head_flops
from ..models.multi_crop import group_views
from ..models.swin import SwinConfig
from ..models.vit import ViTConfig, dino_vit, vit_small
from .base import DemoRun, Schedule
from .centers import Distilled
from .dino import DINO, GLOBAL_CROPS, DINOConfig
from .joint import spread
from .masks import BLOCK_COLUMNS, block_masks, ibot_columns, ibot_counts, masked_rows
from .schedules import warmed_temperature

COUNTS, PLACES = 0, 1  # streams of a step's noise


@dataclass(kw_only=True)
class IBOTConfig(DINOConfig):
    """iBOT."""

    encoder: BackboneConfig = field(
        default_factory=lambda: replace(dino_vit(vit_small()), drop_path=0.1, mask_token=True)
    )
    """The network that is kept after pre-training, with a mask token; its stochastic depth is the student's alone."""
    prototypes: int = 8192
    """Prototypes K of the views."""
    patch_prototypes: int | None = None
    """Prototypes of the patches' own; None: they share those of the views."""
    norm_last_layer: bool = False
    """Prototypes stay of unit length, which is stabler; trained lengths are better at the end."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temp_epochs: int = 30
    """Epochs from the one temperature to the other, of views and of patches."""
    patch_teacher_temp: float = 0.07
    """Temperature of the teacher's softmax for patches after its warm-up."""
    warmup_patch_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax for patches in the first epoch."""
    local_crops: int = 10
    """Small crops, which the teacher does not see."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of the two large crops, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of the small crops, as a share of the image."""
    mask_ratios: tuple[float, ...] = (0.0, 0.3)
    """Shares of a large crop's patches to hide, one of which is drawn for each crop."""
    mask_variances: tuple[float, ...] = (0.0, 0.2)
    """What each of these shares may differ by, up or down, evenly distributed."""
    mask_shape: Literal["blocks", "random"] = "blocks"
    """Hide rectangles, or patches drawn one by one."""
    mask_epoch: float = 0
    """Epoch from which patches are hidden."""
    mean_over_masked: bool = False
    """Average the patch loss over the crops with hidden patches; otherwise the others count as well, with 0."""

    def build(self) -> IBOT:
        """Construct student and teacher, equal at the start."""
        return IBOT(self)

    def build_head(self, name: str) -> DINOHead:
        """The student's head, which the teacher's copies."""
        return DINOHead(
            self.encoder.feature_width,
            self.prototypes,
            patch_prototypes=self.patch_prototypes,
            hidden=self.hidden,
            bottleneck=self.bottleneck,
            batch_norm=self.head_batch_norm,
            trained_length=not self.norm_last_layer,
        )

    def shrunk(self) -> dict[str, Any]:
        """DINO's, on crops of 4 x 4 patches, where patches are hidden from the start."""
        patches = {"patch_teacher_temp": 0.04, "warmup_patch_teacher_temp": 0.04, "mask_epoch": 0.0}
        return super().shrunk() | patches

    def demo(self) -> IBOTConfig:
        """A small network with batch normalisation in its head, few prototypes, two small crops of 16 pixels."""
        return replace(self, **self.shrunk())

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=7, batch_size=128, lr=4e-3, weight_decay=0.04)


class Hidden(NamedTuple):
    """The patches of a micro-batch's large crops that the student does not see."""

    masks: Tensor
    """bool `[2 n, T]`, crop by crop, True where hidden."""
    rows: Tensor
    """Places of the hidden ones among all `2 n T`, int64 `[C]`, then padding."""
    weight: Tensor
    """Factor of each one's cross-entropy in the loss, float32 `[C]`; 0 for padding."""


class IBOT(DINO):
    """DINO on large crops of which the student does not see all, and a centre of the logits of patches."""

    config: IBOTConfig

    def __init__(self, config: IBOTConfig) -> None:
        encoder = config.encoder
        if not isinstance(encoder, ViTConfig | SwinConfig) or not encoder.mask_token:
            raise ValueError(
                f"patches are hidden by a mask token, and the {type(encoder).__name__} has none: "
                "pass --method.encoder.mask-token"
            )
        super().__init__(config)
        self.patch_centers = self.build_centers(1, config.patch_prototypes or config.prototypes)
        height, width = encoder.size
        strip = encoder.patch_size  # of one region's width
        self.grid = encoder.regions_at((height, strip)), encoder.regions_at((strip, width))

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss of views, and the loss of the hidden patches."""
        crops, epoch = batch.views, schedule.epoch
        hidden = self.hide(len(crops[0]), schedule, crops[0].device)
        with torch.no_grad():
            views, patches = self.teacher.forward_regions(group_views(crops[:GLOBAL_CROPS])[0][0])
            teacher = Distilled(*self.teacher_heads["head"](views))
            seen = Distilled(*self.teacher_heads["head"](patches.flatten(0, 1), True))
            taught = Distilled(seen.features[hidden.rows], seen.prototypes)
            self.centers.observe(teacher)
            self.patch_centers.observe(seen)  # of all patches, hidden or not
        views, patches = self.encode_masked(crops, hidden.masks)
        student = Distilled(*self.student_heads["head"](views))
        guessed = Distilled(*self.student_heads["head"](patches.flatten(0, 1)[hidden.rows], True))
        view_loss = self.view_loss(student, teacher, crops=len(crops), epoch=epoch)
        patch_loss = self.patch_loss(guessed, taught, hidden.weight, epoch=epoch)
        loss = view_loss + patch_loss
        return loss, {
            "loss": loss.detach(),
            "view_loss": view_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "masked": hidden.masks.float().mean(),
            "feature_std": spread(student.features),
        }

    def hide(self, images: int, schedule: Schedule, device: torch.device) -> Hidden:
        """Choose what the student does not see.

        How many patches are hidden is drawn on the host, which so knows the length of the lists without waiting; where
        they are, on the device.

        Args:
            images: number n of the micro-batch's images.
            schedule: where the run stands.
            device: of the result.
        """
        config, tokens = self.config, math.prod(self.grid)
        columns = ibot_columns(config.mask_ratios)
        noise = schedule.uniform_everywhere(GLOBAL_CROPS * columns, torch.device("cpu"), stream=COUNTS)
        everywhere = ibot_counts(
            noise.view(-1, columns), tokens, ratios=config.mask_ratios, variances=config.mask_variances
        ).long()
        if schedule.epoch < config.mask_epoch:
            everywhere.zero_()
        mine = everywhere.view(-1, GLOBAL_CROPS)[schedule.first_row : schedule.first_row + images]
        counts = mine.T.flatten()
        masks = self.place(moved(counts, device), images, schedule)
        # Never none: a rank that hides nothing must not leave out what others send gradients of. Two, since batch
        # normalisation in the head takes no single row.
        rows, weight = masked_rows(masks, max(2, int(counts.sum())))
        share = float((everywhere > 0).float().mean()) if config.mean_over_masked else 1.0
        return Hidden(masks, rows, weight / (max(share, 1e-9) * len(counts)))

    def place(self, counts: Tensor, images: int, schedule: Schedule) -> Tensor:
        """Masks `[2 n, T]`, crop by crop, with as many hidden patches as `counts [2 n]` say."""
        tokens, blocks = math.prod(self.grid), self.config.mask_shape == "blocks"
        columns = BLOCK_COLUMNS if blocks else tokens
        noise = schedule.uniform(images, GLOBAL_CROPS * columns, counts.device, stream=PLACES)
        noise = noise.view(images, GLOBAL_CROPS, columns).transpose(0, 1).reshape(-1, columns)
        if blocks:
            return block_masks(noise, self.grid, counts, least_area=(min(self.grid) // 3) ** 2)
        return noise.argsort(dim=1).argsort(dim=1) < counts[:, None]

    def patch_loss(self, student: Distilled, teacher: Distilled, weight: Tensor, *, epoch: float) -> Tensor:
        """Weighted sum of the cross-entropies of the student's hidden patches with the teacher's seen ones.

        Args:
            student: rows of the hidden patches, `[C, d]`.
            teacher: rows of the same, `[C, d]`.
            weight: factors, `[C]`.
            epoch: epochs done, which decide the teacher's temperature.
        """
        config = self.config
        temperature = warmed_temperature(
            epoch, config.warmup_patch_teacher_temp, config.patch_teacher_temp, config.warmup_teacher_temp_epochs
        )
        center = self.balance(teacher, self.patch_centers, temperature, valid=weight > 0)
        return self.distil(student, teacher, temperature, center, weight=weight)

    def after_step(self, applied: bool) -> None:
        """Move both centres, which the losses use from the next step on."""
        super().after_step(applied)
        self.patch_centers.settle(applied)

    def chance_loss(self, images: int) -> float:
        """All softmaxes uniform; crops without hidden patches have no loss of patches."""
        config = self.config
        hiding = [r + v > 0 for r, v in zip(config.mask_ratios, config.mask_variances, strict=True)]
        share = 1.0 if config.mean_over_masked else sum(hiding) / len(hiding)
        return math.log(config.prototypes) + share * math.log(config.patch_prototypes or config.prototypes)

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass of the student, once that of the teacher.

        The student's head meets the patches expected to be hidden, the teacher's all patches, but its prototypes only
        the former.
        """
        config, head = self.config, self.student_heads["head"]
        mlp, views = head_flops(head.get_submodule("mlp")), head_flops(head.get_submodule("last_layer"))
        patches = views if config.patch_prototypes is None else head_flops(head.get_submodule("last_layer2"))
        tokens = math.prod(self.grid)
        hidden = tokens * sum(config.mask_ratios) / len(config.mask_ratios)
        large = config.encoder.region_flops + mlp + views
        small = config.encoder.flops_at((config.local_size,) * 2) + mlp + views
        student = GLOBAL_CROPS * (large + hidden * (mlp + patches)) + config.local_crops * small
        teacher = GLOBAL_CROPS * (large + tokens * mlp + hidden * patches)
        return images * (3 * student + teacher)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory on the device, which the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
