"""MoCo v2 (Chen et al., arXiv 2003.04297): a query must find its key among a queue of earlier batches' keys.

The method is described in `docs/methods/moco_v2.md`; numbers in comments are those of the authors' released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels import info_nce_loss
from vitrail.kernels.groups import gather_rows, rank_and_size

from ..data.chains import moco_v2_views
from ..data.views import View
from ..models.backbone import BackboneConfig
from ..models.heads import mlp_head
from ..models.resnet import ResNetConfig
from .base import DemoRun, Schedule
from .joint import Encoded, JointConfig, Taught, all_ranks, encode_views, spread


@dataclass(kw_only=True)
class MoCoV2Config(JointConfig):
    """MoCo v2."""

    encoder: BackboneConfig = field(default_factory=ResNetConfig)
    """The network that is kept after pre-training."""
    freeze_patch_embed: bool = False
    """Keep a vision transformer's patch projection as it was initialised."""
    dim: int = 128
    """Width of the vectors that are compared."""
    queue: int = 65_536
    """Keys that the queue holds."""
    momentum: float = 0.999
    """Of the teacher, constant."""
    temperature: float = 0.2
    """Of the softmax."""
    batch_norm: Literal["shuffled", "synced"] = "shuffled"
    """Statistics of each rank, over keys that were exchanged among the ranks so that they tell nothing, or of all."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crops, as a share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of the colour jitter: brightness, contrast, saturation, hue."""

    def build(self) -> MoCoV2:
        """Construct student and teacher, equal at the start, and a queue of random directions."""
        return MoCoV2(self)

    def demo(self) -> MoCoV2Config:
        """A small network, and a queue and a teacher that suit few steps."""
        return replace(self, **self.shrunk(), queue=4096, momentum=0.99, temperature=0.1)

    def demo_run(self) -> DemoRun:
        """What learns within minutes on two CPU cores."""
        return DemoRun(epochs=6, batch_size=128, lr=0.03, weight_decay=1e-4)


class MoCoV2(Taught):
    """Encoder and projector, a teacher that follows them, and the queue of its keys."""

    views_per_network = 1
    queue: Tensor
    queue_position: Tensor

    def __init__(self, config: MoCoV2Config) -> None:
        super().__init__(config, groups=1, sync=config.batch_norm == "synced")
        self.config = config
        width = config.encoder.feature_width
        self.projector = mlp_head([width, width, config.dim], hidden_norm=False, last_bias=True)
        self.teach()
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.dim), dim=1))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))
        self._keys: dict[int, Tensor] = {}  # of this step's micro-batches on this rank, by place in the global batch

    def views(self) -> list[View]:
        """Two crops from one distribution: the query's and the key's."""
        return moco_v2_views(**self.config.chain())

    def student_features(self, batch: Any) -> Tensor:
        """Features `[1, n, D]` of the first view, the queries'."""
        return encode_views(self.encoder, batch.views[:1])

    def teacher_features(self, batch: Any, schedule: Schedule) -> Tensor:
        """The teacher's features `[1, n, D]` of the second view, the keys', with batch statistics of other images.

        A permutation that all ranks draw alike exchanges the images, and its inverse the features: otherwise query
        and key of an image would share the statistics of one rank's batch, which gives them away.
        """
        images, group = batch.views[1], all_ranks()
        if group is None or self.config.batch_norm == "synced":
            return encode_views(self.momentum_encoder, [images])
        rank, world = rank_and_size(group)
        own = torch.arange(rank * len(images), (rank + 1) * len(images), device=images.device)
        generator = torch.Generator().manual_seed((schedule.seed << 32) + schedule.step)
        order = torch.randperm(world * len(images), generator=generator).to(images.device)
        shuffled = gather_rows("images", images.flatten(1), group)[order[own]].view_as(images)
        features = encode_views(self.momentum_encoder, [shuffled])[0]
        return gather_rows("features", features, group)[order.argsort()[own]][None]

    def criterion(self, encoded: Encoded, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE of the queries with their keys against the queue; the keys enter the queue after the step."""
        assert encoded.teacher is not None
        queries = self.projector(encoded.student[0])
        with torch.no_grad():
            keys = self.momentum_projector(encoded.teacher[0])
        loss = info_nce_loss(queries, keys, self.config.temperature, queue=self.queue)
        self._keys[schedule.first_row] = F.normalize(keys.to(self.queue.dtype), dim=1)
        return loss, {"loss": loss.detach(), "feature_std": spread(queries)}

    @torch.no_grad()
    def after_step(self, applied: bool) -> None:
        """Put the step's keys of all ranks in the place of the oldest ones."""
        pending, self._keys = list(self._keys.values()), {}
        if not applied or not pending:
            return
        keys = gather_rows("keys", torch.cat(pending), all_ranks())[-self.config.queue :]
        places = (self.queue_position + torch.arange(len(keys), device=keys.device)) % self.config.queue
        self.queue.index_copy_(0, places, keys)
        self.queue_position.add_(len(keys)).remainder_(self.config.queue)

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """Constant; the update before the keys of a step is the one after the step before."""
        return self.config.momentum

    def chance_loss(self, images: int) -> float:
        """A uniform guess among the queue and the key."""
        return math.log(1 + self.config.queue)
