"""The losses of DINO, EsViT, iBOT and DINOv2 on fixed inputs, and lightly's beside them.

Logits are handed over as features whose prototypes are the identity.
"""

import math

import pytest
import torch
from ladder import kernel_device
from lightly.loss import DINOLoss, IBOTPatchLoss

from vitrail.kernels import (
    cross_view_match,
    prototype_cross_entropy,
    region_match_crops,
    sinkhorn_center,
    sinkhorn_knopp,
    update_center_,
)

IMPLS = ("reference", "chunked", "triton")
DEVICE = kernel_device()
K = 32


def g(shape: tuple[int, ...], a: float, b: float = 0.0) -> torch.Tensor:
    """sin(a i + b) over the flat index i."""
    flat = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * flat + b).sin().float().view(shape).to(DEVICE)


def near(value: torch.Tensor, *expected: float, rtol: float = 1e-6, atol: float = 2e-7) -> None:
    torch.testing.assert_close(
        value.detach().cpu().float(), torch.tensor(expected).view(value.shape), rtol=rtol, atol=atol
    )


EYE = torch.eye(K, device=DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_dino(impl):
    student, teacher = g((16, K), 0.31).requires_grad_(), g((8, K), 0.47, 0.5)
    center, match = torch.zeros(K, device=DEVICE), cross_view_match(4, 2, 4, device=DEVICE)

    def loss(teacher_temp: float) -> torch.Tensor:
        arguments = student, EYE, teacher, EYE
        options = {"student_temp": 0.1, "teacher_temp": teacher_temp, "center": center, "match": match, "impl": impl}
        result = prototype_cross_entropy(*arguments, **options)
        update_center_(center, teacher, EYE)
        return result

    first = loss(0.04)
    near(first, 11.3188887)
    (gradient,) = torch.autograd.grad(first, student)
    near(gradient[0, :4], 3.6504962e-6, 7.7126722e-5, 1.2183033e-3, 1.1059693e-2, rtol=2e-5, atol=1e-10)
    near(gradient.abs().sum(), 17.8282509)
    near(center[:4], -0.00158059306, 0.00120701722, 0.00373286544, 0.00544919400, atol=1e-8)
    near(loss(0.04), 11.3164549)
    near(loss(0.07), 11.3285952)


@pytest.mark.parametrize("impl", IMPLS)
def test_esvit(impl):
    student_cls, student_regions, student_features = g((8, K), 0.31), g((52, K), 0.29, 0.2), g((52, 8), 0.41, 0.1)
    teacher_cls, teacher_regions, teacher_features = g((4, K), 0.47, 0.5), g((36, K), 0.43, 0.3), g((36, 8), 0.59, 0.7)
    tokens, images, pairs = [9, 9, 4, 4], 2, 2 * 4 - 2
    match, _ = region_match_crops(
        student_features, teacher_features, tokens, [9, 9], impl="auto" if impl == "chunked" else impl
    )
    local = match[0, 36:44].view(images, 4)  # of crop 2 with view 0, whose rows start at 9 times the image
    assert (local - 9 * torch.arange(images, device=DEVICE)[:, None]).tolist() == [[6, 8, 1, 3], [0, 2, 0, 2]]
    weight = torch.cat([torch.full((images * count,), 1 / (count * images * pairs)) for count in tokens]).to(DEVICE)
    center, center_grid = torch.zeros(2, K, device=DEVICE)
    temperatures = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}

    def loss() -> torch.Tensor:
        views = {"center": center, "match": cross_view_match(4, 2, images, device=DEVICE), **temperatures}
        regions = {"center": center_grid, "match": match, "weight": weight, **temperatures}
        view = prototype_cross_entropy(student_cls, EYE, teacher_cls, EYE, **views)
        region = prototype_cross_entropy(student_regions, EYE, teacher_regions, EYE, **regions)
        update_center_(center, teacher_cls, EYE)
        update_center_(center_grid, teacher_regions, EYE)
        return view / 2 + region / 2

    near(loss(), 10.6506243)
    near(loss(), 10.6361895)
    near(center_grid[:4], 0.00327239, 0.00165656, -0.00026088, -0.00213082, atol=6e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_ibot(impl):
    images, patches = 2, 4
    student_cls = torch.cat([g((4, K), 0.31), g((4, K), 0.23, 0.9)])
    teacher_cls = g((4, K), 0.47, 0.5)
    student_patch, teacher_patch = g((4, patches, K), 0.29, 0.2), g((4, patches, K), 0.43, 0.3)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]], device=DEVICE).bool()
    masked = mask.sum(1, keepdim=True).clamp(min=1)
    weight = (1 / (masked * images * 2)).expand_as(mask)[mask]  # the mean over images and over both global crops
    center, center2 = torch.zeros(2, K, device=DEVICE)
    temperatures = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        views = {"center": center, "match": cross_view_match(4, 2, images, device=DEVICE), **temperatures}
        cls = prototype_cross_entropy(student_cls, EYE, teacher_cls, EYE, **views)
        rows = student_patch[mask], EYE, teacher_patch[mask], EYE
        patch = prototype_cross_entropy(*rows, center=center2, weight=weight, **temperatures)
        update_center_(center, teacher_cls, EYE)
        update_center_(center2, teacher_patch.flatten(0, 1), EYE)
        return cls, patch

    near(torch.stack(losses()), 10.8235674, 9.3024931)
    near(torch.stack(losses()), 10.8256044, 9.3033009)
    near(center2[:4], -0.00044964, 0.00066675, 0.00166176, 0.00235420, atol=6e-9)


