from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_ops, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import UnsupportedError, explain, random_masking

KERNEL = "vitrail.kernels.random_masking.kernel"
SIZES = [(1, 1, 0), (1, 1, 1), (2, 3, 2), (3, 7, 0), (2, 49, 12), (2, 63, 63), (1, 65, 16), (3, 197, 49)]


def problem(batch: int, length: int, keep: int, ties: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(length)
    noise = torch.rand(batch, length, generator=generator)
    if ties:
        noise = (noise * 4).floor()
    return Problem({"batch": batch, "length": length, "keep": keep, "noise": noise})


def eager(batch: int, length: int, keep: int, noise: torch.Tensor):
    """Two stable argsorts, as the method is usually written down."""
    shuffle = torch.argsort(noise, dim=1, stable=True)
    return shuffle[:, :keep], shuffle[:, keep:], torch.argsort(shuffle, dim=1, stable=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", torch.float64), ("reference", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float64)],
)
def test_splits_as_two_argsorts_do(impl, dtype, size, ties):
    check_accuracy(random_masking, eager, problem(*size, ties=ties), dtype, impl)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, float("inf"), float("-inf"), float("nan")]), min_size=1))
def test_triton_orders_special_values_as_torch_sort_does(values):
    noise = torch.tensor([values], device=kernel_device())
    keep = len(values) // 2
    got = random_masking(1, len(values), keep, noise=noise, impl="triton")
    expected = random_masking(1, len(values), keep, noise=noise, impl="reference")
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_generator_reproduces_the_masks_and_samples_differ():
    draws = [random_masking(8, 64, 16, generator=torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0][0], draws[0][1])


def test_every_position_is_kept_equally_often():
    keep, _, _ = random_masking(4000, 16, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(keep.flatten(), minlength=16)
    assert (counts - 1000).abs().max() < 6 * (4000 * 0.25 * 0.75) ** 0.5  # six standard deviations


@pytest.mark.parametrize("size", [(2, 65, 16), (1, 3, 0)])
def test_triton_stays_inside_its_buffers(size):
    check_guarded(random_masking, problem(*size))


def test_ops_and_compilation():
    check_ops(random_masking, problem(2, 9, 4))
    check_compiled(random_masking, problem(2, 9, 4))
    check_compiled(partial(random_masking), problem(2, 9, 4), problem(3, 12, 5), problem(4, 33, 8))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop the last tile", KERNEL, 'triton.cdiv(length, config["BLOCK"])', "length // config['BLOCK']"),
        Fault("drop the last chunk", KERNEL, "range(0, length, CHUNK)", "range(0, length - CHUNK, CHUNK)"),
        Fault("ties to the higher index", KERNEL, "other[None, :] < position", "other[None, :] > position"),
        Fault("restore holds the shuffle", KERNEL, "position, rank.to(tl.int64)", "rank, position.to(tl.int64)"),
        Fault("masked ids off by one", KERNEL, "rank - keep, value", "rank - keep, value + 1"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    case = problem(2, 70, 16, ties=True)
    check_noticed(fault, tmp_path, lambda: check_accuracy(random_masking, eager, case, torch.float32, "triton"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((2, 8, 9), {}, ValueError, "keep must be between 0 and length=8, got 9"),
        ((2, 8, -1), {}, ValueError, "keep must be between 0"),
        ((-1, 8, 2), {}, ValueError, "must not be negative"),
        ((2, 8, 2), {"noise": torch.rand(2, 7)}, ValueError, r"noise must have shape \[2, 8\], got \[2, 7\]"),
        ((2, 8, 2), {"noise": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "noise must be of a floating dtype"),
        ((2, 8, 2), {"noise": torch.rand(2, 8), "generator": torch.Generator()}, ValueError, "pass one of them"),
        ((2, 8, 2), {"noise": torch.rand(2, 8), "device": "meta"}, ValueError, "noise is on cpu but device=meta"),
        ((2, 8, 2), {"impl": "fast"}, ValueError, "impl must be one of"),
        ((2, 8, 2), {"impl": "cuda"}, UnsupportedError, "no 'cuda' implementation; it has triton, reference"),
    ],
)
def test_errors_name_the_value_and_the_expectation(arguments, options, error, message):
    with pytest.raises(error, match=message):
        random_masking(*arguments, **options)


def test_triton_gives_reasons():
    noise = torch.rand(8, 4, device=kernel_device()).T
    (reason,) = explain(random_masking, 4, 8, 2, noise=noise)["triton"]
    assert "noise has stride 4 in its last dimension" in reason
    assert "noise.contiguous()" in reason
    (reason,) = explain("random_masking", 4, 8, 2, noise=noise.contiguous().half())["triton"]
    assert "noise is float16; the kernel takes float32, float64" in reason
