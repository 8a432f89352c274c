"""The op `restore_tokens`; its README has the mathematics, the support matrix and the costs."""

from .op import restore_tokens

__all__ = ["restore_tokens"]
