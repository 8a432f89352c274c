"""How many directions features use."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank of features (RankMe: Garrido et al., arXiv 2210.02885).

    The exponential of the entropy of `p = s / sum(s) + 1e-7` over the singular values s, not centred: 1 where all
    features point in one direction, near D where they fill the space. The singular values are square roots of the
    eigenvalues of the smaller Gram matrix in float64, which is exact to about 1e-8 of the largest one.

    Args:
        features: `[N, D]`, any floating dtype.

    Returns:
        The rank, NaN where a feature is not finite.
    """
    x = features.double()
    if not bool(x.isfinite().all()):
        return math.nan
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return math.exp(-(p * p.log()).sum().item())
