"""The op `koleo_loss`; its README has the mathematics, the support matrix and the costs."""

from .op import koleo_loss

__all__ = ["koleo_loss"]
