"""Cross-entropy against a linear teacher: the loss of DINO, iBOT, EsViT and SwAV, without logits in memory."""

from .center import update_center_
from .match import cross_view_match
from .op import prototype_cross_entropy

__all__ = ["cross_view_match", "prototype_cross_entropy", "update_center_"]
