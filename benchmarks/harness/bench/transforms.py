"""torchvision's form of views, for the loaders that others would write."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from vitrail.engine.data import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    HorizontalFlip,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)
from vitrail.engine.data.views import Op


class RandomBlur:
    """Pillow's blur, drawn from torch's generator as torchvision's transforms are."""

    def __init__(self, op: GaussianBlur) -> None:
        self.op = op

    def __call__(self, image: Image.Image) -> Image.Image:
        chance, width = torch.rand(2).tolist()
        low, high = self.op.sigma
        return image.filter(ImageFilter.GaussianBlur(low + width * (high - low))) if chance < self.op.p else image


class Transforms:
    """torchvision's form of views: a Pillow image to one uint8 tensor [3, height, width] per view."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = [
            transforms.Compose([*(self.transform(op) for op in view.ops), transforms.PILToTensor()]) for view in views
        ]

    def transform(self, op: Op) -> Any:
        if isinstance(op, RandomResizedCrop):
            mode = InterpolationMode(op.interpolation)
            return transforms.RandomResizedCrop(op.size, op.scale, op.ratio, interpolation=mode)
        if isinstance(op, HorizontalFlip):
            return transforms.RandomHorizontalFlip(op.p)
        if isinstance(op, Resize):
            return transforms.Resize(op.size, InterpolationMode(op.interpolation))
        if isinstance(op, CenterCrop):
            return transforms.CenterCrop(op.size)
        return self.colour(op)

    def colour(self, op: Op) -> Any:
        if isinstance(op, ColorJitter):
            jitter = transforms.ColorJitter(op.brightness, op.contrast, op.saturation, op.hue)
            return transforms.RandomApply([jitter], op.p)
        if isinstance(op, RandomGrayscale):
            return transforms.RandomGrayscale(op.p)
        if isinstance(op, GaussianBlur):
            return RandomBlur(op)
        if isinstance(op, Solarize):
            return transforms.RandomSolarize(op.threshold, op.p)
        raise TypeError(f"{type(op).__name__} has no torchvision form in this benchmark; add it")

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]
