"""Steps of MoCo v3 and SimCLR: ours as the trainer takes them, MoCo v3's in plain PyTorch, SimCLR's with lightly.

A step is forward, backward and an AdamW update under bf16 autocast, with the same hyperparameters for all. Every
implementation starts from the weights that ours draws and sees the same two views of each image. Ours gets them as the
loader delivers them, uint8; the others get them normalised, in float32 and channels first, and that costs them nothing.

The others' backbone is timm's VisionTransformer, with the fixed positions and the frozen patch projection of MoCo v3
(arXiv 2104.02057). They encode view by view, as the authors' code of MoCo v3 and lightly's example of SimCLR do.
timm attends with scaled_dot_product_attention, which is slow on CPUs in bf16; `, explicit attention` in a name has it
write the scores out, as the timm of MoCo v3's code did.

SimCLR is defined in more than one way. Here it is lightly's, on both sides: two linear layers, each followed by batch
normalisation with scale and shift, statistics of each view by itself, a temperature of 0.5. Our default is that of the
authors' code: three layers, no shift after the last one, statistics of both views together, 0.1.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from work import Work

from vitrail.engine.methods.base import Method, Schedule
from vitrail.engine.methods.joint import JointEmbedding
from vitrail.engine.methods.moco_v3 import MoCoV3, MoCoV3Config
from vitrail.engine.methods.simclr import SimCLR, SimCLRConfig
from vitrail.engine.models.batch_norm import BatchNorm, batch_norms, defer_statistics, settle_statistics
from vitrail.engine.models.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Block,
    ViTConfig,
    moco_vit,
    vit_base,
    vit_large,
    vit_small,
)
from vitrail.engine.train import OptimConfig, optimizers
from vitrail.engine.train.host_memory import keep_freed_memory
from vitrail.kernels import FusedAdamWEMA, multi_tensor_ema_

MODELS = {"small": vit_small, "base": vit_base, "large": vit_large}
OURS = ("vitrail", "vitrail checkpointed")
EXPLICIT = ", explicit attention"
IMPLEMENTATIONS = {
    family: (*OURS, peer, peer + EXPLICIT) for family, peer in (("moco_v3", "plain PyTorch"), ("simclr", "lightly"))
}
LR, WEIGHT_DECAY, BETAS = 1e-4, 0.1, (0.9, 0.999)
TOTAL = 100_000  # steps of the run that these are the first ones of: the teacher's momentum hardly moves
SQUARES = 8


def prepare(work: Work, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """Build model and data.

    Returns:
        A function that trains one step and returns its loss, and the operations of a step.
    """
    with torch.device(device):
        torch.manual_seed(0)
        ours = build(work)
        torch.manual_seed(1)
        views = [pictures(work) for _ in range(2)]
        flops = ours.flops(work.batch)
        if work.implementation in OURS:
            if work.implementation == "vitrail checkpointed":
                for block in (module for module in ours.modules() if isinstance(module, Block)):
                    block.recompute = True
            return trainers_step(ours.train(), views), flops
        theirs: nn.Module = PlainMoCoV3(ours) if isinstance(ours, MoCoV3) else LightlySimCLR(ours)
        if work.implementation.endswith(EXPLICIT):
            attentions = [module for module in theirs.modules() if hasattr(module, "fused_attn")]
            assert attentions, "timm says otherwise how it attends"
            for module in attentions:
                module.fused_attn = False
        return plain_step(theirs.train(), [normalised(view) for view in views]), flops


def load() -> None:
    """Import what the others import, so that all implementations hold the same libraries."""
    for name in ("timm.models.vision_transformer", "lightly.loss", "lightly.models.modules"):
        with contextlib.suppress(ImportError):
            __import__(name)


def build(work: Work) -> JointEmbedding:
    """Our method; of SimCLR lightly's definition."""
    heads = 12 if work.model == "small" else None  # MoCo v3's ViT-S has twice the usual number
    encoder = moco_vit(MODELS[work.model](image_size=work.image_size), heads=heads)
    encoder = replace(encoder, depth=min(work.depth or encoder.depth, encoder.depth))
    if work.family == "moco_v3":
        return MoCoV3Config(encoder=encoder).build()
    config = SimCLRConfig(encoder=encoder, projector_layers=2, temperature=0.5)
    method = config.build()
    method.projector[-1] = BatchNorm(config.dim)
    for norm in batch_norms(method.projector):
        norm.groups = 2
    return method


def pictures(work: Work) -> Tensor:
    """Squares of random colours, uint8 `[B, H, W, 3]`.

    To an untrained network all images of plain noise look alike, and batch normalisation would magnify what little
    differs, rounding errors included.
    """
    squares = torch.randint(0, 256, (work.batch, SQUARES, SQUARES, 3), dtype=torch.uint8)
    side = work.image_size // SQUARES
    return squares.repeat_interleave(side, 1).repeat_interleave(side, 2)


