import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import explain, masked_patch_loss, random_masking

KERNEL = "vitrail.kernels.masked_patch_loss.kernel"
REDUCTION = "vitrail.kernels.reduction"
REFERENCE = "vitrail.kernels.masked_patch_loss.reference"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = ("hwc", "chw", "channels_last")


def problem(
    patch: int = 2,
    grid: tuple[int, int] = (3, 2),
    masked: int = 4,
    images: torch.dtype = torch.uint8,
    layout: str = "hwc",
    batch: int = 2,
    **options: object,
) -> Problem:
    generator = torch.Generator().manual_seed(patch)
    pixels = torch.randint(0, 256, (batch, grid[0] * patch, grid[1] * patch, 3), generator=generator, dtype=torch.uint8)
    pixels[0, :patch, :patch] = 77  # a flat patch: only eps keeps its statistics finite
    if images != torch.uint8:
        pixels = (pixels / 255).to(images)
    if layout != "hwc":
        pixels = pixels.permute(0, 3, 1, 2)
        pixels = pixels if layout == "channels_last" else pixels.contiguous()
    length = grid[0] * grid[1]
    noise = torch.rand(batch, length, generator=generator)
    noise[0, 0] = 1.0  # the flat patch is masked
    indices = random_masking(batch, length, length - masked, noise=noise)[1]
    pred = torch.randn(batch, masked, options.get("pad_to") or 3 * patch * patch, generator=generator)
    inputs = {"pred": pred, "images": pixels, "masked_indices": indices, "patch_size": patch, **options}
    return Problem(inputs, ("pred",))


def eager(pred, images, masked_indices, patch_size, norm_pix=True, mean=None, std=None, pad_to=None):
    """Patchifies the whole image, normalises every patch, and averages over the masked ones with a 0-1 mask."""
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    pixels = images.to(pred.dtype) / 255 if images.dtype == torch.uint8 else images.to(pred.dtype)
    if mean is not None:
        pixels = (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
    columns = torch.nn.functional.unfold(pixels, patch_size, stride=patch_size)
    target = columns.view(len(images), 3, patch_size**2, -1).permute(0, 3, 2, 1).flatten(2)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, correction=1) + 1e-6).sqrt()
    batch, length, width = target.shape
    rows = masked_indices[..., None].expand(-1, -1, width)
    full = target.new_zeros(batch, length, width).scatter(1, rows, pred[..., :width])
    mask = target.new_zeros(batch, length).scatter(1, masked_indices, 1.0)
    return ((full - target).square().mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD, "pad_to": 16}], ids=["plain", "normalised"])
def test_reference(dtype, images, norm_pix, options):
    check_accuracy(masked_patch_loss, eager, problem(images=images, norm_pix=norm_pix, **options), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_triton(patch, images, layout):
    columns = -(-3 * patch * patch // 8) * 8
    case = problem(patch, images=images, layout=layout, mean=MEAN, std=STD, pad_to=columns)
    result = check_accuracy(masked_patch_loss, eager, case, torch.float32, "triton")
    assert not result["gradient of pred"][..., 3 * patch * patch :].any()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_low_precision(dtype, norm_pix):
    case = problem(14, images=torch.float32, mean=MEAN, std=STD, norm_pix=norm_pix, pad_to=592)
    check_accuracy(masked_patch_loss, eager, case, dtype, "triton")


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), kept=st.floats(0, 0.99), batch=st.integers(1, 4))
def test_triton_on_any_grid(rows, columns, kept, batch):
    length = rows * columns
    case = problem(8, (rows, columns), length - int(kept * length), batch=batch)
    check_accuracy(masked_patch_loss, eager, case, torch.float32, "triton")


def test_triton_sums_many_rows_per_program(monkeypatch):
    """With fewer programs than patches, each adds several rows, and the last one fewer."""
    case = problem(8, (3, 3), 7, batch=3).to(torch.float32)
    launcher = importlib.import_module(KERNEL)
    monkeypatch.setattr(launcher, "PROGRAMS", 4)
    check_accuracy(masked_patch_loss, eager, case, torch.float32, "triton")


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD, "pad_to": 16}], ids=["plain", "normalised"])
def test_gradients(norm_pix, options):
    check_gradients(masked_patch_loss, problem(norm_pix=norm_pix, **options))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_gradient_scales_with_its_upstream(impl):
    case = problem(8).to(torch.float32, kernel_device())
    once = evaluate(partial(masked_patch_loss, impl=impl), case)["gradient of pred"]
    twice = evaluate(lambda **inputs: 2 * masked_patch_loss(**inputs, impl=impl), case)["gradient of pred"]
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
def test_triton_stays_inside_its_buffers(images, layout):
    check_guarded(masked_patch_loss, problem(14, images=images, layout=layout, pad_to=592).to(torch.float32))


