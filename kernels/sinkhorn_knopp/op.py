"""Sinkhorn-Knopp on the row pass of the softmax, or on logits that are there already."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .. import checks
from ..features import check_temperature, product_dtype
from ..groups import check_group, rank_and_size
from ..passes import as_scale, compute_dtype
from ..prototype_cross_entropy.weight import prototype_weight
from ..registry import Op, check_impl, register
from ..softmax_row_pass.op import OP as ROW_PASS
from ..softmax_row_pass.op import row_pass

ABSENT = -1e8  # log-scale of a row that does not count: below any other, and finite, as a batch may hold no other


def _check(name: str, rows: torch.Tensor, temperature: float, iterations: int, group: dist.ProcessGroup | None) -> None:
    """Raises unless the arguments that both forms share are in order."""
    checks.check_floating(name, rows)
    checks.check_shape(name, rows, ("B", "K" if name == "logits" else "d"))
    check_temperature("temperature", temperature)
    check_group(group)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if rows.shape[0] == 0 and rank_and_size(group)[1] == 1:
        raise ValueError(f"{name} has no row: there is nothing to balance; skip the empty batch")


def _check_center(
    features: torch.Tensor,
    prototypes: torch.Tensor | torch.nn.Module,
    temperature: float,
    iterations: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the public arguments and returns features and prototypes in the dtype of the products."""
    _check("features", features, temperature, iterations, group)
    weight = prototype_weight("prototypes", prototypes)
    checks.check_shape("prototypes", weight, ("K", features.shape[1]))
    checks.check_same_device(features=features, prototypes=weight)
    dtype = product_dtype(features)
    return features.detach().to(dtype), weight.detach().to(dtype)


