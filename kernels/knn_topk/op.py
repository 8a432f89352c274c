"""Nearest neighbours in a bank: the op, its registration and the public function."""

from typing import Any

import torch

from .. import checks
from ..library import define
from ..registry import Implementation, Op, check_impl, register
from .reference import QUERIES, compute_dtype


def _bind(query: torch.Tensor, bank: torch.Tensor, k: int, *, chunk: int | None = None) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    for name, tensor, rows in (("query", query, "N"), ("bank", bank, "M")):
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, (rows, "D"))
    checks.check_same_device(query=query, bank=bank)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(f"query and bank must be of equal width, got {query.shape[1]} and {bank.shape[1]}")
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"k must be between 1 and the {bank.shape[0]} rows of bank, got k={k}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a positive number of queries at a time, got {chunk}")
    return query.detach(), bank.detach(), k, QUERIES if chunk is None else chunk


def _fake(query: torch.Tensor, bank: torch.Tensor, k: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    similarity = query.new_empty((query.shape[0], k), dtype=compute_dtype(query, bank))
    return similarity, query.new_empty((query.shape[0], k), dtype=torch.int64)


OP = register(
    Op(
        name="knn_topk",
        bind=_bind,
        implementations=(
            Implementation(
                name="reference",
                module="vitrail.kernels.knn_topk.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes, any stride, any device",
            ),
        ),
    )
)
_forward = define(OP, "forward", "Tensor query, Tensor bank, SymInt k, SymInt chunk", "(Tensor, Tensor)", _fake)


def knn_topk(
    query: torch.Tensor, bank: torch.Tensor, k: int, *, chunk: int | None = None, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k rows of a bank with the largest inner product with each query, without the matrix of all products.

    The search of the k-NN protocol (Wu et al. 2018, arXiv 1805.01978). The products are plain: normalise both sides
    first, once, for cosine similarity. Nothing here is differentiable.

    Args:
        query: [N, D], floating.
        bank: [M, D], floating.
        k: Number of rows to find, 1 to M.
        chunk: Queries at a time, by default 512. Memory beyond the inputs: O(N k), 16,384 similarities for each
            query of a chunk, and 16,384 rows of the bank in float32 if they are in another dtype.
        impl: `auto` or `reference`.

    Returns:
        Similarities [N, k], largest first: float32 whatever the autocast state, float64 if an input is. Rows of the
        bank, int64 [N, k]; of equal similarities the lower row comes first. NaN counts as the largest.

    Raises:
        TypeError: An input is not floating.
        ValueError: A shape or a device does not fit, k exceeds the bank, or chunk is not positive.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    result: tuple[Any, ...] = _forward(*_bind(query, bank, k, chunk=chunk), impl)
    return result[0], result[1]
