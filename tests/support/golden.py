"""The deterministic weights, images and noise behind the golden numbers of the parity tests."""

import torch
from torch import Tensor, nn


def fill_(module_state: dict[str, Tensor], *, skip: tuple[str, ...] = ()) -> None:
    """Overwrite a state in place: tensor i (by sorted name), element j gets 0.05 sin(0.37 j + 1.1 i), j from 1.

    One-dimensional tensors whose name ends in `.weight` (norm scales) get 1 added.
    """
    names = sorted(k for k, v in module_state.items() if v.is_floating_point() and k not in skip)
    for i, name in enumerate(names):
        tensor = module_state[name]
        j = torch.arange(1, tensor.numel() + 1, dtype=torch.float64)
        values = 0.05 * torch.sin(0.37 * j + 1.1 * i)
        if tensor.dim() == 1 and name.endswith(".weight"):
            values = values + 1
        tensor.copy_(values.view(tensor.shape))


def images(batch: int, size: int) -> Tensor:
    """float64 `[B, 3, size, size]`, already normalised: sin(0.3n + 0.7c + 0.11y + 0.13x) + 0.1 cos(0.05xy)."""
    n, c, y, x = torch.meshgrid(*(torch.arange(k, dtype=torch.float64) for k in (batch, 3, size, size)), indexing="ij")
    return torch.sin(0.3 * n + 0.7 * c + 0.11 * y + 0.13 * x) + 0.1 * torch.cos(0.05 * x * y)


def noise(batch: int, length: int) -> Tensor:
    """float64 `[B, L]` without ties: ((7919 n + 104729 l + 13) mod 1009) / 1009."""
    n, index = torch.meshgrid(torch.arange(batch), torch.arange(length), indexing="ij")
    return ((7919 * n + 104729 * index + 13) % 1009).double() / 1009


def gradient_norm(module: nn.Module) -> float:
    """Global L2 norm of all gradients."""
    return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
