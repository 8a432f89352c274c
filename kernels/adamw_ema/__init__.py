"""The op `adamw_ema_` and its optimiser; the README has the mathematics, the support matrix and the costs."""

from .op import adamw_ema_
from .optimizer import FusedAdamWEMA

__all__ = ["FusedAdamWEMA", "adamw_ema_"]
