"""Input pipelines: encoded photographs in, uint8 batches on the device out; then decoding and every operation alone.

Views (`MAE views`; `DINO views`: two crops of 224 pixels and eight of 96; `evaluation view`). Files are read from the
page cache, in the same shuffled order by everybody.

* `DALI` and `DALI GPU`: this engine's loader with `--data.decoder cpu` and `gpu`.
* `Pillow`: this engine's loader with `--data.decoder pillow`.
* `torchvision`: `torch.utils.data.DataLoader` over `torchvision.datasets.ImageFolder`, as the official MAE code sets it
  up, with a worker process for each core: the worker opens the file with Pillow, converts it to RGB and applies
  torchvision's transforms of the same name to the Pillow image, and Pillow's blur, as the official DINO code does;
  where these go on with `ToTensor` and `Normalize`, it keeps the bytes (`PILToTensor`) and collates uint8 [b, 3, H, W].

`decode only` turns JPEGs that are in memory into pixels, and leaves these where the decoder does. torchvision's is
`torchvision.io.decode_jpeg`.

The operations start from decoded images. The difference to `decode only` would carry the noise of a decoder, which is
more than a crop or a flip costs; what is given up for it is that images come fresh out of a decoder. Windows are the
same for everybody, every image is mirrored, and every result is written out, although torchvision could hand out a crop
as a view. torchvision's are the functions of `torchvision.transforms.v2.functional` on uint8 tensors, in the layout
that its decoder leaves.

What is not a loader runs on threads, a share of the images each, and ends when all are done.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from bench.loaders import COUNT, HEIGHT, SHARE, WIDTH, Feed, Job, LoaderCase, Photos, make_photos, measures
from bench.plugin import Session
from PIL import Image
from torch.utils.dlpack import from_dlpack

from vitrail.engine.data import (
    CenterCrop,
    ColorJitter,
    DataConfig,
    GaussianBlur,
    HorizontalFlip,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
    build_loader,
    open_source,
)
from vitrail.engine.data.chains import dino_views
from vitrail.engine.data.order import permutation, sample_rng
from vitrail.engine.data.pillow import apply, decode, execute
from vitrail.engine.data.views import Op, Params
from vitrail.engine.evaluate.features import evaluation_view
from vitrail.engine.methods.mae import MAE, MAEConfig

Tensor = torch.Tensor
SEED = 0
SIZE = (HEIGHT, WIDTH)
# DALI's GPU decoder repeats colours of half the resolution, libjpeg interpolates them: on these photographs about one
# grey level by arithmetic. Not measured on a GPU yet.
GPU_ALLOWED = {"DALI GPU": 2.0}  # grey levels
OPS: tuple[Op, ...] = (
    RandomResizedCrop(size=224, scale=(0.2, 1.0)),
    HorizontalFlip(p=1.0),
    Resize(size=256),
    CenterCrop(size=224),
    ColorJitter(p=1.0),
    RandomGrayscale(p=1.0),
    GaussianBlur(p=1.0),
    Solarize(p=1.0),
)
# torchvision's functions on tensors do not round between the adjustments of a jitter, and blur by another kernel than
# Pillow: other pixels, so no peer.
WITHOUT_TORCHVISION = (ColorJitter, GaussianBlur)
# DALI turns hues and blurs by arithmetic of its own: up to half a grey level in the mean. torchvision cuts the fraction
# of a grey value off, Pillow rounds it.
OP_ALLOWED: dict[type, dict[str, float]] = {
    ColorJitter: {"DALI": 1.0, "DALI GPU": 2.0},
    GaussianBlur: {"DALI": 1.0, "DALI GPU": 2.0},
    RandomGrayscale: {"torchvision": 0.6},
}  # grey levels


def view_sets() -> dict[str, Sequence[View]]:
    """What methods want to see; a method adds its line."""
    with torch.device("meta"):  # nobody needs the weights
        return {
            "MAE views": MAE(MAEConfig()).views(),
            "DINO views": dino_views(224, 96),
            "evaluation view": [evaluation_view((224, 224))],
        }


def stacked(images: Sequence[Any]) -> Tensor:
    """Images in any form to uint8 [b, height, width, 3]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


# --- loaders ---------------------------------------------------------------------------------------------------------


def drawn(views: Sequence[View], job: Job) -> list[Tensor]:
    """The first batch of the engine's order, image by image."""
    results: list[list[Any]] = [[] for _ in views]
    for position, index in enumerate(permutation(len(job.photos.files), SEED, 0)[: job.batch]):
        image = decode(job.photos.files[index].read_bytes())
        for number, view in enumerate(views):
            params = view.draw(sample_rng(SEED, 0, position, number), SIZE)
            results[number].append(execute(view, image, params))
    return [stacked(result) for result in results]


