"""The top rung of the ladder for the ops over lists: on a GPU, where the arithmetic must be the CPU's."""

import pytest
import torch
from lists import SIZES, clones, randoms, same

from vitrail.kernels import (
    FusedAdamWEMA,
    FusedLAMB,
    FusedLARS,
    adamw_ema_,
    explain,
    extension,
    multi_tensor_clip_,
    multi_tensor_ema_,
    multi_tensor_norm,
)

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(extension.reasons(CUDA)), reason="needs the compiled extension"
    ),
]

BOTH = (torch.float32, torch.bfloat16)
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}


def to(device, *lists):
    return [[tensor.to(device) for tensor in tensors] for tensors in lists]


def adamw_lists(sizes=SIZES):
    """Parameters, gradients, moments, teachers, both copies and steps."""
    params, grads = randoms(sizes, seed=1), randoms(sizes, seed=2, dtypes=BOTH)
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    copies = [[torch.zeros_like(p, dtype=torch.bfloat16) for p in params] for _ in range(2)]
    return params, grads, *moments, clones(params), *copies, [torch.zeros(()) for _ in params]


def step(lists, **options):
    params, grads, mean, square, teacher, param_copies, teacher_copies, steps = lists
    copies = {"param_copies": param_copies, "teacher_copies": teacher_copies}
    states = (params, grads, mean, square, steps)
    adamw_ema_(*states, teachers=teacher, ema_momentum=0.99, **copies, impl="cuda", **{**OPTIONS, **options})


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_average_has_the_bits_of_the_cpu(shift):
    teacher, student = randoms(seed=1), randoms(seed=2, dtypes=BOTH)
    moved = randoms(seed=1, shift=shift, device=CUDA), randoms(seed=2, dtypes=BOTH, shift=shift, device=CUDA)
    multi_tensor_ema_(teacher, student, 0.996, impl="cuda")
    multi_tensor_ema_(*moved, 0.996, impl="cuda")
    assert same(teacher, [tensor.cpu() for tensor in moved[0]])


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_norms_have_the_bits_of_the_cpu(shift):
    here = multi_tensor_norm(randoms(seed=1, dtypes=BOTH), impl="cuda")
    there = multi_tensor_norm(randoms(seed=1, dtypes=BOTH, shift=shift, device=CUDA), impl="cuda")
    assert torch.equal(here.norms, there.norms.cpu())
    assert torch.equal(here.total, there.total.cpu())


def test_adamw_has_the_bits_of_the_cpu():
    """The coefficients come from a double-precision power; if those differ in the last place, so may the step."""
    here = adamw_lists()
    there = to(CUDA, *here)
    for _ in range(3):
        step(here)
        step(there)
    for mine, other in zip(here, there, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=3e-7 if a.dtype == torch.float32 else 2**-8, atol=1e-9)
    assert same(here[2], [tensor.cpu() for tensor in there[2]])  # no power in the moments
    assert same(here[3], [tensor.cpu() for tensor in there[3]])


def test_lists_longer_than_a_launch():
    sizes = [3, 130] * 1000
    here = adamw_lists(sizes)
    there = to(CUDA, *here)
    step(here)
    step(there)
    for a, b in zip(here[0], there[0], strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=3e-7, atol=1e-9)
    assert all(count == 1 for count in there[7])


def test_twenty_runs_on_two_streams_are_bit_identical():
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    results = []
    for repeat in range(20):
        with torch.cuda.stream(streams[repeat % 2]):
            lists = to(CUDA, *adamw_lists())
            multi_tensor_clip_(lists[1], 1.0)
            step(lists)
        torch.cuda.synchronize()
        results.append([tensor.cpu() for tensors in lists for tensor in tensors])
    assert all(same(results[0], other) for other in results[1:])


