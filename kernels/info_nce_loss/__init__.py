"""InfoNCE, the loss of the MoCo family: queries against keys that get no gradient."""

from .op import info_nce_loss

__all__ = ["info_nce_loss"]
