"""SimSiam (Chen and He, arXiv 2011.10566): each view predicts the other; neither negatives nor a teacher.

The method is described in `docs/methods/simsiam.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..data.chains import moco_v2_views
from ..data.views import View
from ..models.heads import mlp_head
from .base import DemoRun, Schedule
from .joint import STRONG_JITTER, Encoded, JointConfig, JointEmbedding, cosine, spread


@dataclass(kw_only=True)
class SimSiamConfig(JointConfig):
    """SimSiam."""

    dim: int = 2048
    """Width of the projector and of the vectors that are compared."""
    hidden: int = 512
    """Width of the predictor's hidden layer."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crops, as a share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of the colour jitter: brightness, contrast, saturation, hue."""

    def build(self) -> SimSiam:
        """Construct the network."""
        return SimSiam(self)

    def demo(self) -> SimSiamConfig:
        """A small ViT and narrower heads."""
        return replace(self, **self.shrunk(), dim=512, hidden=128, jitter=STRONG_JITTER)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=128, lr=5e-4, weight_decay=0.01)


class SimSiam(JointEmbedding):
    """Encoder, projector and predictor."""

    trained_heads = ("projector", "predictor")

    def __init__(self, config: SimSiamConfig) -> None:
        super().__init__(config, groups=2)
        self.config = config
        dim = config.dim
        # The released code's last linear layer has a frozen bias, which the normalisation after it takes out again.
        self.projector = mlp_head([config.encoder.feature_width, dim, dim, dim], last_norm="plain", groups=2)
        self.predictor = mlp_head([dim, config.hidden, dim], last_bias=True, groups=2)

    def views(self) -> list[View]:
        """Two crops from one distribution."""
        return moco_v2_views(**self.config.chain())

    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative cosine of each prediction with the other view's projection, the mean of both directions."""
        projected = self.projector(encoded.student.flatten(0, 1))
        first, second = projected.chunk(2)
        first_predicted, second_predicted = self.predictor(projected).chunk(2)
        loss = -0.5 * (cosine(first_predicted, second) + cosine(second_predicted, first))
        return loss, {"loss": loss.detach(), "feature_std": spread(projected)}

    def unscheduled(self) -> list[nn.Module]:
        """The predictor's learning rate is constant (arXiv 2011.10566, table 1 (c))."""
        return [self.predictor]
