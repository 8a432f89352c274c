"""torchvision's residual networks (He et al., arXiv 1512.03385) as backbones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from .batch_norm import replace_batch_norm
from .pixels import PixelNormalisation, standardised

Architecture = Literal["resnet18", "resnet50"]
WIDTHS: dict[Architecture, int] = {"resnet18": 512, "resnet50": 2048}


@dataclass(kw_only=True)
class ResNetConfig(BackboneConfig):
    """Size and options of a residual network."""

    architecture: Architecture = "resnet50"
    """Which of torchvision's."""
    zero_init_residual: bool = False
    """Start the last BatchNorm of every residual branch at zero (SimSiam, arXiv 2011.10566, released code)."""
    cifar_stem: bool = False
    """Begin with a 3x3 convolution of stride 1 and no max-pooling, for images of 32 pixels (arXiv 2002.05709, B.9)."""

    def build(
        self,
        *,
        groups: int = 1,
        sync: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> ResNet:
        """See `BackboneConfig.build`.

        Raises:
            RuntimeError: torchvision is not installed.
        """
        return ResNet(self, groups=groups, sync=sync, mean=mean, std=std)

    def demo(self) -> ResNetConfig:
        """ResNet-18 on 32-pixel images, with the usual stem: that of CIFAR would cost 15 times as much."""
        return replace(self, architecture="resnet18", image_size=32)

    @property
    def feature_width(self) -> int:
        """2048 for ResNet-50, 512 for ResNet-18."""
        return WIDTHS[self.architecture]

    @property
    def flops(self) -> float:
        """Convolutions on one image, two operations per multiply-accumulate."""
        return _count_flops(self.architecture, self.cifar_stem, self.size)

    def regions_at(self, size: tuple[int, int]) -> int:
        """Positions of the last map, whose stride is 32, or 8 with the stem for small images."""
        stride = 8 if self.cifar_stem else 32
        return -(-size[0] // stride) * -(-size[1] // stride)


class ResNet(nn.Module):
    """A residual network without its classifier that reads raw images.

    State-dict keys are torchvision's (`conv1.weight`, `layer1.0.bn1.running_mean`, ...) without those of `fc`.
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        groups: int = 1,
        sync: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config = config
        self.width = config.feature_width
        self.pixels = PixelNormalisation(mean, std)
        trunk = _trunk(config.architecture, config.cifar_stem, zero_init_residual=config.zero_init_residual)
        for name, part in trunk.named_children():
            self.add_module(name, part)
        replace_batch_norm(self, groups=groups, sync=sync)

    def forward(self, images: Tensor, regions: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            images: uint8 `[B, H, W, 3]`, normalised on the way in.
            regions: return the last map as well.

        Returns:
            The average over the last map, `[B, D]`; with `regions` also the map's vectors, `[B, T, D]`, row by row.
        """
        x = standardised(images) if self.config.pixels == "image" else images
        *trunk, pool = self.children()  # the pixels, and torchvision's parts in the order that they are applied
        for part in trunk:
            x = part(x)
        pooled: Tensor = pool(x).flatten(1)
        return (pooled, x.flatten(2).transpose(1, 2)) if regions else pooled

    def forward_features(self, images: Tensor) -> Tensor:
        """The average over the last map, `[B, D]`."""
        return self(images)

    def forward_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The average over the last map, `[B, D]`, and the map's vectors, `[B, T, D]`: 49 of them at 224 pixels."""
        return self(images, True)

    def first_layer(self) -> list[nn.Parameter]:
        """The weight of the first convolution."""
        return [self.get_parameter("conv1.weight")]

    def freeze_patch_embed(self) -> None:
        """Refused.

        Raises:
            ValueError: a residual network has no patch projection.
        """
        raise ValueError(
            f"freeze_patch_embed is on, but {self.config.architecture} has no patch projection: "
            "pass --method.no-freeze-patch-embed"
        )


def _trunk(architecture: Architecture, cifar_stem: bool, **options: Any) -> nn.Module:
    """The network of torchvision, without its classifier."""
    try:
        from torchvision import models
    except ImportError as error:
        raise RuntimeError(
            f"{architecture} is built by torchvision, which is not installed: pip install torchvision"
        ) from error
    trunk: nn.Module = getattr(models, architecture)(**options)
    del trunk.fc
    if cifar_stem:
        trunk.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    return trunk


@lru_cache
def _count_flops(architecture: Architecture, cifar_stem: bool, size: tuple[int, int]) -> float:
    """Run the network on tensors without memory and count."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        nn.Sequential(*_trunk(architecture, cifar_stem).eval().children())(torch.empty(1, 3, *size))
    return float(counter.get_total_flops())
