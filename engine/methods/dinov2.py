"""DINOv2 (Oquab et al., arXiv 2304.07193): views as in DINO, hidden patches as in iBOT, and features spread apart.

The method is described in `docs/methods/dinov2.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.kernels import cross_view_match, koleo_loss

from ..models.block import SUBSET_RATE
from ..models.heads import DINOHead, head_flops
from ..models.multi_crop import group_views
from ..models.vit import ViTConfig, dinov2_vit, vit_large
from .base import DemoRun, Schedule
from .centers import Distilled
from .dino import DINO, GLOBAL_CROPS, DINOConfig
from .ibot import Hidden, moved
from .joint import spread
from .masks import BLOCK_COLUMNS, block_masks, dinov2_counts, masked_rows, ranks
from .schedules import warmed_temperature_by_step

ORDER, SHARES, PLACES = 0, 1, 2  # streams of a step's noise
LEAST_BLOCK = 4  # patches of a rectangle


@dataclass(kw_only=True)
class DINOv2Config(DINOConfig):
    """DINOv2."""

    encoder: ViTConfig = field(default_factory=lambda: replace(dinov2_vit(vit_large()), drop_path=0.3))
    """The vision transformer that is kept after pre-training; its stochastic depth is the student's alone."""
    patch_prototypes: int | None = None
    """Prototypes of a head that patches have for themselves; None: they share that of the views."""
    patch_bottleneck: int = 256
    """Width of the unit vectors that these are multiplied with."""
    norm_last_layer: bool = False
    """Prototypes stay of unit length, which is stabler; trained lengths are better at the end."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's softmax after its warm-up, of views and of patches."""
    warmup_teacher_temp_epochs: float = 30  # type: ignore[assignment]
    """Epochs from the one temperature to the other, in a straight line."""
    momentum: float = 0.992
    """Of the teacher at the start, rising to 1 along half a cosine."""
    patch_weight: float = 1.0
    """Of the loss of hidden patches."""
    koleo_weight: float = 0.1
    """Of the KoLeo loss, which is added for each of the two large crops."""
    masked_share: float = 0.5
    """Share of the large crops of which patches are hidden."""
    mask_ratios: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of the patches that is hidden of such a crop."""
    mean_over_masked: bool = False
    """Average the patch loss over the crops with hidden patches; otherwise the others count as well, with 0."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Area of the two large crops, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Area of the small crops, as a share of the image."""
    blur_window: int | None = 9
    """Taps of the blur's kernel; None: as many as it needs."""
    dinov2_blur: bool = False
    """Blur with the complement of each probability, as the released code does and all its weights were trained."""
    pack_crops: bool = True
    """All crops of the student in one sequence, whose images do not see each other."""
    layer_decay: float = 0.9
    """Learning rate of a block over that of the next one."""
    patch_embed_lr: float = 0.2
    """Factor of the patch projection's learning rate, beside the layers' decay."""

    @property
    def heads(self) -> tuple[str, ...]:
        """The head of views, and that of patches where they have their own."""
        return ("dino_head",) if self.patch_prototypes is None else ("dino_head", "ibot_head")

    def build(self) -> DINOv2:
        """Construct student and teacher, equal at the start."""
        return DINOv2(self)

    def build_head(self, name: str) -> DINOHead:
        """One of the student's heads, which the teacher's copies."""
        if name == "dino_head" or self.patch_prototypes is None:
            return super().build_head(name)
        sizes = replace(self, prototypes=self.patch_prototypes, bottleneck=self.patch_bottleneck)
        return DINOConfig.build_head(sizes, name)

    def chain(self) -> dict[str, Any]:
        """What `vitrail.engine.data.chains.dino_views` takes."""
        blur = (0.0, 0.9, 0.5) if self.dinov2_blur else (1.0, 0.1, 0.5)
        return super().chain() | {"blur": blur, "window": self.blur_window}

    def demo(self) -> DINOv2Config:
        """A small network, few prototypes, two small crops of 16 pixels, balanced by Sinkhorn-Knopp."""
        fields = self.shrunk() | {"head_batch_norm": False, "patch_bottleneck": 64}
        # In so few steps a moving centre, without batch normalisation beside it, does not keep prototypes in use.
        fields["centering"] = "sinkhorn"
        fields["encoder"] = replace(fields["encoder"], layer_scale=0.1)
        if self.patch_prototypes is not None:
            fields["patch_prototypes"] = 1024
        return replace(self, **fields)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=8, batch_size=128, lr=1e-3, weight_decay=0.04)


