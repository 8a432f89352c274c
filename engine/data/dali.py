"""Views executed with NVIDIA DALI, on a GPU or on CPU threads.

The graph is deterministic arithmetic: encoded bytes and drawn parameters go in, pixels come out, and nothing in it has
a seed or a state. Each image is decoded once, whatever the number of views.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .faults import DataError
from .reader import DecodeError, Sample
from .views import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    HorizontalFlip,
    Op,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

try:
    from nvidia.dali import fn, math, types
    from nvidia.dali.pipeline import Pipeline
except ImportError as error:
    raise DataError(
        f"DALI cannot be imported ({error}); expected nvidia-dali-cuda130 (Linux): "
        "install it, or decode with Pillow: --data.decoder pillow"
    ) from error

Node: TypeAlias = Any
"""A DALI graph node."""

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

# Added before rounding, it truncates, as Pillow does. A little less than half, since float32 may miss a whole number.
_TRUNCATE = -0.499


@singledispatch
def lower(op: Op, images: Node, params: Node) -> Node:
    """Add one operation to the graph.

    Args:
        op: The operation.
        images: uint8 images, HWC.
        params: The operation's parameters for each sample, float32 vectors on the CPU.

    Returns:
        uint8 images, HWC.
    """
    raise NotImplementedError(f"{type(op).__name__} has no DALI form")


def _integers(params: Node) -> Node:
    return fn.cast(params, dtype=types.INT32)


def _crop(images: Node, window: Node) -> Node:
    window = _integers(window)
    return fn.slice(images, start=window[0:2], shape=window[2:4], axis_names="HW")


def _resize(images: Node, size: Node | tuple[int, int], interpolation: str) -> Node:
    # Antialiasing is what Pillow does when it shrinks; without it cubic resampling is off by several grey levels.
    return fn.resize(images, size=size, interp_type=_FILTERS[interpolation], antialias=True)


@lower.register
def _(op: RandomResizedCrop, images: Node, params: Node) -> Node:
    # Crop first: a region of interest in the resize itself would let pixels from outside the window bleed in.
    return _resize(_crop(images, params), op.output_size((0, 0)), op.interpolation)


@lower.register
def _(op: HorizontalFlip, images: Node, params: Node) -> Node:
    return fn.flip(images, horizontal=_integers(params)[0])


@lower.register
def _(op: Resize, images: Node, params: Node) -> Node:
    return _resize(images, params, op.interpolation)


@lower.register
def _(op: CenterCrop, images: Node, params: Node) -> Node:
    return _crop(images, params)


def _where(chosen: Node, do: Callable[..., Node], images: Node, *numbers: Node) -> Node:
    """Do something to those samples whose `chosen`, a scalar on the CPU, is true; the others are not copied."""
    conditional: Any = vars(fn)["_conditional"]  # what DALI turns an `if` of a decorated pipeline into
    split = [conditional.split(node, predicate=chosen, _if_stmt=True) for node in (images, *numbers)]
    return conditional.merge(do(*(yes for yes, _ in split)), split[0][1], predicate=chosen)


def _beside(numbers: Node, images: Node) -> Node:
    """A few numbers of each sample, moved to where its pixels are."""
    return numbers.gpu() if images.device == "gpu" else numbers


def _luma(images: Node) -> Node:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _grey(images: Node) -> Node:
    return fn.color_space_conversion(_luma(images), image_type=types.GRAY, output_type=types.RGB)


def _rounded(images: Node, shift: float = 0.0) -> Node:
    """float32 values 0-255 to the nearest uint8, after `shift`."""
    return fn.brightness_contrast(images, brightness_shift=shift / 255, dtype=types.UINT8)


def _blend(flat: Node, images: Node, factor: Node) -> Node:
    """Scale the distance of all values from `flat`, float32."""
    return _rounded((images - flat) * _beside(factor, images) + flat, _TRUNCATE)


def _brightness(images: Node, factor: Node) -> Node:
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=_TRUNCATE / 255)


def _contrast(images: Node, factor: Node) -> Node:
    # The operator's own contrast_center is an argument, and arguments of GPU operators must be on the CPU.
    return _blend(math.floor(fn.reductions.mean(_luma(images)) + 0.5), images, factor)


def _saturation(images: Node, factor: Node) -> Node:
    return _blend(_luma(images) * 1.0, images, factor)


def _hue(images: Node, ahead: Node) -> Node:
    """Turn the hexagon of colours, whose corners red, yellow, green, cyan, blue, magenta are at 0, 1, 2, 3, -2, -1.

    With the largest and the smallest channel at V and m, a channel holds m + (V - m) * clamp(2 - d, 0, 1) at distance d
    from its own corner. `ahead` is of `_ahead`, from -3 to 3.
    """
    red, green, blue = (images[:, :, channel : channel + 1] for channel in range(3))
    low = math.min(math.min(red, green), blue)
    chroma = math.max(math.max(red, green), blue) - low
    from_red = (green * 1.0 + blue - red - low) / math.max(chroma, np.uint8(1)) + 1
    place = from_red * ((green >= blue) * 2.0 - 1)
    near = math.abs(3 - math.abs(place + _beside(ahead, images)))  # 3 - d, as neither term exceeds 3
    return _rounded(math.clamp(near - 1, 0.0, 1.0) * chroma + low)


def _ahead(turn: Node) -> Node:
    """How far a turn leads past each of the three corners, in corners, taken round the shorter way."""
    # torchvision turns Pillow's hue, a byte, by whole steps. The byte was truncated: half a step low in the mean.
    steps = math.floor(math.max(turn * 255, 0.0)) + math.ceil(math.min(turn * 255, 0.0)) - 0.5
    ahead = steps * (6 / 255)
    ahead = fn.stack(ahead, ahead - 2, ahead + 2)  # green's corner is at 2, blue's at -2
    return ahead - 6 * math.floor((ahead + 3) / 6)


_ADJUST = (_brightness, _contrast, _saturation, _hue)  # in the order of `ADJUSTMENTS`


@lower.register
def _(op: ColorJitter, images: Node, params: Node) -> Node:
    numbers = [params[4], params[5], params[6], _ahead(params[7])]
    for stage in range(4):
        drawn = params[stage]
        for which, adjust in enumerate(_ADJUST):
            images = _where(drawn == which, adjust, images, numbers[which])
    return images


@lower.register
def _(op: RandomGrayscale, images: Node, params: Node) -> Node:
    return _where(params[0] > 0, _grey, images)


@lower.register
def _(op: GaussianBlur, images: Node, params: Node) -> Node:
    sigma = params[0]
    return _where(sigma > 0, lambda images, sigma: fn.gaussian_blur(images, sigma=sigma), images, sigma)


@lower.register
def _(op: Solarize, images: Node, params: Node) -> Node:
    table = [255 - value if value >= op.threshold else value for value in range(256)]
    return _where(
        params[0] > 0,
        lambda images: fn.lookup_table(images, keys=list(range(256)), values=table, dtype=types.UINT8),
        images,
    )


class DaliDecoder:
    """Decodes and augments with DALI.

    Args:
        views: The views of every sample.
        batch: Largest micro-batch.
        device: Where the batches are wanted.
        on_gpu: Whether to decode and augment on that device, rather than on CPU threads.
        threads: CPU threads; a GPU decoder needs them too, for parsing and for what its hardware cannot decode.
        prefetch: Batches decoded ahead.
    """

    def __init__(
        self, views: Sequence[View], *, batch: int, device: torch.device, on_gpu: bool, threads: int, prefetch: int
    ) -> None:
        self._views = views
        self._batch = batch
        self._device = device
        self._on_gpu = on_gpu
        self._threads = threads
        self._prefetch = prefetch

    def _pipeline(self, batches: Iterator[Sequence[Sample]]) -> Pipeline:
        """Build a pipeline that pulls from `batches`."""
        inputs = 1 + sum(len(view.ops) for view in self._views)

        def pull() -> tuple[Any, ...]:
            samples = next(batches)  # StopIteration is how DALI wants to hear of the end
            encoded = [np.frombuffer(sample.data, np.uint8) for sample in samples]
            flat = [list(itertools.chain(*sample.params)) for sample in samples]
            return (encoded, *(np.stack(params) for params in zip(*flat, strict=True)))

        pipeline = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=None if self._device.type == "cpu" else self._device.index,
            prefetch_queue_depth=self._prefetch,
            # The dynamic executor gives every batch memory of its own, so tensors can be handed out without a copy.
            exec_dynamic=True,
        )
        with pipeline:
            encoded, *params = fn.external_source(
                source=pull,
                num_outputs=inputs,
                batch=True,
                device="cpu",
                dtype=[types.UINT8] + [types.FLOAT] * (inputs - 1),
                ndim=1,
            )
            decoded = fn.decoders.image(encoded, device="mixed" if self._on_gpu else "cpu", output_type=types.RGB)
            pending = iter(params)
            outputs = []
            for view in self._views:
                images = decoded
                for op in view.ops:
                    images = lower(op, images, next(pending))
                outputs.append(images if self._device.type == "cpu" else images.gpu())
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def decode(self, batches: Iterator[Sequence[Sample]]) -> Iterator[list[Tensor]]:
        """See `vitrail.engine.data.stream.Decoder`."""
        pipeline = self._pipeline(batches)
        pipeline.schedule_run()  # the first call starts `prefetch` batches
        while True:
            # On a GPU the batch is bound to the consumer's stream: that stream waits for it, the host does not, and
            # the memory is reused only after the work that was queued on that stream.
            stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
            try:
                outputs = pipeline.outputs(cuda_stream=stream)
            except StopIteration:
                return
            except RuntimeError as error:
                raise DecodeError(_reason(error)) from error
            pipeline.schedule_run()
            yield [from_dlpack(output.as_tensor()) for output in outputs]

    def close(self) -> None:
        """Nothing is held between calls of `decode`."""


def _reason(error: RuntimeError) -> str:
    """What went wrong, out of DALI's account of where in the graph it did."""
    what = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    # Files are blamed one at a time, so the number within the batch says nothing.
    return " ".join(what.replace("sample #0", "").split()).removesuffix(" :") or "DALI gave no reason"
