"""Steps of SiT: ours as the trainer takes them, and in plain PyTorch as the authors' released code does.

A step is forward, backward, clipping of each tensor's gradient and an AdamW update under bf16 autocast, with the same
hyperparameters for all, on two views of each image. Every implementation starts from the weights that ours draws,
without stochastic depth. Ours gets the views as the loader delivers them, uint8, and corrupts them in the step.

The others get three float32 tensors of each view, as the released loader sends them (arXiv 2104.03602): clean,
corrupted and the mask, all as large as the images; normalising and corrupting costs them nothing. `, corrupting` in a
name counts that loader's work too: rectangles are placed one by one, image by image, in the process that trains, where
the authors' code has processes of its own for that. In the first step all see what ours has drawn: their losses are
then the same.

The backbone is timm's ViT. `plain PyTorch` attends with scaled_dot_product_attention; `, explicit attention` writes the
scores out, as the released code does. The loss picks pixels by their mask; clipping and the teacher's update are loops
over the parameters.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from crop_steps import CLIP, MOMENTUM, clip_each
from joint_steps import (
    BETAS,
    EXPLICIT,
    LR,
    OURS,
    WEIGHT_DECAY,
    normalised,
    pictures,
    schedule,
    timm_vit,
    trainers_step,
)
from torch import Tensor, nn
from work import Work

from vitrail.engine.methods.corruption import Corruption
from vitrail.engine.methods.sit import VIEWS, Network, SiT, SiTConfig
from vitrail.engine.models.recompute import Recomputable
from vitrail.engine.models.vit import dino_vit, vit_base, vit_small

MODELS = {"small": vit_small, "base": vit_base}
PEER, CORRUPTING = "plain PyTorch", ", corrupting"
IMPLEMENTATIONS = {"sit": (*OURS, PEER, PEER + EXPLICIT, PEER + EXPLICIT + CORRUPTING)}


def prepare(work: Work, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """Build model and data.

    Returns:
        A function that trains one step and returns its loss, and the operations of a step.
    """
    with torch.device(device):
        torch.manual_seed(0)
        ours = build(work)
        torch.manual_seed(1)
        views = [pictures(work) for _ in range(VIEWS)]
        flops = ours.flops(work.batch)
        if work.implementation in OURS:
            for block in (module for module in ours.modules() if isinstance(module, Recomputable)):
                block.recompute = work.implementation == "vitrail checkpointed"
            return trainers_step(ours.train(), views, clip=CLIP), flops
        theirs = PlainSiT(ours)
        attentions = [module for module in theirs.modules() if hasattr(module, "fused_attn")]
        assert attentions, "timm says otherwise how it attends"
        for module in attentions:
            module.fused_attn = EXPLICIT not in work.implementation
        corrupting = work.implementation.endswith(CORRUPTING)
        return plain_step(theirs.train(), as_ours(ours, views), ours.config.corruption if corrupting else None), flops


def load() -> None:
    """Import what the others import, so that all implementations hold the same libraries."""
    with contextlib.suppress(ImportError):
        __import__("timm.models.vision_transformer")


def build(work: Work) -> SiT:
    """Our method."""
    encoder = dino_vit(MODELS[work.model](image_size=work.image_size))
    encoder = replace(encoder, depth=min(work.depth or encoder.depth, encoder.depth))
    return SiTConfig(encoder=encoder, momentum=MOMENTUM).build()


def as_ours(ours: SiT, views: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupted views and the mask, float32 `[2 n, 3, H, W]`, of our first step."""
    batch, columns = len(views[0]), ours.config.corruption.columns
    noise = schedule(0, batch).uniform(batch, VIEWS * columns, views[0].device)
    seen = ours.corrupt(torch.cat(list(views)), torch.cat(noise.chunk(VIEWS, dim=1)), batch=batch)
    clean = torch.cat([normalised(view) for view in views])
    mask = seen.mask[:, None].expand_as(clean).float().contiguous()
    return clean, seen.images.permute(0, 3, 1, 2).contiguous(), mask


