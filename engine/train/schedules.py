"""Step to value: the learning rate and the weight decay."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from .config import OptimConfig, RunConfig


def cosine_with_warmup(
    epoch: float, *, peak: float, final: float, warmup: float, total: float, start: float = 0.0
) -> float:
    """Linear warm-up, then half a cosine to `final`, as in the official MAE and MoCo v3 code.

    Args:
        epoch: epochs done, fractional.
        peak: value at the end of the warm-up.
        final: value at `total`.
        warmup: epochs of warm-up.
        total: epochs of the run.
        start: value that the warm-up begins with.
    """
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    progress = (epoch - warmup) / max(total - warmup, 1e-12)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def cosine_after_inclusive_warmup(
    step: int, *, peak: float, final: float, warmup: int, total: int, start: float = 0.0
) -> float:
    """As in the official DINO and EsViT code: the warm-up's last step has the peak already, and so has the next one.

    Args:
        step: steps done.
        peak: value of the last step of the warm-up and of the first of the cosine.
        final: value that a step `total` would have.
        warmup: steps of warm-up.
        total: steps of the run.
        start: value of the first step.
    """
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return cosine_with_warmup(step, peak=peak, final=final, warmup=warmup, total=total)


def steps_with_warmup(
    epoch: float, *, peak: float, factor: float, milestones: Sequence[float], warmup: float, start: float = 0.0
) -> float:
    """Linear warm-up, then a constant that each milestone multiplies by `factor`, as in the official SimMIM code.

    Args:
        epoch: epochs done, fractional.
        peak: value at the end of the warm-up.
        factor: what is left at each milestone.
        milestones: epochs, ascending; at the very milestone the value has changed.
        warmup: epochs of warm-up.
        start: value that the warm-up begins with.
    """
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    return peak * factor ** bisect_right(milestones, epoch)


def learning_rate(config: RunConfig, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of the step that follows `step` steps, under the schedule that `optim.schedule` names."""
    optim, peak, start = config.optim, config.peak_lr, config.optim.warmup_lr
    epoch, warmup = step / steps_per_epoch, optim.warmup_epochs
    if optim.schedule == "step":
        return steps_with_warmup(
            epoch, peak=peak, factor=optim.factor, milestones=sorted(optim.milestones), warmup=warmup, start=start
        )
    if optim.schedule == "dino":
        steps = round(warmup * steps_per_epoch)
        return cosine_after_inclusive_warmup(
            step, peak=peak, final=optim.min_lr, warmup=steps, total=total_steps, start=start
        )
    return cosine_with_warmup(
        epoch, peak=peak, final=optim.min_lr, warmup=warmup, total=config.train.epochs, start=start
    )


def weight_decay(optim: OptimConfig, step: int, *, total_steps: int) -> float | None:
    """Weight decay of the step that follows `step` steps: half a cosine over the run; None where it stays."""
    if optim.final_weight_decay is None:
        return None
    return cosine_with_warmup(
        step, peak=optim.weight_decay, final=optim.final_weight_decay, warmup=0, total=total_steps
    )
