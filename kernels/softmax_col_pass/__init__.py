"""The column pass of a softmax over inner products: its transpose times rows, without logits in memory."""

from .op import softmax_col_pass

__all__ = ["softmax_col_pass"]
