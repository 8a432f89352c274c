"""Checkpoints: DeepSpeed's own files plus a sidecar that no number of ranks is tied to.

A checkpoint is a folder `checkpoints/step_00001234`::

    deepspeed/          optimiser and parameter shards, for the same number of ranks
    model.safetensors   every parameter and buffer, whole, in fp32; teachers are among them
    rng-0.safetensors   random state of each rank
    state.json          step, what the guard remembers, fingerprint of the configuration, world, versions

It is written under a temporary name, flushed to disk and renamed, so a folder with its final name is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.positions import resize_positions
from ..models.vit import VisionTransformer
from .config import ConfigError, RunConfig, TrainingError
from .optimizers import choose

PREFIX = "step_"


@dataclass
class TrainState:
    """Everything that moves with the steps; the data stream and the masks are functions of it."""

    step: int = 0
    """Optimiser steps taken, skipped ones included."""
    skipped: int = 0
    """Steps not applied: a gradient was not finite, or a spike."""
    data_shift: int = 0
    """Batches passed over by returns to a checkpoint: step s trains on batch s + data_shift of the sample order."""
    rollbacks: int = 0
    """Returns to a checkpoint."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembers."""


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints under a run's folder, oldest first."""
    found = (output / "checkpoints").glob(f"{PREFIX}*")
    return sorted(path for path in found if (path / "state.json").is_file())