def normalised(images: Tensor) -> Tensor:
    """What other implementations are given: float32 `[B, 3, H, W]`."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.permute(0, 3, 1, 2) / 255 - mean) / std).contiguous()


def trainers_step(method: Method, views: list[Tensor], clip: float = 0.0) -> Callable[[], Tensor]:
    """What the trainer does on one device in ZeRO stage 0, without DeepSpeed, which a GPU machine may lack.

    Args:
        method: what is trained.
        views: uint8 images, one tensor for each view.
        clip: longest that the gradient of a tensor may be; 0 for any length.
    """
    if views[0].device.type == "cpu":
        keep_freed_memory()
    batch = SimpleNamespace(views=views)
    defer_statistics(method)
    pairs = [
        (teacher, student)
        for pair in method.momentum_pairs()
        for teacher, student in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True)
    ]
    trained = [param for param in method.parameters() if param.requires_grad]
    optimizer = optimizers.build(
        "vitrail",
        OptimConfig(betas=BETAS, clip=clip, clip_per_tensor=clip > 0),
        [{"params": trained, "weight_decay": WEIGHT_DECAY}],
        {student: teacher for teacher, student in pairs if student.requires_grad},
    )
    assert isinstance(optimizer, FusedAdamWEMA)
    optimizer.param_groups[0]["lr"] = LR
    frozen = [pair for pair in pairs if not pair[1].requires_grad]
    taken = 0

    def step() -> Tensor:
        nonlocal taken
        here, coming = schedule(taken, len(views[0])), schedule(taken + 1, len(views[0]))
        momentum = method.ema_momentum(here, coming) if pairs else 1.0
        optimizer.param_groups[0]["ema_momentum"] = momentum
        with torch.autocast(views[0].device.type, torch.bfloat16):
            loss, metrics = method(batch, here)
        loss.backward()
        optimizer.step()
        assert optimizer.norms is not None
        applied = not bool(optimizer.norms.found_inf)
        if applied and frozen:
            multi_tensor_ema_(*zip(*frozen, strict=True), momentum)
        method.after_step(applied)
        settle_statistics(method, applied)
        optimizer.zero_grad()
        taken += 1
        return metrics["loss"]

    return step


def schedule(step: int, rows: int) -> Schedule:
    """Where a step stands; after the first epoch, in which DINO holds its prototypes."""
    return Schedule(step=step, total_steps=TOTAL, epoch=1.0, seed=0, first_row=0, global_rows=rows)


def plain_step(model: nn.Module, views: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loop that everyone writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step() -> Tensor:
        with torch.autocast(views[0].device.type, torch.bfloat16):
            loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def timm_vit(ours: nn.Module, config: ViTConfig) -> nn.Module:
    """The ViT of timm with our weights, positions and patch projection fixed; it returns the class token."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=config.size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )
    vit.load_state_dict(ours.state_dict())
    vit.pos_embed.requires_grad_(False)
    vit.patch_embed.requires_grad_(False)
    return vit


def plain_mlp(*widths: int) -> nn.Sequential:
    """MoCo v3's heads: no bias, batch normalisation after every layer, the last one without parameters."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers += [nn.Linear(widths[-2], widths[-1], bias=False), nn.BatchNorm1d(widths[-1], affine=False)]
    return nn.Sequential(*layers)


class PlainMoCoV3(nn.Module):
    """MoCo v3 as its authors' code computes it: two calls of each network, a loop for the teacher, dense logits."""

    def __init__(self, ours: MoCoV3) -> None:
        super().__init__()
        config = ours.config
        self.temperature, self.momentum = config.temperature, config.momentum
        self.encoder = timm_vit(ours.encoder, config.encoder)
        self.encoder.head = plain_mlp(config.encoder.width, config.hidden, config.hidden, config.dim)
        self.encoder.head.load_state_dict(ours.projector.state_dict())
        self.predictor = plain_mlp(config.dim, config.hidden, config.dim)
        self.predictor.load_state_dict(ours.predictor.state_dict())
        self.teacher = deepcopy(self.encoder).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views `[B, 3, H, W]`."""
        first_queries = self.predictor(self.encoder(first))
        second_queries = self.predictor(self.encoder(second))
        with torch.no_grad():
            self.teach()
            first_keys, second_keys = self.teacher(first), self.teacher(second)
        return self.contrast(first_queries, second_keys) + self.contrast(second_queries, first_keys)

    @torch.no_grad()
    def teach(self) -> None:
        """Move the teacher, parameter by parameter."""
        for teacher, student in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            teacher.mul_(self.momentum).add_(student, alpha=1 - self.momentum)

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cross-entropy of dense logits, times twice the temperature."""
        logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / self.temperature
        own = torch.arange(len(queries), device=queries.device)
        return 2 * self.temperature * F.cross_entropy(logits, own)


class LightlySimCLR(nn.Module):
    """SimCLR as lightly's example puts it together, on timm's ViT."""

    def __init__(self, ours: SimCLR) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        config = ours.config
        width = config.encoder.width
        self.backbone = timm_vit(ours.encoder, config.encoder)
        self.projection_head = SimCLRProjectionHead(width, width, config.dim)
        self.projection_head.layers.load_state_dict(ours.projector.state_dict())
        self.criterion = NTXentLoss(temperature=config.temperature)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views `[B, 3, H, W]`."""
        first_projected = self.projection_head(self.backbone(first))
        second_projected = self.projection_head(self.backbone(second))
        return self.criterion(first_projected, second_projected)
