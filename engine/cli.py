"""The `vitrail` command."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from tyro.conf import Positional

from .data import DataConfig, DataError, Source, open_source
from .train.config import ConfigError

if TYPE_CHECKING:
    from .show.run import Run

RECORDED = DataConfig()
"""The images that a run names itself."""
PACKAGES = ("deepspeed", "nvidia-dali-cuda130", "xformers", "transformers", "timm", "torchvision", "apex")
"""Packages beside torch and triton whose versions decide what runs."""


def doctor() -> None:
    """Show versions, devices, options of training, optimisers and what each implementation of each op can do here."""
    from vitrail.kernels import report

    from .models.attention import attention_backend

    table = Table("component", "state", title="vitrail", title_justify="left")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table.add_row("device", torch.cuda.get_device_name() if device.type == "cuda" else "CPU")
    table.add_row("attention", ": ".join(attention_backend("auto", device)))
    table.add_row("DALI decodes", _dali(device))
    console = Console()
    console.print(table)
    console.print(_training())
    console.print(_optimisers(device))
    for part in (report.environment(), report.flags(), report.support()):
        console.print(part)


def data_pack(
    path: Annotated[str, Positional], output: Annotated[Path, Positional], shard_megabytes: int = 1000
) -> None:
    """Write images as tar shards, which a network file system reads much faster than single files.

    Args:
        path: folder of images, tar shards, or text file of paths.
        output: folder to make.
        shard_megabytes: size at which a shard is closed.
    """
    from .data.pack import pack

    source = _source(path)
    with _progress() as progress:
        count = pack(source, output, shard_bytes=shard_megabytes * 1_000_000, progress=progress)
    Console().print(f"{count} images in {output}")


def data_check(path: Annotated[str, Positional], threads: int = 0) -> None:
    """Decode every image once and report counts, sizes and the files that cannot be read.

    Args:
        path: folder of images, tar shards, or text file of paths.
        threads: decoding threads; 0 takes all cores.
    """
    from .data.pack import check

    source = _source(path)
    with _progress() as progress:
        report = check(source, threads=threads, progress=progress)
    Console().print(str(report), highlight=False, soft_wrap=True)
    if report.bad:
        raise SystemExit(1)


def show_attention(
    run: Annotated[Path, Positional],
    images: int = 8,
    size: int | None = None,
    output: Path | None = None,
    data: DataConfig = RECORDED,
) -> None:
    """Draw where the last layer of a run's network looks: attention.png.

    Of a ViT the attention of the class token, head by head; of a Swin transformer that which each token gets. Outlines
    hold 60 % of it.

    Args:
        run: the train.output of a run, with a checkpoint.
        images: how many.
        size: side of the images in pixels; a ViT that takes any size is shown more pixels than in its training.
        output: folder of the picture; that of the run.
        data: other images than those of the run.
    """
    from .evaluate.features import evaluation_mode
    from .show import attention

    device, found, source, options = _open_run(run, data)
    path = (output or run) / "attention.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with evaluation_mode(found.method, found.precision):
            attention.show_attention(
                found.method.backbone(), source, options, path, device=device, size=size, count=images
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    Console().print(f"Attention at step {found.step}: {path}", soft_wrap=True)


def show_matches(
    run: Annotated[Path, Positional],
    images: int = 1000,
    batch: int = 64,
    output: Path | None = None,
    data: DataConfig = RECORDED,
) -> None:
    """Draw which regions a run's network finds again in changed mirror images: matches.png.

    Args:
        run: the train.output of a run, with a checkpoint.
        images: how many are compared; the first eight are drawn.
        batch: how many at a time.
        output: folder of the picture; that of the run.
        data: other images than those of the run.
    """
    from .show.matches import draw_matches, match_regions

    device, found, source, options = _open_run(run, data)
    path = (output or run) / "matches.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = match_regions(
            found.method, source, options, precision=found.precision, batch=batch, device=device, limit=images
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    draw_matches(report, path)
    table = Table("regions found again", "exactly", "mean distance", title=f"step {found.step}", title_justify="left")
    for name, accuracy, distance in (
        ("10 most similar pairs of each image", report.accuracy, report.distance),
        ("all regions", report.all_accuracy, report.all_distance),
    ):
        table.add_row(name, f"{100 * accuracy:.1f} %", f"{distance:.2f} cells")
    table.add_row("chance", f"{100 * report.chance:.1f} %", "")
    Console().print(table)
    Console().print(
        f"{report.images} images, {report.grid[0]} x {report.grid[1]} regions. Picture: {path}", soft_wrap=True
    )


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "": {"doctor": doctor},
    "data": {"check": data_check, "pack": data_pack},
    "show": {"attention": show_attention, "matches": show_matches},
}
"""Command groups; those of "" stand alone."""


def main() -> None:
    """Entry point: `vitrail <command>` or `vitrail <group> <command>`; a user's mistake ends with status 2."""
    group = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else ""
    others = ", ".join(f"{name} {command}" for name in COMMANDS if name for command in COMMANDS[name])
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS[group],
            prog=f"vitrail {group}".rstrip(),
            args=sys.argv[2:] if group else sys.argv[1:],
            description=None if group else f"Further commands: {others}.",
        )
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one line that the user must see
        raise SystemExit(2) from None


