"""The op `random_masking`; its README has the mathematics, the support matrix and the costs."""

from .op import random_masking

__all__ = ["random_masking"]
