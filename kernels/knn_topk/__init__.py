"""The op `knn_topk`; its README has the mathematics, the support matrix and the costs."""

from .op import knn_topk

__all__ = ["knn_topk"]
