"""Views executed with NVIDIA DALI, on a GPU or on CPU threads.

The graph is deterministic arithmetic: encoded bytes and drawn parameters go in, pixels come out, and nothing in it has
a seed or a state. Each image is decoded once. The first operation of each view, a crop, works on the decoded images;
what then follows is in the graph once, and works on a batch of all samples in all views that have it, of whatever size:
building a graph, its threads' time and, on a GPU, its kernel launches grow with the number of its nodes, and the
colours need about 290.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce, singledispatch
from operator import or_
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .batch import apart, by_size
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

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}

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


# What DALI turns an `if` of a decorated pipeline into. Samples pass both by reference.
_conditional: Any = vars(fn)["_conditional"]


def _split(node: Node, chosen: Node) -> tuple[Node, Node]:
    """The samples whose `chosen`, a scalar on the CPU, is true, and the others: two smaller batches."""
    yes, no = _conditional.split(node, predicate=chosen, _if_stmt=True)
    return yes, no


def _merge(yes: Node, no: Node, chosen: Node) -> Node:
    """One batch with a sample for each of `chosen`: the next of `yes` or the next of `no`."""
    return _conditional.merge(yes, no, predicate=chosen)


def _where(chosen: Node, do: Callable[..., Node], images: Node, *numbers: Node) -> Node:
    """Do something to those samples whose `chosen`, a scalar on the CPU, is true."""
    images, others = _split(images, chosen)
    return _merge(do(images, *(_split(node, chosen)[0] for node in numbers)), others, chosen)


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
    sigma, window = params[0], op.window or 0  # 0: as many taps as it needs
    blur = partial(fn.gaussian_blur, window_size=window)
    return _where(sigma > 0, lambda images, sigma: blur(images, sigma=sigma), images, sigma)


@lower.register
def _(op: Solarize, images: Node, params: Node) -> Node:
    table = [255 - value if value >= op.threshold else value for value in range(256)]
    return _where(
        params[0] > 0,
        lambda images: fn.lookup_table(images, keys=list(range(256)), values=table, dtype=types.UINT8),
        images,
    )


_DRAWN = {"p", "scale", "ratio", "sigma", "brightness", "contrast", "saturation", "hue"}


def _arithmetic(op: Op) -> tuple[Any, ...]:
    """What an operation computes, apart from how its parameters are drawn."""
    settings = ((field.name, getattr(op, field.name)) for field in fields(cast(Any, op)) if field.name not in _DRAWN)
    return (type(op), *settings)


@dataclass(frozen=True)
class Stage:
    """An operation of several views at once."""

    op: Op
    """That of any of them."""
    places: Mapping[int, int]
    """Where it stands among the operations of a view, by the number of the view."""


def stages(views: Sequence[View]) -> list[Stage]:
    """One sequence of operations out of which each view takes all of its own but the first, in their order."""
    chains = [[_arithmetic(op) for op in view.ops] for view in views]
    done = [1] * len(views)
    sequence: list[Stage] = []
    while True:
        heads = {
            number: chain[place]
            for number, (chain, place) in enumerate(zip(chains, done, strict=True))
            if chain[place:]
        }
        if not heads:
            return sequence
        # What some view comes to only later waits for it.
        later = {op for chain, place in zip(chains, done, strict=True) for op in chain[place + 1 :]}
        chosen = next((op for op in heads.values() if op not in later), next(iter(heads.values())))
        places = {number: done[number] for number, op in heads.items() if op == chosen}
        first = min(places)
        sequence.append(Stage(views[first].ops[done[first]], places))
        for number in places:
            done[number] += 1


def _among(view: Node, numbers: Iterable[int]) -> Node:
    """Whether the view of a sample is one of some."""
    return reduce(or_, (view == number for number in numbers))


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
        self._stages = stages(views)
        self._sizes = by_size(views)
        self._batch = batch
        self._device = device
        self._on_gpu = on_gpu
        self._threads = threads
        self._prefetch = prefetch

    def _inputs(self, samples: Sequence[Sample]) -> tuple[Any, ...]:
        """What the graph wants to know, view by view: encoded bytes, parameters by stage, the number of the view."""
        views = range(len(self._views))
        encoded = [np.frombuffer(sample.data, np.uint8) for sample in samples]
        encoded += [_NOTHING] * (len(samples) * (len(views) - 1))  # they are decoded for the first view
        first = [sample.params[view][0] for view in views for sample in samples]
        params = (_parameters(stage, samples, len(views)) for stage in self._stages)
        numbers = [np.repeat(np.array(views, np.int32), len(samples))] if len(views) > 1 else []
        return (encoded, first, *params, *numbers)

    def _pipeline(self, batches: Iterator[Sequence[Sample]]) -> Pipeline:
        """Build a pipeline that pulls from `batches`."""
        pipeline = Pipeline(
            batch_size=self._batch * len(self._views),
            num_threads=self._threads,
            device_id=None if self._device.type == "cpu" else self._device.index,
            prefetch_queue_depth=self._prefetch,
            # The dynamic executor gives every batch memory of its own, so tensors can be handed out without a copy.
            exec_dynamic=True,
        )
        vectors, several = 1 + len(self._stages), len(self._views) > 1
        with pipeline:
            encoded, *params = fn.external_source(
                source=lambda: self._inputs(next(batches)),  # StopIteration is how DALI wants to hear of the end
                num_outputs=1 + vectors + several,
                batch=True,
                device="cpu",
                dtype=[types.UINT8] + [types.FLOAT] * vectors + [types.INT32] * several,
                ndim=[1] * (1 + vectors) + [0] * several,
            )
            view = params.pop() if several else None
            images = self._begin(view, encoded, params[0])
            for stage, numbers in zip(self._stages, params[1:], strict=True):
                if len(stage.places) == len(self._views):
                    images = lower(stage.op, images, numbers)
                else:
                    images = _where(_among(view, stage.places), partial(lower, stage.op), images, numbers)
            outputs = self._of_each_size(view, images)
            pipeline.set_outputs(*(images if self._device.type == "cpu" else images.gpu() for images in outputs))
        pipeline.build()
        return pipeline

    def _begin(self, view: Node, encoded: Node, params: Node) -> Node:
        """Decode each image once, and apply the first operation of each view."""
        if len(self._views) > 1:
            encoded, _ = _split(encoded, view == 0)
        decoded = fn.decoders.image(encoded, device="mixed" if self._on_gpu else "cpu", output_type=types.RGB)
        return self._first(0, decoded, view, params)

    def _first(self, number: int, decoded: Node, view: Node, params: Node) -> Node:
        """The batch of one view and all that follow, each after its first operation."""
        op = self._views[number].ops[0]
        if number == len(self._views) - 1:
            return lower(op, decoded, params)
        here = view == number
        (mine, params), (_, view) = _split(params, here), _split(view, here)
        return _merge(lower(op, decoded, mine), self._first(number + 1, decoded, view, params), here)

    def _of_each_size(self, view: Node, images: Node) -> Iterator[Node]:
        """Take the views of each size out of a batch of all views."""
        for numbers in self._sizes[:-1]:
            chosen = _among(view, numbers)
            yes, images = _split(images, chosen)
            _, view = _split(view, chosen)
            yield yes
        yield images

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
            yield apart([from_dlpack(output.as_tensor()) for output in outputs], self._sizes)

    def close(self) -> None:
        """Nothing is held between calls of `decode`."""


_NOTHING = np.zeros(1, np.uint8)


def _parameters(stage: Stage, samples: Sequence[Sample], views: int) -> npt.NDArray[np.float32]:
    """[views * b, n]: a stage's parameters for the samples in each view, zero where a view is without it."""
    number, place = next(iter(stage.places.items()))
    params = np.zeros((views, len(samples), len(samples[0].params[number][place])), np.float32)
    for number, place in stage.places.items():
        np.stack([sample.params[number][place] for sample in samples], out=params[number])
    return params.reshape(views * len(samples), -1)


def _reason(error: RuntimeError) -> str:
    """What went wrong, out of DALI's account of where in the graph it did."""
    what = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    # Files are blamed one at a time, so the number within the batch says nothing.
    return " ".join(what.replace("sample #0", "").split()).removesuffix(" :") or "DALI gave no reason"
