"""MoCo v3 (Chen, Xie, He, arXiv 2104.02057): each view predicts the teacher's encoding of the other one.

The method is described in `docs/methods/moco_v3.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrail.kernels import info_nce_loss

from ..data.chains import moco_v3_views
from ..data.views import View
from ..models.heads import mlp_head
from .base import DemoRun, Schedule
from .joint import Encoded, JointConfig, Taught, all_ranks, spread
from .schedules import cosine_momentum


@dataclass(kw_only=True)
class MoCoV3Config(JointConfig):
    """MoCo v3 with a vision transformer; a ResNet-50 has two projection layers and no norm after the predictor."""

    dim: int = 256
    """Width of the vectors that are compared."""
    hidden: int = 4096
    """Width of the heads' hidden layers."""
    projector_layers: int = 3
    """Linear layers of the projector; 2 for a ResNet-50."""
    predictor_norm: bool = True
    """Batch normalisation after the predictor's last layer; off for a ResNet-50."""
    temperature: float = 0.2
    """Of the softmax; 1.0 for a ResNet-50."""
    momentum: float = 0.99
    """Of the teacher at the start, rising to 1 along half a cosine."""

    def build(self) -> MoCoV3:
        """Construct student and teacher, equal at the start."""
        return MoCoV3(self)

    def demo(self) -> MoCoV3Config:
        """A small ViT and narrower heads; a teacher that follows faster, as there are few steps."""
        return replace(self, **self.shrunk(), hidden=512, dim=128, momentum=0.9)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=10, batch_size=128, lr=2e-3, weight_decay=0.1)


class MoCoV3(Taught):
    """Encoder, projector and predictor; a teacher's encoder and projector that follow them."""

    compares_images = True
    trained_heads = ("projector", "predictor")

    def __init__(self, config: MoCoV3Config) -> None:
        super().__init__(config, groups=2)  # the released code encodes the views in two calls
        self.config = config
        hidden, dim = [config.hidden] * (config.projector_layers - 1), config.dim
        self.projector = mlp_head([config.encoder.feature_width, *hidden, dim], last_norm="plain", groups=2)
        self.predictor = mlp_head(
            [dim, config.hidden, dim], last_norm="plain" if config.predictor_norm else "none", groups=2
        )
        self.teach()

    def views(self) -> list[View]:
        """Two crops; the first always blurred, the second seldom but sometimes solarised."""
        return moco_v3_views(**self.config.chain())

    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE of each view's queries with the keys of the other view, over the images of all ranks."""
        assert encoded.teacher is not None
        projected = self.projector(encoded.student.flatten(0, 1))
        first_queries, second_queries = self.predictor(projected).chunk(2)
        with torch.no_grad():
            first_keys, second_keys = self.momentum_projector(encoded.teacher.flatten(0, 1)).chunk(2)
        temperature, group = self.config.temperature, all_ranks()
        loss = info_nce_loss(first_queries, second_keys, temperature, group=group)
        loss = loss + info_nce_loss(second_queries, first_keys, temperature, group=group)
        loss = 2 * temperature * loss  # the gradient to a cosine then does not depend on the temperature
        return loss, {"loss": loss.detach(), "feature_std": spread(projected)}

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """The released code updates within the step, before the keys and with weights that the step has not changed."""
        return cosine_momentum(coming.step / coming.total_steps, self.config.momentum)

    def chance_loss(self, images: int) -> float:
        """Both directions at the entropy of a uniform guess."""
        return 4 * self.config.temperature * math.log(images)
