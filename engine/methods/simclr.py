"""SimCLR (Chen et al., arXiv 2002.05709; second version 2006.10029): each view must find its partner in the batch.

The method is described in `docs/methods/simclr.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from vitrail.kernels import nt_xent_loss

from ..data.chains import simclr_views
from ..data.views import View
from ..models.heads import mlp_head
from .base import DemoRun, Schedule
from .joint import Encoded, JointConfig, JointEmbedding, all_ranks, spread


@dataclass(kw_only=True)
class SimCLRConfig(JointConfig):
    """SimCLR."""

    dim: int = 128
    """Width of the vectors that are compared."""
    hidden: int | None = None
    """Width of the projector's hidden layers; None for that of the features."""
    projector_layers: int = 3
    """Linear layers of the projector, 3 in the second version, 2 in the first."""
    temperature: float = 0.1
    """Of the softmax."""
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    """Strengths of the colour jitter; half of them suit small images (arXiv 2002.05709, B.9)."""

    def build(self) -> SimCLR:
        """Construct the network."""
        return SimCLR(self)

    def demo(self) -> SimCLRConfig:
        """A small ViT."""
        return replace(self, **self.shrunk(), hidden=512, jitter=(0.4, 0.4, 0.4, 0.1))

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=128, lr=2e-3, weight_decay=0.1)


class SimCLR(JointEmbedding):
    """Encoder and projector. Batch statistics are those of both views together, as in the released code."""

    compares_images = True

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config, groups=1)
        self.config = config
        width = config.encoder.feature_width
        hidden = [config.hidden or width] * (config.projector_layers - 1)
        self.projector = mlp_head([width, *hidden, config.dim], last_norm="scale")

    def views(self) -> list[View]:
        """Two crops from one distribution, with strong colour jitter."""
        return simclr_views(**self.config.chain())

    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent over the images of all ranks, its mean over all views; the released code doubles it."""
        projected = self.projector(encoded.student.flatten(0, 1))
        first, second = projected.chunk(2)
        loss = nt_xent_loss(first, second, self.config.temperature, group=all_ranks())
        return loss, {"loss": loss.detach(), "feature_std": spread(projected)}

    def chance_loss(self, images: int) -> float:
        """A uniform guess among the other views."""
        return math.log(2 * images - 1)
