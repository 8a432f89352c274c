"""The encoder of DALL-E's discrete autoencoder (arXiv 2102.12092), which names patches for BEiT.

Structure, names and layouts are those of the released network. It is never trained here: weights are buffers, which
neither an optimiser nor ZeRO's shards hold.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # a pool between each two of them: a token for every 8 x 8 pixels
STRIDE = 2 ** (GROUPS - 1)


class Conv(nn.Module):
    """A convolution that keeps the size of its input; weight `w [out, in, k, k]` and bias `b [out]`."""

    w: Tensor
    b: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.register_buffer("w", torch.zeros(outputs, inputs, kernel, kernel))
        self.register_buffer("b", torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H, W]`."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class EncoderBlock(nn.Module):
    """A bottleneck of four convolutions with a ReLU before each, scaled by `gain`, beside the input."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        hidden = outputs // 4
        widths, kernels = [inputs, hidden, hidden, hidden, outputs], (3, 3, 3, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H, W]`."""
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


class DallEEncoder(nn.Module):
    """Images to logits over a vocabulary, one set for every 8 x 8 pixels.

    Args:
        width: channels of the first group, doubled by each of the next three; 256 in the released network.
        vocabulary: number of tokens; 8,192 there.
        blocks: in each group; 2 there.
    """

    def __init__(self, width: int = 256, vocabulary: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        gain = 1 / (GROUPS * blocks) ** 2
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(3, width, 7))
        inputs = width
        for group in range(GROUPS):
            outputs, layers = width * 2**group, OrderedDict[str, nn.Module]()
            for block in range(blocks):
                layers[f"block_{block + 1}"] = EncoderBlock(inputs, outputs, gain)
                inputs = outputs
            if group < GROUPS - 1:
                layers["pool"] = nn.MaxPool2d(2)
            parts[f"group_{group + 1}"] = nn.Sequential(layers)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(inputs, vocabulary, 1)))
        self.blocks = nn.Sequential(parts)

    def features(self, pixels: Tensor) -> Tensor:
        """Everything but the last layer: `[B, 3, H, W]` in 0-1 units to `[B, 8 width, H / 8, W / 8]`.

        The released network was trained on pixels brought to 0.1-0.9.
        """
        x = 0.8 * pixels + 0.1
        for name, part in self.blocks.named_children():
            if name != "output":
                x = part(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """The last layer on vectors, `[..., 8 width]` to `[..., vocabulary]`, in the type of its weights."""
        conv = self.blocks.get_submodule("output.conv")
        assert isinstance(conv, Conv)
        return F.linear(F.relu(features.to(conv.w.dtype)), conv.w.flatten(1), conv.b)

    def flops(self, height: int, width: int) -> tuple[float, float]:
        """Of `features` on an image of that many pixels, and of `logits` on one vector; two per multiply-accumulate."""
        total, area = 0.0, height * width
        for name, part in self.blocks.named_children():
            convolutions = [module for module in part.modules() if isinstance(module, Conv)]
            work = 2.0 * sum(conv.w.numel() for conv in convolutions)
            if name == "output":
                return total, work
            total += work * area
            area //= 4 if any(isinstance(layer, nn.MaxPool2d) for layer in part.children()) else 1
        raise AssertionError("the network has no last layer")
