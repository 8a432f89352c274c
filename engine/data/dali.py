"""Views executed with NVIDIA DALI, on a GPU or on CPU threads.

The graph is deterministic arithmetic: encoded bytes and drawn parameters go in, pixels come out, and nothing in it has
a seed or a state. Each image is decoded once, whatever the number of views.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .faults import DataError
from .reader import DecodeError, Sample
from .views import CenterCrop, HorizontalFlip, Op, RandomResizedCrop, Resize, View

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
except ImportError as error:
    raise DataError(
        f"DALI cannot be imported ({error}); expected nvidia-dali-cuda130 (Linux): "
        "install it, or decode with Pillow: --data.decoder pillow"
    ) from error

Node: TypeAlias = Any
"""A DALI graph node."""

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


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
