"""The op `multi_tensor_ema_`; its README has the mathematics, the support matrix and the costs."""

from .op import multi_tensor_ema_

__all__ = ["multi_tensor_ema_"]
