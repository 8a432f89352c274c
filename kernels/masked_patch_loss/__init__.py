"""The op `masked_patch_loss`; its README has the mathematics, the support matrix and the costs."""

from .op import masked_patch_loss

__all__ = ["masked_patch_loss"]
