import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_ops, evaluate
from ladder_faults import Fault, check_noticed
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.kernels import UnsupportedError, explain
from vitrail.kernels.knn_topk import knn_topk, reference

REFERENCE = "vitrail.kernels.knn_topk.reference"


def problem(queries: int = 7, rows: int = 40, k: int = 5, width: int = 16, ties: bool = False, **options) -> Problem:
    generator = torch.Generator().manual_seed(rows)
    query, bank = (torch.randn(count, width, generator=generator) for count in (queries, rows))
    if ties:  # products of small integers are exact, and many are equal
        query, bank = (tensor.round().clamp(-1, 1) for tensor in (query, bank[:, :2].repeat(1, width // 2)))
    return Problem({"query": query, "bank": bank, "k": k, **options})


def eager(query, bank, k, chunk=None):
    """Sorts all products, stably: the lower row first among equals."""
    values, index = (query @ bank.T).sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_accuracy(dtype, ties):
    result = check_accuracy(knn_topk, eager, problem(ties=ties), dtype)
    assert result["output 0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result["output 1"].dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(0, 9),
    rows=st.integers(1, 300),
    share=st.floats(0, 1),
    chunk=st.sampled_from([None, 1, 4, 100]),
    tile=st.sampled_from([1, 7, 64, 256, 1000]),
    ties=st.booleans(),
)
def test_any_size_in_any_tiles(queries, rows, share, chunk, tile, ties):
    case = problem(queries, rows, max(1, int(share * share * rows)), ties=ties, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROWS", tile)
        check_accuracy(knn_topk, eager, case, torch.float64)


def test_groups_are_searched_where_there_are_many_columns():
    """All of the largest in one group, in its last columns, and in the columns behind the last whole group."""
    generator = torch.Generator().manual_seed(0)
    for columns in (4096, 4097, 5000):
        tile = torch.randn(6, columns, generator=generator, dtype=torch.float64)
        tile[1, 64:72] += 10
        tile[2, -9:] += 10
        tile[3, ::500] += 10
        values, index = reference._best_of_tile(tile, 9)
        assert torch.equal(values, tile.topk(9, dim=1).values)
        assert torch.equal(tile.gather(1, index), values)
        assert all(row.unique().numel() == 9 for row in index)


def test_equals_everywhere_come_in_the_order_of_their_rows(monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 50)
    _, index = knn_topk(torch.ones(3, 4), torch.ones(130, 4), 60, chunk=2)
    assert torch.equal(index, torch.arange(60).expand(3, 60))


def test_nan_counts_as_the_largest():
    bank = torch.eye(50, 8)
    bank[[30, 41, 44]] = torch.nan
    similarity, index = knn_topk(torch.ones(2, 8), bank, 2)
    assert index.tolist() == [[30, 41]] * 2
    assert similarity.isnan().all()


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_matrix_of_all_products_is_never_there(monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 256)
    case = problem(200, 5000, 3, width=4, chunk=10).inputs
    with Largest() as largest:
        got = knn_topk(**case)
    assert largest.elements == case["bank"].numel()  # of a view; a tile holds 2,560, all products a million
    assert torch.equal(got[1], eager(**case)[1])


def test_ops_and_compilation():
    check_ops(knn_topk, problem())
    check_compiled(knn_topk, problem())
    check_compiled(partial(knn_topk), problem(7, 40, 5), problem(9, 50, 6), problem(4, 33, 3))


def test_autocast_changes_nothing_and_nothing_is_differentiable():
    for dtype in (torch.float32, torch.bfloat16):
        case = problem().to(dtype)
        expected = evaluate(knn_topk, case)
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(knn_topk, case)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    similarity, _ = knn_topk(torch.ones(2, 4, requires_grad=True), torch.ones(3, 4), 1)
    assert not similarity.requires_grad


@pytest.mark.parametrize(
    "fault",
    [
        Fault("contested places as topk has them", REFERENCE, "for rows in contested.split(chunk)", "for rows in ()"),
        Fault("equals unordered", REFERENCE, "values, index = _by_row(values, index)", "index = index.flip(1)"),
        Fault("rows of the tile", REFERENCE, "+ start], 1)", "], 1)"),
        Fault("the first tile only", REFERENCE, "range(0, size, ROWS)", "range(0, min(size, ROWS), ROWS)"),
        Fault("columns behind the groups", REFERENCE, "if whole < columns", "if whole < 0"),
        Fault("the worst groups", REFERENCE, "topk(keep, dim=1).indices", "topk(keep, dim=1, largest=False).indices"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(REFERENCE), "ROWS", 450)
            for ties in (False, True):
                check_accuracy(knn_topk, eager, problem(50, 1000, 4, ties=ties), torch.float64)

    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(7, 16).long()}, TypeError, "query must be of a floating dtype"),
        ({"bank": torch.ones(16)}, ValueError, r"bank must have shape \[M, D\], got \[16\]"),
        ({"bank": torch.ones(40, 15)}, ValueError, "equal width, got 16 and 15"),
        ({"bank": torch.ones(40, 16, device="meta")}, ValueError, "query on cpu, bank on meta"),
        ({"k": 41}, ValueError, "k must be between 1 and the 40 rows of bank, got k=41"),
        ({"k": 0}, ValueError, "got k=0"),
        ({"chunk": 0}, ValueError, "chunk must be a positive number of queries at a time, got 0"),
        ({"impl": "triton"}, UnsupportedError, "no 'triton' implementation; it has reference"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    with pytest.raises(error, match=message):
        knn_topk(**{**problem().inputs, **change})


def test_explain():
    assert explain(knn_topk, torch.ones(2, 4), torch.ones(3, 4), 1) == {"reference": []}
