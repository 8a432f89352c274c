"""Steps of DINO and EsViT: ours as the trainer takes them, and in plain PyTorch as the authors' released codes do.

A step has two large and eight small crops of each image; it is forward, backward, clipping of each tensor's gradient
and an AdamW update under bf16 autocast, with the same hyperparameters for all, after the epoch in which prototypes are
held. Every implementation starts from the weights that ours draws, without stochastic depth. Ours gets the crops as the
loader delivers them, uint8; the others get them normalised, in float32 and channels first, and that costs them nothing.

The others hold all logits: crops of a size go through the backbone at once, all through the heads (arXiv 2104.14294,
2106.09785), and the loss visits one pair of crops at a time, with the matched regions' probabilities gathered. The
backbone is timm's ViT with the positions of DINO's code, or `plain_swin.py`. `plain PyTorch` attends with
scaled_dot_product_attention; `, explicit attention` writes the scores out, as both codes did. `compiled` has the
backbones compiled. Clipping and the teacher's update are loops over the parameters.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from joint_steps import BETAS, EXPLICIT, LR, OURS, SQUARES, WEIGHT_DECAY, normalised, timm_vit, trainers_step
from torch import Tensor, nn
from work import Work

from vitrail.engine.methods.dino import DINO, GLOBAL_CROPS, DINOConfig
from vitrail.engine.methods.esvit import EsViT, EsViTConfig
from vitrail.engine.methods.schedules import warmed_temperature
from vitrail.engine.models.heads import DINOHead
from vitrail.engine.models.recompute import Recomputable
from vitrail.engine.models.swin import SwinConfig, swin_base, swin_small, swin_tiny
from vitrail.engine.models.vit import ViTConfig, dino_vit, vit_base, vit_small, vit_tiny

MODELS = {
    "tiny": {"dino": dino_vit(vit_tiny()), "esvit": swin_tiny()},
    "small": {"dino": dino_vit(vit_small()), "esvit": swin_small()},
    "base": {"dino": dino_vit(vit_base()), "esvit": swin_base(window=14)},
}
PEER = "plain PyTorch"
IMPLEMENTATIONS = dict.fromkeys(("dino", "esvit"), (*OURS, PEER, f"{PEER} compiled", PEER + EXPLICIT))
CLIP = 3.0
MOMENTUM = 0.996  # of the teacher; ours rises from there, within a step by nothing to speak of
EPOCH = 1.0


def prepare(work: Work, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """Build model and data.

    Returns:
        A function that trains one step and returns its loss, and the operations of a step.
    """
    with torch.device(device):
        torch.manual_seed(0)
        ours = build(work)
        torch.manual_seed(1)
        config = ours.config
        crops = [*pictures(work.batch, work.image_size, GLOBAL_CROPS)]
        crops += pictures(work.batch, work.local_size, config.local_crops)
        flops = ours.flops(work.batch)
        if work.implementation in OURS:
            for block in (module for module in ours.modules() if isinstance(module, Recomputable)):
                block.recompute = work.implementation == "vitrail checkpointed"
            return trainers_step(ours.train(), crops, clip=CLIP), flops
        theirs = PlainDINO(ours)
        attentions = [module for module in theirs.modules() if hasattr(module, "fused_attn")]
        assert attentions, "timm says otherwise how it attends"
        for module in attentions:
            module.fused_attn = not work.implementation.endswith(EXPLICIT)
        if work.implementation.endswith("compiled"):
            for network in (theirs.backbone, theirs.teacher_backbone):
                network.compile(backend=work.backend, dynamic=False)
        return plain_step(theirs.train(), [normalised(crop) for crop in crops]), flops


def load() -> None:
    """Import what the others import, so that all implementations hold the same libraries."""
    for name in ("timm.models.vision_transformer", "plain_swin"):
        with contextlib.suppress(ImportError):
            __import__(name)


def build(work: Work) -> DINO:
    """Our method."""
    encoder = replace(MODELS[work.model][work.family], image_size=work.image_size)
    if work.depth and isinstance(encoder, SwinConfig):
        encoder = replace(encoder, depths=tuple(min(work.depth, depth) for depth in encoder.depths))
    elif work.depth:
        assert isinstance(encoder, ViTConfig)
        encoder = replace(encoder, depth=min(work.depth, encoder.depth))
    kind = {"dino": DINOConfig, "esvit": EsViTConfig}[work.family]
    return kind(encoder=encoder, local_size=work.local_size, prototypes=work.prototypes, momentum=MOMENTUM).build()


def pictures(images: int, side: int, crops: int) -> tuple[Tensor, ...]:
    """Squares of random colours, uint8 `[B, H, W, 3]` for each crop, one behind the other as the loader has them."""
    squares = torch.randint(0, 256, (crops * images, SQUARES, SQUARES, 3), dtype=torch.uint8)
    return squares.repeat_interleave(side // SQUARES, 1).repeat_interleave(side // SQUARES, 2).chunk(crops)


def plain_step(model: "PlainDINO", crops: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loop of the released codes."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step() -> Tensor:
        with torch.autocast(crops[0].device.type, torch.bfloat16):
            loss = model(crops)
        optimizer.zero_grad()
        loss.backward()
        clip_each(trained)
        optimizer.step()
        model.teach()
        return loss.detach()

    return step


def clip_each(params: Sequence[Tensor]) -> None:
    """Shorten every gradient to `CLIP`, parameter by parameter."""
    for param in params:
        if param.grad is not None:
            shortened = CLIP / (param.grad.norm() + 1e-6)
            if shortened < 1:
                param.grad.mul_(shortened)


class PlainHead(nn.Module):
    """A head that computes all logits."""

    def __init__(self, ours: DINOHead) -> None:
        super().__init__()
        count, bottleneck = ours.last_layer.weight_v.shape
        first, _, second, _, third = (module for module in ours.mlp)
        widths = first.in_features, first.out_features, second.out_features
        self.mlp = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.mlp.extend([nn.Linear(before, after), nn.GELU()])
        self.mlp.append(nn.Linear(third.in_features, bottleneck))
        self.mlp.load_state_dict(ours.mlp.state_dict())
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, count, bias=False))
        self.last_layer.load_state_dict(ours.last_layer.state_dict())
        self.last_layer.weight_g.requires_grad = ours.last_layer.weight_g.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        """`[N, width]` to `[N, K]`."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainViT(nn.Module):
    """timm's ViT with learned positions that follow the crop, as DINO's code stretches them."""

    def __init__(self, ours: nn.Module, config: ViTConfig) -> None:
        super().__init__()
        self.vit = timm_vit(ours, config).requires_grad_(True)
        self.grid, self.offset = config.grid, config.position_offset

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Images `[B, 3, H, W]` to their class tokens `[B, D]`."""
        patches = self.vit.patch_embed.proj(images)
        grid = patches.shape[2:]
        positions = self.vit.pos_embed
        if tuple(grid) != self.grid:
            stretched = F.interpolate(
                positions[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2),
                scale_factor=tuple((new + self.offset) / old for new, old in zip(grid, self.grid, strict=True)),
                mode="bicubic",
            )
            positions = torch.cat([positions[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1)
        tokens = torch.cat([self.vit.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return (self.vit.norm(self.vit.blocks(tokens + positions))[:, 0],)


def plain_backbone(ours: DINO) -> nn.Module:
    """The network that the others train, with our weights."""
    config = ours.config.encoder
    if isinstance(config, ViTConfig):
        return PlainViT(ours.student, config)
    from plain_swin import PlainSwin

    assert isinstance(config, SwinConfig)
    swin = PlainSwin(config, {config.size[0], ours.config.local_size})
    swin.load_state_dict(ours.student.state_dict())
    return swin


class PlainDINO(nn.Module):
    """DINO or EsViT as the released codes compute it: all logits, pair by pair."""

    def __init__(self, ours: DINO) -> None:
        super().__init__()
        config = ours.config
        self.config, self.regions = config, isinstance(ours, EsViT)
        self.backbone, self.teacher_backbone = plain_backbone(ours), plain_backbone(ours)
        self.heads, self.teacher_heads = (
            nn.ModuleDict({name: PlainHead(head) for name, head in ours.student_heads.items()}) for _ in range(2)
        )
        for taught in (self.teacher_backbone, self.teacher_heads):
            taught.requires_grad_(False)
        self.centers = [torch.zeros(1, config.prototypes) for _ in self.heads]
        self.teacher_temp = warmed_temperature(
            EPOCH, config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        )

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """The loss of crops `[B, 3, H, W]`, large ones first."""
        student, student_dense, regions = self.encode(self.backbone, self.heads, crops)
        with torch.no_grad():
            large = crops[:GLOBAL_CROPS]
            teacher, teacher_dense, keys = self.encode(self.teacher_backbone, self.teacher_heads, large)
            targets = self.sharpened(teacher, 0)
            dense_targets = self.sharpened(teacher_dense, 1) if self.regions else ()
        student, student_dense = (
            [logits / self.config.student_temp for logits in part] for part in (student, student_dense)
        )
        total, pairs = torch.zeros(()), 0
        for i, v in itertools.product(range(GLOBAL_CROPS), range(len(crops))):
            if v == i:
                continue
            loss = cross_entropy(targets[i], student[v])
            if self.regions:
                cosine = F.normalize(regions[v].detach(), dim=-1) @ F.normalize(keys[i], dim=-1).transpose(1, 2)
                chosen = cosine.argmax(-1)[..., None].expand(-1, -1, self.config.prototypes)
                dense = cross_entropy(dense_targets[i].gather(1, chosen), student_dense[v])
                loss = 0.5 * loss + 0.5 * dense.mean(-1)
            total, pairs = total + loss.mean(), pairs + 1
        self.follow(teacher, 0)
        if self.regions:
            self.follow(teacher_dense, 1)
        return total / pairs

    def encode(
        self, backbone: nn.Module, heads: nn.ModuleDict, crops: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], ...]:
        """For each crop its logits `[B, K]`, and for EsViT those of its regions `[B, T, K]` and these `[B, T, D]`."""
        sizes = [list(same) for _, same in itertools.groupby(crops, key=lambda crop: crop.shape)]
        encoded = [backbone(torch.cat(same)) for same in sizes]
        logits = heads["head"](torch.cat([pooled for pooled, *_ in encoded])).chunk(len(crops))
        if not self.regions:
            return logits, (), ()
        flat = torch.cat([regions.flatten(0, 1) for _, regions in encoded])
        images = len(crops[0])
        rows = [images * regions.shape[1] for (_, regions), same in zip(encoded, sizes, strict=True) for _ in same]
        dense, regions = (
            [part.unflatten(0, (images, -1)) for part in x.split(rows)] for x in (heads["head_dense"](flat), flat)
        )
        return logits, dense, regions

    def sharpened(self, logits: Sequence[Tensor], head: int) -> list[Tensor]:
        """What the teacher says of each crop."""
        return [
            F.softmax((part - self.centers[head]) / self.teacher_temp, dim=-1, dtype=torch.float32) for part in logits
        ]

    @torch.no_grad()
    def follow(self, logits: Sequence[Tensor], head: int) -> None:
        """Move a centre."""
        mean = torch.cat([part.flatten(0, -2) for part in logits]).mean(0, keepdim=True, dtype=torch.float32)
        momentum = self.config.center_momentum
        self.centers[head] = self.centers[head] * momentum + mean * (1 - momentum)

    @torch.no_grad()
    def teach(self) -> None:
        """Move the teacher, parameter by parameter."""
        for taught, network in ((self.teacher_backbone, self.backbone), (self.teacher_heads, self.heads)):
            for teacher, student in zip(taught.parameters(), network.parameters(), strict=True):
                teacher.mul_(MOMENTUM).add_(student, alpha=1 - MOMENTUM)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Of probabilities and logits `[..., K]`, in float32."""
    return -(targets * F.log_softmax(logits, dim=-1, dtype=torch.float32)).sum(-1)
