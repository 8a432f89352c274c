"""Sinkhorn-Knopp by scaling vectors against the loop over a matrix in memory."""

import importlib
import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_compiled, kernel_device
from ladder_faults import Fault, check_noticed
from torch import nn
from training import finish, start

from vitrail.kernels import explain, prototype_cross_entropy, registry, sinkhorn_center, sinkhorn_knopp
from vitrail.kernels.registry import UnsupportedError

SOURCE = "vitrail.kernels.sinkhorn_knopp.op"


def loop(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Divides a matrix by its sums again and again, as published; float64 keeps its exponentials finite."""
    matrix = (logits.double() / temperature).exp().T
    matrix /= matrix.sum()
    count, batch = matrix.shape
    for _ in range(iterations):
        matrix /= matrix.sum(1, keepdim=True)
        matrix /= count
        matrix /= matrix.sum(0, keepdim=True)
        matrix /= batch
    return (matrix * batch).T


def features(rows: int, count: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(rows + count))
    return randn(rows, width), randn(count, width)


def from_features(teacher, prototypes, temperature, iterations=3, *, impl="auto", center=sinkhorn_center):
    """The probabilities that the centre stands for."""
    shift = center(teacher, prototypes, temperature, iterations, impl=impl)
    logits = teacher.to(shift.dtype) @ prototypes.to(shift.dtype).T
    return ((logits - shift) / temperature).softmax(1)


def check(sinkhorn=sinkhorn_knopp, center=sinkhorn_center) -> None:
    """Both forms over sizes, temperatures and iterations, to rounding in float64."""
    for rows, count, temperature, iterations in [(33, 65, 0.5, 3), (7, 3, 2.0, 1), (65, 130, 0.3, 5)]:
        teacher, prototypes = (matrix.double() for matrix in features(rows, count))
        logits = teacher @ prototypes.T
        expected = loop(logits, temperature, iterations)
        torch.testing.assert_close(sinkhorn(logits, temperature, iterations), expected, rtol=1e-10, atol=1e-12)
        got = from_features(teacher, prototypes, temperature, iterations, center=center)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_both_forms_equal_the_loop():
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1), (2, 33), (65, 7), (130, 65)])
def test_logits_in_any_dtype(sizes, dtype):
    logits = torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)
    for temperature, iterations in [(0.05, 3), (0.07, 1), (1.0, 10)]:
        got = sinkhorn_knopp(logits, temperature, iterations)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), loop(logits, temperature, iterations), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_in_any_dtype(dtype, impl):
    for rows, count in [(1, 1), (3, 33), (33, 2), (40, 65)]:
        teacher, prototypes = (matrix.to(kernel_device(), dtype) for matrix in features(rows, count))
        expected = loop(teacher.double() @ prototypes.double().T, 0.8)
        got = from_features(teacher, prototypes, 0.8, impl=impl)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), count=st.integers(1, 12), temperature=st.floats(0.05, 5), iterations=st.integers(1, 6))
def test_any_problem(rows, count, temperature, iterations):
    teacher, prototypes = (matrix.double() for matrix in features(rows, count, 3))
    logits = teacher @ prototypes.T
    expected = loop(logits, temperature, iterations)
    torch.testing.assert_close(sinkhorn_knopp(logits, temperature, iterations), expected, rtol=1e-9, atol=1e-12)
    got = from_features(teacher, prototypes, temperature, iterations)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_that_do_not_count_change_nothing(impl):
    teacher, prototypes = (matrix.to(kernel_device()) for matrix in features(21, 33))
    valid = torch.arange(21, device=teacher.device) % 4 != 1
    shift = sinkhorn_center(teacher[valid], prototypes, 0.8, impl=impl)
    got = sinkhorn_center(teacher, prototypes, 0.8, valid=valid, impl=impl)
    torch.testing.assert_close(got, shift, rtol=1e-5, atol=1e-5)
    assert (got - sinkhorn_center(teacher, prototypes, 0.8, impl=impl)).abs().max() > 1e-3
    assert sinkhorn_center(teacher, prototypes, 0.8, valid=valid & False, impl=impl).isfinite().all()
    with pytest.raises(ValueError, match="valid"):
        sinkhorn_center(teacher, prototypes, 0.8, valid=valid[1:], impl=impl)


def test_logits_of_any_size_stay_finite():
    logits = 1000 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    got = sinkhorn_knopp(logits, 0.07)
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(1), torch.ones(16))
    teacher, prototypes = features(16, 40)
    assert sinkhorn_center(1000 * teacher, prototypes, 0.07).isfinite().all()


def test_a_constant_changes_nothing():
    logits = torch.randn(9, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_knopp(logits + 700, 0.07), sinkhorn_knopp(logits, 0.07))


def test_many_iterations_balance_the_prototypes():
    teacher, prototypes = features(40, 8)
    target = sinkhorn_knopp(teacher @ prototypes.T, 1.0, 200)
    torch.testing.assert_close(target.sum(1), torch.ones(40))
    torch.testing.assert_close(target.sum(0), torch.full((8,), 40 / 8), rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_the_centre_makes_the_loss_that_of_the_balanced_targets(impl):
    teacher, theirs = (matrix.to(kernel_device()) for matrix in features(20, 33))
    student, ours = (matrix.to(kernel_device()) for matrix in features(20, 33, 6))
    center = sinkhorn_center(teacher, theirs, 0.8)
    options = {"student_temp": 0.5, "teacher_temp": 0.8, "center": center, "impl": impl}
    got = prototype_cross_entropy(student, ours, teacher, theirs, **options)
    target = loop(teacher @ theirs.T, 0.8)
    expected = -(target * (student.double() @ ours.double().T / 0.5).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "new", "old"])
def test_layers_hold_the_prototypes(kind):
    teacher, weight = features(9, 17)
    layer = nn.Linear(8, 17, bias=False)
    layer.weight.data.copy_(weight)
    if kind == "old":
        layer = nn.utils.weight_norm(layer)
        layer.weight_g.data.mul_(2)
        weight = 2 * weight
    elif kind == "new":
        layer = nn.utils.parametrizations.weight_norm(layer)
    got = sinkhorn_center(teacher, layer, 0.7)
    assert not got.requires_grad
    torch.testing.assert_close(got, sinkhorn_center(teacher, weight, 0.7))


def test_autocast_rounds_the_operands_and_nothing_else():
    teacher, prototypes = features(20, 33)
    expected = sinkhorn_center(teacher.bfloat16().float(), prototypes.bfloat16().float(), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        got = sinkhorn_center(teacher, prototypes, 0.7)
        balanced = sinkhorn_knopp(teacher, 0.7)
    assert got.dtype == balanced.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    assert torch.equal(balanced, sinkhorn_knopp(teacher, 0.7))


def test_compilation():
    logits = [torch.randn(rows, 9) for rows in (5, 7, 8)]
    check_compiled(sinkhorn_knopp, *(Problem({"logits": matrix, "temperature": 0.07}) for matrix in logits))
    pairs = [features(rows, 9) for rows in (5, 7, 8)]
    names = "features", "prototypes"
    cases = [Problem({**dict(zip(names, pair, strict=True)), "temperature": 0.7}) for pair in pairs]
    check_compiled(sinkhorn_center, cases[0])
    check_compiled(sinkhorn_center, *cases)


def test_explain_and_reasons():
    teacher, prototypes = (matrix.to(kernel_device()) for matrix in features(9, 17))
    assert explain("sinkhorn_knopp", teacher, prototypes, 0.7) == {"triton": [], "reference": []}
    with pytest.raises(UnsupportedError, match="float64"):
        sinkhorn_center(teacher.double(), prototypes.double(), 0.7, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        sinkhorn_center(teacher, prototypes, 0.7, impl="fast")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(2, 3).long()}, TypeError, "logits must be of a floating dtype"),
        ({"logits": torch.ones(2, 3, 4)}, ValueError, r"logits must have shape \[B, K\], got \[2, 3, 4\]"),
        ({"logits": torch.ones(0, 3)}, ValueError, "logits has no row: there is nothing to balance"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite positive number, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite positive number"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_knopp(**{"logits": torch.ones(2, 3), "temperature": 0.07, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(0, 4)}, ValueError, "features has no row"),
        ({"features": torch.ones(4)}, ValueError, r"features must have shape \[B, d\], got \[4\]"),
        ({"prototypes": torch.ones(9, 5)}, ValueError, r"prototypes must have shape \[K, 4\], got \[9, 5\]"),
        ({"prototypes": nn.Linear(4, 9)}, ValueError, "prototypes has a bias"),
        ({"prototypes": "layer"}, TypeError, "prototypes must be a matrix"),
        ({"iterations": -1}, ValueError, "iterations must be at least 1, got -1"),
    ],
)
def test_errors_of_the_centre(change, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_center(**{"features": torch.ones(2, 4), "prototypes": torch.ones(9, 4), "temperature": 0.07, **change})


@pytest.mark.parametrize(
    "fault",
    [
        Fault("one iteration less", SOURCE, "in range(iterations)", "in range(max(iterations - 1, 1))"),
        Fault("rows of an earlier iteration", SOURCE, "-of_rows(columns)", "-of_rows(0 * columns)"),
        Fault("columns from nothing", SOURCE, "of_columns(rows), group)", "of_columns(None), group)"),
        Fault("centre with the wrong sign", SOURCE, "columns * -temperature", "columns * temperature"),
        Fault("temperature missing in the centre", SOURCE, "columns * -temperature", "-columns"),
        Fault("temperature ignored", SOURCE, "scale = as_scale(1 / temperature", "scale = as_scale(1"),
        Fault("columns missing in the result", SOURCE, "balanced.mul_(columns)", "balanced"),
        Fault("rows missing in the result", SOURCE, ".mul_(rows[:, None])", ""),
        Fault("one iteration less on logits", SOURCE, "in range(iterations - 1)", "in range(iterations - 2)"),
        Fault("rows ignored in the columns' sums", SOURCE, "balanced.T @ rows", "balanced.sum(0)"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))  # the twin registers its op

    def run() -> None:
        module = importlib.import_module(SOURCE)
        check(module.sinkhorn_knopp, module.sinkhorn_center)

    check_noticed(fault, tmp_path, run)


# --- several ranks ---------------------------------------------------------------------------------------------------

RANKS = """
import json, sys
import torch
import torch.distributed as dist
from vitrail.kernels import sinkhorn_center, sinkhorn_knopp

dist.init_process_group("gloo")
rank = dist.get_rank()
inputs = torch.load(sys.argv[1])
reduced = []
plain = dist.all_reduce
dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor.numel()), plain(tensor, *args, **kwargs))[1]
pair = dist.new_group([0, 1])
results = {}
for name, group, split in (("three", dist.group.WORLD, [20, 0, 13]), ("two", pair, [6, 27])):
    if rank >= len(split):
        continue
    reduced.clear()
    teacher = inputs["teacher"].split(split)[rank]
    target = sinkhorn_knopp(teacher @ inputs["prototypes"].T, 0.7, group=group)
    collectives = list(reduced)
    centre = sinkhorn_center(teacher, inputs["prototypes"], 0.7, group=group)
    center_collectives = reduced[len(collectives):]
    far = sinkhorn_knopp(1000 * teacher @ inputs["prototypes"].T, 0.07, group=group)
    parts = [None] * len(split)
    dist.all_gather_object(parts, target.tolist(), group=group)
    results[name] = {
        "target": sum(parts, []), "centre": centre.tolist(), "collectives": collectives,
        "center_collectives": center_collectives,
        "finite": bool(far.isfinite().all()),
    }
if rank == 0:
    json.dump(results, open(sys.argv[2], "w"))
dist.destroy_process_group()
"""


@pytest.mark.launch
def test_ranks_with_unequal_rows_balance_as_one_process_would(tmp_path):
    teacher, prototypes = features(33, 17)
    torch.save({"teacher": teacher, "prototypes": prototypes}, tmp_path / "inputs.pt")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    finish(start(script, str(tmp_path / "inputs.pt"), str(tmp_path / "result.json"), ranks=3))
    for result in json.loads((tmp_path / "result.json").read_text()).values():
        expected = sinkhorn_knopp(teacher @ prototypes.T, 0.7)
        torch.testing.assert_close(torch.tensor(result["target"]), expected, rtol=1e-5, atol=1e-6)
        center = sinkhorn_center(teacher, prototypes, 0.7)
        torch.testing.assert_close(torch.tensor(result["centre"]), center, rtol=1e-5, atol=1e-5)
        assert result["collectives"] == [1, 17, 17, 17]  # a K-vector for each iteration and a scalar for the first
        assert result["center_collectives"] == [1, 17] * 3
        assert result["finite"]
