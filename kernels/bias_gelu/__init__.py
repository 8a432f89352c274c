"""The op `bias_gelu`; its README has the mathematics, the support matrix and the costs."""

from .op import bias_gelu

__all__ = ["bias_gelu"]
