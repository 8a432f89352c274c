"""The KoLeo loss: its registration, its gradient and the public function."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..region_match.op import bind_neighbors, nearest_neighbors, triton_reasons
from ..registry import Implementation, Op, check_impl, register
from ..scatter import scatter_rows


def _bind(x: torch.Tensor, *, eps: float = 1e-8) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of the search for neighbours."""
    return bind_neighbors(x)


OP = register(
    Op(
        name="koleo_loss",
        bind=_bind,
        # The search for neighbours is what can be done in more than one way.
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.region_match.kernel",
                reasons={"forward": triton_reasons},
                supports="fp16, bf16, fp32; any number of rows from 2 and any width; rows contiguous",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.region_match.reference",
                reasons={"forward": lambda *_: []},
                supports="also fp64 and any stride",
            ),
        ),
    )
)


def _pairs(
    x: torch.Tensor, index: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the norms of the rows, the unit rows, and what separates each from its neighbour, with its length."""
    rows = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norm.clamp(min=eps)
    apart = unit - unit[index] + eps
    return norm, unit, apart, torch.linalg.vector_norm(apart, dim=1, keepdim=True)


class _Loss(torch.autograd.Function):
    """The loss with its gradient to both ends of each pair; the choice of pairs has none."""

    @staticmethod
    def forward(ctx: Any, impl: str, x: torch.Tensor, eps: float) -> Any:
        """Computes the loss; keeps its input and the neighbours."""
        index, _ = nearest_neighbors(x, impl=impl)
        ctx.save_for_backward(x, index)
        ctx.eps = eps
        *_, distance = _pairs(x, index, eps)
        return -(distance + eps).log().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradient of x."""
        x, index = ctx.saved_tensors
        eps = ctx.eps
        norm, unit, apart, distance = _pairs(x, index, eps)
        # As autograd has it, the length of a zero vector has gradient zero.
        scale = torch.where(distance > 0, 1 / (distance * (distance + eps)), 0)
        toward = apart * (scale * (-grad / len(x)))
        toward = toward - scatter_rows(toward, index, len(x))
        along = (toward * unit).sum(1, keepdim=True)
        # Below eps the norm is clamped: the row is only scaled.
        toward = torch.where(norm >= eps, toward - unit * along, toward) / norm.clamp(min=eps)
        return None, toward.to(x.dtype), None


def koleo_loss(x: torch.Tensor, *, eps: float = 1e-8, impl: str = "auto") -> torch.Tensor:
    """Spreads features over the sphere: minus the mean logarithm of the distance to the nearest neighbour.

    The Kozachenko-Leonenko regulariser (Sablayrolles et al. 2018, arXiv 1806.03198, section 3) as in DINOv2
    (Oquab et al. 2023, arXiv 2304.07193)::

        u = x / max(‖x‖, eps) by rows,   n(i) = the other row most similar to x[i] by cosine
        loss = - mean over i of log(‖u[i] - u[n(i)] + eps‖ + eps)

    Args:
        x: [N, D], floating, N at least 2.
        eps: Least norm, and what keeps the logarithm of a distance of zero finite.
        impl: `auto`, `triton` or `reference`, for the search of the neighbours.

    Returns:
        A scalar: float32 whatever the autocast state, float64 for float64 `x`. Differentiable with respect to x.

    Raises:
        TypeError: The input is not floating.
        ValueError: The input is no matrix, or has fewer than two rows.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    _bind(x, eps=eps)
    result: torch.Tensor = _Loss.apply(impl, x, eps)
    return result
