"""The op `masked_patch_gather`; its README has the mathematics, the support matrix and the costs."""

from .op import masked_patch_gather

__all__ = ["masked_patch_gather"]
