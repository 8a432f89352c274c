"""The op `lars_` and its optimiser; the README has the mathematics, the variants and the costs."""

from .op import lars_
from .optimizer import FusedLARS

__all__ = ["FusedLARS", "lars_"]
