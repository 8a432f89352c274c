"""What the cases of MAE's ops share: sizes, images, and the eager steps that other people's code takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in 0-1 units


@dataclass(frozen=True)
class Grid:
    """A ViT's view of 224-pixel images under MAE: a quarter of the patches stays visible."""

    name: str
    patch: int
    width: int

    @property
    def length(self) -> int:
        """Patches of an image."""
        return (224 // self.patch) ** 2

    @property
    def keep(self) -> int:
        """Visible patches."""
        return self.length // 4

    @property
    def values(self) -> int:
        """Values of a patch, 3 P²."""
        return 3 * self.patch**2

    def shape(self, batch: int) -> dict[str, int | float | str]:
        """The sizes as a row states them."""
        return {
            "batch": batch,
            "image": 224,
            "patch": self.patch,
            "visible": self.keep,
            "masked": self.length - self.keep,
        }


GRIDS = (Grid("ViT-H/14", 14, 1280), Grid("ViT-B/16", 16, 768))


def random_images(batch: int, device: torch.device, *, planes: bool = False) -> torch.Tensor:
    """uint8 images of 224 pixels, [B, H, W, 3] as decoders leave them, or [B, 3, H, W]."""
    size = (batch, 3, 224, 224) if planes else (batch, 224, 224, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device)


def planes_first(images: torch.Tensor) -> torch.Tensor:
    """A [B, 3, H, W] view of images in either layout."""
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def normalised(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images [B, 3, H, W] as torchvision's transforms leave them: 0-1, minus mean, over standard deviation."""
    mean, std = (torch.tensor(values, dtype=dtype, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (planes_first(images).to(dtype) / 255 - mean) / std


def patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3, H, W] to [B, L, 3 P²], each patch in the order (row, column, channel)."""
    rows = pixels.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # [B, 3, h, P, w, P]
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def mae_methods(grid: Grid) -> Callable[[], object]:
    """A factory of transformers' ViTMAE, as small as its functions on patches allow."""

    def build() -> object:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            image_size=224,
            patch_size=grid.patch,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            decoder_hidden_size=8,
            decoder_intermediate_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=1,
            mask_ratio=0.75,
            norm_pix_loss=True,
        )
        return ViTMAEForPreTraining(config)

    return build
