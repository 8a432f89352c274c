"""Norms of lists of tensors, scaling them, and clipping."""

import math

import pytest
import torch
from lists import IMPLS, SIZES, clones, randoms, same, without_extension

from vitrail.kernels import multi_tensor_clip_, multi_tensor_norm, multi_tensor_scale_

BOTH = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_against_float64(impl):
    tensors = [*randoms(seed=1, dtypes=BOTH), torch.zeros(0, 3), torch.zeros(7)]
    total, norms, found_inf = multi_tensor_norm(tensors, impl=impl)
    expected = torch.stack([tensor.double().norm() for tensor in tensors])
    assert norms.dtype == total.dtype == found_inf.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(total.double(), expected.norm(), rtol=2e-7, atol=0)
    assert found_inf == 0
    assert norms[-2:].tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 16_383, 16_384, 40_000])
def test_a_single_bad_number_raises_the_flag(impl, bad, place):
    tensors = randoms((5, 40_001, 3), seed=1)
    tensors[1][place] = bad
    total, norms, found_inf = multi_tensor_norm(tensors, impl=impl)
    assert found_inf == 1
    assert not total.isfinite()
    assert norms.isfinite().tolist() == [True, False, True]


@without_extension
def test_sums_depend_on_sizes_alone():
    """Neither on alignment, nor on the neighbours in the list, nor on the number of threads, nor on the run."""
    expected = multi_tensor_norm(randoms(seed=1, dtypes=BOTH), impl="cuda").norms
    for shift in (1, 3, 4):
        assert torch.equal(multi_tensor_norm(randoms(seed=1, dtypes=BOTH, shift=shift), impl="cuda").norms, expected)
    alone = [multi_tensor_norm([tensor], impl="cuda").norms for tensor in randoms(seed=1, dtypes=BOTH)]
    assert torch.equal(torch.cat(alone), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = [multi_tensor_norm(randoms(seed=1, dtypes=BOTH), impl="cuda") for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    parallel = [multi_tensor_norm(randoms(seed=1, dtypes=BOTH), impl="cuda") for _ in range(20)]
    assert all(torch.equal(run.norms, expected) for run in serial + parallel)
    assert len({run.total.item() for run in serial + parallel}) == 1


@without_extension
def test_the_last_elements_count():
    """A chunk that were cut short by one element would be seen."""
    for size in SIZES:
        tensor = torch.zeros(size)
        tensor[-1] = 3.0
        assert multi_tensor_norm([tensor], impl="cuda").total == 3
        tensor[-1], tensor[0] = 0.0, 4.0
        assert multi_tensor_norm([tensor], impl="cuda").total == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_list_has_the_norm_zero(impl):
    total, norms, found_inf = multi_tensor_norm([], impl=impl)
    assert (total, len(norms), found_inf) == (0, 0, 0)
    multi_tensor_scale_([], torch.ones(()), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_tensor_is_scaled_by_its_own_number(impl):
    tensors = randoms(seed=1, dtypes=BOTH)
    scales = torch.linspace(0, 1, len(tensors))
    expected = [tensor * scale for tensor, scale in zip(tensors, scales, strict=True)]
    multi_tensor_scale_(tensors, scales, impl=impl)
    assert same(tensors, expected)
    expected = [tensor * 0.3 for tensor in tensors]
    multi_tensor_scale_(tensors, torch.tensor(0.3), impl=impl)
    assert same(tensors, expected)


def official_per_tensor(grads, limit):
    """Each tensor for itself, as DINO clips: by the limit over the norm plus 1e-6, where that is below 1."""
    for grad in grads:
        coefficient = limit / (grad.norm() + 1e-6)
        if coefficient < 1:
            grad.mul_(coefficient)


@pytest.mark.parametrize("impl", IMPLS)
def test_clipping_each_tensor_is_the_official_rule(impl):
    grads = randoms((5, 64, 900, 20_000), seed=1)
    ours, theirs = clones(grads), clones(grads)
    multi_tensor_clip_(ours, 20.0, per_tensor=True, impl=impl)
    official_per_tensor(theirs, 20.0)
    assert same(ours[:2], grads[:2])  # within the limit
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-7, atol=0)
    assert all(grad.norm() < 20.001 for grad in ours)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_clipping_all_together_is_torchs(impl, limit):
    grads = randoms(seed=1)
    theirs = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(theirs, clones(grads), strict=True):
        param.grad = grad
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    norms = multi_tensor_clip_(grads, limit, impl=impl)
    torch.testing.assert_close(norms.total, expected)
    for mine, param in zip(grads, theirs, strict=True):
        torch.testing.assert_close(mine, param.grad, rtol=3e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_what_is_not_finite_is_not_scaled(impl, per_tensor):
    grads = randoms((5, 900), seed=1)
    grads[0][2] = math.nan
    before = clones(grads)
    norms = multi_tensor_clip_(grads, 1e-3, per_tensor=per_tensor, impl=impl)
    assert norms.found_inf == 1
    assert torch.equal(grads[0].nan_to_num(), before[0].nan_to_num())
    assert torch.equal(grads[1], before[1]) != per_tensor  # the other tensor is clipped for itself


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        multi_tensor_clip_(randoms((3,)), limit)


def test_scales_of_another_length_are_an_error():
    with pytest.raises(ValueError, match=r"scales must have shape \[\] or \[2\], one for each tensor, got \[3\]"):
        multi_tensor_scale_(randoms((3, 4)), torch.ones(3))


def test_norms_compile_as_one_graph():
    tensors = randoms((5, 33), seed=1)
    expected = multi_tensor_norm(tensors)
    compiled = torch.compile(multi_tensor_norm, fullgraph=True)(tensors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


def test_clipping_compiles_as_one_graph():
    compiled, eager = randoms((5, 33), seed=1), randoms((5, 33), seed=1)
    torch.compile(lambda grads: multi_tensor_clip_(grads, 1.0, per_tensor=True), fullgraph=True)(compiled)
    multi_tensor_clip_(eager, 1.0, per_tensor=True)
    assert same(compiled, eager)
    assert not same(compiled, randoms((5, 33), seed=1))
