"""EsViT's loss of views and regions, forward and backward, against every logit in memory."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, measures
from bench.case import Factory
from torch.utils.checkpoint import checkpoint

from vitrail.engine.methods.centers import Distilled
from vitrail.engine.methods.esvit import EsViTConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.kernels import region_match_crops

Tensor = torch.Tensor
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
TRUTH_ROWS = 64  # of which the truth holds the logits in float64 at a time


@dataclass(frozen=True)
class Problem:
    """Two large crops and some small ones of `images`, with the tokens of each."""

    images: int
    prototypes: int
    large: int = 49
    small: int = 9
    locals: int = 8
    width: int = 256
    matched_width: int = 768
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> list[int]:
        return [self.large] * 2 + [self.small] * self.locals

    @property
    def pairs(self) -> int:
        return 2 * (len(self.tokens) - 1)


def inputs(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """Unit vectors of both heads, prototypes of unit length, and the backbone's features that are matched."""
    regions, taught = problem.images * sum(problem.tokens), 2 * problem.images * problem.large
    sizes = {
        "views": (problem.images * len(problem.tokens), problem.width),
        "regions": (regions, problem.width),
        "teacher_views": (2 * problem.images, problem.width),
        "teacher_regions": (taught, problem.width),
        "features": (regions, problem.matched_width),
        "teacher_features": (taught, problem.matched_width),
    } | dict.fromkeys(("w", "w_dense", "teacher_w", "teacher_w_dense"), (problem.prototypes, problem.width))
    made = {
        name: F.normalize(torch.randn(*size, device=device), dim=1).to(problem.dtype) for name, size in sizes.items()
    }
    return made | {"centers": 0.02 * torch.randn(2, problem.prototypes, device=device)}


def logits(rows: Tensor, prototypes: Tensor) -> Tensor:
    """Logits in the dtype that softmaxes are formed in."""
    product = rows @ prototypes.T
    return product if product.dtype == torch.float64 else product.float()


def per_crop(rows: Tensor, problem: Problem, tokens: list[int]) -> list[Tensor]:
    """Rows of each crop, `[images, tokens, ...]`."""
    parts = rows.split([problem.images * count for count in tokens])
    return [part.unflatten(0, (problem.images, -1)) for part in parts]


def eager(problem: Problem, **given: Tensor) -> Tensor:
    """The released code's two loops: all logits, and a gathered copy of the teacher's probabilities for each pair."""
    views, regions = (
        logits(given[name], given[w]) / STUDENT_TEMP for name, w in (("views", "w"), ("regions", "w_dense"))
    )
    with torch.no_grad():
        targets = [
            ((logits(given[name], given[w]) - center) / TEACHER_TEMP).softmax(1)
            for name, w, center in zip(
                ("teacher_views", "teacher_regions"), ("teacher_w", "teacher_w_dense"), given["centers"], strict=True
            )
        ]
    views, targets[0] = views.split(problem.images), targets[0].split(problem.images)
    regions, features = (per_crop(x, problem, problem.tokens) for x in (regions, given["features"]))
    large = [problem.large] * 2
    targets[1], theirs = (per_crop(x, problem, large) for x in (targets[1], given["teacher_features"]))
    total = 0.0
    for u in range(2):
        for v in range(len(problem.tokens)):
            if u == v:
                continue
            view = -(targets[0][u] * views[v].log_softmax(1)).sum(1)
            similar = F.normalize(features[v], dim=-1) @ F.normalize(theirs[u], dim=-1).transpose(1, 2)
            chosen = similar.argmax(-1)[..., None].expand(-1, -1, problem.prototypes)
            matched = targets[1][u].gather(1, chosen)
            region = -(matched * regions[v].log_softmax(-1)).sum(-1).mean(1)
            total = total + (0.5 * view + 0.5 * region).mean()
    return total / problem.pairs


