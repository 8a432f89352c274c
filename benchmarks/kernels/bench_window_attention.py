"""Swin's window attention: the op alone, and between its projections as timm's blocks run it, in bf16."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, measures

from vitrail.kernels import window_attention

Tensor = torch.Tensor


@dataclass(frozen=True)
class Stage:
    """A stage of Swin-T at 224 pixels."""

    name: str
    side: int
    heads: int
    window: int
    shift: int
    width: int = 32  # of a head

    @property
    def channels(self) -> int:
        return self.heads * self.width

    def tokens(self, batch: int) -> int:
        return batch * self.side**2

    def flops(self, batch: int) -> float:
        """Of the two products of the forward pass, over whole windows."""
        return 4.0 * self.tokens(batch) * self.window**2 * self.channels

    def shape(self, batch: int) -> dict[str, int | float | str]:
        sizes = {"side": self.side, "heads": self.heads, "head_dim": self.width}
        return {"batch": batch, **sizes, "window": self.window, "shift": self.shift}


STAGES = (
    Stage("Swin-T stage 1", 56, 3, 7, 3),
    Stage("Swin-T stage 2", 28, 6, 7, 3),
    Stage("Swin-T stage 3", 14, 12, 7, 3),
    Stage("Swin-T stage 4", 7, 24, 7, 0),
    Stage("Swin-T stage 1, window 14", 56, 3, 14, 7),
)


def relative_index(window: int, device: torch.device) -> Tensor:
    axis = torch.arange(window, device=device)
    delta = (grid := torch.cartesian_prod(axis, axis))[:, None] - grid + window - 1
    return delta[..., 0] * (2 * window - 1) + delta[..., 1]


def partition(canvas: Tensor, window: int) -> Tensor:
    """[B, H, W, C] to [B, windows, w², C]."""
    parts = canvas.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
    return parts.flatten(3, 4).flatten(1, 2)


def region_mask(stage: Stage, device: torch.device) -> Tensor:
    labels = torch.zeros(1, stage.side, stage.side, 1, device=device)
    bands = (slice(0, -stage.window), slice(-stage.window, -stage.shift), slice(-stage.shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in bands for c in bands):
        labels[:, rows, columns] = number
    labels = partition(labels, stage.window)[0, ..., 0]
    return (labels[:, :, None] != labels[:, None]).float() * -100


def eager(qkv: Tensor, bias_table: Tensor, stage: Stage) -> Tensor:
    """Rolls, partitions, masks; the maps of the cases need no padding."""
    window, shift, side = stage.window, stage.shift, stage.side
    canvas = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
    q, k, v = partition(canvas, window).unflatten(-1, (3, stage.heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = (q * stage.width**-0.5) @ k.transpose(-1, -2)
    scores = scores + bias_table[relative_index(window, qkv.device)].permute(2, 0, 1)
    if shift:
        scores = scores + region_mask(stage, qkv.device)[:, None]
    out = (scores.softmax(-1).to(v.dtype) @ v).transpose(2, 3).flatten(3)
    out = out.unflatten(1, (-1, side // window)).unflatten(3, (window, window)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2)
    return out.roll((shift, shift), (1, 2)) if shift else out


def ours(qkv: Tensor, bias_table: Tensor, stage: Stage) -> Tensor:
    return window_attention(qkv, bias_table, window_size=stage.window, shift=stage.shift, num_heads=stage.heads)


def attention_inputs(stage: Stage, batch: int, device: torch.device) -> dict[str, Tensor]:
    qkv = torch.randn(batch, stage.side, stage.side, 3 * stage.channels, device=device).bfloat16()
    return {"qkv": qkv, "bias_table": torch.randn((2 * stage.window - 1) ** 2, stage.heads, device=device)}


def attention_case(stage: Stage, batch: int) -> Case:
    one, lse = stage.tokens(batch) * stage.channels * 2, stage.tokens(batch) * stage.heads * 4
    return Case(
        op="window_attention",
        name=stage.name,
        shape=stage.shape(batch),
        dtype=torch.bfloat16,
        inputs=partial(attention_inputs, stage, batch),
        truth=partial(eager, stage=stage),
        implementations={
            "vitrail": lambda: partial(ours, stage=stage),
            "eager": lambda: partial(eager, stage=stage),
        },
        # q, k, v in, the output and its log-sum-exp out; backward those, the output's gradient in, three gradients out.
        bytes={"forward": 4 * one + lse, "forward+backward": 12 * one + 2 * lse},
        flops={"forward": stage.flops(batch), "forward+backward": 3.5 * stage.flops(batch)},
        differentiable=("qkv", "bias_table"),
    )


PARAMETERS = {
    "attn.qkv.weight": "qkv_weight",
    "attn.qkv.bias": "qkv_bias",
    "attn.relative_position_bias_table": "bias_table",
    "attn.proj.weight": "proj_weight",
    "attn.proj.bias": "proj_bias",
}


def layer(attention: Callable[[Tensor, Tensor], Tensor], x: Tensor, **parameters: Tensor) -> Tensor:
    """Both projections around an attention; in bf16 but for the truth, whose inputs are float64."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
        qkv = F.linear(x, parameters["qkv_weight"], parameters["qkv_bias"])
        attended = attention(qkv, parameters["bias_table"])
        return F.linear(attended, parameters["proj_weight"], parameters["proj_bias"])


