"""Dense formulas of the losses on softmax passes, as the papers' code writes them: the independent side of their tests.

Each returns the mean, or with `mean=False` the loss of every row. `low` rounds unit features to a dtype as an
implementation that multiplies in it does, and passes gradients through: what is left to compare is arithmetic.
"""

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def unit(features: Tensor, low: torch.dtype | None = None) -> Tensor:
    exact = F.normalize(features, dim=1, eps=1e-12)
    if low is None or low in (torch.float32, torch.float64):
        return exact
    rounded = F.normalize(features.float(), dim=1, eps=1e-12).to(low).to(exact.dtype)
    return exact + (rounded - exact).detach()


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Targets of each row after three alternations on a matrix in memory, as published."""
    matrix = (logits / temperature).exp().T
    for _ in range(3):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix.T


def cross_entropy(logits: Tensor, target: Tensor, mean: bool) -> Tensor:
    """F.cross_entropy by its definition, whose rounding is that of the logits; PyTorch's own subtracts them first."""
    losses = logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    return losses.mean() if mean else losses


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, *, low: torch.dtype | None = None, mean: bool = True
) -> Tensor:
    z = torch.cat([unit(z1, low), unit(z2, low)])
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)), mean)


def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float = 0.2,
    queue: Tensor | None = None,
    *,
    low: torch.dtype | None = None,
    mean: bool = True,
) -> Tensor:
    q, k = unit(q, low), unit(k, low).detach()
    if queue is None:
        return cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device), mean)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.detach().T], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device), mean)


def clip(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    low: torch.dtype | None = None,
    mean: bool = True,
) -> Tensor:
    logits = unit(a, low) @ unit(b, low).T * logit_scale
    own = torch.arange(len(a), device=a.device)
    return (cross_entropy(logits, own, mean) + cross_entropy(logits.T, own, mean)) / 2