def on_cpu(views: Sequence[Tensor]) -> list[Tensor]:
    return [view.cpu() for view in views]


def engine(decoder: str, views: Sequence[View], job: Job) -> Feed:
    """This engine's training loader; evaluation uses the same with another order."""
    config = DataConfig(path=str(job.photos.folder), decoder=decoder, threads=job.workers)  # type: ignore[arg-type]
    loader = build_loader(
        open_source(config),
        views,
        micro_batch=job.batch,
        accumulation=1,
        rank=0,
        world=1,
        seed=SEED,
        device=job.device,
        config=config,
    )
    batches = (batch.views for batch in loader)

    def close() -> None:
        batches.close()
        loader.close()

    return Feed(pull=partial(next, batches), images=job.batch, pixels=on_cpu, ahead=config.prefetch + 1, close=close)


class Shuffled:
    """The engine's order of samples, for a DataLoader."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(
            permutation(self.length, SEED, epoch).tolist() for epoch in itertools.count()
        )


def data_loader(views: Sequence[View], job: Job) -> Feed:
    from bench.transforms import Transforms  # which needs torchvision
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(job.photos.folder), Transforms(views))
    gpu = job.device.type == "cuda"
    loader: Any = DataLoader(
        dataset,
        job.batch,
        sampler=Shuffled(len(dataset)),
        num_workers=job.workers,
        pin_memory=gpu,
        drop_last=True,
    )
    batches = ([view.to(job.device, non_blocking=True) for view in images] for images, _ in loader)
    return Feed(
        pull=partial(next, batches),
        images=job.batch,
        pixels=lambda views: [view.permute(0, 2, 3, 1).cpu() for view in views],
        ahead=job.workers * loader.prefetch_factor,
        close=batches.close,
    )


def fixed(views: Sequence[View]) -> bool:
    """Whether the views draw nothing at random."""
    draws = [[np.concatenate(view.draw(sample_rng(seed, 0, 0, 0), SIZE)) for view in views] for seed in range(16)]
    return all(np.array_equal(a, b) for draw in draws for a, b in zip(draw, draws[0], strict=True))


def loading(name: str, views: Sequence[View]) -> LoaderCase:
    colours = any(isinstance(op, ColorJitter) for view in views for op in view.ops)
    return LoaderCase(
        name=name,
        shape=lambda job: {**job.photos.shape, "batch": job.batch},
        truth=partial(drawn, views),
        implementations={
            "DALI": partial(engine, "cpu", views),
            "DALI GPU": partial(engine, "gpu", views),
            "Pillow": partial(engine, "pillow", views),
            "torchvision": partial(data_loader, views),
        },
        own_draws=() if fixed(views) else ("torchvision",),
        allowed=GPU_ALLOWED | OP_ALLOWED[ColorJitter] if colours else GPU_ALLOWED,
    )


# --- single calls ----------------------------------------------------------------------------------------------------


def some(job: Job) -> Photos:
    return job.photos.first(SHARE * job.workers)


def on_threads(
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    job: Job,
    pixels: Callable[[Any], Any] = np.asarray,
) -> Feed:
    """A call that shares items out to threads, which work on one image at a time."""
    # PyTorch would start threads of its own in each of them.
    pool = ThreadPoolExecutor(job.workers, initializer=torch.set_num_threads, initargs=(1,))
    length = -(-len(items) // job.workers)
    shares = [items[start : start + length] for start in range(0, len(items), length)]

    def work(share: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [function(*item) for item in share]

    def close() -> None:
        pool.shutdown()
        torch.set_num_threads(torch.get_num_threads())  # threads to come take the number that was set last

    return Feed(
        pull=lambda: list(itertools.chain(*pool.map(work, shares))),
        images=len(items),
        pixels=lambda images: [stacked([pixels(image) for image in images])],
        close=close,
    )


def in_dali(graph: Callable[[Any, Any], Any], images: int, job: Job, *, gpu: bool) -> Feed:
    """A call of a DALI pipeline that has nothing in stock."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(
        batch_size=images,
        num_threads=job.workers,
        device_id=torch.cuda.current_device() if gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        pipeline.set_outputs(graph(fn, types))
    pipeline.build()
    return Feed(
        pull=pipeline.run,
        images=images,
        pixels=lambda outputs: [from_dlpack(outputs[0].as_tensor()).cpu().clone()],
    )


def encoded(job: Job) -> list[bytes]:
    return [path.read_bytes() for path in some(job).files]


