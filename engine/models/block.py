"""The block of the vision transformer and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import bias_gelu

from .attention import Attention, AttentionBackend
from .packing import Packing
from .recompute import Recomputable, run

NORM_EPS = 1e-6  # of every LayerNorm (official MAE, MoCo v3, DINO, BEiT and DINOv2 code)
SUBSET_RATE = 0.1  # above this rate blocks that may leave images out do so (official DINOv2 code)

MLPKind = Literal["gelu", "swiglu"]
DropUnit = Literal["image", "subset"]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`[B, N, D]` and indices `[B, M]` to `[B, M, D]`, without an index of D columns."""
    B, N, D = x.shape
    flat = rows + torch.arange(B, device=rows.device)[:, None] * N
    return x.reshape(B * N, D).index_select(0, flat.reshape(-1)).view(B, -1, D)


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382), scaled so that the expectation is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Zero whole samples of `[B, ...]`, or images packed into `[1, N, D]`, with probability `rate` in training."""
        if not self.training or self.rate == 0.0:
            return x
        if packing is not None:
            keep = torch.rand(packing.images, device=x.device) >= self.rate
            keep = packing.spread(keep, x.shape[1])[None, :, None]
        else:
            keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate))

    def rows(self, x: Tensor, image: Tensor, images: int) -> Tensor:
        """The same for rows `[T, D]` of some images: `image` `[T]` numbers the one, of `images`, that a row is of."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(images, 1, device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate)).index_select(0, image)


class GELULinear(nn.Linear):
    """A linear layer with an exact (erf) GELU behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.device.type == "cpu":
            return bias_gelu(F.linear(x, self.weight), self.bias)
        return F.gelu(super().forward(x))


class MLP(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = GELULinear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(self.fc1(x))


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202): `w3(silu(a) * b)` with a and b the halves of `w12(x)`; keys as DINOv2's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def mlp_hidden(width: int, ratio: float, kind: MLPKind) -> int:
    """Hidden width of an MLP; a gated one has two thirds of it, rounded up to a multiple of 8, for its third matrix."""
    hidden = int(width * ratio)
    return hidden if kind == "gelu" else (int(hidden * 2 / 3) + 7) // 8 * 8


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return x * self.gamma


class Block(Recomputable):
    """A pre-norm transformer block.

    Args:
        width: D.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over D, before what a gated one takes off.
        mlp: two linear layers with a GELU, or SwiGLU.
        layer_scale: value that each branch's factors start from; 0: there are none.
        key_bias: whether keys have a bias. It changes no attention: softmax does not see what all keys share.
        drop_path: rate of stochastic depth.
        drop_by: what a rate above 0.1 drops. "image": each image by itself, after the branch was computed. "subset":
            a fixed share of the images, on which the branch is then not computed at all, as in DINOv2.
        attention: backend.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: MLPKind = "gelu",
        layer_scale: float = 0.0,
        key_bias: bool = True,
        drop_path: float = 0.0,
        drop_by: DropUnit = "image",
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, attention, key_bias=key_bias)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = (MLP if mlp == "gelu" else SwiGLU)(width, mlp_hidden(width, mlp_ratio, mlp))
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.drop_by = drop_by

    def project(self, x: Tensor) -> Tensor:
        """The part that looks at each token alone: `LN1` and the qkv projection, `[..., D]` to `[..., 3D]`."""
        return self.attn.qkv(self.norm1(x))

    def forward(
        self,
        x: Tensor,
        qkv: Tensor | None = None,
        rows: Tensor | None = None,
        packing: Packing | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Apply the block, or exactly the part of it that is needed.

        Args:
            x: residual stream `[B, N, D]`.
            qkv: `project` of `x`, when the caller has it already, `[B, N, 3D]`.
            rows: indices `[B, M]` of the only tokens whose output is needed. Every token still serves as key and
                value; queries, output projection and MLP run for these rows alone, and their results are the same.
                Where images need different numbers of tokens, indices `[T]` into those of all images, `[B N]`: output
                projection and MLP run for these rows alone.
            packing: how several images lie in the one sequence `[1, N, D]`, which then do not see each other.
            bias: added to the scaled scores of every image, `[heads, N, N]`, `[heads, M, N]` with `rows`.

        Returns:
            `[B, N, D]`, or `[B, M, D]` or `[T, D]` with `rows`.
        """
        if rows is not None and rows.dim() == 1:
            return self._scattered(x, self.project(x) if qkv is None else qkv, rows, bias)
        if rows is None:
            if qkv is None and self.drop_by == "subset" and self.training and self.drop_path.rate > SUBSET_RATE:
                x = self._on_subset(x, packing, lambda x, part: self.attn(self.project(x), packing=part, bias=bias), 1)
                return self._on_subset(x, packing, lambda x, part: self.mlp(self.norm2(x)), 2)
            packed: tuple[Tensor, ...] = (self.project(x) if qkv is None else qkv,)
        else:
            packed = self._restricted(x, qkv, rows)
            x = take_rows(x, rows)
        x = x + self.drop_path(self.ls1(self.attn(*packed, packing=packing, bias=bias)), packing)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))), packing)

    def _restricted(self, x: Tensor, qkv: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of `rows` alone `[B, M, D]`, keys and values of all tokens `[B, N, 2 D]`."""
        if qkv is not None:
            width = x.shape[-1]
            return take_rows(qkv[..., :width], rows), qkv[..., width:]
        normed = self.norm1(x)
        return self.attn.qkv(take_rows(normed, rows), "q"), self.attn.qkv(normed, "kv")

    def _scattered(self, x: Tensor, qkv: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Rows `[T, D]` of the result, of any images; no two are the same."""
        images, tokens, _ = x.shape
        image = rows // tokens
        branch = self.ls1(self.attn(qkv, bias=bias, rows=rows))
        x = x.flatten(0, 1).index_select(0, rows) + self.drop_path.rows(branch, image, images)
        return x + self.drop_path.rows(self.ls2(self.mlp(self.norm2(x))), image, images)

    def _on_subset(
        self, x: Tensor, packing: Packing | None, branch: Callable[[Tensor, Packing | None], Tensor], number: int
    ) -> Tensor:
        """Add a branch to a random part of the images, scaled so that the expectation is kept."""
        scale = self.ls1 if number == 1 else self.ls2
        if packing is None:
            images = x.shape[0]
            kept = max(1, int(images * (1 - self.drop_path.rate)))
            chosen = torch.randperm(images, device=x.device)[:kept]
            out = scale(branch(x.index_select(0, chosen), None))
            return x.index_add(0, chosen, out.to(x.dtype), alpha=images / kept)
        tokens, factors, part = packing.subset(1 - self.drop_path.rate, x.device)
        out = scale(branch(x.index_select(1, tokens), part)) * factors[:, None]
        return x.index_add(1, tokens, out.to(x.dtype))


def run_block(
    block: nn.Module,
    x: Tensor,
    *,
    qkv: Tensor | None = None,
    rows: Tensor | None = None,
    packing: Packing | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Call a block, recomputing its activations in the backward pass if it is set to."""
    return run(block, x, qkv, rows, packing, bias)


def transformer_flops(*, tokens: float, width: int, depth: float, mlp_ratio: float = 4.0) -> float:
    """Floating-point operations of `depth` blocks on one image, forward, two per multiply-accumulate.

    Matrix products only: qkv and output projection `8 N D^2`, MLP `4 r N D^2`, attention `4 N^2 D`.
    """
    return depth * ((8 + 4 * mlp_ratio) * tokens * width**2 + 4 * tokens**2 * width)
