"""The op `packed_attention`; its README has the mathematics, the support matrix and the costs."""

from .op import packed_attention

__all__ = ["packed_attention"]
