"""Step to value: the learning rate and the weight decay."""

from __future__ import annotations

import math

from .config import OptimConfig, RunConfig


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


def cosine_after_inclusive_warmup(step: int, *, peak: float, final: float, warmup: int, total: int) -> float:
    """As in the official DINO and EsViT code: the warm-up's last step has the peak already, and so has the next one.

    Args:
        step: steps done.
        peak: value of the last step of the warm-up and of the first of the cosine.
        final: value that a step `total` would have.
        warmup: steps of warm-up.
        total: steps of the run.
    """
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return cosine_with_warmup(step, peak=peak, final=final, warmup=warmup, total=total)


def learning_rate(config: RunConfig, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of the step that follows `step` steps, under the schedule that `optim.schedule` names."""
    optim, peak = config.optim, config.peak_lr
    if optim.schedule == "dino":
        warmup = round(optim.warmup_epochs * steps_per_epoch)
        return cosine_after_inclusive_warmup(step, peak=peak, final=optim.min_lr, warmup=warmup, total=total_steps)
    return cosine_with_warmup(
        step / steps_per_epoch,
        peak=peak,
        final=optim.min_lr,
        warmup=optim.warmup_epochs,
        total=config.train.epochs,
    )


def weight_decay(optim: OptimConfig, step: int, *, total_steps: int) -> float | None:
    """Weight decay of the step that follows `step` steps: half a cosine over the run; None where it stays."""
    if optim.final_weight_decay is None:
        return None
    return cosine_with_warmup(
        step, peak=optim.weight_decay, final=optim.final_weight_decay, warmup=0, total=total_steps
    )
