"""The published chains of the joint-embedding methods, as views.

They are made of the same operations; the order, the strengths and what each view does make the difference. All take
the same arguments, those that a demo on small images has to change:

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


def _view(name: str, ops: tuple[Op, ...]) -> View:
    return View(name=name, ops=tuple(op for op in ops if getattr(op, "p", 1.0) > 0.0))


def _pair(first: tuple[Op, ...], second: tuple[Op, ...]) -> list[View]:
    return [_view("first", first), _view("second", second)]


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


def dino_views(
    size: int | ImageSize,
    local_size: int | ImageSize,
    *,
    locals: int = 8,
    scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    flip: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1),
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    window: int | None = None,
) -> list[View]:
    """DINO's crops (arXiv 2104.14294 and its released code), which are EsViT's too: two large, several small ones.

    Colours are BYOL's. The longest of DINO's published runs crop (0.25, 1) and (0.05, 0.25) of the image, with ten
    small crops. iBOT's and DINOv2's are the same in all but numbers.

    Args:
        size: As above, of the two global crops: 224 as published.
        local_size: Side of the local crops in pixels, or (height, width): 96 as published.
        locals: How many local crops, at least 0.
        scale: As above, of the global crops.
        local_scale: As above, of the local crops.
        flip: As above.
        sigma: As above; in pixels of the crop, small or large.
        jitter: As above.
        blur: Probabilities of a blur in the first global crop, in the second and in the local ones.
        window: Taps of the blur's kernel, 9 in DINOv2; None for as many as it needs.

    Returns:
        The views "global 1", always blurred, "global 2", seldom blurred and sometimes solarised, and "local 1" and so
        on, blurred half the time. Every one draws its own random numbers.
    """

    def chain(size: int | ImageSize, scale: tuple[float, float], blur: float, solarize: float) -> tuple[Op, ...]:
        return (
            RandomResizedCrop(size=size, scale=scale),
            HorizontalFlip(p=flip),
            _colours(jitter),
            RandomGrayscale(p=_GREY),
            GaussianBlur(p=blur, sigma=sigma, window=window),
            Solarize(p=solarize),
        )

    first, second, other = blur
    local = chain(local_size, local_scale, other, 0.0)
    return [
        _view("global 1", chain(size, scale, first, 0.0)),
        _view("global 2", chain(size, scale, second, 0.2)),
        *(_view(f"local {number + 1}", local) for number in range(locals)),
    ]
