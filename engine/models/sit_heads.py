"""The two heads of SiT (arXiv 2104.03602), with the keys of its released checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import BatchNorm
from .initialisation import truncated_init_


class ContrastiveHead(nn.Module):
    """Three linear layers with batch normalisation after each, ReLU after the first and GELU after the second.

    Statistics are of all rows together, whatever view they are of.

    Args:
        width: of the input.
        hidden: width of the hidden layers.
        dim: width of the vectors that are compared.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            BatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            BatchNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            BatchNorm(dim, affine=False),
        )
        truncated_init_(self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, width]` to `[N, dim]`."""
        return self.mlp(x)


class PatchPainter(nn.ConvTranspose2d):
    """A transposed convolution whose stride is its kernel size, applied as the linear layer that it is.

    Parameters and initialisation are those of the convolution; what it paints stays in patches.

    Args:
        width: D of the tokens.
        patch_size: side P of a patch in pixels.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__(width, 3, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """`[N, L, D]` to `[N, L, 3 P P]`, pixels of a patch in the order (row, column, channel)."""
        assert self.bias is not None
        # Only here: a parameter may exist just while the module that owns it runs (DeepSpeed ZeRO-3).
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return F.linear(tokens, weight, self.bias.repeat(weight.shape[0] // 3))


class ReconstructionHead(nn.Module):
    """Three linear layers, each followed by GELU, and a projection of every token to the pixels of its patch.

    Args:
        width: D of the tokens.
        patch_size: side P of a patch in pixels.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())))
        truncated_init_(self.mlp)
        self.convTrans = PatchPainter(width, patch_size)  # the released name

    def forward(self, tokens: Tensor) -> Tensor:
        """`[N, L, D]` to `[N, L, 3 P P]`, pixels of a patch in the order (row, column, channel)."""
        return self.convTrans(self.mlp(tokens))

    @property
    def flops(self) -> float:
        """Floating-point operations on one token, forward, two per multiply-accumulate."""
        width, side = self.convTrans.in_channels, self.convTrans.kernel_size[0]
        return 2.0 * width * (3 * width + 3 * side**2)
