"""The published two-view chains of the joint-embedding methods, as views.

They are made of the same operations; the order, the strengths and what the second view does make the difference. All
take the same arguments, those that a demo on small images has to change:

    size: side of the views in pixels, or (height, width).
    scale: smallest and largest share of the image's area that is cropped.
    flip: probability of mirroring left and right.
    sigma: smallest and largest standard deviation of the blur, in pixels of the view.
    jitter: strengths of the colour jitter: brightness, contrast, saturation, hue.

An operation that never happens is left out.
"""

from typing import TypeAlias

from .views import (
    ColorJitter,
    GaussianBlur,
    HorizontalFlip,
    ImageSize,
    Op,
    RandomGrayscale,
    RandomResizedCrop,
    Solarize,
    View,
)

Jitter: TypeAlias = tuple[float, float, float, float]
"""Brightness, contrast, saturation, hue."""

_GREY = 0.2  # probability, in all of them


def _pair(first: tuple[Op, ...], second: tuple[Op, ...]) -> list[View]:
    chains = {"first": first, "second": second}
    return [View(name=name, ops=tuple(op for op in ops if getattr(op, "p", 1.0) > 0.0)) for name, ops in chains.items()]


def _colours(jitter: Jitter) -> ColorJitter:
    brightness, contrast, saturation, hue = jitter
    return ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def moco_v3_views(
    size: int | ImageSize,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
) -> list[View]:
    """MoCo v3's views for vision transformers (arXiv 2104.02057 and its released code); its ResNet crops from 0.2.

    Returns:
        The views "first", always blurred, and "second", seldom blurred and sometimes solarised.
    """

    def chain(blur: float, solarize: float) -> tuple[Op, ...]:
        return (
            RandomResizedCrop(size=size, scale=scale, interpolation="bilinear"),
            _colours(jitter),
            RandomGrayscale(p=_GREY),
            GaussianBlur(p=blur, sigma=sigma),
            Solarize(p=solarize),
            HorizontalFlip(p=flip),
        )

    return _pair(chain(1.0, 0.0), chain(0.1, 0.2))


def byol_views(
    size: int | ImageSize,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
) -> list[View]:
    """BYOL's views (arXiv 2006.07733, appendix B): bicubic crops, mirrored before the colours change.

    Returns:
        The views "first", always blurred, and "second", seldom blurred and sometimes solarised.
    """

    def chain(blur: float, solarize: float) -> tuple[Op, ...]:
        return (
            RandomResizedCrop(size=size, scale=scale),
            HorizontalFlip(p=flip),
            _colours(jitter),
            RandomGrayscale(p=_GREY),
            GaussianBlur(p=blur, sigma=sigma),
            Solarize(p=solarize),
        )

    return _pair(chain(1.0, 0.0), chain(0.1, 0.2))


def simclr_views(
    size: int | ImageSize,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    jitter: Jitter = (0.8, 0.8, 0.8, 0.2),
) -> list[View]:
    """SimCLR's views (arXiv 2002.05709, appendix A): strong colours, both views alike.

    Returns:
        The views "first" and "second", each with its own random numbers.
    """
    chain = (
        RandomResizedCrop(size=size, scale=scale),
        HorizontalFlip(p=flip),
        _colours(jitter),
        RandomGrayscale(p=_GREY),
        GaussianBlur(p=0.5, sigma=sigma),
    )
    return _pair(chain, chain)


def moco_v2_views(
    size: int | ImageSize,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
) -> list[View]:
    """MoCo v2's views (arXiv 2003.04297), which are SimSiam's too (arXiv 2011.10566): both alike, mirrored last.

    Returns:
        The views "first" and "second", each with its own random numbers.
    """
    chain = (
        RandomResizedCrop(size=size, scale=scale, interpolation="bilinear"),
        _colours(jitter),
        RandomGrayscale(p=_GREY),
        GaussianBlur(p=0.5, sigma=sigma),
        HorizontalFlip(p=flip),
    )
    return _pair(chain, chain)
