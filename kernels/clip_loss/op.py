"""The symmetric contrastive loss on the two softmax passes."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import checks
from ..features import check_pair, product_dtype, unit_rows
from ..groups import check_group, gather_rows, gather_upstream
from ..passes import as_scale
from ..registry import Op, check_impl, register
from ..softmax_col_pass.op import col_pass
from ..softmax_row_pass.op import OP as ROW_PASS
from ..softmax_row_pass.op import row_pass


def _check(
    a: torch.Tensor, b: torch.Tensor, logit_scale: float | torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Raises unless the public arguments fit each other; returns the scale as a tensor."""
    check_pair(a=a, b=b)
    check_group(group)
    if not isinstance(logit_scale, torch.Tensor):
        if not 0 < logit_scale < math.inf:
            raise ValueError(f"logit_scale must be a finite positive number, got {logit_scale}")
        return as_scale(logit_scale, a)
    checks.check_floating("logit_scale", logit_scale)
    checks.check_shape("logit_scale", logit_scale, ())
    checks.check_same_device(a=a, logit_scale=logit_scale)
    return logit_scale


def _bind(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor = 1 / 0.07,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of one of the two row passes."""
    scale = _check(a, b, logit_scale, group)
    rows, keys = (unit_rows(features).detach().to(product_dtype(a)) for features in (a, b))
    return rows, keys, None, None, as_scale(scale, rows), [], False, True


OP = register(Op(name="clip_loss", bind=_bind, implementations=ROW_PASS.implementations))


class _CLIP(torch.autograd.Function):
    """The loss of unit rows a, b [n, d] that belong together, with gradients to both and to the scale."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, group: Any, impl: str
    ) -> Any:
        """Computes the loss; keeps the features, the softmax means and the log-sum-exps: O(N d)."""
        ctx.group, ctx.impl, ctx.scale_dtype = group, impl, scale.dtype
        needed = any(ctx.needs_input_grad[:3])
        a, b = a.to(dtype), b.to(dtype)
        factor = as_scale(scale, a)
        all_a, all_b = gather_rows("a", a, group), gather_rows("b", b, group, equal=True)
        a_lse, a_mean = row_pass(a, all_b, None, None, factor, [], False, needed, impl)
        b_lse, b_mean = row_pass(b, all_a, None, None, factor, [], False, needed, impl)
        cosine = (a.to(a_lse.dtype) * b.to(a_lse.dtype)).sum(1)
        if needed:
            lses = (gather_rows("lse", lse, group, equal=True) for lse in (a_lse, b_lse))
            ctx.save_for_backward(a, b, all_a, all_b, factor, a_mean, b_mean, *lses, cosine.mean())
        # Row by row: these are large, their difference is not.
        return ((a_lse + b_lse) / 2 - factor * cosine).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients of all ranks' losses to this rank's features, and of its own loss to the scale."""
        a, b, all_a, all_b, factor, a_mean, b_mean, a_lse, b_lse, cosine = ctx.saved_tensors
        rows = a.shape[0]
        weight, upstream = gather_upstream(grad, rows, ctx.group)
        wide = [features.to(a_mean.dtype) for features in (a, b)]
        results: list[torch.Tensor | None] = []
        for index, (own, others, lse, mean) in enumerate(((a, all_b, b_lse, a_mean), (b, all_a, a_lse, b_mean))):
            if not ctx.needs_input_grad[index]:
                results.append(None)
                continue
            # What this side is as a key of the other side's rows, on every rank.
            as_key = col_pass(others, own, lse, None, weight, None, factor, [], ctx.impl)
            as_key *= upstream
            result = (mean - 2 * wide[1 - index]).mul_(grad).add_(as_key).mul_(factor / (2 * rows))
            results.append(result)
        to_scale = None
        if ctx.needs_input_grad[2]:
            expected = ((wide[0] * a_mean).sum(1).mean() + (wide[1] * b_mean).sum(1).mean()) / 2
            to_scale = ((expected - cosine) * grad).to(ctx.scale_dtype)
        return *results, to_scale, None, None, None


def clip_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor = 1 / 0.07,
    *,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3).

    Row i of `a` must find row i of `b` among all rows of `b`, and the reverse; the loss is the mean of the two
    cross-entropies. No matrix of logits is ever in memory.

    With a group, the features of all ranks are gathered and gradients flow to all of them. Each rank returns the mean
    over its own rows; gradients averaged over the ranks, as DistributedDataParallel does, are those of the mean over
    all rows, exactly as one process with the whole batch would compute them.

    Args:
        a: [N, d] features, floating; L2-normalised inside, in float32.
        b: [N, d] features of the same things in the same order, of the same dtype.
        logit_scale: Factor of the cosines, 1 / temperature: a number, or a 0-d tensor, which gets its gradient. CLIP
            learns its logarithm: pass `log_scale.exp()`.
        group: Process group whose ranks hold the other rows, each the same number; None for this process alone.
        impl: `auto`, `triton` or `reference`.

    Returns:
        The mean over this process's N rows and both directions, a scalar: float32, float64 for float64 features.

    Raises:
        TypeError: A dtype or the group does not fit.
        ValueError: Shapes or devices differ, the batch is empty, the scale is not a finite positive number (that of a
            tensor is not read), or ranks hold different numbers of rows.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    scale = _check(a, b, logit_scale, group)
    result: torch.Tensor = _CLIP.apply(unit_rows(a), unit_rows(b), scale, product_dtype(a), group, impl)
    return result
