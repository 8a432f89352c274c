"""Step to value: the learning rate."""

from __future__ import annotations

import math


def cosine_with_warmup(epoch: float, *, peak: float, final: float, warmup: float, total: float) -> float:
    """Linear warm-up from exactly zero, then half a cosine to `final`, as in the official MAE and MoCo v3 code.

    Args:
        epoch: epochs done, fractional.
        peak: value at the end of the warm-up.
        final: value at `total`.
        warmup: epochs of warm-up.
        total: epochs of the run.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / max(total - warmup, 1e-12)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
