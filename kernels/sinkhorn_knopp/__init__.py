"""Sinkhorn-Knopp: targets whose prototypes are used about equally, in the form of scaling vectors."""

from .op import sinkhorn_center, sinkhorn_knopp

__all__ = ["sinkhorn_center", "sinkhorn_knopp"]
