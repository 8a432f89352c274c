"""The deterministic weights and images behind the golden outputs of whole networks.

The numbers that go with them come from the released networks of DINO (arXiv 2104.14294) and EsViT (arXiv 2106.09785),
filled by this rule.
"""

import math

import torch
from torch import Tensor

DOUBLED = ("relative_position_bias_table", "pos_embed", "cls_token")


def spread(count: int, rank: int) -> Tensor:
    """float64 `[count]` between -0.5 and 0.5.

    frac(43758.5453 sin(12.9898 (i mod 1000003) + 78.233 (rank + 1))) - 0.5 for element i.
    """
    i = torch.arange(count, dtype=torch.float64) % 1000003
    values = torch.sin(12.9898 * i + 78.233 * (rank + 1)) * 43758.5453
    return values - values.floor() - 0.5


def fill_(state: dict[str, Tensor]) -> None:
    """Overwrite the floating tensors of a state dict in place, each by `spread` with its rank among the sorted names.

    Bias tables, positions and class tokens get 2 u, the weights of norms 1 + 0.4 u, biases 0.4 u, and matrices
    u sqrt(12 / fan-in).
    """
    names = sorted(name for name, tensor in state.items() if tensor.is_floating_point())
    for rank, name in enumerate(names):
        tensor = state[name]
        u = spread(tensor.numel(), rank)
        if name.endswith(DOUBLED):
            u = 2 * u
        elif tensor.dim() == 1:
            u = 0.4 * u + (1 if name.endswith("weight") else 0)
        else:
            u = u * math.sqrt(12 / (tensor.numel() / tensor.shape[0]))
        tensor.copy_(u.view(tensor.shape))


def image(size: int) -> Tensor:
    """float32 `[1, 3, size, size]` between -1 and 1, as if already normalised: 2 u of rank 999."""
    return (2 * spread(3 * size * size, 999)).float().view(1, 3, size, size)


def summary(output: Tensor) -> list[float]:
    """The first four values of an output, its sum and its L2 norm, added up in float64."""
    flat = output.detach().double().flatten()
    return [*flat[:4].tolist(), flat.sum().item(), flat.norm().item()]
