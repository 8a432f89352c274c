"""Progress to value: the momentum and the temperature of teachers."""

from __future__ import annotations

import math


def cosine_momentum(progress: float, start: float) -> float:
    """Half a cosine from `start` to one, as MoCo v3 (arXiv 2104.02057), BYOL (2006.07733) and DINO (2104.14294) do.

    Args:
        progress: steps done / steps of the run, in [0, 1].
        start: momentum at the start of the run, 0.99 in MoCo v3, 0.996 in BYOL and DINO.
    """
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmed_temperature(epoch: float, start: float, end: float, warmup: int) -> float:
    """Temperature of DINO's teacher: constant within an epoch, in `warmup` even steps from `start` to `end`.

    Args:
        epoch: epochs done, fractional.
        start: temperature of the first epoch.
        end: temperature of the last epoch of the warm-up and of all that follow.
        warmup: epochs of the warm-up; 0 for none.
    """
    done = int(epoch)
    if done >= warmup:
        return end
    return start + (end - start) * done / max(warmup - 1, 1)


def warmed_temperature_by_step(step: int, epoch: float, start: float, end: float, warmup: float) -> float:
    """Temperature of DINOv2's teacher: a straight line over the steps of `warmup` epochs, both ends included.

    Args:
        step: steps done.
        epoch: epochs done, fractional.
        start: temperature of the first step.
        end: temperature of the last step of the warm-up and of all that follow.
        warmup: epochs of the warm-up; 0 for none.
    """
    if epoch >= warmup:
        return end
    if step == 0:
        return start
    steps = warmup * step / epoch
    return start + (end - start) * min(step / max(steps - 1, 1), 1.0)
