"""NT-Xent on the two softmax passes."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..features import check_pair, check_temperature, cosines_are_bounded, product_dtype, unit_rows
from ..groups import check_group, gather_rows, gather_upstream, rank_and_size
from ..passes import as_scale
from ..registry import Op, check_impl, register
from ..softmax_col_pass.op import col_pass
from ..softmax_row_pass.op import OP as ROW_PASS
from ..softmax_row_pass.op import row_pass


def _bind(
    z1: torch.Tensor, z2: torch.Tensor, temperature: float = 0.1, *, group: dist.ProcessGroup | None = None
) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of the row pass over this process's rows."""
    check_pair(z1=z1, z2=z2)
    check_temperature("temperature", temperature)
    check_group(group)
    z = torch.cat([unit_rows(z1), unit_rows(z2)]).detach().to(product_dtype(z1))
    return z, z, None, None, as_scale(1 / temperature, z), [0], cosines_are_bounded(temperature), True


OP = register(Op(name="nt_xent_loss", bind=_bind, implementations=ROW_PASS.implementations))


class _NTXent(torch.autograd.Function):
    """The loss of unit rows [2 n, d], whose halves are the two views of the same n images."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, dtype: torch.dtype, temperature: float, group: Any, impl: str) -> Any:
        """Computes the loss; keeps the features, the softmax means and the log-sum-exps: O(N d)."""
        rank, _ = rank_and_size(group)
        rows = z.shape[0]
        local = z.to(dtype)
        everyone = gather_rows("z1 and z2", local, group)
        scale = as_scale(1 / temperature, local)
        lse, mean = row_pass(
            *(local, everyone, None, None, scale),
            *([rank * rows], cosines_are_bounded(temperature), ctx.needs_input_grad[0], impl),
        )
        first, second = local.to(lse.dtype).chunk(2)
        logit = (first * second).sum(1) / temperature
        loss = (lse.view(2, -1) - logit).mean()  # row by row: both are large, their difference is not
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(local, everyone, scale, mean, gather_rows("lse", lse, group, equal=True))
        ctx.temperature, ctx.group, ctx.rank, ctx.impl = temperature, group, rank, impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradient of all ranks' losses to this rank's features.

        As a query, row i contributes `mean_i - z_positive`. As a key of every row j, on any rank, it contributes
        `sum_j p_ji z_j - z_positive`. For the latter the gathered rows and log-sum-exps suffice: no gradient travels.
        """
        local, everyone, scale, mean, lse = ctx.saved_tensors
        rows = local.shape[0]
        weight, factor = gather_upstream(grad, rows, ctx.group)
        as_key = col_pass(everyone, local, lse, None, weight, None, scale, [-ctx.rank * rows], ctx.impl)
        as_key *= factor
        positive = local.to(mean.dtype).roll(rows // 2, 0)
        result = (mean - 2 * positive).mul_(grad).add_(as_key).mul_(1 / (ctx.temperature * rows))
        return result, None, None, None, None


def nt_xent_loss(
    z1: torch.Tensor,
    z2: torch.Tensor,
    temperature: float = 0.1,
    *,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, arXiv 2002.05709, eq. 1).

    Each of the 2 N views must tell its other view from all views but itself, by cosine over the temperature. The
    matrix of similarities is never in memory: time is quadratic in N, memory linear.

    With a group, the views of all ranks are gathered, and gradients flow to all of them. Each rank returns the mean
    over its own views; gradients averaged over the ranks, as DistributedDataParallel does, are those of the mean over
    all views, exactly as one process with the whole batch would compute them.

    Args:
        z1: [N, d] features of the first views, floating; L2-normalised inside, in float32.
        z2: [N, d] features of the second views, in the same order.
        temperature: Divisor of the cosines, finite and positive.
        group: Process group whose ranks hold the other images, each the same number; None for this process alone.
        impl: `auto`, `triton` or `reference`.

    Returns:
        The mean over this process's 2 N views, a scalar: float32, float64 for float64 features. SimCLR's TensorFlow
        code adds the means of the two directions instead, which is twice this.

    Raises:
        TypeError: A dtype or the group does not fit.
        ValueError: Shapes or devices differ, the batch is empty, the temperature is not a finite positive number, or
            ranks hold different numbers of images.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    check_pair(z1=z1, z2=z2)
    check_temperature("temperature", temperature)
    check_group(group)
    z = torch.cat([unit_rows(z1), unit_rows(z2)])
    result: torch.Tensor = _NTXent.apply(z, product_dtype(z1), float(temperature), group, impl)
    return result
