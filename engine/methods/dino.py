"""DINO (Caron et al., arXiv 2104.14294): each crop predicts what the teacher makes of the large crops.

The method is described in `docs/methods/dino.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.kernels import cross_view_match, prototype_cross_entropy, sinkhorn_center

from ..data.chains import dino_views
from ..data.views import View
from ..models.backbone import BackboneConfig
from ..models.block import DropPath
from ..models.heads import DINOHead, Prototypes, head_flops
from ..models.multi_crop import group_views
from ..models.vit import ViTConfig, dino_vit, vit_small
from .base import DemoRun, Method, MethodConfig, MomentumPair, Schedule
from .centers import Centers, Distilled
from .joint import all_ranks, spread
from .schedules import cosine_momentum, warmed_temperature

GLOBAL_CROPS = 2


@dataclass(kw_only=True)
class DINOConfig(MethodConfig):
    """DINO."""

    encoder: BackboneConfig = field(default_factory=lambda: replace(dino_vit(vit_small()), drop_path=0.1))
    """The network that is kept after pre-training; its stochastic depth is the student's alone."""
    prototypes: int = 65_536
    """Prototypes K, the outputs of the head."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Width of the unit vectors that prototypes are multiplied with."""
    head_batch_norm: bool = False
    """Batch normalisation in the head, for networks that have it themselves."""
    norm_last_layer: bool = True
    """Prototypes stay of unit length, which is stabler; trained lengths are better at the end."""
    freeze_last_layer: float = 1
    """Epochs in which the prototypes stay as they are."""
    student_temp: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temp: float = 0.04
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs from the one temperature to the other."""
    centering: Literal["centering", "sinkhorn"] = "centering"
    """What balances the teacher's targets: a moving mean of its logits, or Sinkhorn-Knopp within the batch."""
    sinkhorn_iterations: int = 3
    """Alternations of Sinkhorn-Knopp."""
    center_momentum: float = 0.9
    """Share of the old centre in the new one."""
    momentum: float = 0.996
    """Of the teacher at the start, rising to 1 along half a cosine."""
    local_crops: int = 8
    """Small crops, which the teacher does not see."""
    local_size: int = 96
    """Their side in pixels."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area of the two large crops, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of the small crops, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the crop."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of the colour jitter: brightness, contrast, saturation, hue."""
    pack_crops: bool = False
    """All crops of the student in one sequence, whose images do not see each other; for vision transformers."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads by name."""
        return ("head",)

    def build(self) -> DINO:
        """Construct student and teacher, equal at the start."""
        return DINO(self)

    def build_head(self, name: str) -> DINOHead:
        """One of the student's heads, which the teacher's copies."""
        return DINOHead(
            self.encoder.feature_width,
            self.prototypes,
            hidden=self.hidden,
            bottleneck=self.bottleneck,
            batch_norm=self.head_batch_norm,
            trained_length=not self.norm_last_layer,
        )

    def chain(self) -> dict[str, Any]:
        """What `vitrail.engine.data.chains.dino_views` takes."""
        return {
            "size": self.encoder.size,
            "local_size": self.local_size,
            "locals": self.local_crops,
            "scale": self.global_scale,
            "local_scale": self.local_scale,
            "flip": self.flip,
            "sigma": self.blur_sigma,
            "jitter": self.jitter,
        }

    def shrunk(self) -> dict[str, Any]:
        """Fields of a demo: a small encoder and few prototypes; digits are neither mirrored nor cut to pieces."""
        # A network this small groups images by their light and does not come to shapes: each gets the same light.
        encoder = replace(self.encoder.demo(), pixels="image")
        if isinstance(encoder, ViTConfig):
            encoder = replace(
                encoder, patch_size=8, width=64, depth=2, drop_path=0.0, init="moco_v3", positions="learned_sincos"
            )
        return {
            "encoder": encoder,
            "prototypes": 1024,
            "hidden": 256,
            "bottleneck": 64,
            "head_batch_norm": True,
            "freeze_last_layer": 0.0,
            "warmup_teacher_temp": 0.02,
            "teacher_temp": 0.02,
            "momentum": 0.97,
            "local_crops": 2,
            "local_size": 16,
            "global_scale": (0.5, 1.0),
            "local_scale": (0.3, 0.7),
            "flip": 0.0,
            "blur_sigma": (0.1, 0.6),
            "jitter": (0.4, 0.4, 0.4, 0.5),
        }

    def demo(self) -> DINOConfig:
        """A small network with batch normalisation in its head, few prototypes, two small crops of 16 pixels."""
        return replace(self, **self.shrunk())

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=8, batch_size=128, lr=1e-3, weight_decay=0.04)


