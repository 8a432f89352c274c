"""The op `multi_tensor_norm`; its README has the mathematics, the support matrix and the costs."""

from .clip import multi_tensor_clip_
from .op import multi_tensor_norm

__all__ = ["multi_tensor_clip_", "multi_tensor_norm"]