def plain_step(
    model: "PlainSiT", given: tuple[Tensor, Tensor, Tensor], corruption: Corruption | None
) -> Callable[[], Tensor]:
    """The loop of the released code, with its loader's work where a corruption is given."""
    clean, corrupted, mask = given
    trained = [param for param in model.student.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    first = True

    def step() -> Tensor:
        nonlocal corrupted, mask, first
        if corruption is not None:
            loaded = [corrupt_batch(view, corruption) for view in clean.chunk(VIEWS)]
            if not first:
                corrupted, mask = (torch.cat(part) for part in zip(*loaded, strict=True))
        first = False
        with torch.autocast(clean.device.type, torch.bfloat16):
            loss = model(clean, corrupted, mask)
        optimizer.zero_grad()
        loss.backward()
        clip_each(trained)
        optimizer.step()
        model.teach()
        return loss.detach()

    return step


def corrupt_batch(clean: Tensor, corruption: Corruption) -> tuple[Tensor, Tensor]:
    """One view of some images, corrupted image by image: the images and the mask, `[n, 3, H, W]`."""
    images, masks = [], []
    for image in clean:
        corrupted, mask = place_rectangles(image, None, corruption.drop, corruption.align)
        if np.random.rand() < corruption.replaced:
            donor = clean[np.random.randint(len(clean))]
            corrupted, mask = place_rectangles(image, donor, corruption.replace, corruption.align)
        images.append(corrupted)
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def place_rectangles(image: Tensor, donor: Tensor | None, most: float, align: int) -> tuple[Tensor, Tensor]:
    """One image, pieces of it exchanged for another image's or for zeros until the mask covers enough."""
    image, mask = image.clone(), torch.zeros_like(image)
    _, height, width = image.shape
    least = np.random.uniform(min(0.5, most), most) * height * width
    while mask[0].sum() < least:
        top, left = (np.random.randint(side - align) // align * align for side in (height, width))
        h, w = (
            round(min(np.random.randint(align, int(0.3 * side)), side - start) / align) * align
            for side, start in ((height, top), (width, left))
        )
        place = (slice(None), slice(top, top + h), slice(left, left + w))
        image[place] = 0 if donor is None else donor[place]
        mask[place] = 1
    return image, mask


class PlainNetwork(nn.Module):
    """timm's ViT and both heads of PyTorch's layers, with our weights."""

    def __init__(self, ours: Network, config: SiTConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.backbone: Any = timm_vit(ours.backbone, config.encoder).requires_grad_(True)
        layers: list[nn.Module] = []
        for before, after, activation in (
            (width, config.hidden, nn.ReLU(inplace=True)),
            (config.hidden, config.hidden, nn.GELU()),
        ):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), activation]
        self.head = nn.Sequential(
            *layers, nn.Linear(config.hidden, config.dim), nn.BatchNorm1d(config.dim, affine=False)
        )
        self.head.load_state_dict(ours.head.mlp.state_dict())
        self.tokens = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())))
        self.tokens.load_state_dict(ours.head_recons.mlp.state_dict())
        side = config.encoder.patch_size
        self.paint = nn.ConvTranspose2d(width, 3, kernel_size=side, stride=side)
        self.paint.load_state_dict(ours.head_recons.convTrans.state_dict())
        self.grid = config.encoder.grid

    def forward(self, images: Tensor, painting: bool) -> tuple[Tensor, Tensor | None]:
        """Vectors `[N, d]` of images `[N, 3, H, W]`, and the images as painted."""
        tokens = self.backbone.forward_features(images)
        if not painting:
            return self.head(tokens[:, 0]), None
        patches = self.tokens(tokens[:, 1:]).transpose(1, 2).unflatten(2, self.grid)
        return self.head(tokens[:, 0]), self.paint(patches)


class PlainSiT(nn.Module):
    """SiT as the released code computes it."""

    def __init__(self, ours: SiT) -> None:
        super().__init__()
        self.config = ours.config
        self.student = PlainNetwork(ours.student, self.config)
        self.teacher = PlainNetwork(ours.teacher, self.config).requires_grad_(False)

    def forward(self, clean: Tensor, corrupted: Tensor, mask: Tensor) -> Tensor:
        """The loss of two views of some images, view by view, `[2 n, 3, H, W]`."""
        queries, painted = self.student(corrupted, True)
        with torch.no_grad():
            keys, _ = self.teacher(clean, False)
        assert painted is not None
        reconstruction = F.l1_loss(painted.float(), clean, reduction="none")[mask == 1].mean()
        (first, second), (first_keys, second_keys) = queries.chunk(VIEWS), keys.chunk(VIEWS)
        return (
            self.contrast(first, second_keys)
            + self.contrast(second, first_keys)
            + self.config.recon_weight * reconstruction
        )

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cross-entropy of dense logits, times twice the temperature."""
        temperature = self.config.temperature
        logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
        return 2 * temperature * F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))

    @torch.no_grad()
    def teach(self) -> None:
        """Move the teacher, parameter by parameter."""
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.mul_(MOMENTUM).add_(student, alpha=1 - MOMENTUM)