def test_out_of_range_indices_read_nothing_and_count_as_zeros():
    case = problem(8).to(torch.float32)
    case.inputs["masked_indices"] = torch.tensor([[-1, 6, 2**40, 2**31]] * 2)
    with pytest.raises(IndexError):
        masked_patch_loss(**case.inputs)
    check_guarded(masked_patch_loss, case)
    got = masked_patch_loss(**case.to(torch.float32, kernel_device()).inputs, impl="triton")
    torch.testing.assert_close(got.cpu(), case.inputs["pred"].square().mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops(layout):
    check_ops(masked_patch_loss, problem(layout=layout, pad_to=16, mean=MEAN, std=STD))


def test_compilation():
    check_compiled(masked_patch_loss, problem())
    check_compiled(masked_patch_loss, problem(batch=2), problem(batch=3, masked=5), problem(batch=4, masked=3))


def test_autocast_leaves_the_loss_in_float32():
    case = problem(14, mean=MEAN, std=STD).to(torch.float32)
    low = Problem({**case.inputs, "pred": case.inputs["pred"].bfloat16()}, case.differentiable)
    for probe in (case, low):
        expected = evaluate(masked_patch_loss, probe)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                got = evaluate(masked_patch_loss, probe)
            assert got["output 0"].dtype == torch.float32
            assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("biased variance", KERNEL, "/ (WIDTH - 1)", "/ WIDTH"),
        Fault("missing eps", KERNEL, "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance + 1e-12)"),
        Fault("mean over the padded tile", KERNEL, "tl.sum(target, 0) / WIDTH", "tl.sum(target, 0) / 256"),
        Fault(
            "drop the last row of a program",
            KERNEL,
            "min(first + rows_per_program, rows)",
            "min(first + rows_per_program, rows - 1)",
        ),
        Fault(
            "drop the last program",
            KERNEL,
            "programs = triton.cdiv(rows, rows_per_program)",
            "programs = rows // rows_per_program",
        ),
        Fault("gradient without its factor 2", KERNEL, "        2 / (batch", "        1 / (batch"),
        Fault("gradient with the wrong sign", KERNEL, "result = error * (", "result = -error * ("),
        Fault("surplus columns left unwritten", KERNEL, "mask=value < COLUMNS", "mask=value < 3 * PATCH * PATCH"),
        Fault("upstream gradient ignored", KERNEL, "(tl.load(grad).to(tl.float32) * factor)", "factor"),
        Fault("second stage drops rows", REDUCTION, "row < rows", "row < rows - 1", (KERNEL,)),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        launcher = importlib.import_module(KERNEL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "PROGRAMS", 4)
            check_accuracy(masked_patch_loss, eager, case, torch.float32, "triton")

    case = problem(8, masked=5, mean=MEAN, std=STD, pad_to=200)
    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("biased variance", REFERENCE, "div_(width - 1)", "div_(width)"),
        Fault("missing eps", REFERENCE, "add_(EPS)", "add_(1e-12)"),
        Fault("gradient without its factor 2", REFERENCE, "-2 / difference", "-1 / difference"),
        Fault("upstream gradient ignored", REFERENCE, "grad * (-2", "(-2"),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_reference_are_noticed(fault, tmp_path):
    check_noticed(fault, tmp_path, lambda: check_accuracy(masked_patch_loss, eager, problem(), torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.ones(2, 4, 12, dtype=torch.int64)}, TypeError, "pred must be of a floating dtype"),
        ({"pred": torch.ones(2, 4, 13)}, ValueError, r"pred must have shape \[2, 4, 12\], got \[2, 4, 13\]"),
        ({"pred": torch.ones(2, 4, 12), "pad_to": 16}, ValueError, r"pred must have shape \[2, 4, 16\]"),
        ({"pad_to": 8}, ValueError, "pad_to=8 is smaller than the 12 values"),
        ({"images": torch.rand(2, 6, 4, 3, requires_grad=True)}, ValueError, "images require a gradient"),
        ({"images": torch.rand(2, 6, 5, 3)}, ValueError, "width 5 is not a positive multiple of patch_size=2"),
        ({"masked_indices": torch.zeros(2, 4)}, TypeError, "masked_indices must be of dtype torch.int64"),
        ({"masked_indices": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "a mean over no patch is undefined"),
        ({"mean": MEAN}, ValueError, "mean is given without std"),
        ({"std": STD, "mean": (0.0,)}, ValueError, "mean must hold 3 values"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    with pytest.raises(error, match=message):
        masked_patch_loss(**{**problem().inputs, **change})


def test_an_empty_batch_is_an_error():
    inputs = {"pred": torch.ones(0, 4, 12), "images": torch.zeros(0, 6, 4, 3), "patch_size": 2}
    with pytest.raises(ValueError, match="a mean over no patch is undefined"):
        masked_patch_loss(masked_indices=torch.zeros(0, 4, dtype=torch.int64), **inputs)


def test_triton_gives_reasons():
    case = problem(4, pad_to=9000).to(torch.float64, kernel_device())
    pred = case.inputs["pred"].transpose(1, 2).contiguous().transpose(1, 2)
    reasons = explain(masked_patch_loss, **{**case.inputs, "pred": pred})["triton"]
    assert any("patch_size is 4" in reason for reason in reasons)
    assert any("pred has 9000 columns" in reason for reason in reasons)
    assert any("pred is float64; the kernel takes float16, bfloat16, float32" in reason for reason in reasons)
    assert any("pred has stride 4 in its last dimension" in reason for reason in reasons)
