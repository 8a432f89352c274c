"""Which optimiser steps the weights, whose code it is, and why not another's."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from vitrail.kernels import FusedAdamWEMA, FusedLAMB, FusedLARS

from .config import ConfigError, OptimConfig, RunConfig

IMPLEMENTATIONS = ("vitrail", "torch", "apex", "deepspeed")
AUTOMATIC = ("vitrail", "torch")  # what `auto` tries, in this order
TITLES = {"adamw": "AdamW", "lars": "LARS", "lamb": "LAMB"}


def reasons(implementation: str, *, name: str, stage: int, device: torch.device) -> list[str]:
    """Why an implementation cannot be the optimiser here; an empty list means that it can.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        name: `adamw`, `lars` or `lamb`.
        stage: ZeRO stage.
        device: where the parameters are.
    """
    if implementation == "vitrail":
        return _vitrail(name, stage)
    if name != "adamw":
        return [f"the trainer takes {TITLES[name]} from vitrail alone; pass --optim.implementation auto"]
    if implementation == "torch":
        return []
    against = _apex(device) if implementation == "apex" else _deepspeed()
    if stage == 0:
        why = "stage 0 leaves gradients that are not finite to the optimiser, and this one would step on them"
        return [*against, f"{why}; pass --train.zero-stage 1"]
    return against


def _vitrail(name: str, stage: int) -> list[str]:
    if stage == 0:
        return []
    if name == "adamw":
        why = "its gain is the teacher's update in the same pass, and flat ZeRO shards have no teachers"
    else:
        why = "its trust ratios, one for each parameter, would be wrong on flat ZeRO shards"
    return [f"{why}; pass --train.zero-stage 0"]


def _apex(device: torch.device) -> list[str]:
    against = [] if device.type == "cuda" else [f"it runs on CUDA devices, not on the {device.type.upper()}"]
    if importlib.util.find_spec("apex") is None:
        return [*against, "apex is not installed"]
    if importlib.util.find_spec("amp_C") is None:
        return [*against, "apex is installed without its compiled kernels (amp_C)"]
    return against


def _deepspeed() -> list[str]:
    """DeepSpeed compiles its Adam on first use, for the GPU or the CPU."""
    from . import ds  # noqa: F401 - tells DeepSpeed which accelerator there is

    try:
        from deepspeed.ops.op_builder import FusedAdamBuilder

        compatible = FusedAdamBuilder().is_compatible(verbose=False)
    except Exception as error:  # builders raise whatever a missing compiler makes of them
        return [f"DeepSpeed cannot compile its FusedAdam here: {error}".splitlines()[0]]
    return [] if compatible else ["DeepSpeed cannot compile its FusedAdam here: ds_report says what is missing"]


def overview(device: torch.device) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """For each optimiser and ZeRO stage on `device`: name, stages, and the state of each implementation.

    Stages of which the same can be said are told together. The state is `active` for what `auto` takes, else why it
    does not.
    """
    rows: list[tuple[str, str, list[tuple[str, str]]]] = []
    for name in TITLES:
        told: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for stage in range(4):
            against = {i: reasons(i, name=name, stage=stage, device=device) for i in IMPLEMENTATIONS}
            active = next((i for i in AUTOMATIC if not against[i]), None)
            states = {i: "; ".join(found) or f"with --optim.implementation {i}" for i, found in against.items()}
            if active is not None:
                states[active] = "active"
            told.setdefault(tuple(states.items()), []).append(str(stage))
        rows += [(name, ", ".join(stages), list(states)) for states, stages in told.items()]
    return rows


def choose(config: RunConfig) -> str:
    """The implementation that runs `config`'s optimiser here; touches neither a GPU nor a process group.

    Raises:
        ConfigError: none can, or not the one that was asked for, or the gradients cannot be clipped or kept as asked.
    """
    optim, stage = config.optim, config.train.zero_stage
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_gradients(config)
    candidates = AUTOMATIC if optim.implementation == "auto" else (optim.implementation,)
    against = {c: reasons(c, name=optim.name, stage=stage, device=device) for c in candidates}
    for candidate, found in against.items():
        if not found:
            return candidate
    first = candidates[0]
    raise ConfigError(
        f"optim.name {optim.name} of {first} cannot run with train.zero_stage {stage}: {'; '.join(against[first])}"
    )


def _check_gradients(config: RunConfig) -> None:
    optim, stage = config.optim, config.train.zero_stage
    if not stage and config.train.reduce_dtype != "fp32":
        raise ConfigError(
            f"train.reduce_dtype {config.train.reduce_dtype} cannot run with train.zero_stage 0: there DeepSpeed keeps "
            "gradients in the parameters' fp32; pass --train.zero-stage 1, or --train.reduce-dtype fp32"
        )
    if not optim.clip_per_tensor:
        return
    if not optim.clip:
        raise ConfigError("optim.clip_per_tensor without a limit does nothing: pass --optim.clip, 3.0 in DINO's code")
    if stage:
        raise ConfigError(
            f"optim.clip_per_tensor cannot run with train.zero_stage {stage}: ZeRO stages 1 to 3 clip flat shards by "
            "their common norm; pass --train.zero-stage 0, or --no-optim.clip-per-tensor for the common norm"
        )


def build(
    implementation: str,
    optim: OptimConfig,
    groups: list[dict[str, Any]],
    teachers: dict[torch.Tensor, torch.Tensor],
) -> torch.optim.Optimizer:
    """The optimiser of `choose`.

    Args:
        implementation: what `choose` returned.
        optim: its settings. vitrail's optimisers clip and check the gradients themselves, `guarded_step` does it for
            torch's, DeepSpeed in stages 1 to 3.
        groups: parameter groups, each with its weight decay.
        teachers: teacher of each parameter that has one; `FusedAdamWEMA` alone updates them.
    """
    adam: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if implementation == "torch":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if implementation == "vitrail":
        return _build_vitrail(optim, groups, adam, teachers)
    module = importlib.import_module("apex.optimizers" if implementation == "apex" else "deepspeed.ops.adam")
    optimizer: torch.optim.Optimizer = module.FusedAdam(groups, **adam, adam_w_mode=True)
    return optimizer


def _build_vitrail(
    optim: OptimConfig,
    groups: list[dict[str, Any]],
    adam: dict[str, Any],
    teachers: dict[torch.Tensor, torch.Tensor],
) -> torch.optim.Optimizer:
    guard: dict[str, Any] = {
        "max_grad_norm": optim.clip or None,
        "clip_per_tensor": optim.clip_per_tensor,
        "skip_nonfinite": True,
    }
    if optim.name == "adamw":
        return FusedAdamWEMA(groups, **adam, teacher=teachers, **guard)
    if optim.name == "lamb":
        return FusedLAMB(groups, **adam, **guard)
    return FusedLARS(
        groups,
        lr=0.0,
        momentum=optim.momentum,
        trust_coefficient=optim.trust_coefficient,
        eps=optim.eps,
        variant=optim.lars_variant,
        **guard,
    )
