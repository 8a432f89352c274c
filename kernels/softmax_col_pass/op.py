"""The column pass: the op, its registration and the public function."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from ..library import define
from ..passes import as_scale, check_exclude, check_no_gradient, check_problem, check_rows, compute_dtype
from ..registry import Implementation, Op, check_impl, register
from ..softmax_row_pass.op import DTYPES, MAX_WIDTH


def _bind(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    exclude: Sequence[int] = (),
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    check_problem(queries, keys, bias, lse=lse, x=x, weight=weight)
    rows = queries.shape[0]
    for name, vector in (("lse", lse), ("weight", weight)):
        if vector is not None:
            checks.check_floating(name, vector)
            checks.check_shape(name, vector, (rows,))
    if x is not None:
        check_rows("x", x, None, queries)
        checks.check_shape("x", x, (rows, "dx"))
    tensors = {"queries": queries, "keys": keys, "lse": lse, "x": x, "weight": weight, "bias": bias}
    check_no_gradient("softmax_col_pass", **tensors)
    return queries, keys, lse, x, weight, bias, as_scale(scale, queries), check_exclude(exclude)


def _triton_reasons(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: Any,
) -> list[str]:
    widths = {"queries": queries.shape[1]} | ({} if x is None else {"x": x.shape[1]})
    vectors = {"lse": lse, "weight": weight, "bias": bias}
    return (
        checks.triton_reasons(queries.device)
        + [
            f"{name} is {width} wide; the kernel holds a tile of whole rows and takes {MAX_WIDTH} at most"
            for name, width in widths.items()
            if width > MAX_WIDTH
        ]
        + checks.dtype_reasons(
            DTYPES, queries=queries.dtype, **{name: None if v is None else v.dtype for name, v in vectors.items()}
        )
        + checks.last_dim_reasons(queries=queries, keys=keys, x=x, **vectors)
    )


OP = register(
    Op(
        name="softmax_col_pass",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.softmax_col_pass.kernel",
                reasons={"forward": _triton_reasons},
                supports=f"fp16, bf16, fp32 up to {MAX_WIDTH} wide; any number of rows and keys",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.softmax_col_pass.reference",
                reasons={"forward": lambda *_: []},
                supports="also fp64, any width and any stride; chunks of rows, no matrix of all logits",
            ),
        ),
    )
)


def _fake(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, x: torch.Tensor | None, *_: Any
) -> torch.Tensor:
    width = (queries if x is None else x).shape[1]
    return queries.new_empty((keys.shape[0], width), dtype=compute_dtype(queries))


col_pass = define(
    OP,
    "forward",
    "Tensor queries, Tensor keys, Tensor lse, Tensor? x, Tensor? weight, Tensor? bias, Tensor scale, int[] exclude",
    "Tensor",
    _fake,
)


def softmax_col_pass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    exclude: Sequence[int] = (),
    impl: str = "auto",
) -> torch.Tensor:
    """The transposed softmax times rows: `out_j = sum_i weight_i exp(scale q_i·k_j + bias_j - lse_i) x_i`.

    With the log-sum-exp of a row pass over the same queries and keys the exponentials are that softmax, computed
    again in place of being stored. It is the gradient of a softmax loss to its keys (see the README).

    Args:
        queries: [N, d] float16, bfloat16, float32 or float64.
        keys: [M, d] of the same dtype.
        lse: [N] what is subtracted from the logits of each row. A row with -inf counts as probability 0.
        x: [N, dx] of the same dtype; None takes the queries, which then are read once.
        weight: [N] factor of each row; None for 1. In float16 keep its largest element near 1 and scale the result.
        scale: As in the row pass.
        bias: [M] as in the row pass.
        exclude: As in the row pass.
        impl: `auto`, `triton` or `reference`.

    Returns:
        [M, dx] float32, float64 for float64 queries.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or a device does not fit, or a gradient would have to flow through.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(queries, keys, lse, x, weight=weight, scale=scale, bias=bias, exclude=exclude)
    result: torch.Tensor = col_pass(*arguments, impl)
    return result
