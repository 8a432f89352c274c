"""A stack of strided convolutions in place of the patch projection (Xiao et al., arXiv 2106.14881)."""

from __future__ import annotations

from torch import Tensor, nn

from .backbone import IMAGENET_MEAN, IMAGENET_STD
from .batch_norm import BatchNorm
from .pixels import PixelNormalisation


class ConvStem(nn.Module):
    """Patch tokens by convolutions, as in the released code of MoCo v3 (arXiv 2104.02057).

    Each stage halves the image by a 3x3 convolution without bias, batch normalisation and ReLU; the widths double up
    to D, where a 1x1 convolution with a bias ends. With patches of 16 pixels that is D/8, D/4, D/2, D, and the
    state-dict keys are the official ones: `proj.0.weight`, `proj.1.*` (BatchNorm), ..., `proj.12.{weight,bias}`.
    Convolutions keep PyTorch's default initialisation. Views in a batch and ranks are up to the `BatchNorm` layers.

    Args:
        image_size: expected side, or (height, width), of the images in pixels.
        patch_size: pixels to a token in each direction, a power of two.
        embed_dim: width D of the tokens.
        mean: channel means of the pixels, in 0-1 units.
        std: channel standard deviations of the pixels, in 0-1 units.

    Raises:
        ValueError: `patch_size` is not a power of two, or does not divide the image; `embed_dim` cannot be halved
            often enough.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if any(side % patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {patch_size}")
        self.pixels = PixelNormalisation(mean, std)
        layers: list[nn.Module] = []
        before = 3
        for width in stem_widths(patch_size, embed_dim):
            layers += [
                nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1, bias=False),
                BatchNorm(width),
                nn.ReLU(inplace=True),
            ]
            before = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, kernel_size=1))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images, uint8 or floating in 0-1 units.

        Args:
            images: `[B, H, W, 3]` or `[B, 3, H, W]`.

        Returns:
            Tokens `[B, L, D]`, row by row, in the autocast dtype under autocast.

        Raises:
            TypeError: the images are neither uint8 nor floating.
            ValueError: the images are not of the expected size.
        """
        x = self.pixels(images)
        if tuple(x.shape[2:]) != tuple(self.image_size):
            raise ValueError(f"images are of size {tuple(x.shape[2:])}, but this stem was built for {self.image_size}")
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


def stem_widths(patch_size: int, embed_dim: int) -> list[int]:
    """Widths of the stages, the last one `embed_dim`.

    Raises:
        ValueError: see `ConvStem`.
    """
    stages = patch_size.bit_length() - 1
    if patch_size < 2 or patch_size != 2**stages:
        raise ValueError(f"a convolutional stem halves the image: patch_size must be a power of two, got {patch_size}")
    if embed_dim % 2 ** (stages - 1):
        raise ValueError(
            f"embed_dim must be a multiple of {2 ** (stages - 1)} for the {stages} stages of a convolutional stem, "
            f"got {embed_dim}"
        )
    return [embed_dim // 2 ** (stages - 1 - stage) for stage in range(stages)]


def stem_flops(size: tuple[int, int], patch_size: int, embed_dim: int) -> float:
    """Floating-point operations of the convolutions on one image of `size`, two per multiply-accumulate."""
    flops, before, pixels = 0.0, 3, size[0] * size[1]
    for width in stem_widths(patch_size, embed_dim):
        pixels //= 4
        flops += 2.0 * pixels * 9 * before * width
        before = width
    return flops + 2.0 * pixels * embed_dim**2