def whole_state(module: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """Parameters and buffers of the state dict by name, on the CPU, complete even when ZeRO-3 has sharded them.

    Collective: every rank must call it. With `sharded` only rank 0's result is complete.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            state[name] = parameter.detach().cpu().clone()
    kept = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            state[name] = buffer.detach().cpu().clone()
    return state


def save(output: Path, engine: DeepSpeedEngine, state: TrainState, config: RunConfig, *, dataset: str) -> Path:
    """Write a checkpoint of `state.step` and delete those beyond `train.keep`. Collective.

    Returns:
        The folder of the checkpoint.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    final = output / "checkpoints" / f"{PREFIX}{state.step:08d}"
    partial = final.with_name(f".partial-{final.name}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
    save_file(_random_state(), partial / f"rng-{rank}.safetensors")
    whole = whole_state(engine.module, sharded=engine.zero_optimization_stage() == 3)
    if rank == 0:
        save_file({name: value.contiguous() for name, value in whole.items()}, partial / "model.safetensors")
        description = {
            **asdict(state),
            "world": world,
            "zero_stage": config.train.zero_stage,
            "implementation": choose(config),
            "fingerprint": config.fingerprint(dataset),
            "dataset": dataset,
            "config": config.as_dict(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        (partial / "state.json").write_text(json.dumps(description, indent=1))
    torch.distributed.barrier()
    if rank == 0:
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush_folder(final.parent)
        for old in checkpoints(output)[: -config.train.keep]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def restore(path: Path, engine: DeepSpeedEngine, config: RunConfig, *, dataset: str) -> TrainState:
    """Continue from a checkpoint: weights, optimiser, random state, position. Collective.

    Raises:
        ConfigError: the checkpoint belongs to another configuration, or to another number of ranks, ZeRO stage or
            implementation of the optimiser.
    """
    description = json.loads((path / "state.json").read_text())
    world = torch.distributed.get_world_size()
    if description["fingerprint"] != config.fingerprint(dataset):
        changed = ", ".join(_differences(description["config"], config.as_dict()))
        if description["dataset"] != dataset:
            changed = f"other training images; {changed}"
        raise ConfigError(
            f"{path} was written with another configuration ({changed}): restore it, choose another train.output, "
            "or pass --train.no-resume"
        )
    for name, saved, present in (
        ("ranks", description["world"], world),
        ("train.zero_stage", description["zero_stage"], config.train.zero_stage),
        ("optim.implementation", description["implementation"], choose(config)),
    ):
        if saved != present:
            raise ConfigError(
                f"{path} holds optimiser shards for {name} = {saved}, this run has {present}: continue with {saved}, "
                "or start a new run from its weights with --train.init_from and another --train.output"
            )
    engine.load_checkpoint(str(path), tag="deepspeed")
    _restore_random_state(load_file(path / f"rng-{torch.distributed.get_rank()}.safetensors"))
    return TrainState(**{part.name: description[part.name] for part in fields(TrainState) if part.name in description})


def go_back(
    output: Path, engine: DeepSpeedEngine, state: TrainState, config: RunConfig, *, dataset: str, before: int, why: str
) -> TrainState:
    """Return to the newest checkpoint of step `before` or an older one, and delete those after it. Collective.

    The batches since that checkpoint will be passed over, or the same ones would lead to the same trouble: the state
    is written with their number into the checkpoint, so that whoever resumes from it passes over them as well.

    Args:
        output: the run's folder.
        engine: what is restored.
        state: where the run stands.
        config: the run.
        dataset: fingerprint of the training images.
        before: newest step that is from before the trouble.
        why: what the trouble is.

    Returns:
        The state to go on from.

    Raises:
        TrainingError: there is no such checkpoint; nothing was done.
    """
    saved = checkpoints(output)
    fitting = [path for path in saved if step_of(path) <= before]
    if not fitting:
        there = ", ".join(str(step_of(path)) for path in saved) or "none"
        raise TrainingError(
            f"{why}; there is no checkpoint of step {before} or before to go back to (there are: {there}); "
            "save more often with train.save_every, or keep more with train.keep"
        )
    path = fitting[-1]
    torch.distributed.barrier()  # all ranks have looked before rank 0 deletes
    restored = restore(path, engine, config, dataset=dataset)
    restored.data_shift = state.data_shift + state.step - restored.step
    restored.rollbacks = state.rollbacks + 1
    if torch.distributed.get_rank() == 0:
        file = path / "state.json"
        partial = path / ".partial-state.json"
        partial.write_text(json.dumps(json.loads(file.read_text()) | asdict(restored), indent=1))
        _flush(path)
        os.replace(partial, file)
        _flush_folder(path)
        for newer in saved[len(fitting) :]:
            shutil.rmtree(newer)
    torch.distributed.barrier()
    return restored


def step_of(path: Path) -> int:
    """Steps done when a checkpoint was written, from the name of its folder."""
    return int(path.name.removeprefix(PREFIX))


def load_weights(module: nn.Module, path: Path) -> list[str]:
    """Load `model.safetensors` of a checkpoint, or such a file itself, into a module with the same names.

    Learned positions of another, square grid are stretched to the module's as its network stretches them for an image
    of another size: at first it does what the saved one would do with such images.

    Returns:
        Names of the tables that were stretched.

    Raises:
        ConfigError: the file does not exist, or its names or shapes are not exactly the module's.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no weights at {file}: pass a checkpoint folder or a .safetensors file")
    found, wanted = load_file(file), module.state_dict()
    stretched = _stretch_positions(module, found)
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [f"{k} {tuple(found[k].shape)} instead of {tuple(wanted[k].shape)}" for k in wanted.keys() & found.keys()
              if found[k].shape != wanted[k].shape]  # fmt: skip
    if missing or surplus or shapes:
        raise ConfigError(
            f"{file} does not fit the model; missing: {missing or 'none'}; not in the model: {surplus or 'none'}; "
            f"other shapes: {sorted(shapes) or 'none'}"
        )
    module.load_state_dict(found)
    return stretched


def _stretch_positions(module: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """Bring square tables of learned positions in `found` to the grids of the module's networks; their names."""
    stretched = []
    for place, network in module.named_modules():
        if not isinstance(network, VisionTransformer) or not network.config.learns_positions:
            continue
        name, wanted, prefix = f"{place}.pos_embed".lstrip("."), network.pos_embed, network.num_prefix
        table = found.get(name)
        if wanted is None or table is None or table.dim() != 3 or table.shape == wanted.shape:
            continue
        side = math.isqrt(max(table.shape[1] - prefix, 0))
        if table.shape[2] == wanted.shape[2] and table.shape[1] == prefix + side**2:
            offset = network.config.position_offset
            found[name] = resize_positions(table, (side, side), network.grid, prefix=prefix, offset=offset)
            stretched.append(name)
    return stretched


def _random_state() -> dict[str, Tensor]:
    """Random state of this process's CPU and GPU generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names whose values differ, with both values."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _differences(before, after, f"{prefix}{key}.")
        elif before != after and not f"{prefix}{key}".startswith(
            ("data.", "guard.", "train.output", "train.log_every")
        ):
            changed.append(f"{prefix}{key}: {before} then, {after} now")
    return changed


def _flush(folder: Path) -> None:
    """Force every file below `folder` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
