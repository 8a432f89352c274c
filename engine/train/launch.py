"""From a recipe and a command line to a finished run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import DataError, Source, open_source
from . import optimizers
from .config import ConfigError, RunConfig, TrainingError
from .demo import provoke, shrink
from .grad_cache import check_comparisons

PROVOKE = "--provoke"


def launch(recipe: Callable[[], RunConfig], argv: Sequence[str] | None = None) -> None:
    """Run a recipe: apply the command line, open the data, train.

    `--demo` shrinks the recipe to the bundled images and a small model; with `--provoke` beside it, the demo is run
    again at a learning rate that is far too high, with the patch projection frozen and trained, to show what the guard
    sees. Every other flag is a dotted field of `RunConfig`. Mistakes of the user end the process with status 2 and one
    line on stderr, before a GPU is touched; a run that the guard has ended, with status 3.

    Args:
        recipe: returns the whole configuration.
        argv: arguments; None takes the process's own.
    """
    try:
        arguments = sys.argv[1:] if argv is None else argv
        config, demo = parse(recipe, arguments)
        config.accumulation(int(os.environ.get("WORLD_SIZE", "1")))  # refuses a batch that does not divide
        optimizers.choose(config)  # refuses an optimiser that cannot run
        check_method(config)
        sources = open_source(config.data, "train"), open_source(config.data, "val")
        if PROVOKE in arguments:
            _provoke(config, *sources)
        else:
            _train(config, *sources, demo=demo)
    except (ConfigError, DataError, TrainingError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one line that the user must see
        raise SystemExit(3 if isinstance(error, TrainingError) else 2) from None


def check_method(config: RunConfig) -> None:
    """Build the method without memory, to find out before a GPU is touched whether its settings fit each other.

    What else a run needs is looked for as well.

    Raises:
        ConfigError: they do not, or something is missing.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        with torch.device("meta"):
            method = config.method.build()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{type(config.method).__name__} cannot be built: {error}") from error
    missing = config.method.missing()
    if missing:
        raise ConfigError("; ".join(missing))
    check_comparisons(method, config, world)


def parse(recipe: Callable[[], RunConfig], argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The recipe's configuration under a command line, and whether it is the demo.

    The DeepSpeed launcher appends `--local_rank=N`, which is dropped: the environment says the same. An unknown flag
    ends the process with status 2 and names the nearest known one.

    Raises:
        ConfigError: there are no images to train on, or a run that is not the demo is to be ruined.
    """
    import tyro  # here, so that the rest of this package serves where nobody parses a command line

    demo = "--demo" in argv
    if PROVOKE in argv and not demo:
        raise ConfigError(f"{PROVOKE} ruins a run on purpose and is for the demo alone: pass --demo as well")
    dropped = ("--local_rank=", "--local-rank=")
    flags = [flag for flag in argv if flag not in ("--demo", PROVOKE) and not flag.startswith(dropped)]
    default = shrink(recipe()) if demo else recipe()
    config = tyro.cli(
        RunConfig,
        default=default,
        args=flags,
        prog=os.path.basename(sys.argv[0]),
        description="Any field of the recipe can be overridden; --demo runs it on bundled images in minutes, and "
        f"{PROVOKE} with it shows an unstable run beside a stable one.",
    )
    if not config.data.path and config.data.source in ("auto", "folder", "tar", "list"):
        raise ConfigError(
            "no training images: pass --data.path with a folder of images, .tar shards or a list of files, "
            "or try the recipe with --demo"
        )
    return config, demo


def _train(config: RunConfig, train: Source, val: Source | None, *, demo: bool) -> None:
    """Start the processes, train, and report on a finished demo."""
    from .ds import start_processes
    from .trainer import Trainer

    rank, world, device = start_processes()
    place: dict[str, Any] = {"train": train, "val": val, "rank": rank, "world": world, "device": device}
    result = Trainer(config, **place).run()
    if demo and result.finished and val is not None:
        from ..show.summary import summarise

        rivals, epochs = {}, config.train.epochs * config.method.demo_run().rival_share
        # A variant may compare images where the method does not: whoever chose to accumulate has accepted that.
        train_config = replace(config.train, epochs=epochs, accumulation=config.accumulation(world))
        for name, method in config.method.demo_rivals().items():
            if rank == 0:
                print(f"\n{name}, to compare with")  # noqa: T201 - a heading for what follows
            output = config.train.output / name.replace(" ", "-")
            variant = replace(config, method=method, train=replace(train_config, output=output))
            other = Trainer(variant, **place).run()
            if not other.finished:
                return
            rivals[name] = other.method
        summarise(result, config, rivals=rivals, **place)


def _provoke(config: RunConfig, train: Source, val: Source | None) -> None:
    """Run the variants of a demo that `provoke` names, and compare what became of them."""
    from ..show.instability import compare
    from .ds import start_processes
    from .trainer import Trainer

    variants = provoke(config)
    rank, world, device = start_processes()
    for name, variant in variants.items():
        if rank == 0:
            shutil.rmtree(variant.train.output, ignore_errors=True)  # alarms of an earlier comparison
            print(f"\npatch projection {name}")  # noqa: T201 - a heading for what follows
        torch.distributed.barrier()
        Trainer(variant, train=train, val=val, rank=rank, world=world, device=device).run()
    if rank == 0:
        compare({name: variant.train.output for name, variant in variants.items()}, config.train.output)
