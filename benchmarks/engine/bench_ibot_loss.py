"""iBOT's head and both its losses, forward and backward, against the head on every token and every logit in memory."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench import Case, Sizes, measures
from bench.case import Factory
from torch import nn
from torch.func import functional_call

from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.ibot import Hidden, IBOTConfig
from vitrail.engine.methods.masks import masked_rows
from vitrail.engine.models.vit import ViTConfig, dino_vit

Tensor = torch.Tensor
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
SHARE = 0.15  # of the patches of large crops: half of the crops hide 0.3
LAYERS = ("mlp.0", "mlp.2", "mlp.4")


@dataclass(frozen=True)
class Problem:
    """Two large crops and some small ones of `images`, with the patches of each."""

    images: int
    prototypes: int = 8192
    large: int = 196
    small: int = 36
    locals: int = 10
    width: int = 384
    hidden: int = 2048
    bottleneck: int = 256
    dtype: torch.dtype = torch.float32

    @property
    def masked(self) -> int:
        """Hidden patches."""
        return self.images * int(2 * SHARE * self.large)

    @property
    def mlp(self) -> int:
        """Weights of the head's matrices but the prototypes."""
        return self.width * self.hidden + self.hidden**2 + self.hidden * self.bottleneck


def inputs(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """Tokens of both backbones in the dtype of autocast, weights of both heads, centres, and what is hidden.

    Every second crop hides patches, as iBOT's draw leaves half of them whole.
    """
    p, images = problem, problem.images
    tokens = {
        "views": (images * (2 + p.locals), p.width),
        "patches": (2 * images, p.large, p.width),
        "small_patches": (images * p.locals, p.small, p.width),
        "teacher_views": (2 * images, p.width),
        "teacher_patches": (2 * images, p.large, p.width),
    }
    made = {name: torch.randn(*size, device=device).to(p.dtype) for name, size in tokens.items()}
    widths = (p.width, p.hidden, p.hidden, p.bottleneck)
    for side in ("student", "teacher"):
        for layer, before, after in zip(LAYERS, widths, widths[1:], strict=False):
            made[f"{side}.{layer}.weight"] = torch.randn(after, before, device=device) / before**0.5
            made[f"{side}.{layer}.bias"] = torch.zeros(after, device=device)
        made[f"{side}.last_layer.weight_v"] = torch.randn(p.prototypes, p.bottleneck, device=device)
    order = torch.rand(2 * images, p.large, device=device).argsort(dim=1).argsort(dim=1)
    made["masks"] = order < p.masked // images
    made["masks"][1::2] = False
    return made | {"centers": 0.02 * torch.randn(2, p.prototypes, device=device)}


def autocast(problem: Problem, given: dict[str, Tensor]) -> torch.autocast:
    """As the trainer does; the truth is not rounded."""
    half = problem.dtype == torch.bfloat16 and given["views"].dtype == torch.bfloat16
    return torch.autocast(given["views"].device.type, torch.bfloat16, enabled=half)


def eager(problem: Problem, **given: Tensor) -> Tensor:
    """The released code: the head on all tokens, softmaxes of all patches, and then the mask."""
    n = problem.images

    def head(side: str, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in LAYERS:
            x = F.linear(x, given[f"{side}.{layer}.weight"], given[f"{side}.{layer}.bias"])
            x = x if layer == LAYERS[-1] else F.gelu(x)
        x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        v = given[f"{side}.last_layer.weight_v"]
        layer = v / v.norm(dim=1, keepdim=True)
        return F.linear(x[:, 0], layer), F.linear(x[:, 1:], layer)

    def sequence(views: Tensor, patches: Tensor) -> Tensor:
        return torch.cat([views[:, None], patches], dim=1)

    def log_softmax(x: Tensor) -> Tensor:
        return F.log_softmax(x / STUDENT_TEMP, dim=-1, dtype=None if x.dtype == torch.float64 else torch.float32)

    with autocast(problem, given):
        with torch.no_grad():
            raw = head("teacher", sequence(given["teacher_views"], given["teacher_patches"]))
            target, patch_target = (
                ((x - center) / TEACHER_TEMP).softmax(-1) for x, center in zip(raw, given["centers"], strict=True)
            )
            [x.flatten(0, -2).mean(0) for x in raw]  # what the centres move by
            del raw
        views, patches = head("student", sequence(given["views"][: 2 * n], given["patches"]))
        if problem.locals:
            views = torch.cat([views, head("student", sequence(given["views"][2 * n :], given["small_patches"]))[0]])
        logs, targets = views.split(n), target.split(n)
        pairs = [(u, v) for u in range(2) for v in range(len(logs)) if u != v]
        view = sum(-(targets[u] * log_softmax(logs[v])).sum(-1).mean() for u, v in pairs) / len(pairs)
        each = [
            -(p * log_softmax(s)).sum(-1) * mask
            for p, s, mask in zip(patch_target.split(n), patches.split(n), given["masks"].split(n), strict=True)
        ]
        sums = [
            (x.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
            for x, mask in zip(each, given["masks"].split(n), strict=True)
        ]
        return view + sum(sums) / 2


class Given(nn.Module):
    """A backbone whose tokens are there already."""

    def forward_regions(self, images: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.views[: len(self.patches)], self.patches

    def forward_features(self, images: Tensor) -> Tensor:
        return self.views[len(self.patches) :]


def ours(problem: Problem) -> Factory:
    """The method's own forward pass, from given tokens on."""

    def build() -> object:
        tiny = dino_vit(ViTConfig(image_size=16, patch_size=4, width=problem.width, depth=1, heads=1))
        method = IBOTConfig(
            encoder=replace(tiny, mask_token=True),
            prototypes=problem.prototypes,
            hidden=problem.hidden,
            bottleneck=problem.bottleneck,
            norm_last_layer=True,
            warmup_teacher_temp=TEACHER_TEMP,
            warmup_patch_teacher_temp=TEACHER_TEMP,
            local_crops=problem.locals,
        ).build()
        method.student, method.teacher = Given(), Given()
        schedule = Schedule(step=0, total_steps=1, epoch=0.0, seed=0, first_row=0, global_rows=problem.images)

        def loss(**given: Tensor) -> Tensor:
            device = given["views"].device
            method.to(device)
            method.student.views, method.student.patches = given["views"], given["patches"]
            method.teacher.views, method.teacher.patches = given["teacher_views"], given["teacher_patches"]
            method.centers.value, method.patch_centers.value = given["centers"][:1], given["centers"][1:]
            rows, weight = masked_rows(given["masks"], problem.masked)
            hidden = Hidden(given["masks"], rows, weight / (2 * problem.images))
            method.hide = lambda *_: hidden
            large, small = (torch.empty(problem.images, side, side, 3, device=device) for side in (2, 1))
            batch = SimpleNamespace(views=[large] * 2 + [small] * problem.locals)
            weights = {
                name.replace(".", "_heads.head.", 1): value
                for name, value in given.items()
                if name.startswith(("student.", "teacher."))
            }
            with autocast(problem, given):
                result, _ = functional_call(method, weights, (batch, schedule))
            method.after_step(False)
            return result

        return loss

    return build


def case(problem: Problem) -> Case:
    """One problem; each call takes seconds on a CPU."""
    p, size = problem, problem.dtype.itemsize
    student = p.images * (2 + p.locals) + p.masked
    taught = 2 * p.images * (1 + p.large)
    prototypes = p.prototypes * p.bottleneck
    products = 3 * student * (p.mlp + prototypes) + taught * p.mlp + (2 * p.images + p.masked) * prototypes
    weights = 4 * (p.mlp + prototypes)
    return Case(
        op="ibot_loss",
        name=f"{p.images} images, {p.prototypes:,} prototypes",
        shape={
            "images": p.images,
            "prototypes": p.prototypes,
            "width": p.width,
            "student_rows": student,
            "teacher_rows": taught,
        },
        dtype=p.dtype,
        inputs=partial(inputs, p),
        truth=partial(eager, p),
        implementations={"vitrail": ours(p), "eager": lambda: partial(eager, p)},
        bytes={"forward+backward": (2 * student + taught) * p.width * size + 3 * weights},
        flops={"forward+backward": 2.0 * products},
        differentiable=(
            *("views", "patches", "student.last_layer.weight_v"),
            *(f"student.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")),
        ),
        tolerance=2**-5 if size == 2 else 1e-4,
    )


def cases(sizes: Sizes) -> list[Case]:
    """Eight images on a CPU, a GPU's share of the published batch of 1024 otherwise."""
    if sizes.dry:
        return [case(Problem(2, 96, large=9, small=4, locals=2, width=32, hidden=24, bottleneck=16))]
    if sizes.batch == 16:
        return [case(Problem(8))]
    return [case(Problem(64, dtype=torch.bfloat16)), case(Problem(128, dtype=torch.bfloat16))]


test_ibot_loss = measures(cases)
