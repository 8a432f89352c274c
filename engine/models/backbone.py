"""What a method needs of the network that is kept after pre-training, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(Protocol):
    """An `nn.Module` that turns raw images into one vector each."""

    width: int
    """Width D of the vector."""

    def forward_features(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]`, normalised on the way in, to `[B, D]` (bf16 under autocast)."""

    def forward_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The image's vector `[B, D]` and the vectors of its regions `[B, T, D]`, T row-major."""

    def first_layer(self) -> list[nn.Parameter]:
        """Parameters of the layer next to the pixels."""

    def freeze_patch_embed(self) -> None:
        """Keep the patch projection as it was initialised (MoCo v3).

        Raises:
            ValueError: the network has no patch projection.
        """


@dataclass(kw_only=True)
class BackboneConfig(ABC):
    """Size and options of a backbone; each kind derives its own."""

    image_size: int | tuple[int, int] = 224
    """Side of the square input in pixels, or (height, width)."""
    pixels: Literal["dataset", "image"] = "dataset"
    """Whose statistics bring pixels to scale: ImageNet's, or those of each image and channel before them."""

    @property
    def size(self) -> tuple[int, int]:
        """Input (height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @abstractmethod
    def build(
        self,
        *,
        groups: int = 1,
        sync: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> nn.Module:
        """Construct a `Backbone` with freshly initialised weights.

        Args:
            groups: views that lie one after the other in a batch; where there is batch normalisation, each has
                statistics of its own.
            sync: whether such statistics are those of all ranks.
            mean: channel means of the pixels, in 0-1 units.
            std: channel standard deviations of the pixels, in 0-1 units.
        """

    @abstractmethod
    def demo(self) -> BackboneConfig:
        """The same kind small enough for 32-pixel images and two CPU cores."""

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """Width D of the vector of an image."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of `forward_features` on one image, two per multiply-accumulate."""

    @property
    def region_flops(self) -> float:
        """The same of `forward_regions`; what is read beside the image's vector was computed for it anyway."""
        return self.flops

    def flops_at(self, size: tuple[int, int], *, regions: bool = False) -> float:
        """Floating-point operations on one image of another size, (height, width) in pixels."""
        other = replace(self, image_size=size)
        return other.region_flops if regions else other.flops

    @abstractmethod
    def regions_at(self, size: tuple[int, int]) -> int:
        """Number T of regions of an image of some size, (height, width) in pixels."""
