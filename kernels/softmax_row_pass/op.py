"""The row pass: the op, its registration and the public function."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from ..library import define
from ..passes import as_scale, check_exclude, check_no_gradient, check_problem, check_rows, compute_dtype
from ..registry import Implementation, Op, check_impl, register

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 512


def _bind(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    exclude: Sequence[int] = (),
    bounded: bool = False,
    output: bool = True,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    check_problem(queries, keys, bias, values=values)
    if values is not None:
        check_rows("values", values, None, queries)
        checks.check_shape("values", values, (keys.shape[0], "dv"))
    tensors = {"queries": queries, "keys": keys, "values": values, "bias": bias}
    check_no_gradient("softmax_row_pass", **tensors)
    return queries, keys, values, bias, as_scale(scale, queries), check_exclude(exclude), bounded, output


def triton_reasons(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: Any,
) -> list[str]:
    """Returns why the Triton kernel cannot run a row pass with these arguments."""
    widths = {"queries": queries.shape[1]} | ({} if values is None else {"values": values.shape[1]})
    return (
        checks.triton_reasons(queries.device)
        + [
            f"{name} are {width} wide; the kernel holds a tile of whole rows and takes {MAX_WIDTH} at most"
            for name, width in widths.items()
            if width > MAX_WIDTH
        ]
        + checks.dtype_reasons(DTYPES, queries=queries.dtype, bias=None if bias is None else bias.dtype)
        + checks.last_dim_reasons(queries=queries, keys=keys, values=values, bias=bias)
    )


OP = register(
    Op(
        name="softmax_row_pass",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.softmax_row_pass.kernel",
                reasons={"forward": triton_reasons},
                supports=f"fp16, bf16, fp32 up to {MAX_WIDTH} wide; any number of rows and keys",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.softmax_row_pass.reference",
                reasons={"forward": lambda *_: []},
                supports="also fp64, any width and any stride; chunks of rows, no matrix of all logits",
            ),
        ),
    )
)


def _fake(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: list[int],
    bounded: bool,
    need_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, rows = compute_dtype(queries), queries.shape[0]
    width = (keys if values is None else values).shape[1]
    return queries.new_empty(rows, dtype=dtype), queries.new_empty((rows if need_output else 0, width), dtype=dtype)


row_pass = define(
    OP,
    "forward",
    "Tensor queries, Tensor keys, Tensor? values, Tensor? bias, Tensor scale, int[] exclude, bool bounded, "
    "bool need_output",
    "(Tensor, Tensor)",
    _fake,
)


def softmax_row_pass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    exclude: Sequence[int] = (),
    bounded: bool = False,
    output: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of every row of `scale queries keysᵀ + bias`, and its softmax times the values.

    The matrix of logits is never in memory. Attention without heads, if you like; and the forward of every softmax
    loss over inner products, for whose gradient see `softmax_col_pass`.

    Args:
        queries: [N, d] float16, bfloat16, float32 or float64.
        keys: [M, d] of the same dtype.
        values: [M, dv] of the same dtype; None takes the keys, which then are read once.
        scale: Factor of the inner products, 1 / temperature; a 0-d tensor where it changes from step to step.
        bias: [M] added to the logits of each key, after the scale; None for none.
        exclude: At most two diagonals to leave out: row i does without key i + offset, for each offset. `(0,)` leaves
            out a row's own key, `(first row of this rank,)` likewise among gathered keys.
        bounded: Promises that every logit lies in [-60, 60]. Then no maximum is searched for or subtracted, which
            saves a pass over the tile. Cosines at a temperature of 1/60 or more qualify. Beyond, sums overflow.
        output: Whether the second result is wanted.
        impl: `auto`, `triton` or `reference`.

    Returns:
        lse [N] and output [N, dv] (or [0, dv]), float32, float64 for float64 queries. A row without any key has
        lse -inf and output 0.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or a device does not fit, or a gradient would have to flow through.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(queries, keys, values, scale=scale, bias=bias, exclude=exclude, bounded=bounded, output=output)
    lse, result = row_pass(*arguments, impl)
    return lse, result