def _bind(
    features: torch.Tensor,
    prototypes: torch.Tensor | torch.nn.Module,
    temperature: float,
    iterations: int = 3,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments of the form from features and returns those of one of its row passes."""
    features, weight = _check_center(features, prototypes, temperature, iterations, group)
    bias = weight.new_zeros(weight.shape[0], dtype=compute_dtype(features))
    return features, weight, None, bias, as_scale(1 / temperature, features), [], False, False


OP = register(Op(name="sinkhorn_knopp", bind=_bind, implementations=ROW_PASS.implementations))


def _alternate(
    of_rows: Callable[[torch.Tensor], torch.Tensor],
    of_columns: Callable[[torch.Tensor | None], torch.Tensor],
    iterations: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Runs the iterations on the logarithms of the scaling vectors.

    Constant factors cancel: neither the matrix's sum nor its sizes are ever needed, so each iteration takes one
    K-vector over the ranks. In logarithms nothing overflows either, whatever the logits.

    Args:
        of_rows: From the columns' log-scales [K] the log-sum-exp of each row [B].
        of_columns: From the rows' log-scales [B], or None for 0, the log-sum-exp of each column [K].
        iterations: How many.
        group: Ranks that hold further rows.

    Returns:
        The log-scales of the columns. The last step, the rows', is left to the softmax that takes these.
    """
    columns: torch.Tensor | None = None
    for _ in range(iterations):
        rows = None if columns is None else -of_rows(columns)
        columns = -_over_ranks(of_columns(rows), group)
        columns = columns - columns.mean()  # or the two vectors drift apart by log(K / B) in each iteration
    assert columns is not None
    return columns


def _over_ranks(lse: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns the log-sum-exp over the ranks of each element of [K]."""
    if rank_and_size(group)[1] == 1:
        return lse
    # One number is subtracted from all, so that the sums stay in range; float64 holds what lies e^700 below it. What
    # lies lower still is taken for that: no logarithm of 0 shall make the rest of the matrix NaN.
    peak = lse.max()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    total = (lse - peak).double().exp()
    dist.all_reduce(total, group=group)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log().to(lse.dtype) + peak


@torch.no_grad()
def sinkhorn_knopp(
    logits: torch.Tensor,
    temperature: float,
    iterations: int = 3,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Teacher probabilities whose columns are balanced: the targets of SwAV and DINOv2, from logits.

    Alternately normalises the columns of exp(logits / temperature) over all samples of all ranks, and its rows (Cuturi
    2013, arXiv 1306.0895; Caron et al. 2020, arXiv 2006.09882; Oquab et al. 2023, arXiv 2304.07193). The result equals
    the official loops', which divide a matrix in memory by its sums again and again; here two vectors are iterated.

    Args:
        logits: [B, K] floating; ranks may hold different numbers of rows, some of them none.
        temperature: Divisor of the logits, finite and positive.
        iterations: Number of alternations.
        group: Process group over whose rows the columns are balanced; None for this process alone.

    Returns:
        [B, K] float32, or float64 for float64 logits; every row sums to 1.

    Raises:
        TypeError: A dtype or the group does not fit.
        ValueError: A shape does not fit, the batch is empty, or temperature or iterations are out of range.
    """
    _check("logits", logits, temperature, iterations, group)
    scaled = logits.detach().to(compute_dtype(logits)) / temperature
    balanced = scaled.sub_(_over_ranks(scaled.logsumexp(0), group)).softmax(1)

    # The first iteration, in logarithms, takes logits of any size. From here on they are not needed: column sums lie
    # between 1 / K and B, since what is divided by its rows' sums, of K numbers up to 1, had columns that sum to 1.
    columns = balanced.new_ones(balanced.shape[1])
    rows = balanced.new_ones(balanced.shape[0])
    with torch.autocast(logits.device.type, enabled=False):  # which would round the products
        for _ in range(iterations - 1):
            total = balanced.T @ rows
            if rank_and_size(group)[1] > 1:
                dist.all_reduce(total, group=group)
            # In proportion, else they would grow by K / B each time. Over ranks a prototype may be too far below the
            # largest logit: it is left out.
            columns = torch.where(total > 0, total.mean() / total, 0)
            rows = 1 / (balanced @ columns)
    return balanced.mul_(columns).mul_(rows[:, None])


@torch.no_grad()
def sinkhorn_center(
    features: torch.Tensor,
    prototypes: torch.Tensor | torch.nn.Module,
    temperature: float,
    iterations: int = 3,
    *,
    group: dist.ProcessGroup | None = None,
    valid: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Sinkhorn-Knopp from features: the centre with which a softmax yields the balanced probabilities.

    As the last step normalises rows, the result of `sinkhorn_knopp` is a softmax whose logits are shifted by a constant
    for each prototype. That constant is all that is computed, from row passes over the features and over the
    prototypes: `sinkhorn_knopp(features Wᵀ, t) = softmax((features Wᵀ - center) / t)`. Give it to
    `prototype_cross_entropy` as its `center`, and no `[B, K]` matrix is ever in memory.

    Args:
        features: [B, d] teacher features that enter the last layer; ranks may hold different numbers of rows.
        prototypes: [K, d], or the linear layer without bias that holds them.
        temperature: Divisor of the logits, finite and positive.
        iterations: Number of alternations.
        group: Process group over whose rows the prototypes are balanced; None for this process alone.
        valid: [B] bool, the rows that count: others, which fill up a buffer of fixed length, change nothing. None
            counts all.
        impl: `auto`, `triton` or `reference`.

    Returns:
        [K] float32, or float64 for float64 features.

    Raises:
        TypeError: A dtype or the group does not fit, or the prototypes are neither a matrix nor a layer.
        ValueError: A shape or device does not fit, the batch is empty, prototypes have a bias, or temperature or
            iterations are out of range.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    features, weight = _check_center(features, prototypes, temperature, iterations, group)
    scale = as_scale(1 / temperature, features)
    padding = None
    if valid is not None:
        checks.check_shape("valid", valid, (features.shape[0],))
        checks.check_same_device(features=features, valid=valid)
        padding = torch.where(valid, 0.0, ABSENT).to(compute_dtype(features))

    def lse(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = row_pass(queries, keys, None, bias, scale, [], False, False, impl)[0]
        return result

    def of_columns(rows: torch.Tensor | None) -> torch.Tensor:
        if padding is not None:
            rows = padding if rows is None else rows + padding
        return lse(weight, features, rows)

    columns = _alternate(
        lambda columns: lse(features, weight, columns),
        of_columns,
        iterations,
        group,
    )
    return columns * -temperature
