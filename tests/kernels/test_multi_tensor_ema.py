"""The moving average over lists of tensors."""

import re

import pytest
import torch
from lists import IMPLS, clones, randoms, same, without_extension

from vitrail.kernels import UnsupportedError, explain, multi_tensor_ema_

BOTH = (torch.float32, torch.bfloat16)


def lerped(teacher, student, momentum):
    """PyTorch's own, tensor by tensor."""
    return [torch.lerp(t, s.to(t.dtype), 1 - momentum) for t, s in zip(teacher, student, strict=True)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 1.0])
def test_it_is_torch_lerp_bit_for_bit(impl, momentum):
    teacher, student = randoms(seed=1), randoms(seed=2, dtypes=BOTH)
    expected = lerped(teacher, student, momentum)
    multi_tensor_ema_(teacher, student, momentum, impl=impl)
    assert same(teacher, expected)
    if momentum == 0:
        assert same(teacher, [s.float() for s in student])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_thousand_steps_at_a_momentum_that_bf16_cannot_follow(impl):
    student = randoms((1000,), seed=3)
    teacher = randoms((1000,), seed=4)
    truth, coarse = teacher[0].double(), teacher[0].bfloat16()
    for _ in range(1000):
        multi_tensor_ema_(teacher, student, 0.9999, impl=impl)
        truth.lerp_(student[0].double(), 1 - 0.9999)
        coarse.lerp_(student[0].bfloat16(), 1 - 0.9999)
    error = (teacher[0].double() - truth).norm() / truth.norm()
    assert error < 5e-6
    start = randoms((1000,), seed=4)[0]
    still = coarse == start.bfloat16()
    assert still.float().mean() > 0.9  # while float32 has moved everywhere
    assert (teacher[0] != start).all()


def test_a_momentum_of_float32_would_be_wrong():
    """Why scalars are float64: the weight 1 - m is off by 6e-4 of itself."""
    teacher, student = randoms((500,), seed=5), randoms((500,), seed=6)
    exact = lerped(teacher, student, 0.9999)
    rounded = clones(teacher)
    multi_tensor_ema_(rounded, student, torch.tensor(0.9999, dtype=torch.float32))
    multi_tensor_ema_(teacher, student, torch.tensor(0.9999, dtype=torch.float64))
    assert same(teacher, exact)
    assert not same(rounded, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_shadow_is_the_teacher_rounded(impl):
    teacher, student = randoms(seed=1), randoms(seed=2, dtypes=BOTH)
    shadow = [torch.full_like(t, float("nan"), dtype=torch.bfloat16) for t in teacher]
    multi_tensor_ema_(teacher, student, 0.9, shadow=shadow, impl=impl)
    assert same(shadow, [t.bfloat16() for t in teacher])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_raised_flag_changes_nothing(impl):
    teacher, student = randoms(seed=1), randoms(seed=2)
    before, shadow = clones(teacher), [torch.zeros_like(t, dtype=torch.bfloat16) for t in teacher]
    multi_tensor_ema_(teacher, student, 0.5, shadow=shadow, found_inf=torch.tensor(1.0), impl=impl)
    assert same(teacher, before)
    assert not any(s.any() for s in shadow)
    multi_tensor_ema_(teacher, student, 0.5, found_inf=torch.tensor(0.0), impl=impl)
    assert not same(teacher, before)


@without_extension
@pytest.mark.parametrize("shift", [1, 2, 3, 5, 7])
def test_alignment_and_neighbours_do_not_matter(shift):
    """Elements in front of a tensor and behind it stay as they are."""
    teacher, student = randoms(seed=1), randoms(seed=2, dtypes=BOTH)
    expected = lerped(teacher, student, 0.7)
    buffers = [torch.full((t.numel() + 2 * 8,), 7.0) for t in teacher]
    shifted = [b[shift : shift + t.numel()].copy_(t) for b, t in zip(buffers, teacher, strict=True)]
    multi_tensor_ema_(shifted, randoms(seed=2, dtypes=BOTH, shift=3), 0.7, impl="cuda")
    assert same(shifted, expected)
    for buffer, tensor in zip(buffers, teacher, strict=True):
        assert (buffer[:shift] == 7).all()
        assert (buffer[shift + tensor.numel() :] == 7).all()


@without_extension
def test_lists_longer_than_a_launch():
    teacher, student = randoms([3, 130] * 1000, seed=1), randoms([3, 130] * 1000, seed=2)
    expected = lerped(teacher, student, 0.9)
    multi_tensor_ema_(teacher, student, 0.9, impl="cuda")
    assert same(teacher, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_lists_and_empty_tensors(impl):
    multi_tensor_ema_([], [], 0.9, impl=impl)
    teacher = [torch.zeros(0, 5), torch.ones(3), torch.zeros(0)]
    multi_tensor_ema_(teacher, [torch.zeros(0, 5), torch.zeros(3), torch.zeros(0)], 0.5, impl=impl)
    assert teacher[1].tolist() == [0.5] * 3
    multi_tensor_ema_([torch.zeros(0)], [torch.zeros(0)], 0.5, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_tensors_of_any_order_of_dimensions(impl):
    def make(seed):
        a, b, c = randoms([(6, 4), (2, 3, 5, 7), (5, 1, 3)], seed=seed)
        return [a.t(), b.to(memory_format=torch.channels_last), c.transpose(0, 2)]

    teacher, student = make(1), make(2)
    expected = lerped(teacher, student, 0.8)
    multi_tensor_ema_(teacher, student, 0.8, impl=impl)
    assert same(teacher, expected)


@without_extension
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: (torch.zeros(8, 4)[:, :2], torch.ones(8, 2)), "leave gaps or overlap"),
        (lambda: (torch.zeros(4, 8), torch.ones(8, 4).t()), "give both the same layout"),
        (lambda: (torch.zeros(3, dtype=torch.float64), torch.ones(3)), "teacher\\[0\\] must be float32, got float64"),
        (lambda: (torch.zeros(3), torch.ones(3, dtype=torch.float16)), "must be float32 or bfloat16, got float16"),
        (lambda: (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)), "must be float32, got bfloat16"),
    ],
)
def test_what_the_extension_refuses_the_reference_does(build, reason):
    teacher, student = build()
    with pytest.raises(UnsupportedError, match=reason):
        multi_tensor_ema_([teacher], [student], 0.5, impl="cuda")
    assert not teacher.any()  # nothing had happened
    (told,) = explain("multi_tensor_ema_", [teacher], [student], 0.5)["cuda"]
    assert re.search(reason, told)
    multi_tensor_ema_([teacher], [student], 0.5)
    assert torch.equal(teacher, torch.full_like(teacher, 0.5))


