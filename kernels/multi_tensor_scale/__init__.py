"""The op `multi_tensor_scale_`; its README has the mathematics, the support matrix and the costs."""

from .op import multi_tensor_scale_

__all__ = ["multi_tensor_scale_"]
