"""InfoNCE on the row pass: against the keys of the batch, of all ranks, or of a queue."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import checks
from ..features import check_pair, check_temperature, cosines_are_bounded, product_dtype, unit_rows
from ..groups import check_group, gather_rows
from ..passes import as_scale
from ..registry import Op, check_impl, register
from ..softmax_row_pass.op import OP as ROW_PASS
from ..softmax_row_pass.op import row_pass


def _check(
    q: torch.Tensor, k: torch.Tensor, temperature: float, group: dist.ProcessGroup | None, queue: torch.Tensor | None
) -> None:
    """Raises unless the public arguments fit each other."""
    check_pair(q=q, k=k)
    check_temperature("temperature", temperature)
    check_group(group)
    if queue is None:
        return
    if group is not None:
        raise ValueError(
            "queue and group are both given, but a queue takes the place of the other ranks' keys; "
            "leave group out, and enqueue the gathered keys"
        )
    checks.check_floating("queue", queue)
    checks.check_shape("queue", queue, ("M", q.shape[1]))
    checks.check_same_device(q=q, queue=queue)


def _bind(
    q: torch.Tensor,
    k: torch.Tensor,
    temperature: float = 0.2,
    *,
    group: dist.ProcessGroup | None = None,
    queue: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of the row pass."""
    _check(q, k, temperature, group, queue)
    dtype = product_dtype(q)
    queries = unit_rows(q).detach().to(dtype)
    keys = (unit_rows(k) if queue is None else queue).detach().to(dtype)
    return queries, keys, None, None, as_scale(1 / temperature, queries), [], cosines_are_bounded(temperature), True


OP = register(Op(name="info_nce_loss", bind=_bind, implementations=ROW_PASS.implementations))


class _InfoNCE(torch.autograd.Function):
    """The loss of unit queries [n, d] whose positive keys are the rows of `k`, with its gradient to the queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        queue: torch.Tensor | None,
        dtype: torch.dtype,
        temperature: float,
        group: Any,
        impl: str,
    ) -> Any:
        """Computes the loss, and on the way the gradient but for its upstream factor: O(n d)."""
        needed = ctx.needs_input_grad[0]
        queries, positive = q.to(dtype), k.to(dtype)
        scale = as_scale(1 / temperature, queries)
        keys = gather_rows("k", positive, group) if queue is None else queue.to(dtype)
        # A queue is taken as it is: nobody promises that its rows still have unit length.
        bounded = queue is None and cosines_are_bounded(temperature)
        lse, mean = row_pass(queries, keys, None, None, scale, [], bounded, needed, impl)
        positive = positive.to(lse.dtype)
        logit = (queries.to(lse.dtype) * positive).sum(1) / temperature
        gradient = mean - positive if needed else mean
        if queue is not None:  # the softmax over the queue and the positive key
            negatives, lse = lse, torch.logaddexp(lse, logit)
            gradient = gradient * (negatives - lse).exp()[:, None] if needed else gradient
        ctx.save_for_backward(gradient)
        ctx.factor = 1 / (temperature * q.shape[0])
        return (lse - logit).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradient of the queries."""
        (gradient,) = ctx.saved_tensors
        return gradient * (grad * ctx.factor), *(None,) * 6


def info_nce_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    temperature: float = 0.2,
    *,
    group: dist.ProcessGroup | None = None,
    queue: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) as MoCo uses it: the cross-entropy of scaled cosines.

    The query of an image must tell the image's key from other keys: those of the batch, of the batches of all ranks
    (MoCo v3, Chen et al. 2021, arXiv 2104.02057), or of a queue (MoCo, He et al. 2020, arXiv 1911.05722). Gradients
    flow to the queries only. The matrix of logits is never in memory.

    MoCo v3 multiplies the loss by twice the temperature and adds both directions; that is the caller's:
    `2 * T * (info_nce_loss(q1, k2, T, group=group) + info_nce_loss(q2, k1, T, group=group))`.

    Args:
        q: [N, d] queries, floating; L2-normalised inside, in float32.
        k: [N, d] keys of the same images, of the same dtype; L2-normalised inside. No gradient.
        temperature: Divisor of the cosines, finite and positive.
        group: Process group whose ranks' keys are negatives too, each the same number; the positive of row i is row
            i + N rank among them. None for this process alone. As no gradient flows to keys, gradients that are
            averaged over the ranks are those of the mean over all queries.
        queue: [M, d] keys of earlier batches, which then are the only negatives; taken as they are, so enqueue
            normalised ones. Not together with a group.
        impl: `auto`, `triton` or `reference`.

    Returns:
        The mean over this process's N queries, a scalar: float32, float64 for float64 features.

    Raises:
        TypeError: A dtype or the group does not fit.
        ValueError: Shapes or devices differ, the batch is empty, the temperature is not a finite positive number, both
            a group and a queue are given, or ranks hold different numbers of keys.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    _check(q, k, temperature, group, queue)
    dtype = product_dtype(q)
    keys = None if queue is None else queue.detach()
    result: torch.Tensor = _InfoNCE.apply(
        unit_rows(q), unit_rows(k.detach()), keys, dtype, float(temperature), group, impl
    )
    return result