def truth(problem: Problem, **given: Tensor) -> Tensor:
    """The same sum some rows at a time, which are computed again for the gradient."""
    images = problem.images

    def part(rows: Tensor, w: Tensor, teacher: Tensor, teacher_w: Tensor, center: Tensor, weight: Tensor) -> Tensor:
        target = ((logits(teacher, teacher_w) - center) / TEACHER_TEMP).softmax(1)
        return -((target * (logits(rows, w) / STUDENT_TEMP).log_softmax(1)).sum(1) * weight).sum()

    def pairs(rows, teacher, weight, names, center):
        total = rows.new_zeros(())
        for chunk in zip(rows.split(TRUTH_ROWS), teacher.split(TRUTH_ROWS), weight.split(TRUTH_ROWS), strict=True):
            total = total + checkpoint(
                part, chunk[0], given[names[0]], chunk[1], given[names[1]], center, chunk[2], use_reentrant=False
            )
        return total

    crops = per_crop(given["regions"], problem, problem.tokens)
    features = per_crop(given["features"], problem, problem.tokens)
    large = [problem.large] * 2
    taught = per_crop(given["teacher_regions"], problem, large)
    theirs = per_crop(given["teacher_features"], problem, large)
    total = given["views"].new_zeros(())
    for u in range(2):
        for v, count in enumerate(problem.tokens):
            if u == v:
                continue
            weight = given["views"].new_full((images,), 0.5 / images / problem.pairs)
            rows = given["views"][v * images : (v + 1) * images]
            teacher = given["teacher_views"][u * images : (u + 1) * images]
            total = total + pairs(rows, teacher, weight, ("w", "teacher_w"), given["centers"][0])
            similar = F.normalize(features[v], dim=-1) @ F.normalize(theirs[u], dim=-1).transpose(1, 2)
            chosen = torch.stack([t[i] for t, i in zip(taught[u], similar.argmax(-1), strict=True)])
            weight = weight.repeat_interleave(count) / count
            names = ("w_dense", "teacher_w_dense")
            total = total + pairs(crops[v].flatten(0, 1), chosen.flatten(0, 1), weight, names, given["centers"][1])
    return total


def ours(problem: Problem) -> Factory:
    """The method's own code, on given features."""
    tiny = SwinConfig(image_size=32, width=16, depths=(1,), heads=(1,), window=4)
    config = EsViTConfig(encoder=tiny, hidden=8, prototypes=problem.prototypes, norm_last_layer=True)
    method = config.build()

    def loss(**given: Tensor) -> Tensor:
        method.centers.value = given["centers"]
        match, _ = region_match_crops(given["features"], given["teacher_features"], problem.tokens, [problem.large] * 2)
        views = method.view_loss(
            Distilled(given["views"], given["w"]),
            Distilled(given["teacher_views"], given["teacher_w"]),
            crops=len(problem.tokens),
            epoch=0,
        )
        regions = method.region_loss(
            Distilled(given["regions"], given["w_dense"]),
            Distilled(given["teacher_regions"], given["teacher_w_dense"]),
            match,
            problem.tokens,
            epoch=0,
        )
        return 0.5 * views + 0.5 * regions

    return lambda: loss


def case(problem: Problem) -> Case:
    """One problem; each call takes seconds on a CPU."""
    student = problem.images * (sum(problem.tokens) + len(problem.tokens))
    teacher = 2 * problem.images * (problem.large + 1)
    matched = problem.images * (sum(problem.tokens) + 2 * problem.large) * problem.matched_width
    size = problem.dtype.itemsize
    read = ((student + teacher + 4 * problem.prototypes) * problem.width + matched) * size + 8 * problem.prototypes
    product = 2.0 * problem.prototypes * problem.width
    return Case(
        op="esvit_loss",
        name=f"{problem.images} images, {problem.prototypes:,} prototypes",
        shape={
            "images": problem.images,
            "prototypes": problem.prototypes,
            "width": problem.width,
            "student_rows": student,
            "teacher_rows": teacher,
        },
        dtype=problem.dtype,
        inputs=partial(inputs, problem),
        truth=partial(truth, problem),
        implementations={"vitrail": ours(problem), "eager": lambda: partial(eager, problem)},
        bytes={"forward+backward": read + (student + 2 * problem.prototypes) * problem.width * size},
        flops={"forward+backward": (3 * student + teacher) * product},
        differentiable=("views", "regions", "w", "w_dense"),
        tolerance=2**-6 if size == 2 else 1e-4,
    )


def cases(sizes: Sizes) -> list[Case]:
    """Eight images on a CPU, a GPU's share of the published batch of 512 otherwise."""
    if sizes.dry:
        return [case(Problem(2, 96, large=9, small=4, locals=2, width=32, matched_width=16))]
    if sizes.batch == 16:
        return [case(Problem(8, 65_536))]
    return [case(Problem(32, 65_536, dtype=torch.bfloat16)), case(Problem(128, 65_536, dtype=torch.bfloat16))]


test_esvit_loss = measures(cases)
