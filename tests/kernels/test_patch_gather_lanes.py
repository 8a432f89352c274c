"""The GPU's side of the patch gather where no GPU is: its addresses and bytes, lane by lane, compiled for the CPU.

On the CPU the extension copies whole rows of a patch, since a window of 16 bytes could reach beyond the image. Here the
windows are read as on the GPU, from the same header.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ladder_faults import Fault
from patch_pixels import LAYOUTS, MEAN, STD, exact, make_images, placed

from vitrail.kernels.patches import channel_affine, channels_last

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
PATCHES = (8, 14, 16, 32)

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler; install g++"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the C++ sources are not there"),
]


class Call(ctypes.Structure):
    """GatherCall of csrc/patch_gather/gather.h."""

    _fields_ = [
        ("images", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "count", "index_stride", "image_stride")),
        *((name, ctypes.c_int64) for name in ("row_stride", "plane_stride", "columns")),
        *((name, ctypes.c_int32) for name in ("grid_width", "patches")),
        *((name, ctypes.c_float * 3) for name in ("scale", "shift")),
    ]


def build(folder: Path, csrc: Path = ROOT / "csrc") -> ctypes.CDLL:
    target = folder / "warp_gather.so"
    source = ROOT / "tests/support/warp_gather.cpp"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-I", str(csrc)]
    subprocess.run([str(COMPILER), *options, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.gather_as_a_warp.restype = ctypes.c_int64
    library.gather_as_a_warp.argtypes = [ctypes.POINTER(Call), ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 2]
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("warp"))


def gather(library: ctypes.CDLL, images: torch.Tensor, indices: torch.Tensor, patch: int) -> torch.Tensor:
    """Gathers as the lanes of a warp would, and asserts that every window read holds a byte of the images."""
    view = channels_last(images)
    height, width = view.shape[1:3]
    planar = view.stride(2) == 1
    out = torch.full((*indices.shape, 3 * patch * patch), float("nan"))
    scale, shift = channel_affine(images, MEAN, STD)
    call = Call(
        images.data_ptr(), indices.data_ptr(), out.data_ptr(), indices.numel(), indices.shape[1], indices.stride(0),
        view.stride(0), view.stride(1), view.stride(3) if planar else 0, out.shape[2],
        width // patch, height // patch * (width // patch), scale, shift,
    )  # fmt: skip
    last = images.data_ptr() + 1 + sum((n - 1) * step for n, step in zip(images.shape, images.stride(), strict=True))
    stray = library.gather_as_a_warp(ctypes.byref(call), planar, patch, images.data_ptr(), last)
    assert stray == 0, f"{stray} windows lie outside the images"
    return out


def check(library: ctypes.CDLL, patch: int, layout: str) -> None:
    images, indices = make_images(2, 2 * patch, 3 * patch, layout), torch.tensor([[0, 5, 2], [3, 3, 4]])
    expected = exact(images, indices, patch, 3 * patch * patch, torch.float32)
    assert torch.equal(gather(library, images, indices, patch), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch", PATCHES)
def test_it_equals_a_gather_pixel_by_pixel_to_the_last_bit(library, patch, layout):
    check(library, patch, layout)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("patch", PATCHES)
def test_images_may_begin_at_any_byte(library, patch, layout):
    images, indices = make_images(1, patch, 2 * patch, layout), torch.tensor([[1, 0]])
    expected = exact(images, indices, patch, 3 * patch * patch, torch.float32)
    width = images.stride(-2) if layout == "chw" else images.stride(1)
    for offset in range(16):
        for pitch in range(width, width + 16):
            moved = placed(images, offset, pitch)
            assert torch.equal(gather(library, moved, indices, patch), expected), (offset, pitch)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("window shifted", "gather.h", "+ offset - before", "+ offset"),
        Fault("last window not read", "gather.h", "offset < before + kLength", "offset < kLength"),
        Fault("foreign window read", "gather.h", "offset < before + kLength", "offset < kPitch"),
        Fault("planes in the wrong order", "gather.h", "(stage, kSize + row", "(stage, 2 * kSize + row"),
        Fault("channels out of step", "gather.h", "value % 3);", "0);"),
        Fault("a row's end not joined", "gather.h", "octet_at(stage, position(row + 1)), left", "octet, left"),
        Fault("a plane row's end not joined", "gather.h", "left < 4 && number", "left < 2 && number"),
        Fault("columns of the grid confused", "gather.h", "column = index % call.grid_width", "column = index % 2"),
        Fault("constants out of step", "gather.h", "if (channel == 2) advance();", ""),
        Fault("alignment of planes forgotten", "gather.h", "unsigned(plane_stride) % kWindow", "0"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    source = (ROOT / "csrc/patch_gather" / fault.module).read_text()
    assert source.count(fault.old) == 1
    csrc = tmp_path / "csrc"
    (csrc / "patch_gather").mkdir(parents=True)
    shutil.copy(ROOT / "csrc/portable.h", csrc)
    (csrc / "patch_gather" / fault.module).write_text(source.replace(fault.old, fault.new))
    library = build(tmp_path, csrc)

    def failed(patch: int, layout: str) -> bool:
        try:
            check(library, patch, layout)
        except AssertionError:
            return True
        return False

    assert any(failed(patch, layout) for patch in PATCHES for layout in LAYOUTS)
