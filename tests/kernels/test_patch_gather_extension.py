"""The patch gather of the compiled extension, on CPU tensors: the arithmetic and the addresses are the GPU's."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, assert_as_accurate, check_compiled, check_ops, poisoned_memory
from ladder_guards import check_guarded
from patch_pixels import LAYOUTS, MEAN, STD, exact, make_images, placed

from vitrail.kernels import UnsupportedError, explain, extension, masked_patch_gather
from vitrail.kernels.masked_patch_gather.op import OP

CPU = torch.device("cpu")
PATCHES = (8, 14, 16, 32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(bool(extension.reasons(CPU)), reason="".join(extension.reasons(CPU)))


def gather(images, indices, patch, columns=None, dtype=torch.float32, mean=MEAN, std=STD):
    with poisoned_memory():
        return masked_patch_gather(images, indices, patch, mean=mean, std=std, pad_to=columns, dtype=dtype, impl="cuda")


def call_op(out, images, indices, patch):
    """The op itself, without what Python checks before."""
    extension.ops().masked_patch_gather_out(out, images, indices, patch, [1.0, 2.0, 3.0], [0.5, 0.25, 0.125])


def some_indices(batch: int, patches: int, count: int = 4) -> torch.Tensor:
    """Random, with the first and the last patch, and one of them twice."""
    indices = torch.randint(0, patches, (batch, count), generator=torch.Generator().manual_seed(patches))
    indices[:, 0], indices[:, 1], indices[:, -1] = patches - 1, 0, patches - 1
    return indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch", PATCHES)
def test_it_equals_a_gather_pixel_by_pixel_to_the_last_bit(patch, layout, dtype):
    images = make_images(2, 2 * patch, 3 * patch, layout)
    indices = some_indices(2, 6)
    columns = 3 * patch * patch
    for mean, std in ((MEAN, STD), (None, None)):
        got = gather(images, indices, patch, dtype=dtype, mean=mean, std=std)
        assert torch.equal(got, exact(images, indices, patch, columns, dtype, mean, std))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", PATCHES)
def test_it_is_as_accurate_as_the_formula_in_float32(patch, dtype):
    images, indices = make_images(2, 2 * patch, 3 * patch, "hwc"), some_indices(2, 6)
    got = gather(images, indices, patch, dtype=dtype)

    def formula(compute):
        rows = images.unflatten(1, (2, patch)).unflatten(3, (3, patch)).transpose(2, 3).reshape(2, 6, patch * patch, 3)
        pixels = (rows.to(compute) / 255 - rows.new_tensor(MEAN, dtype=compute)) / rows.new_tensor(STD, dtype=compute)
        return pixels.flatten(2).take_along_dim(indices[..., None], 1)

    results = ({"output 0": value} for value in (got, formula(torch.float32), formula(torch.float64)))
    assert_as_accurate(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [588, 589, 590, 592, 601, 640, 1200])
def test_padding_is_zero_and_every_column_is_written(columns, dtype):
    images, indices = make_images(2, 28, 42, "hwc"), some_indices(2, 6)
    got = gather(images, indices, 14, columns, dtype)
    assert torch.equal(got, exact(images, indices, 14, columns, dtype))
    assert got.shape == (2, 4, columns)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_equals_a_gather_pixel_by_pixel(data):
    patch = data.draw(st.sampled_from(PATCHES[:3]))
    rows, width, batch, count = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 4), (0, 3), (0, 5)))
    images = make_images(batch, rows * patch, width * patch, data.draw(st.sampled_from(("hwc", "chw"))))
    pitch = images.shape[-1] if images.shape[1] == 3 else 3 * images.shape[2]
    images = placed(images, data.draw(st.integers(0, 31)), pitch + data.draw(st.integers(0, 40)))
    numbers = st.lists(st.integers(0, rows * width - 1), min_size=batch * count, max_size=batch * count)
    indices = torch.tensor(data.draw(numbers), dtype=torch.int64).view(batch, count)
    columns = 3 * patch * patch + data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    assert torch.equal(gather(images, indices, patch, columns, dtype), exact(images, indices, patch, columns, dtype))


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("patch", PATCHES)
def test_images_may_begin_at_any_byte(patch, layout):
    images, indices = make_images(2, 2 * patch, 3 * patch, layout), some_indices(2, 6)
    expected = gather(images, indices, patch)
    width = images.stride(-2) if layout == "chw" else images.stride(1)
    for offset in range(16):
        for pitch in (width, width + 1, width + 16):
            assert torch.equal(gather(placed(images, offset, pitch), indices, patch), expected), (offset, pitch)


def test_images_and_indices_may_be_expanded():
    images, indices = make_images(1, 32, 48, "hwc"), some_indices(1, 6)
    got = gather(images.expand(3, -1, -1, -1), indices.expand(3, -1), 16)
    assert torch.equal(got, gather(images, indices, 16).expand(3, -1, -1))


def test_all_patches_in_order_are_the_image():
    images = make_images(2, 28, 42, "chw")
    rows = gather(images, torch.arange(6).expand(2, -1), 14, mean=None, std=None)
    folded = rows.view(2, 2, 3, 14, 14, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 28, 42)
    assert torch.equal((folded * 255).round().to(torch.uint8), images)


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0), (0, 0)])
def test_empty_calls(batch, count):
    got = gather(make_images(batch, 28, 42, "hwc"), torch.zeros(batch, count, dtype=torch.int64), 14, 592)
    assert got.shape == (batch, count, 592)


@pytest.mark.parametrize("bad", [-1, 6, 2**31, 2**32, 2**40, -(2**40)])
def test_an_index_out_of_range_raises_and_the_op_itself_writes_zeros(bad):
    images = make_images(2, 16, 24, "hwc")
    indices = torch.tensor([[0, bad], [bad, 5]])
    with pytest.raises(IndexError, match=rf"{bad}.*16 x 24 pixels have patches 0 to 5"):
        masked_patch_gather(images, indices, 8, impl="cuda")
    out = torch.full((2, 2, 200), float("nan"))
    call_op(out, images, indices, 8)
    assert torch.equal(out.ne(0).any(-1), torch.tensor([[True, False], [False, True]]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [588, 592, 595])
def test_it_writes_its_buffer_and_nothing_else(columns, layout):
    images, indices = make_images(2, 28, 42, layout), some_indices(2, 6)
    check_guarded(
        masked_patch_gather,
        Problem({"images": images, "indices": indices, "patch_size": 14, "pad_to": columns}),
        "cuda",
    )


PAGES = """
import ctypes, mmap, sys
import torch
from vitrail.kernels import masked_patch_gather
layout, patch, at_end = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "end"
shape = (2, 2 * patch, 3 * patch, 3) if layout == "hwc" else (2, 3, 2 * patch, 3 * patch)
size, page = 36 * patch * patch, mmap.PAGESIZE
pages = -(-size // page)
memory = mmap.mmap(-1, (pages + 2) * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
for number in (0, pages + 1):
    assert libc.mprotect(ctypes.c_void_p(start + number * page), ctypes.c_size_t(page), 0) == 0
offset = (pages + 1) * page - size if at_end else page
images = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(shape).fill_(255)
rows = masked_patch_gather(images, torch.arange(6).expand(2, -1), patch, impl="cuda")
assert rows.eq(1).all()
print("read")
"""


@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_on_the_cpu_it_reads_the_images_and_nothing_else(layout, where):
    """Between pages that must not be touched; reading one ends the process."""
    for patch in ("8", "14"):
        done = subprocess.run(
            [sys.executable, "-c", PAGES, layout, patch, where], capture_output=True, text=True, check=False
        )
        assert done.stdout == "read\n", done.stderr


def test_threads_do_not_change_a_bit():
    images, indices = make_images(8, 64, 64, "chw"), some_indices(8, 16, 100)  # enough patches for several threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gather(images, indices, 16, dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][:, :3], exact(images, indices[:, :3], 16, 768, torch.bfloat16))


def test_auto_takes_it_for_uint8_images_and_never_for_others():
    images, indices = make_images(1, 32, 32, "hwc"), torch.zeros(1, 1, dtype=torch.int64)
    arguments = OP.bind(images, indices, 16)
    assert explain(masked_patch_gather, images, indices, 16)["cuda"] == []
    assert OP.choose("forward", "auto", arguments).name == "cuda"
    real = OP.bind(images / 255, indices, 16)
    assert OP.choose("forward", "auto", real).name == "reference"
    with pytest.raises(UnsupportedError, match="it has no backward pass"):
        OP.choose("backward", "cuda", (torch.zeros(1, 1, 768), images / 255, indices, 16, ()))
    loss = masked_patch_gather((images / 255).requires_grad_(), indices, 16).sum()
    loss.backward()  # finds another implementation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 32, 48, 3)}, "images is float32; the kernel takes uint8"),
        ({"patch_size": 4}, "patch_size is 4; the kernel is built for 8, 14, 16, 32"),
        ({"dtype": torch.float64}, "dtype is float64; the kernel takes float16, bfloat16, float32"),
        (
            {"images": torch.zeros(2, 48, 32, 3, dtype=torch.uint8).transpose(1, 2)},
            r"images has strides \[4608, 3, 96, 1\] for shape \[2, 32, 48, 3\].*pass images.contiguous\(\)",
        ),
        (
            {"images": torch.zeros(2, 3, 32, 96, dtype=torch.uint8)[..., ::2]},
            r"images has strides \[9216, 3072, 96, 2\] for shape \[2, 3, 32, 48\].*pass images.contiguous\(\)",
        ),
        ({"indices": torch.zeros(4, 2, dtype=torch.int64).T}, "indices has stride 2 in its last dimension"),
    ],
)
def test_a_call_that_it_does_not_take_is_refused_with_the_reason(change, message):
    call = {"images": make_images(2, 32, 48, "hwc"), "indices": torch.zeros(2, 4, dtype=torch.int64), "patch_size": 16}
    with pytest.raises(UnsupportedError, match=message):
        masked_patch_gather(**{**call, **change}, impl="cuda")
    masked_patch_gather(**{**call, **change})  # another implementation takes it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 32, 48, 3)}, "images must be uint8, got float32"),
        ({"images": torch.zeros(2, 32, 48, 4, dtype=torch.uint8)}, r"images must have shape \[B, H, W, 3\].*48, 4\]"),
        ({"images": torch.zeros(2, 32, 96, 3, dtype=torch.uint8)[:, :, ::2]}, r"strides \[9216, 288, 6, 1\]"),
        ({"images": torch.zeros(2, 33, 48, 3, dtype=torch.uint8)}, "33 x 48 pixels are no whole number of patches"),
        ({"images": torch.zeros(2, 0, 48, 3, dtype=torch.uint8)}, "0 x 48 pixels are no whole number of patches"),
        ({"patch": 4}, "patch_size is 4; the extension is built for 8, 14, 16, 32"),
        ({"indices": torch.zeros(2, 5, dtype=torch.int32)}, "indices must be int64, got int32"),
        ({"indices": torch.zeros(3, 5, dtype=torch.int64)}, r"indices must have shape .* with B=2 as in images"),
        ({"indices": torch.zeros(5, 2, dtype=torch.int64).T}, r"indices have strides \[1, 2\]"),
        ({"out": torch.zeros(2, 5, 767)}, r"out must have shape \[2, 5, 768 or more\], got \[2, 5, 767\]"),
        ({"out": torch.zeros(2, 4, 768)}, r"out must have shape \[2, 5, 768 or more\], got \[2, 4, 768\]"),
        ({"out": torch.zeros(2, 768, 5).mT}, r"out has strides \[3840, 1, 5\]; it must be contiguous"),
        ({"out": torch.zeros(2, 5, 768, dtype=torch.float64)}, "out must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_the_op_itself_refuses_what_it_would_misread(change, message):
    call = {
        "out": torch.zeros(2, 5, 768),
        "images": make_images(2, 32, 48, "hwc"),
        "indices": torch.zeros(2, 5, dtype=torch.int64),
        "patch": 16,
    }
    call_op(**call)
    with pytest.raises(RuntimeError, match=message):
        call_op(**{**call, **change})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_and_compilation(layout):
    def function(**inputs):
        return masked_patch_gather(**inputs, pad_to=592, impl="cuda")

    problems = [
        Problem({"images": make_images(batch, 28, 42, layout), "indices": some_indices(batch, 6), "patch_size": 14})
        for batch in (2, 3)
    ]
    check_ops(function, problems[0])
    check_compiled(function, *problems)
    check_compiled(lambda **inputs: function(**inputs, mean=MEAN, std=STD), problems[0])


def test_the_exact_gather_sees_a_pixel_in_the_wrong_place():
    """The yardstick of this file itself: every value of a patch depends on its own byte alone."""
    images, indices = make_images(1, 8, 16, "hwc"), torch.tensor([[1]])
    before = exact(images, indices, 8, 192, torch.float32)
    for row, column, channel in np.ndindex(8, 16, 3):
        changed = images.clone()
        changed[0, row, column, channel] ^= 1
        differs = (exact(changed, indices, 8, 192, torch.float32) != before)[0, 0].nonzero().flatten().tolist()
        assert differs == ([(row * 8 + column - 8) * 3 + channel] if column >= 8 else [])