def test_a_captured_step_follows_scalars_and_flag():
    lists = to(CUDA, *adamw_lists())
    other = [clones(tensors) for tensors in lists]
    lr, found_inf = torch.tensor(3e-3, dtype=torch.float64, device=CUDA), torch.zeros((), device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # fails on any host synchronisation
        norms = multi_tensor_norm(lists[1], impl="cuda")
        step(lists, lr=lr, found_inf=found_inf, scales=norms.total.reciprocal())
    for rate, flag in ((3e-3, 0.0), (1e-3, 1.0), (2e-3, 0.0)):
        lr.fill_(rate)
        found_inf.fill_(flag)
        graph.replay()
        scales = multi_tensor_norm(other[1], impl="cuda").total.reciprocal()
        step(other, lr=rate, found_inf=found_inf, scales=scales)
    torch.cuda.synchronize()
    assert all(same(mine, theirs) for mine, theirs in zip(lists, other, strict=True))
    assert all(count == 2 for count in lists[7])


GUARDED = {"max_grad_norm": 1.0, "skip_nonfinite": True, "impl": "cuda"}
OPTIMIZERS = {
    "AdamW": lambda params, lr: FusedAdamWEMA(
        params, **{**OPTIONS, "lr": lr}, teacher={param: param.detach().clone() for param in params}, **GUARDED
    ),
    # With factors of their own for vectors and matrices, which are two calls.
    "LARS": lambda params, lr: FusedLARS(params, lr, weight_decay=1e-4, clip_per_tensor=True, **GUARDED),
    "LARS, parts": lambda params, lr: FusedLARS(params, lr, weight_decay=1e-4, variant="lightly", **GUARDED),
    "LAMB": lambda params, lr: FusedLAMB(params, lr, **GUARDED),
    "LAMB, bf16 moments": lambda params, lr: FusedLAMB(params, lr, state_dtype=torch.bfloat16, **GUARDED),
}
SHAPES = ((5,), (33, 65), (20_000,), (3, 16_384), (0, 2))


def optimizing(name, device, lr=3e-3):
    """Parameters with gradients, and their optimiser."""
    params = [torch.nn.Parameter(tensor) for tensor in randoms(SHAPES, seed=1, device=device)]
    for param, grad in zip(params, randoms(SHAPES, seed=2, device=device), strict=True):
        param.grad = grad
    return params, OPTIMIZERS[name](params, lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_waits_for_the_device(name):
    """Fails by what PyTorch raises at the first synchronisation."""
    _, optimizer = optimizing(name, CUDA)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_step_as_on_the_cpu(name):
    """Norms have the same bits; ratios and powers come from double-precision functions that may differ in the last."""
    here, there = (optimizing(name, device) for device in ("cpu", CUDA))
    for _ in range(3):
        here[1].step()
        there[1].step()
    for a, b in zip(here[0], there[0], strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6 if "bf16" not in name else 2**-8, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_optimiser_follows_the_rate_and_the_flag(name):
    lr, found_inf = torch.tensor(3e-3, dtype=torch.float64, device=CUDA), torch.zeros((), device=CUDA)
    captured, eager = optimizing(name, CUDA, lr), optimizing(name, CUDA)
    captured[1].found_inf = found_inf
    for _, optimizer in (captured, eager):
        optimizer.step()  # makes the states
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):  # fails on any host synchronisation
        captured[1].step()
    for rate, flag in ((3e-3, 0.0), (0.1, 1.0), (1e-3, 0.0)):
        lr.fill_(rate)
        found_inf.fill_(flag)
        graph.replay()
        if not flag:
            eager[1].param_groups[0]["lr"] = rate
            eager[1].step()
    torch.cuda.synchronize()
    assert same(captured[0], eager[0])


def test_auto_takes_the_extension():
    lists = to(CUDA, *adamw_lists())
    assert explain("multi_tensor_ema_", lists[4], lists[0], 0.5)["cuda"] == []
    assert explain("adamw_ema_", *lists[:4], lists[7], lr=0.1)["cuda"] == []


def test_lists_on_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"student\[0\] is on cpu"):
        multi_tensor_ema_([torch.zeros(3, device=CUDA)], [torch.zeros(3)], 0.5)