def timm(stage: Stage, fused: bool) -> Any:
    """A block of timm's up to its first residual, without the norm."""
    from timm.models.swin_transformer import SwinTransformerBlock

    class Attention(SwinTransformerBlock):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self._attn(x)

    block = Attention(stage.channels, (stage.side,) * 2, stage.heads, window_size=stage.window, shift_size=stage.shift)
    block.attn.fused_attn = fused

    def attention(x: Tensor, **parameters: Tensor) -> Tensor:
        block.to(x.device)
        given = {theirs: parameters[name] for theirs, name in PARAMETERS.items()}
        with torch.autocast(x.device.type, torch.bfloat16):
            return torch.func.functional_call(block, given, (x,))

    return attention


def layer_inputs(stage: Stage, batch: int, device: torch.device) -> dict[str, Tensor]:
    width, offsets = stage.channels, (2 * stage.window - 1) ** 2
    sizes = {
        "x": (batch, stage.side, stage.side, width),
        "qkv_weight": (3 * width, width),
        "qkv_bias": (3 * width,),
        "bias_table": (offsets, stage.heads),
        "proj_weight": (width, width),
        "proj_bias": (width,),
    }
    scaled = {"qkv_weight": width**-0.5, "proj_weight": width**-0.5}
    return {name: torch.randn(size, device=device) * scaled.get(name, 1) for name, size in sizes.items()}


def layer_case(stage: Stage, batch: int) -> Case:
    tokens, width = stage.tokens(batch), stage.channels
    products = 8.0 * tokens * width**2
    return Case(
        op="window_attention",
        name=f"{stage.name} with projections",
        shape=stage.shape(batch),
        dtype=torch.bfloat16,
        inputs=partial(layer_inputs, stage, batch),
        truth=partial(layer, partial(eager, stage=stage)),
        implementations={
            "vitrail": lambda: partial(layer, partial(ours, stage=stage)),
            "eager": lambda: partial(layer, partial(eager, stage=stage)),
            "timm": partial(timm, stage, fused=True),
            "timm, explicit attention": partial(timm, stage, fused=False),
        },
        # The map in float32 in and out in bf16, and float32 weights; backward the gradients of each as well.
        bytes={
            "forward": tokens * width * 6 + 4 * width**2 * 4,
            "forward+backward": 2 * (tokens * width * 6 + 4 * width**2 * 4),
        },
        flops={
            "forward": stage.flops(batch) + products,
            "forward+backward": 3.5 * stage.flops(batch) + 3 * products,
        },
        differentiable=("x", *PARAMETERS.values()),
        # Two products in bf16, one after the other, on either side of the attention.
        tolerance=2**-6,
    )


def cases(sizes: Sizes) -> list[Case]:
    return [make(stage, sizes.batch) for make in (attention_case, layer_case) for stage in STAGES]


test_window_attention = measures(cases)