def _training() -> Table:
    """Options that decide what a run computes and how it is watched, with the flags that choose."""
    from .train.guard import POLICIES

    flags = Column("flag", no_wrap=True)
    table = Table("option", flags, "what it takes", title="training", title_justify="left")
    resnets = "installed" if importlib.util.find_spec("torchvision") else "missing: pip install torchvision"
    table.add_row("ResNet backbones", "recipes/*_r50.py", f"torchvision, {resnets}")
    table.add_row("frozen patch projection", "--method.freeze-patch-embed", "a vision transformer without ConvStem")
    table.add_row("loss over the whole batch", "--train.grad-cache", "two views, no batch norm in the backbone")
    table.add_row("batch statistics of all ranks", "as the method has it", "any backend: gloo on CPUs, NCCL on GPUs")
    table.add_row("decay of vectors too", "--optim.decay all", "any optimiser but LARS")
    table.add_row("decay that moves", "--optim.final-weight-decay", "any optimiser, every ZeRO stage")
    table.add_row("schedule of DINO's code", "--optim.schedule dino", "any optimiser, every ZeRO stage")
    table.add_row("clipping of each tensor", "--optim.clip-per-tensor", "--optim.clip; every ZeRO stage")
    table.add_row("parameters held at first", "as the method has it", "any optimiser, every ZeRO stage")
    for kind, policies in POLICIES.items():
        table.add_row(f"guard: {kind}", f"--guard.{kind}", " | ".join(policies))
    return table


def _optimisers(device: torch.device) -> Table:
    """Whose code steps the weights in a run on `device`, by optimiser and ZeRO stage."""
    from .train.optimizers import overview

    table = Table("optim.name", "ZeRO stage", "implementation", "state", title="optimisers", title_justify="left")
    for name, stages, states in overview(device):
        for index, (implementation, state) in enumerate(states):
            start = ("", "") if index else (name, stages)
            table.add_row(*start, implementation, state, end_section=index == len(states) - 1)
    return table


def _source(path: str) -> Source:
    return open_source(DataConfig(path=path))


def _open_run(folder: Path, data: DataConfig) -> tuple[torch.device, Run, Source, DataConfig]:
    """The device, a run on it, and the images to show: those named, or those that the run is validated on."""
    from .show.run import open_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = open_run(folder, device)
    if not data.path and not data.val_path and data.source == "auto":
        data = replace(data, path=found.data.path, val_path=found.data.val_path, source=found.data.source)
    source = open_source(data, "val") or open_source(data, "train")
    return device, found, source, data


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as the callback that data tools take."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("images")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dali(device: torch.device) -> str:
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        return f"nothing ({error}); pass --data.decoder pillow"
    return "on the GPU" if device.type == "cuda" else "on the CPU"