def dali_decode(job: Job, *, gpu: bool) -> Feed:
    data = [np.frombuffer(one, np.uint8) for one in encoded(job)]

    def graph(fn: Any, types: Any) -> Any:
        files = fn.external_source(source=lambda: data, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)
        return fn.decoders.image(files, device="mixed" if gpu else "cpu", output_type=types.RGB)

    return in_dali(graph, len(data), job, gpu=gpu)


def pillow_decode(job: Job) -> Feed:
    return on_threads(decode, [(data,) for data in encoded(job)], job)


def torchvision_decode(job: Job) -> Feed:
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded(job)]
    return on_threads(lambda data: decode_jpeg(data, ImageReadMode.RGB), [(one,) for one in tensors], job, rows)


def rows(image: Tensor) -> Tensor:
    """[3, height, width] to a view [height, width, 3]; this is what torchvision's decoder has in memory."""
    return image.permute(1, 2, 0)


def decoding() -> LoaderCase:
    return LoaderCase(
        name="decode only",
        shape=lambda job: some(job).shape,
        truth=lambda job: [stacked([decode(data) for data in encoded(job)])],
        implementations={
            "DALI": partial(dali_decode, gpu=False),
            "DALI GPU": partial(dali_decode, gpu=True),
            "Pillow": pillow_decode,
            "torchvision": torchvision_decode,
        },
        allowed=GPU_ALLOWED,
    )


def decoded(op: Op, job: Job) -> list[tuple[Image.Image, Params]]:
    """Images, and for each what the operation draws."""
    images = [decode(data) for data in encoded(job)]
    return [(image, op.draw(sample_rng(SEED, 0, position, 0), SIZE)) for position, image in enumerate(images)]


def dali_op(op: Op, job: Job, *, gpu: bool) -> Feed:
    images, params = zip(*decoded(op, job), strict=True)
    pixels, drawn = stacked(images), np.stack(params)
    batch = pixels.cuda() if gpu else pixels.numpy()  # one piece of memory, which DALI need not copy

    def graph(fn: Any, types: Any) -> Any:
        from vitrail.engine.data.dali import lower

        common = {"batch": True, "no_copy": True}
        device = "gpu" if gpu else "cpu"
        inputs = fn.external_source(
            source=lambda: batch, device=device, dtype=types.UINT8, ndim=3, layout="HWC", **common
        )
        return lower(op, inputs, fn.external_source(source=lambda: drawn, dtype=types.FLOAT, ndim=1, **common))

    return in_dali(graph, len(images), job, gpu=gpu)


def pillow_op(op: Op, job: Job) -> Feed:
    return on_threads(partial(apply, op), decoded(op, job), job)


def torchvision_op(op: Op, job: Job) -> Feed:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    def run(image: Tensor, params: list[int]) -> Tensor:
        if isinstance(op, RandomResizedCrop):
            mode = InterpolationMode(op.interpolation)
            return F.resized_crop(image, *params, list(op.output_size((0, 0))), mode, antialias=True)
        if isinstance(op, HorizontalFlip):
            return F.horizontal_flip(image) if params[0] else image
        if isinstance(op, Resize):
            return F.resize(image, params, InterpolationMode(op.interpolation), antialias=True)
        if isinstance(op, RandomGrayscale):
            return F.rgb_to_grayscale(image, num_output_channels=3)
        if isinstance(op, Solarize):
            return F.solarize(image, op.threshold)
        if isinstance(op, CenterCrop):
            return rows(F.center_crop(image, params[2:])).contiguous().permute(2, 0, 1)
        raise TypeError(f"{type(op).__name__} has no torchvision form in this benchmark; add it")

    items = [(stacked([image])[0].permute(2, 0, 1), params.astype(int).tolist()) for image, params in decoded(op, job)]
    return on_threads(run, items, job, rows)


def operation(op: Op) -> LoaderCase:
    peer = {} if isinstance(op, WITHOUT_TORCHVISION) else {"torchvision": partial(torchvision_op, op)}
    return LoaderCase(
        name=f"{type(op).__name__} alone",
        shape=lambda job: {**some(job).shape, "bytes": HEIGHT * WIDTH * 3},
        truth=lambda job: [stacked([apply(op, image, params) for image, params in decoded(op, job)])],
        implementations={
            "DALI": partial(dali_op, op, gpu=False),
            "DALI GPU": partial(dali_op, op, gpu=True),
            "Pillow": partial(pillow_op, op),
            **peer,
        },
        allowed=OP_ALLOWED.get(type(op), {}),
    )


@pytest.fixture(scope="session")
def photos(bench: Session) -> Iterator[Photos]:
    """Made once, removed at the end."""
    with TemporaryDirectory() as folder:
        yield make_photos(Path(folder), COUNT[bench.dry])


CASES = [*itertools.starmap(loading, view_sets().items()), decoding(), *map(operation, OPS)]
test_loader = measures(CASES)
