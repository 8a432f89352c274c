"""The op `window_attention`; its README has the mathematics, the support matrix and the costs."""

from .op import window_attention

__all__ = ["window_attention"]
