"""Operations of the op for `torch.utils.flop_counter`, which cannot look into it; importing this registers them.

Apart from the op because PyTorch's counter imports Triton, and importing the kernels must not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import op  # noqa: F401 - defines the operators


def _product(qkv: Sequence[int], kv: Sequence[int] | None) -> int:
    """Returns the operations of one of the products of all heads: 2 B N M D."""
    batch, queries, channels = qkv
    return 2 * batch * queries * (queries * channels // 3 if kv is None else kv[1] * channels)


@register_flop_formula(torch.ops.vitrail.packed_attention)
def _flops(qkv: Sequence[int], kv: Sequence[int] | None, *_: Any, **__: Any) -> int:
    """Returns what is counted forward: two products."""
    return 2 * _product(qkv, kv)


@register_flop_formula(torch.ops.vitrail.packed_attention_backward)
def _backward_flops(grad: Sequence[int], qkv: Sequence[int], kv: Sequence[int] | None, *_: Any, **__: Any) -> int:
    """Returns what is counted backward: the scores once more, and four products."""
    return 5 * _product(qkv, kv)
