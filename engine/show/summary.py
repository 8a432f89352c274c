"""The report at the end of a demo: did it learn, and how does it look?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vitrail.kernels import knn_topk

from ..data import Source, View
from ..data.pillow import decode, execute
from ..data.views import streams
from ..evaluate.correspondence import Correspondence
from ..evaluate.features import Features, evaluation_mode, evaluation_view, extract
from ..evaluate.knn import knn_accuracy
from ..evaluate.linear import linear_accuracy
from ..methods.base import Method
from ..methods.mae import MAE
from ..methods.simmim import SimMIM
from ..methods.sit import SiT
from ..models.vit import VisionTransformer
from .attention import show_attention
from .matches import compare_correspondence, draw_matches, match_regions
from .pictures import draw_curves, draw_grid, draw_reconstructions, some_images

if TYPE_CHECKING:
    from ..train.config import RunConfig
    from ..train.trainer import RunResult

PICTURES, LOOKS = 16, 8  # reconstructions, images whose attention is drawn
COLUMNS, NEIGHBOURS = 10, 4  # of the other pictures


def summarise(
    result: RunResult,
    config: RunConfig,
    *,
    train: Source,
    val: Source,
    rank: int,
    world: int,
    device: torch.device,
    rivals: dict[str, Method] | None = None,
) -> dict[str, dict[str, float]]:
    """Probe the trained features beside raw pixels and beside the same network untrained; write pictures.

    Collective. Rank 0 writes `summary.json` and `curves.png` into the run's folder, for MAE and SimMIM
    `reconstructions.png`, for methods on several views `views.png` and `neighbours.png`, for a ViT `attention.png`,
    for methods that compare regions `matches.png`, and prints a table. Variants that were trained for comparison are
    probed too; `correspondence.png` shows how well regions find each other in each of the networks.

    Returns:
        On rank 0, per row of the table, accuracies `knn`, `linear`, `linear_standardised`, 0 to 1; elsewhere nothing.
    """
    view = evaluation_view(result.method.views()[0].size)

    def collect(features: Callable[[Tensor], Tensor]) -> tuple[Features, Features]:
        train_part, val_part = (
            extract(features, source, view, config.data, batch=256, device=device, rank=rank, world=world)
            for source in (train, val)
        )
        return train_part, val_part

    def match(method: Method) -> Correspondence:
        precision = config.train.precision
        return match_regions(
            method, val, config.data, precision=precision, batch=256, device=device, rank=rank, world=world
        )

    torch.manual_seed(config.train.seed)
    networks = {"untrained network": config.method.build().to(device), "trained network": result.method}
    networks |= rivals or {}
    found = {"raw pixels": collect(lambda images: images.flatten(1) / 255)}
    for name, method in networks.items():
        with evaluation_mode(method, config.train.precision):
            found[name] = collect(method.features)
    matched = {name: match(method) for name, method in networks.items() if method.compares_regions}
    _look(result.method, config, val, device, rank)
    rows = {}
    if rank == 0:
        if len(result.method.views()) > 1:
            _show_views(result.method, config, train)
            _show_neighbours(*found["trained network"], view, config, train, val)
        rows = {
            name: {
                "knn": knn_accuracy(bank, queries, neighbours=config.evaluate.neighbours),
                "linear": linear_accuracy(bank, queries),
                "linear_standardised": linear_accuracy(bank, queries, standardise=True),
            }
            for name, (bank, queries) in found.items()
        }
        _write(rows, matched, result, config)
        _print(rows, matched, result, config)
    return rows


def _write(
    rows: dict[str, dict[str, float]], matched: dict[str, Correspondence], result: RunResult, config: RunConfig
) -> None:
    output = config.train.output
    summary = {"train_seconds": round(result.train_seconds, 1), "steps": result.step, "accuracy": rows}
    if matched:
        summary["correspondence"] = {name: found.numbers() for name, found in matched.items()}
        draw_matches(matched["trained network"], output / "matches.png")
        compare_correspondence(matched, output / "correspondence.png")
    draw_curves(output / "metrics.jsonl", output / "curves.png")
    (output / "summary.json").write_text(json.dumps(summary, indent=1))


def _look(method: Method, config: RunConfig, val: Source, device: torch.device, rank: int) -> None:
    """Draw what an autoencoder paints and where a ViT looks."""
    network = method.backbone()
    with evaluation_mode(method, config.train.precision):
        if isinstance(method, (MAE, SimMIM, SiT)):
            _paint(method, config, val, device, rank)
        if isinstance(network, VisionTransformer):
            path = config.train.output / "attention.png"
            show_attention(network, val, config.data, path, device=device, count=LOOKS, rank=rank)


def _paint(method: MAE | SimMIM | SiT, config: RunConfig, val: Source, device: torch.device, rank: int) -> None:
    """Reconstruct the first validation images; every rank computes, since ZeRO-3 needs them all."""
    images = some_images(val, method.views()[0].size, config.data, count=PICTURES, device=device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    if isinstance(method, MAE):
        columns, hidden = method.encoder.length, method.encoder.length - method.visible
    elif isinstance(method, SimMIM):
        columns, hidden = method.cells, method.hidden // method.scale**2
    else:
        columns, hidden = method.config.corruption.columns, 0
    noise = torch.rand(images.shape[0], columns, generator=generator, device=device)
    pictures = method.reconstruct(images, noise)
    if rank == 0:
        note = f"{100 * hidden / columns:.0f} % of the patches hidden" if hidden else "parts hidden, or other images'"
        if isinstance(method, MAE) and method.config.norm_pix:
            note += "; painted patches borrow the true patch's mean and contrast"
        draw_reconstructions(pictures, config.train.output / "reconstructions.png", note=note)


def _show_views(method: Method, config: RunConfig, train: Source) -> None:
    """Draw what the method sees of the first training images."""
    views = method.views()
    rows = {
        view.name: [_picture(train, index, view, seed=stream * COLUMNS + index) for index in range(COLUMNS)]
        for stream, view in zip(streams(views), views, strict=True)
    }
    draw_grid(rows, config.train.output / "views.png")


def _show_neighbours(
    bank: Features, queries: Features, view: View, config: RunConfig, train: Source, val: Source
) -> None:
    """Draw the nearest training images of the first validation images, and mark those of another class."""
    keys = F.normalize(bank.vectors, dim=1)
    _, nearest = knn_topk(F.normalize(queries.vectors[:COLUMNS], dim=1), keys, NEIGHBOURS)
    rows = {"image": [_picture(val, index, view) for index in range(COLUMNS)]}
    wrong = {}
    for rank, indices in enumerate(nearest.T.tolist(), start=1):
        rows[f"nearest {rank}"] = [_picture(train, index, view) for index in indices]
        wrong[f"nearest {rank}"] = [bool(bank.labels[i] != queries.labels[q]) for q, i in enumerate(indices)]
    draw_grid(rows, config.train.output / "neighbours.png", marked=wrong, note="framed: another class")


def _picture(source: Source, index: int, view: View, seed: int = 0) -> NDArray[np.uint8]:
    """One view of one image, `[H, W, 3]`."""
    image = decode(source.read(index))
    return execute(view, image, view.draw(np.random.default_rng(seed), (image.height, image.width)))


def _print(
    rows: dict[str, dict[str, float]], matched: dict[str, Correspondence], result: RunResult, config: RunConfig
) -> None:
    table = Table(title=f"{result.step} steps in {result.train_seconds:.0f} s", title_justify="left")
    table.add_column("features")
    regions = ["regions found again"] if matched else []
    for column in ("20-NN", "linear", "linear, standardised", *regions):
        table.add_column(column, justify="right")
    for name, scores in rows.items():
        found = [100 * matched[name].accuracy] if name in matched else []
        table.add_row(name, *(f"{value:.1f} %" for value in (*(100 * score for score in scores.values()), *found)))
    if matched:
        table.add_row("chance", "", "", "", f"{100 * matched['trained network'].chance:.1f} %")
    console = Console()
    console.print(table)
    knn, linear = (100 * (rows["trained network"][k] - rows["untrained network"][k]) for k in ("knn", "linear"))
    console.print(
        f"Training added {knn:.1f} points to the nearest-neighbour accuracy and {linear:.1f} to the linear one. "
        f"Pictures: {config.train.output}/*.png"
    )
