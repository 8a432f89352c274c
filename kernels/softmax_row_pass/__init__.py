"""The row pass of a softmax over inner products: log-sum-exp and weighted mean of values, without logits in memory."""

from .op import softmax_row_pass

__all__ = ["softmax_row_pass"]
