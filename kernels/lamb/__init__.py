"""The op `lamb_` and its optimiser; the README has the mathematics, the support matrix and the costs."""

from .op import lamb_
from .optimizer import FusedLAMB

__all__ = ["FusedLAMB", "lamb_"]
