"""A finished or a running run, opened from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import DataConfig
from ..methods.base import Method
from ..methods.load import method_config, read_config
from ..train.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Run:
    """What there is to look at."""

    method: Method
    """With the weights of the newest checkpoint."""
    data: DataConfig
    """The images that it was trained on."""
    precision: str
    """That of the training, "bf16" or "fp32"."""
    step: int
    """Steps that the weights have seen."""


def open_run(folder: Path, device: torch.device) -> Run:
    """Rebuild the method of a run and load its newest weights. No code is unpickled.

    Args:
        folder: `train.output` of the run.
        device: where the method goes.

    Raises:
        ConfigError: this is no such folder, there is no checkpoint yet, or another version wrote it.
    """
    from ..train.checkpoint import checkpoints, load_weights, step_of  # with it DeepSpeed

    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} holds no run, there is no {file.name} in it: pass the train.output of a recipe")
    saved = checkpoints(folder)
    if not saved:
        raise ConfigError(f"{folder} has no checkpoint yet: wait for the first one, every train.save_every epochs")
    try:
        plain = json.loads(file.read_text())
        method = method_config(plain["method"]).build()
        data, precision = read_config(DataConfig, plain["data"], "data"), plain["train"]["precision"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a configuration that this version knows: {error}") from error
    load_weights(method, saved[-1])
    return Run(method=method.to(device).eval(), data=data, precision=precision, step=step_of(saved[-1]))