def test_sinkhorn():
    target = sinkhorn_knopp(g((8, 16), 0.47, 0.5), 0.07)
    near(target[0, :4], 0.00022212, 0.15842435, 0.27593595, 0.19240287, atol=6e-9)
    near(target[5, :4], 0.00006908, 0.07477956, 0.23805088, 0.32054090, atol=6e-9)
    columns = target.sum(0)
    assert (round(columns.min().item(), 4), round(columns.max().item(), 4)) == (0.3887, 0.6480)
    near(target.sum(1), *[1.0] * 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_dinov2(impl):
    student, teacher, eye = g((8, 16), 0.31), g((8, 16), 0.47, 0.5), EYE[:16, :16].contiguous()
    center = sinkhorn_center(teacher, eye, 0.07, impl="auto" if impl == "chunked" else impl)
    options = {"student_temp": 0.1, "teacher_temp": 0.07, "center": center, "impl": impl}
    near(prototype_cross_entropy(student, eye, teacher, eye, **options), 9.9719315)
    masked = torch.tensor([3, 0, 1, 4], device=DEVICE)
    weight = (1 / masked.clamp(min=1) / len(masked)).repeat_interleave(masked)
    near(prototype_cross_entropy(student, eye, teacher, eye, weight=weight, **options), 8.8477097)


# --- lightly ---------------------------------------------------------------------------------------------------------


def features(rows: int, count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrices = (torch.randn(size, width, generator=generator) for size in (rows, count))
    first, second = (torch.nn.functional.normalize(matrix).to(DEVICE) for matrix in matrices)
    return first, second


def compare(ours: torch.Tensor, theirs: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.1, 0.07), (0.3, 0.2)])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 17, 8), (6, 2, 4, 40, 16), (10, 2, 2, 33, 5)])
@pytest.mark.parametrize("impl", IMPLS)
def test_lightlys_dino_loss(impl, sizes, temperatures):
    views, teachers, batch, count, width = sizes
    student_temp, teacher_temp = temperatures
    student, prototypes = features(views * batch, count, width, 0)
    teacher, theirs = features(teachers * batch, count, width, 1)
    student.requires_grad_(), prototypes.requires_grad_()
    lightly = DINOLoss(count, teacher_temp=teacher_temp, student_temp=student_temp).to(DEVICE)
    center = torch.zeros(count, device=DEVICE)
    for _ in range(2):
        expected = lightly((teacher @ theirs.T).chunk(teachers), (student @ prototypes.T).chunk(views), teacher_temp)
        got = prototype_cross_entropy(
            *(student, prototypes, teacher, theirs),
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            center=center,
            match=cross_view_match(views, teachers, batch, device=DEVICE),
            normalized=True,
            impl=impl,
        )
        update_center_(center, teacher, theirs)
        compare(got, expected, (student, prototypes))
        torch.testing.assert_close(center, lightly.center.flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.3, 0.2)])
@pytest.mark.parametrize("sizes", [(2, 3, 17, 8), (5, 4, 40, 16)])
@pytest.mark.parametrize("impl", IMPLS)
def test_lightlys_ibot_patch_loss(impl, sizes, temperatures):
    images, side, count, width = sizes
    student_temp, teacher_temp = temperatures
    mask = torch.rand(images, side, side, generator=torch.Generator().manual_seed(images)).to(DEVICE) < 0.4
    mask[0] = False
    rows = int(mask.sum())
    student, prototypes = features(rows, count, width, 0)
    teacher, theirs = features(rows, count, width, 1)
    student.requires_grad_(), prototypes.requires_grad_()
    lightly = IBOTPatchLoss(count, teacher_temp=teacher_temp, student_temp=student_temp).to(DEVICE)
    center = torch.zeros(count, device=DEVICE)
    weight = (1 / (mask.sum((1, 2), keepdim=True).clamp(min=1) * images)).expand_as(mask)[mask]
    for _ in range(2):
        expected = lightly(teacher @ theirs.T, student @ prototypes.T, mask)
        got = prototype_cross_entropy(
            *(student, prototypes, teacher, theirs),
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            center=center,
            weight=weight,
            impl=impl,
        )
        update_center_(center, teacher, theirs)
        compare(got, expected, (student, prototypes))
        torch.testing.assert_close(center, lightly.center.value.flatten(), rtol=1e-5, atol=1e-7)
