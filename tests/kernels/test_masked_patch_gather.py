from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import UnsupportedError, explain, masked_patch_gather

KERNEL = "vitrail.kernels.masked_patch_gather.kernel"
PIXELS = "vitrail.kernels.pixels"
REFERENCE = "vitrail.kernels.masked_patch_gather.reference"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = ("hwc", "chw", "channels_last", "cropped")


def make_images(batch: int, height: int, width: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    images = torch.randint(0, 256, (batch, height, width + 2, 3), generator=generator, dtype=torch.uint8)
    if dtype != torch.uint8:
        images = (images / 255).to(dtype)
    if layout == "cropped":  # a view whose rows are longer than its images
        return images[:, :, 1 : width + 1]
    images = images[:, :, :width].contiguous()
    if layout == "hwc":
        return images
    chw = images.permute(0, 3, 1, 2)
    return chw if layout == "channels_last" else chw.contiguous()


def problem(
    patch: int = 2,
    grid: tuple[int, int] = (3, 2),
    visible: int = 4,
    images: torch.dtype = torch.float32,
    layout: str = "hwc",
    batch: int = 2,
    **options: object,
) -> Problem:
    pixels = make_images(batch, grid[0] * patch, grid[1] * patch, images, layout)
    generator = torch.Generator().manual_seed(visible)
    indices = torch.randint(0, grid[0] * grid[1], (batch, visible), generator=generator)  # with repetitions
    differentiable = ("images",) if pixels.is_floating_point() else ()
    return Problem({"images": pixels, "indices": indices, "patch_size": patch, **options}, differentiable)


def eager(images, indices, patch_size, mean=None, std=None, pad_to=None, dtype=None):
    """Patchifies everything with nn.functional.unfold, then gathers."""
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    compute = torch.float64 if dtype is None and images.dtype == torch.float64 else dtype or torch.float32
    pixels = images.to(compute) / 255 if images.dtype == torch.uint8 else images
    if mean is not None:
        pixels = (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
    columns = torch.nn.functional.unfold(pixels, patch_size, stride=patch_size)  # (channel, row, column) order
    rows = columns.view(len(images), 3, patch_size**2, -1).permute(0, 3, 2, 1).flatten(2)
    chosen = rows.take_along_dim(indices[..., None], 1)
    return torch.nn.functional.pad(chosen, (0, (pad_to or chosen.shape[-1]) - chosen.shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD, "pad_to": 16}], ids=["plain", "normalised"])
def test_reference_on_floating_images(dtype, layout, options):
    check_accuracy(masked_patch_gather, eager, problem(layout=layout, **options), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_on_uint8_images(dtype, layout):
    case = problem(images=torch.uint8, layout=layout, mean=MEAN, std=STD, dtype=dtype)
    got = evaluate(partial(masked_patch_gather, impl="reference"), case)["output 0"]
    torch.testing.assert_close(got, eager(**case.inputs), rtol=0, atol=0)
    assert got.dtype == dtype


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_on_uint8_images(patch, layout):
    columns = -(-3 * patch * patch // 8) * 8
    case = problem(patch, images=torch.uint8, layout=layout, mean=MEAN, std=STD, pad_to=columns, visible=5)
    got = masked_patch_gather(**case.to(torch.float32, kernel_device()).inputs, impl="triton").cpu()
    truth = eager(**{**case.inputs, "dtype": torch.float64})
    baseline = eager(**case.inputs).double()
    assert (got - truth).abs().max() <= 2 * (baseline - truth).abs().max() + 1e-6
    assert torch.equal(got[..., 3 * patch * patch :], torch.zeros(2, 5, columns - 3 * patch * patch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch", [8, 14])
def test_triton_on_floating_images(patch, layout, dtype):
    case = problem(patch, visible=7, layout=layout, mean=MEAN, std=STD, pad_to=592)
    check_accuracy(masked_patch_gather, eager, case, dtype, "triton")


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    visible=st.integers(0, 6),
    batch=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
)
def test_triton_equals_the_reference_on_any_grid(rows, columns, visible, batch, layout):
    case = problem(8, (rows, columns), visible, torch.uint8, layout, batch).to(torch.float32, kernel_device())
    got, expected = (masked_patch_gather(**case.inputs, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD, "pad_to": 16}], ids=["plain", "normalised"])
def test_gradients(layout, options):
    check_gradients(masked_patch_gather, problem(layout=layout, visible=9, **options))


def test_the_gradient_accepts_any_upstream_strides():
    case = problem(8).to(torch.float32, kernel_device())
    images = case.inputs["images"].requires_grad_()
    masked_patch_gather(**case.inputs, impl="triton").sum().backward()  # an expanded scalar
    counts = torch.stack([torch.bincount(row, minlength=6) for row in case.inputs["indices"]])
    assert torch.equal(images.grad[:, ::8, ::8, 0].flatten(1), counts.to(images.grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [torch.uint8, torch.float32, torch.bfloat16])
def test_triton_stays_inside_its_buffers(images, layout):
    case = problem(14, visible=5, images=images, layout=layout, pad_to=592)
    check_guarded(masked_patch_gather, case)


def test_out_of_range_indices_read_nothing_and_yield_zeros():
    case = problem(8, images=torch.uint8)
    case.inputs["indices"] = torch.tensor([[0, -1, 6, 2**40], [5, 1, -(2**40), 2**31]])
    check_guarded(masked_patch_gather, case)
    got = masked_patch_gather(**case.to(torch.float32, kernel_device()).inputs, impl="triton")
    assert torch.equal(
        got.flatten(2).any(-1).cpu(), torch.tensor([[True, False, False, False], [True, True, False, False]])
    )


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
def test_out_of_range_indices_raise_on_the_cpu(images, bad):
    case = problem(8, images=images)
    case.inputs["indices"] = torch.tensor([[0, 1], [bad, 5]])
    for impl in ("auto", "reference"):
        with pytest.raises(IndexError, match=rf"{bad}.*24 x 16 pixels have patches 0 to 5"):
            masked_patch_gather(**case.inputs, impl=impl)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
def test_ops(images, layout):
    check_ops(masked_patch_gather, problem(images=images, layout=layout, pad_to=16, mean=MEAN, std=STD))


def test_compilation():
    check_compiled(masked_patch_gather, problem())
    check_compiled(masked_patch_gather, problem(batch=2), problem(batch=3, visible=5), problem(batch=4, visible=7))


def test_dtype_follows_autocast_then_the_images():
    byte, real = problem(images=torch.uint8).inputs, problem(images=torch.float64).inputs
    assert masked_patch_gather(**byte).dtype == torch.float32
    assert masked_patch_gather(**real).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert masked_patch_gather(**byte).dtype == dtype
            assert masked_patch_gather(**real).dtype == dtype
            assert masked_patch_gather(**byte, dtype=torch.float64).dtype == torch.float64
        outside = masked_patch_gather(**byte, mean=MEAN, std=STD, dtype=dtype)
        with torch.autocast("cpu", dtype):
            assert torch.equal(masked_patch_gather(**byte, mean=MEAN, std=STD), outside)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            "drop the last tile of columns",
            KERNEL,
            'triton.cdiv(columns, config["BLOCK"])',
            "columns // config['BLOCK']",
        ),
        Fault(
            "drop the last rows",
            KERNEL,
            'triton.cdiv(batch * count, config["ROWS"])',
            "batch * count // config['ROWS']",
        ),
        Fault("padding left unwritten", KERNEL, "& (column < COLUMNS)", "& (column < 3 * PATCH * PATCH)"),
        Fault("gradient keeps only the last duplicate", KERNEL, "total += tl.load(row", "total = tl.load(row"),
        Fault("gradient ignores std", KERNEL, "total *= by_channel(column, scale)", "total *= 1.0"),
        Fault(
            "gradient misses the last index",
            KERNEL,
            "min(start + INDEX_BLOCK, count)",
            "min(start + INDEX_BLOCK, count - 1)",
        ),
        Fault(
            "channels swapped",
            PIXELS,
            "(channel == 1, numbers[1], numbers[2])",
            "(channel == 1, numbers[2], numbers[1])",
            (KERNEL,),
        ),
        Fault(
            "grid transposed",
            PIXELS,
            "(patch % grid_width) * PATCH * step",
            "(patch // grid_width) * PATCH * step",
            (KERNEL,),
        ),
        Fault("shift forgotten", PIXELS, "+ by_channel(value, shift)", "", (KERNEL,)),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    case = problem(14, (2, 2), visible=5, mean=MEAN, std=STD, pad_to=592)
    check_noticed(fault, tmp_path, lambda: check_accuracy(masked_patch_gather, eager, case, torch.float32, "triton"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("gradient ignores duplicates", REFERENCE, "accumulate=True", "accumulate=False"),
        Fault("mean forgotten", REFERENCE, "values - values.new_tensor(mean)", "values - 0 * values.new_tensor(mean)"),
        Fault("gradient ignores std", REFERENCE, "values / values.new_tensor(std)", "values / values.new_ones(3)"),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_reference_are_noticed(fault, tmp_path):
    case = problem(visible=9, mean=MEAN, std=STD)
    check_noticed(fault, tmp_path, lambda: check_accuracy(masked_patch_gather, eager, case, torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 6, 4, 3, dtype=torch.int32)}, TypeError, "images must be uint8 or floating"),
        ({"images": torch.zeros(2, 6, 4, 1)}, ValueError, r"images must have shape \[B, H, W, 3\]"),
        ({"images": torch.zeros(2, 3, 6, 3)}, ValueError, "ambiguous"),
        ({"images": torch.zeros(2, 7, 4, 3)}, ValueError, "height 7 is not a positive multiple of patch_size=2"),
        ({"images": torch.zeros(3, 6, 4, 3)}, ValueError, "indices must have shape .* with B=3"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, r"indices must be .*int64.*\.long\(\)"),
        (
            {"indices": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
            ValueError,
            "images on cpu, indices on meta",
        ),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"mean": MEAN}, ValueError, "mean is given without std"),
        ({"std": STD}, ValueError, "std is given without mean"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, ValueError, "std must be positive"),
        ({"mean": MEAN[:2], "std": STD}, ValueError, "mean must hold 3 values"),
        ({"mean": (float("nan"), 0, 0), "std": STD}, ValueError, "mean must be finite"),
        ({"pad_to": 11}, ValueError, "pad_to=11 is smaller than the 12 values"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    with pytest.raises(error, match=message):
        masked_patch_gather(**{**problem().inputs, **change})


def test_without_the_extension_auto_takes_the_reference_on_the_cpu(monkeypatch):
    monkeypatch.setattr("vitrail.kernels.extension.missing", lambda: "nobody built it")
    case = problem(8, images=torch.uint8, mean=MEAN, std=STD)
    assert explain(masked_patch_gather, **case.inputs)["cuda"] == ["nobody built it"]
    with pytest.raises(UnsupportedError, match="nobody built it"):
        masked_patch_gather(**case.inputs, impl="cuda")
    assert torch.equal(masked_patch_gather(**case.inputs), masked_patch_gather(**case.inputs, impl="reference"))


def test_triton_gives_reasons():
    case = replace(problem(patch=4)).to(torch.float64, kernel_device())
    inputs = {**case.inputs, "indices": case.inputs["indices"].T.contiguous().T}
    reasons = explain(masked_patch_gather, **inputs)["triton"]
    assert any("patch_size is 4; the kernel is built for 8, 14, 16, 32" in reason for reason in reasons)
    assert any("images is float64" in reason for reason in reasons)
    assert any("indices has stride 2 in its last dimension" in reason for reason in reasons)
    assert explain(masked_patch_gather, **inputs)["reference"] == []