class DINOv2(DINO):
    """DINO on large crops of which the student does not see all; its class tokens keep away from each other."""

    config: DINOv2Config

    def __init__(self, config: DINOv2Config) -> None:
        if not config.encoder.mask_token:
            raise ValueError(
                "patches are hidden by a mask token, and the encoder has none: pass --method.encoder.mask-token"
            )
        if config.head_batch_norm:
            raise ValueError(
                "head_batch_norm is DINO's: here the head's rows are class tokens, patches and padding together, "
                "which have no statistics in common; pass --method.no-head-batch-norm"
            )
        super().__init__(config)
        self.compares_images = self.compares_images or bool(config.koleo_weight)
        self.centers = self.build_centers(1, config.prototypes)
        self.patch_centers = self.build_centers(1, config.patch_prototypes or config.prototypes)

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of views, of hidden patches, and of class tokens too close to each other."""
        crops, config = batch.views, self.config
        hidden = self.hide(len(crops[0]), schedule, crops[0].device)
        with torch.no_grad():
            views, patches = self.teacher.forward_regions(group_views(crops[:GLOBAL_CROPS])[0][0])
            teacher, taught = self.distilled(self.teacher_heads, views, patches, hidden)
        views, patches = self.encode_masked(crops, hidden.masks)
        student, guessed = self.distilled(self.student_heads, views, patches, hidden)
        temperature = self.temperature(schedule)
        view_loss = self.view_loss_at(student, teacher, temperature, crops=len(crops))
        patch_loss = self.patch_loss(guessed, taught, temperature, hidden.weight)
        koleo = self.koleo(views)
        self.centers.observe(teacher)
        self.patch_centers.observe(taught, valid=hidden.weight > 0)
        loss = view_loss + config.patch_weight * patch_loss + config.koleo_weight * koleo
        return loss, {
            "loss": loss.detach(),
            "view_loss": view_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "koleo": koleo.detach(),
            "masked": hidden.masks.float().mean(),
            "feature_std": spread(student.features),
        }

    def hide(self, images: int, schedule: Schedule, device: torch.device) -> Hidden:
        """Choose what the student does not see, the shares spread evenly over the crops of the global batch.

        How many patches are hidden is drawn on the host, which so knows the length of the lists without waiting; where
        they are, on the device.

        Args:
            images: number n of the micro-batch's images.
            schedule: where the run stands.
            device: of the result.
        """
        config, grid, host = self.config, self.config.encoder.grid, torch.device("cpu")
        tokens = math.prod(grid)
        order, noise = (schedule.uniform_everywhere(GLOBAL_CROPS, host, stream=s) for s in (ORDER, SHARES))
        everywhere, _ = dinov2_counts(ranks(order), noise, tokens, share=config.masked_share, ratios=config.mask_ratios)
        counts = everywhere[schedule.first_row : schedule.first_row + images].T.flatten()
        places = schedule.uniform(images, GLOBAL_CROPS * BLOCK_COLUMNS, device, stream=PLACES)
        masks = block_masks(
            torch.cat(places.chunk(GLOBAL_CROPS, dim=1)),
            grid,
            moved(counts, device),
            least_area=LEAST_BLOCK,
            most_area=tokens / 2,
            rounds=20 if tokens <= 256 else 32,
        )
        # At least one place: a rank that hides nothing must not leave out what others send gradients of.
        rows, weight = masked_rows(masks, max(1, int(counts.sum())))
        share = float((everywhere > 0).float().mean()) if config.mean_over_masked else 1.0
        return Hidden(masks, rows, weight / (max(share, 1e-9) * len(counts)))

    def distilled(
        self, heads: nn.ModuleDict, views: Tensor, patches: Tensor, hidden: Hidden
    ) -> tuple[Distilled, Distilled]:
        """What the heads make of the class tokens `[R, D]`, and of the hidden ones of the patches `[2 n, T, D]`."""
        chosen = patches.flatten(0, 1)[hidden.rows]
        if "ibot_head" in heads:
            return Distilled(*heads["dino_head"](views)), Distilled(*heads["ibot_head"](chosen))
        features, prototypes = heads["dino_head"](torch.cat([views, chosen]))  # prototypes are normalised once
        views, chosen = features.split([len(views), len(chosen)])
        return Distilled(views, prototypes), Distilled(chosen, prototypes)

    def view_loss_at(self, student: Distilled, teacher: Distilled, temperature: float, *, crops: int) -> Tensor:
        """DINO's mean over the pairs of a large crop and another crop, and over images.

        Args:
            student: rows crop by crop, `[V n, d]`.
            teacher: rows of the large crops, `[2 n, d]`.
            temperature: of the teacher's softmax.
            crops: number V of the student's crops.
        """
        images = len(teacher.features) // GLOBAL_CROPS
        match = cross_view_match(crops, GLOBAL_CROPS, images, device=student.features.device)
        center = self.balance(teacher, self.centers, temperature)
        return self.distil(student, teacher, temperature, center, match=match)

    def patch_loss(self, student: Distilled, teacher: Distilled, temperature: float, weight: Tensor) -> Tensor:
        """Weighted sum of the cross-entropies of the student's hidden patches with the teacher's seen ones.

        Args:
            student: rows of the hidden patches, `[C, d]`.
            teacher: rows of the same, `[C, d]`.
            temperature: of the teacher's softmax.
            weight: factors, `[C]`; rows whose factor is 0 are padding.
        """
        center = self.balance(teacher, self.patch_centers, temperature, valid=weight > 0)
        return self.distil(student, teacher, temperature, center, weight=weight)

    def koleo(self, views: Tensor) -> Tensor:
        """Sum over the two large crops of the KoLeo loss of their class tokens `[V n, D]`, before the head.

        Neighbours are those of this rank's micro-batch.
        """
        if not self.config.koleo_weight:
            return views.new_zeros(())
        images = len(views) // (GLOBAL_CROPS + self.config.local_crops)
        first, second, *_ = views.split(images)
        return koleo_loss(first) + koleo_loss(second)

    def temperature(self, schedule: Schedule) -> float:
        """Of the teacher's softmax."""
        config = self.config
        return warmed_temperature_by_step(
            schedule.step,
            schedule.epoch,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
        )

    def after_step(self, applied: bool) -> None:
        """Move both centres, which the losses use from the next step on."""
        super().after_step(applied)
        self.patch_centers.settle(applied)

    def lr_scales(self) -> list[tuple[float, Sequence[nn.Parameter]]]:
        """Lower learning rates towards the pixels: positions and tokens count as the layer before the first block."""
        config, depth = self.config, self.config.encoder.depth
        scales: list[tuple[float, Sequence[nn.Parameter]]] = []
        for name, parameter in self.student.named_parameters():
            kind, _, rest = name.partition(".")
            layer = int(rest.partition(".")[0]) + 1 if kind == "blocks" else depth + 1 if kind == "norm" else 0
            factor = config.patch_embed_lr if kind == "patch_embed" else 1.0
            scales.append((factor * config.layer_decay ** (depth + 1 - layer), [parameter]))
        return scales

    def clip_groups(self) -> list[Sequence[nn.Parameter]]:
        """The backbone and each head."""
        return [list(network.parameters()) for network in (self.student, *self.student_heads.values())]

    def chance_loss(self, images: int) -> float:
        """All softmaxes uniform; crops without hidden patches have no loss of patches. KoLeo's part, small, is not in.

        It says nothing of the outputs, and equal features are told by `feature_std`.
        """
        config = self.config
        patches = config.patch_prototypes or config.prototypes
        share = 1.0 if config.mean_over_masked else config.masked_share
        return math.log(config.prototypes) + config.patch_weight * share * math.log(patches)

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass of the student, once that of the teacher.

        Of the student's blocks, those are counted that stochastic depth leaves; of the patches, those expected to be
        hidden meet a head.
        """
        config, encoder = self.config, self.config.encoder
        views, patches = (head_flops(self.student_heads[name]) for name in (config.heads[0], config.heads[-1]))
        hidden = config.masked_share * sum(config.mask_ratios) / 2 * math.prod(encoder.grid) * patches
        local = (config.local_size,) * 2
        large, small = encoder.region_flops, encoder.flops_at(local, regions=config.pack_crops)
        stems = [replace(encoder, image_size=size, depth=0).region_flops for size in (encoder.size, local)]
        subset = encoder.drop_path_by == "subset" and encoder.drop_path > SUBSET_RATE
        kept = 1 - encoder.drop_path if subset else 1.0
        student = GLOBAL_CROPS * (stems[0] + kept * (large - stems[0]) + views + hidden)
        student += config.local_crops * (stems[1] + kept * (small - stems[1]) + views)
        return images * (3 * student + GLOBAL_CROPS * (large + views + hidden))
