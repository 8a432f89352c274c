"""Window attention on the CPU in the compiled extension: a rectangle of one head at a time, straight from the map."""

import torch

from .. import extension
from .reference import runs

TASKS = 32  # at least, where the batch allows: one head of a part of the batch each


def _parts(batch: int, heads: int) -> int:
    """Returns into how many parts the batch is cut; the number of threads, which would change sums, does not matter."""
    return max(1, min(batch, -(-TASKS // heads)))


def _geometry(shape: torch.Size, window: int, shift: int) -> tuple[list[int], list[int]]:
    """Returns the runs of rows and of columns as flat lists."""
    rows, columns = (
        [number for run in runs(length, window, shift) for number in (run.start, run.count, run.real, run.full)]
        for length in shape[1:3]
    )
    return rows, columns


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends within windows. Arguments and result as in the reference."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty((batch, height, width, channels // 3))
    lse = qkv.new_empty((batch, num_heads, height, width), dtype=torch.float32)
    table, padding = (tensor.float().contiguous() for tensor in (bias_table, qkv_bias))
    rows, columns = _geometry(qkv.shape, window_size, shift)
    parts = _parts(batch, num_heads)
    extension.ops().window_attention_out(out, lse, qkv, table, padding, rows, columns, window_size, scale, parts)
    return out, lse


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients. Arguments and results as in the reference."""
    batch, height, width, channels = qkv.shape
    parts = _parts(batch, num_heads)
    grad_qkv = qkv.new_empty((batch, height, width, channels))
    table_parts = lse.new_empty((parts, num_heads, len(bias_table)))
    padding_parts = lse.new_empty((parts, num_heads, 2, channels // 3 // num_heads))
    table, padding = (tensor.float().contiguous() for tensor in (bias_table, qkv_bias))
    rows, columns = _geometry(qkv.shape, window_size, shift)
    extension.ops().window_attention_backward_out(
        grad_qkv, table_parts, padding_parts, grad, qkv, table, padding, out, lse, rows, columns, window_size, scale
    )
    grad_table = bias_table.new_empty(bias_table.shape).copy_(table_parts.sum(0).t())
    grad_bias = qkv_bias.new_zeros(qkv_bias.shape)
    if qkv_bias.numel():
        grad_bias.unflatten(0, (3, num_heads, -1))[1:] = padding_parts.sum(0).transpose(0, 1)
    return grad_qkv, grad_table, grad_bias