class DINO(Method):
    """Student and teacher, each a backbone and a head, and the centre of the teacher's logits."""

    student: Any
    teacher: Any
    student_heads: nn.ModuleDict
    teacher_heads: nn.ModuleDict

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config = config
        self.student = config.encoder.build()
        self.teacher = still(self.student)
        self.student_heads = nn.ModuleDict({name: config.build_head(name) for name in config.heads})
        self.teacher_heads = still(self.student_heads)
        self.compares_images = config.centering == "sinkhorn"
        self.centers = self.build_centers(len(config.heads), config.prototypes)
        if config.pack_crops and not hasattr(self.student, "forward_packed"):
            raise ValueError(
                f"pack_crops puts the crops into one sequence of tokens, and {type(self.student).__name__} has none: "
                "pass --method.no-pack-crops"
            )

    def build_centers(self, heads: int, prototypes: int) -> Centers:
        """Moving means of some heads' logits; none where Sinkhorn-Knopp balances the targets."""
        return Centers(heads if self.config.centering == "centering" else 0, prototypes, self.config.center_momentum)

    def views(self) -> list[View]:
        """Two large crops and the small ones, from one decoded image."""
        return dino_views(**self.config.chain())

    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of every crop of the student's with the teacher's view of each large crop but the same."""
        crops = batch.views
        student = Distilled(*self.student_heads["head"](self.encode(self.student, crops)))
        with torch.no_grad():
            teacher = Distilled(*self.teacher_heads["head"](self.encode(self.teacher, crops[:GLOBAL_CROPS])))
        loss = self.view_loss(student, teacher, crops=len(crops), epoch=schedule.epoch)
        self.centers.observe(teacher)
        return loss, {"loss": loss.detach(), "feature_std": spread(student.features)}

    def encode(self, network: Any, crops: list[Tensor]) -> Tensor:
        """Vectors of all images of all crops, crop by crop, `[V n, D]`."""
        groups = [images for images, _ in group_views(crops)]
        if self.config.pack_crops and len(groups) > 1:
            packed: Tensor = network.forward_packed(groups)
            return packed
        return torch.cat([network.forward_features(images) for images in groups])

    def encode_masked(self, crops: list[Tensor], masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the student makes of all crops, hidden patches of the large ones replaced by the mask token.

        Returns:
            Vectors of all images, crop by crop, `[V n, D]`, and the patches of the large crops, `[2 n, T, D]`.
        """
        groups = group_views(crops[:GLOBAL_CROPS]) + group_views(crops[GLOBAL_CROPS:])
        (large, _), *small = groups
        if self.config.pack_crops and small:
            tokens = self.student([images for images, _ in groups], None, False, [masks, *(None for _ in small)])
            return torch.cat([group[:, 0] for group in tokens]), tokens[0][:, self.student.num_prefix :]
        views, patches = self.student.forward_regions(large, masks)
        return torch.cat([views, *(self.student.forward_features(images) for images, _ in small)]), patches

    def view_loss(self, student: Distilled, teacher: Distilled, *, crops: int, epoch: float) -> Tensor:
        """Mean over the pairs of a large crop and another crop, and over images; each student row is visited once.

        Args:
            student: rows crop by crop, `[V n, d]`.
            teacher: rows of the large crops, `[2 n, d]`.
            crops: number V of the student's crops.
            epoch: epochs done, which decide the teacher's temperature.
        """
        images = len(teacher.features) // GLOBAL_CROPS
        match = cross_view_match(crops, GLOBAL_CROPS, images, device=student.features.device)
        return self.cross_entropy(student, teacher, 0, match, None, epoch)

    def cross_entropy(
        self, student: Distilled, teacher: Distilled, head: int, match: Tensor, weight: Tensor | None, epoch: float
    ) -> Tensor:
        """The loss of some pairs of rows under the temperatures of the epoch, the head's targets balanced."""
        config = self.config
        temperature = warmed_temperature(
            epoch, config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        )
        center = self.balance(teacher, self.centers, temperature, head=head)
        return self.distil(student, teacher, temperature, center, match=match, weight=weight)

    def balance(
        self,
        teacher: Distilled,
        centers: Centers,
        temperature: float,
        *,
        head: int = 0,
        valid: Tensor | None = None,
    ) -> Tensor:
        """What the teacher's logits are reduced by, `[K]`, so that no prototype takes all.

        Args:
            teacher: its rows `[Q, d]`.
            centers: the moving means.
            temperature: of the teacher's softmax.
            head: whose mean it is.
            valid: the rows that count, bool `[Q]`; None counts all.
        """
        if self.config.centering == "centering":
            return centers.value[head]
        iterations, group = self.config.sinkhorn_iterations, all_ranks()
        return sinkhorn_center(*teacher, temperature, iterations, group=group, valid=valid)

    def distil(
        self,
        student: Distilled,
        teacher: Distilled,
        temperature: float,
        center: Tensor,
        *,
        match: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of pairs of rows: their mean, or with weights their weighted sum.

        Args:
            student: rows `[R, d]`.
            teacher: rows `[Q, d]`.
            temperature: of the teacher's softmax.
            center: what its logits are reduced by, `[K]`.
            match: rows of the teacher for each of the student's, as `prototype_cross_entropy` takes them.
            weight: factor of each of the student's rows, `[R]`.
        """
        return prototype_cross_entropy(
            *student,
            *teacher,
            student_temp=self.config.student_temp,
            teacher_temp=temperature,
            center=center,
            match=match,
            weight=weight,
            normalized=self.config.norm_last_layer,
        )

    def after_step(self, applied: bool) -> None:
        """Move the centre, which the loss uses from the next step on."""
        self.centers.settle(applied)

    def momentum_pairs(self) -> list[MomentumPair]:
        """Backbones and heads."""
        return [
            MomentumPair(self.teacher, self.student),
            MomentumPair(self.teacher_heads, self.student_heads),
        ]

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """The teacher follows the weights that the step has made, with the momentum of that step."""
        return cosine_momentum(taken.step / taken.total_steps, self.config.momentum)

    def held(self) -> list[tuple[float, Sequence[nn.Parameter]]]:
        """The student's prototypes in the first epochs: gradients of that time only make training unstable."""
        layers = [module for module in self.student_heads.modules() if isinstance(module, Prototypes)]
        prototypes = [p for layer in layers for p in layer.parameters()]
        return [(self.config.freeze_last_layer, prototypes)]

    def first_layer(self) -> list[nn.Parameter]:
        """The student's first layer."""
        return [p for p in self.student.first_layer() if p.requires_grad] or super().first_layer()

    def chance_loss(self, images: int) -> float:
        """Both softmaxes uniform."""
        return math.log(self.config.prototypes)

    def backbone(self) -> nn.Module:
        """The teacher's."""
        network: nn.Module = self.teacher
        return network

    def features(self, images: Tensor) -> Tensor:
        """The teacher's vector of an image, before the head: `[B, D]`."""
        return self.teacher.forward_features(images).float()

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass of the student, once that of the teacher."""
        config = self.config
        large, small = (self._crop_flops(size) for size in (config.encoder.size, (config.local_size,) * 2))
        student = GLOBAL_CROPS * large + config.local_crops * small
        return images * (3 * student + GLOBAL_CROPS * large)

    def _crop_flops(self, size: tuple[int, int]) -> float:
        """Of one crop, forward."""
        return self.config.encoder.flops_at(size) + head_flops(self.student_heads["head"])


def still(network: nn.Module) -> Any:
    """A copy that is never trained and drops nothing, as a teacher's is to be."""
    network = deepcopy(network).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    return network
