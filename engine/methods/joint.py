"""What MoCo, SimCLR, BYOL and SimSiam share: two views of an image, one network, vectors that are to agree."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbone import BackboneConfig
from ..models.heads import head_flops
from ..models.vit import ViTConfig, moco_vit, vit_base
from .base import Method, MethodConfig, MomentumPair, Schedule

# For demos without negatives: the colour of a digit and of what is behind it would be all that two views need to agree.
STRONG_JITTER = (0.8, 0.8, 0.8, 0.5)


@dataclass(kw_only=True)
class JointConfig(MethodConfig):
    """What every method on two views has."""

    encoder: BackboneConfig = field(default_factory=lambda: moco_vit(vit_base()))
    """The network that is kept after pre-training."""
    freeze_patch_embed: bool = True
    """Keep the patch projection as it was initialised: training is then stable (arXiv 2104.02057, section 4.2)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crops, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of the colour jitter: brightness, contrast, saturation, hue."""

    def shrunk(self) -> dict[str, Any]:
        """Fields of a demo: a small encoder; digits are neither mirrored nor cut up nor blurred away."""
        encoder = self.encoder.demo()
        if isinstance(encoder, ViTConfig):
            encoder = replace(encoder, patch_size=8)  # a quarter of the tokens that MAE's demo needs
        return {"encoder": encoder, "crop_scale": (0.4, 1.0), "flip": 0.0, "blur_sigma": (0.1, 0.6)}

    def chain(self) -> dict[str, Any]:
        """What the chains of `vitrail.engine.data.chains` take."""
        return {
            "size": self.encoder.size,
            "scale": self.crop_scale,
            "flip": self.flip,
            "sigma": self.blur_sigma,
            "jitter": self.jitter,
        }


class Encoded(NamedTuple):
    """Features of a micro-batch: view by view, `[views, n, D]`, of the trained network and of its teacher."""

    student: Tensor
    teacher: Tensor | None


class Cached(NamedTuple):
    """What a micro-batch is to send back through the backbone, where features of the whole batch were cached."""

    gradient: Tensor
    """Of the whole batch's loss to the micro-batch's features, `[views, n, D]`."""
    whole: Encoded | None
    """Features of the whole batch, for the one micro-batch of a step that trains the heads on them."""


class JointEmbedding(Method):
    """A backbone and heads, with a teacher or without one.

    The loss is computed in two parts, so that the trainer can cache features: the encoders look at each image alone,
    `criterion` at the whole batch.
    """

    encoder: Any
    projector: nn.Sequential
    views_per_network = 2
    trained_heads: tuple[str, ...] = ("projector",)
    taught_heads: tuple[str, ...] = ()

    def __init__(self, config: JointConfig, *, groups: int, sync: bool = True) -> None:
        super().__init__()
        self.encoder = config.encoder.build(groups=groups, sync=sync)
        self.forward_flops = config.encoder.flops
        if config.freeze_patch_embed:
            self.encoder.freeze_patch_embed()

    def forward(self, batch: Any, schedule: Schedule, cached: Cached | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch with two views, or with `cached` the part of a larger batch's loss that is its own."""
        if cached is None:
            return self.criterion(self.encode(batch, schedule), schedule)
        part = (self.student_features(batch).float() * cached.gradient.float()).sum()
        if cached.whole is None:
            return part, {}
        loss, metrics = self.criterion(cached.whole, schedule)
        return part + loss, metrics

    def encode(self, batch: Any, schedule: Schedule) -> Encoded:
        """Features of a micro-batch, those of the teacher without gradient."""
        student = self.student_features(batch)
        with torch.no_grad():
            return Encoded(student, self.teacher_features(batch, schedule))

    def student_features(self, batch: Any) -> Tensor:
        """Features `[views, n, D]` of the trained network."""
        return encode_views(self.encoder, batch.views)

    def teacher_features(self, batch: Any, schedule: Schedule) -> Tensor | None:
        """Features `[views, n, D]` of the teacher, None where there is none."""
        return None

    @abstractmethod
    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of features, and detached scalars to log."""

    def backbone(self) -> nn.Module:
        """The trained encoder."""
        network: nn.Module = self.encoder
        return network

    def features(self, images: Tensor) -> Tensor:
        """The encoder's vector of an image, before any head: `[B, D]`."""
        return self.encoder.forward_features(images).float()

    def first_layer(self) -> list[nn.Parameter]:
        """The encoder's first layer; the first that is trained, where the projection is frozen."""
        trained = [p for p in self.encoder.first_layer() if p.requires_grad]
        return trained or super().first_layer()

    def flops(self, images: int) -> float:
        """Matrix products of a step: three times the forward pass for what is trained, once for a teacher."""
        heads, taught = (
            sum(head_flops(self.get_submodule(name)) for name in names)
            for names in (self.trained_heads, self.taught_heads)
        )
        student = 3.0 * (self.forward_flops + heads)
        teacher = self.forward_flops + taught if self.momentum_pairs() else 0.0
        return self.views_per_network * images * (student + teacher)


class Taught(JointEmbedding):
    """A method whose teacher, `momentum_encoder` and `momentum_projector`, encodes the views as the student does."""

    taught_heads = ("momentum_projector",)

    momentum_encoder: Any
    momentum_projector: nn.Sequential

    def teach(self) -> None:
        """Make the teacher, once encoder and projector are there: a copy that is never trained."""
        self.momentum_encoder = deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)

    def teacher_features(self, batch: Any, schedule: Schedule) -> Tensor | None:
        """Features `[views, n, D]` of the teacher's encoder."""
        return encode_views(self.momentum_encoder, batch.views)

    def momentum_pairs(self) -> list[MomentumPair]:
        """Encoder and projector; running statistics are not averaged, the teacher has its own."""
        return [
            MomentumPair(self.momentum_encoder, self.encoder),
            MomentumPair(self.momentum_projector, self.projector),
        ]


def encode_views(encoder: Any, views: list[Tensor]) -> Tensor:
    """Features of several views in one call, `[views, n, D]`."""
    images = views[0] if len(views) == 1 else torch.cat(views)
    features: Tensor = encoder.forward_features(images)
    return features.unflatten(0, (len(views), -1))


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks, None where there is one."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def spread(embeddings: Tensor) -> Tensor:
    """Standard deviation of normalised embeddings `[N, d]`, times sqrt(d): 0 when all are the same.

    About 1 for directions drawn evenly from the sphere (SimSiam, arXiv 2011.10566, section 4.1).
    """
    unit = F.normalize(embeddings.detach().float(), dim=1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


def cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of `[N, d]` predictions and targets that get no gradient, in float32 at least."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return F.cosine_similarity(predicted.to(dtype), target.detach().to(dtype), dim=1).mean()
