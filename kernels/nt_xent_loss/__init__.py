"""NT-Xent, SimCLR's loss: every view against all others, its own excluded."""

from .op import nt_xent_loss

__all__ = ["nt_xent_loss"]
