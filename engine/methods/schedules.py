"""Progress to value: the momentum of teachers."""

from __future__ import annotations

import math


def cosine_momentum(progress: float, start: float) -> float:
    """Half a cosine from `start` to one, as MoCo v3 (arXiv 2104.02057), BYOL (2006.07733) and DINO (2104.14294) do.

    Args:
        progress: steps done / steps of the run, in [0, 1].
        start: momentum at the start of the run, 0.99 in MoCo v3, 0.996 in BYOL and DINO.
    """
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * progress))
