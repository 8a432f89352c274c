"""BYOL (Grill et al., arXiv 2006.07733): each view predicts the teacher's encoding of the other one, no negatives.

The method is described in `docs/methods/byol.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.chains import byol_views
from ..data.views import View
from ..models.heads import mlp_head
from .base import DemoRun, Schedule
from .joint import STRONG_JITTER, Encoded, JointConfig, Taught, cosine, spread
from .schedules import cosine_momentum


@dataclass(kw_only=True)
class BYOLConfig(JointConfig):
    """BYOL."""

    dim: int = 256
    """Width of the vectors that are compared."""
    hidden: int = 4096
    """Width of the heads' hidden layers."""
    momentum: float = 0.996
    """Of the teacher at the start, rising to 1 along half a cosine; the paper has 0.99 for 300 epochs."""

    def build(self) -> BYOL:
        """Construct student and teacher, equal at the start."""
        return BYOL(self)

    def demo(self) -> BYOLConfig:
        """A small ViT and narrower heads; a teacher that follows faster, as there are few steps."""
        return replace(self, **self.shrunk(), hidden=512, dim=128, momentum=0.99, jitter=STRONG_JITTER)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=4, batch_size=128, lr=3e-4, weight_decay=0.01)


class BYOL(Taught):
    """Encoder, projector and predictor; a teacher's encoder and projector that follow them."""

    trained_heads = ("projector", "predictor")

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config, groups=2)
        self.config = config
        hidden, dim = config.hidden, config.dim
        self.projector = mlp_head([config.encoder.feature_width, hidden, dim], last_bias=True, groups=2)
        self.predictor = mlp_head([dim, hidden, dim], last_bias=True, groups=2)
        self.teach()

    def views(self) -> list[View]:
        """Two crops; the first always blurred, the second seldom but sometimes solarised."""
        return byol_views(**self.config.chain())

    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared distance of unit vectors, `2 - 2 cos`, the mean of each direction, both added."""
        assert encoded.teacher is not None
        projected = self.projector(encoded.student.flatten(0, 1))
        first, second = self.predictor(projected).chunk(2)
        with torch.no_grad():
            first_target, second_target = self.momentum_projector(encoded.teacher.flatten(0, 1)).chunk(2)
        loss = 4 - 2 * (cosine(first, second_target) + cosine(second, first_target))
        return loss, {"loss": loss.detach(), "feature_std": spread(projected)}

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """The teacher follows the weights that the step has made, with the momentum of that step."""
        return cosine_momentum(taken.step / taken.total_steps, self.config.momentum)
