"""The symmetric contrastive loss of two kinds of features, as CLIP uses it."""

from .op import clip_loss

__all__ = ["clip_loss"]
