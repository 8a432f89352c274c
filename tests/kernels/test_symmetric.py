"""On the CPU the passes of a matrix with itself compute half of the logits: the results are those of all."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder_faults import Fault, check_noticed

from vitrail.kernels import nt_xent_loss, softmax_col_pass, softmax_row_pass, symmetric

SYMMETRIC = "vitrail.kernels.symmetric"
REFERENCES = ("vitrail.kernels.softmax_row_pass.reference", "vitrail.kernels.softmax_col_pass.reference")


def features(rows: int = 37, width: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64))
    return values.to(dtype)


def dense(z: torch.Tensor, scale: float, exclude: tuple[int, ...], weight: torch.Tensor | None = None):
    """Log-sum-exps, mean values, and the transposed softmax times the weighted rows."""
    logits = scale * z @ z.T
    if exclude:
        logits.fill_diagonal_(-torch.inf)
    probabilities = logits.softmax(1)
    terms = z if weight is None else z * weight[:, None]
    return logits.logsumexp(1), probabilities @ z, probabilities.T @ terms


def both(z: torch.Tensor, scale: float, exclude: tuple[int, ...], weight: torch.Tensor | None = None):
    lse, mean = softmax_row_pass(z, z, scale=scale, exclude=exclude, bounded=True)
    return lse, mean, softmax_col_pass(z, z, lse, weight=weight, scale=scale, exclude=exclude)


def check(rows: int = 37, scale: float = 9.0, exclude: tuple[int, ...] = (0,), chunk: int = 16) -> None:
    z = features(rows)
    weight = torch.linspace(-1, 1, rows, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(symmetric.CHUNK_BYTES, "cpu", chunk * rows * 8)
        got = both(z, scale, exclude, weight)
    for value, expected in zip(got, dense(z, scale, exclude, weight), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 90),
    scale=st.floats(0.1, 55),
    exclude=st.sampled_from([(), (0,)]),
    chunk=st.integers(1, 100),
)
def test_both_passes_of_any_size(rows, scale, exclude, chunk):
    check(rows, scale, exclude, chunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    z = features(130, 64, dtype)
    for value, expected in zip(both(z, 10.0, (0,)), dense(z.double(), 10.0, (0,)), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


def test_it_is_taken_where_it_applies_and_only_there(monkeypatch):
    calls = []
    for name, module in zip(("row_pass", "col_pass"), map(importlib.import_module, REFERENCES), strict=True):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=plain: calls.append(n) or f(*a))
    z = features().requires_grad_()
    nt_xent_loss(z, z + 0.1).backward()
    assert calls == ["row_pass", "col_pass"]
    calls.clear()
    z = z.detach()
    softmax_row_pass(z, z, exclude=(0,))  # not bounded
    softmax_row_pass(z, z.clone(), bounded=True)
    softmax_row_pass(z, z, exclude=(1,), bounded=True)
    softmax_row_pass(z, z, z + 1, bounded=True)
    softmax_row_pass(z, z, bias=z[:, 0].contiguous(), bounded=True)
    softmax_col_pass(z, z, z[:, 0].contiguous(), z + 1)
    softmax_row_pass(z[:20], z[17:], exclude=(0,), bounded=True)
    assert calls == []


def test_log_sum_exps_far_apart_take_the_ordinary_way():
    z = features(20, 3)
    z[3] *= 30  # its log-sum-exp is hundreds above the others
    lse, _ = softmax_row_pass(z, z, scale=1.0, exclude=(0,))
    assert symmetric.col_pass(z, 40 * lse, None, torch.tensor(40.0, dtype=torch.float64), [0]) is None
    lse, _ = softmax_row_pass(z, z, scale=40.0, exclude=(0,))
    torch.testing.assert_close(softmax_col_pass(z, z, lse, scale=40.0, exclude=(0,)), dense(z, 40.0, (0,))[2])


@pytest.mark.parametrize("row", [torch.nan, -torch.inf])
def test_log_sum_exps_that_are_not_finite_take_the_ordinary_way(row):
    z = features(5)
    lse = torch.full((5,), row, dtype=torch.float64)
    assert symmetric.col_pass(z, lse, None, torch.ones((), dtype=torch.float64), []) is None


@pytest.mark.parametrize(
    "fault",
    [
        Fault("the other half's sums are missing", SYMMETRIC, "total[stop:] += right.sum(0)", "pass", REFERENCES),
        Fault("the diagonal block counts twice", SYMMETRIC, "right = weights[:, stop - start :]",
              "right = weights[:, : weights.shape[1] - stop + start]", REFERENCES),
        Fault("the other half's means are missing", SYMMETRIC,
              "output[stop:].addmm_(right.T, features[start:stop])", "pass", REFERENCES),
        Fault("the other half's columns are missing", SYMMETRIC,
              "output[stop:].addmm_(shared[:, stop - start :].T, terms[start:stop])", "pass", REFERENCES),
        Fault("the rows' halves are not given back", SYMMETRIC, "(half - half_way).exp_()", "half.exp_()", REFERENCES),
        Fault("weights are ignored", SYMMETRIC, "factor if weight is None else factor * weight", "factor", REFERENCES),
        Fault("a row meets itself", SYMMETRIC, "logits.diagonal().fill_(-torch.inf)", "pass", REFERENCES),
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_planted_faults_are_noticed(fault, tmp_path):
    check_noticed(fault, tmp_path, check)
