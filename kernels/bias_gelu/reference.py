"""A bias and GELU in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def forward(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns GELU(x + bias) of x [..., C] and a bias [C], in the dtype of x; so is the sum, as a linear layer's."""
    return F.gelu(x + bias.to(x.dtype))


def backward(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and of the bias, for one of the result."""
    grad_x = torch.ops.aten.gelu_backward(grad, x + bias.to(x.dtype))
    dtype = torch.promote_types(bias.dtype, torch.float32)
    return grad_x, grad_x.flatten(0, -2).sum(dim=0, dtype=dtype).to(bias.dtype)