def test_wrappers_around_tensors_go_to_the_reference():
    """A distributed tensor, for example, has no memory of its own to point at."""
    from torch.testing._internal.two_tensor import TwoTensor

    teacher, student = (TwoTensor(torch.full((3,), value), torch.full((3,), value)) for value in (0.0, 1.0))
    (told,) = explain("multi_tensor_ema_", [teacher], [student], 0.5)["cuda"]
    assert told.startswith("the tensors are of class TwoTensor")
    with pytest.raises(UnsupportedError, match="class TwoTensor"):
        multi_tensor_ema_([teacher], [student], 0.5, impl="cuda")
    multi_tensor_ema_([teacher], [student], 0.5)
    assert teacher.a.tolist() == teacher.b.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ([torch.zeros(3)], [], "student holds 0 tensors, teacher holds 1"),
        ([], [torch.zeros(3)], "teacher is empty, student holds 1"),
        ([torch.zeros(3)], [torch.zeros(4)], r"student\[0\] has shape \[4\], teacher\[0\] has \[3\]"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], r"student\[0\] is on meta"),
    ],
)
def test_lists_that_do_not_correspond_are_an_error(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        multi_tensor_ema_(teacher, student, 0.5, impl="reference")
    if all(tensor.device.type == "cpu" for tensor in student):
        with pytest.raises(ValueError, match=message):
            multi_tensor_ema_(teacher, student, 0.5)


def test_a_momentum_of_several_numbers_is_an_error():
    with pytest.raises(ValueError, match=r"momentum must be a number or a tensor of one element, got shape \[2\]"):
        multi_tensor_ema_([torch.zeros(1)], [torch.zeros(1)], torch.zeros(2))


@without_extension
def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            teacher = randoms(seed=1)
            multi_tensor_ema_(teacher, randoms(seed=2), 0.99, impl="cuda")
            results.append(teacher)
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


@without_extension
def test_autograd_notices_the_change():
    """A tensor that a graph has saved and that is then changed in place must not go unnoticed."""
    weight = torch.ones(3)
    loss = (torch.ones(3, requires_grad=True) * weight).sum()
    multi_tensor_ema_([weight], [torch.zeros(3)], 0.5, impl="cuda")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_compiles_as_one_graph():
    teacher, student = randoms((5, 33), seed=1), randoms((5, 33), seed=2)
    expected = lerped(teacher, student, 0.9)
    compiled = torch.compile(multi_tensor_ema_, fullgraph=True)
    compiled(teacher, student, torch.tensor(0.9, dtype=torch.float64))
    assert same(teacher, expected)


@without_extension
def test_auto_takes_the_extension_on_the_cpu():
    teacher, student = randoms(seed=1), randoms(seed=2)
    assert explain("multi_tensor_ema_", teacher, student, 0.9)["cuda"] == []
    assert same(teacher, randoms(seed=1))  # asking changes nothing
