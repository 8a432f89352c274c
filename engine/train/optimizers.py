"""Which optimiser steps the weights, whose code it is, and why not another's."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch

from vitrail.kernels import FusedAdamWEMA, FusedLAMB, FusedLARS

from .config import ConfigError, OptimConfig, RunConfig

IMPLEMENTATIONS = ("vitrail", "torch", "apex", "deepspeed")
AUTOMATIC = ("vitrail", "torch")  # what `auto` tries, in this order
TITLES = {"adamw": "AdamW", "lars": "LARS", "lamb": "LAMB", "sgd": "SGD"}


def reasons(implementation: str, *, name: str, stage: int, device: torch.device) -> list[str]:
    """Why an implementation cannot be the optimiser here; an empty list means that it can.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        name: `adamw`, `lars`, `lamb` or `sgd`.
        stage: ZeRO stage.
        device: where the parameters are.
    """
    if name == "sgd":
        return [] if implementation == "torch" else ["SGD is taken from torch alone"]
    if implementation == "vitrail":
        return _vitrail(name, stage)
    against = [] if name == "adamw" or stage == 0 else [_shards(name)]
    if implementation == "torch":
        return against if name == "adamw" else [*against, f"PyTorch has no {TITLES[name]}"]
    if name == "lars":
        return [*against, f"{implementation} has no LARS"]
    return against + (_apex(device) if implementation == "apex" else _deepspeed(name, device))


def _vitrail(name: str, stage: int) -> list[str]:
    if stage == 0:
        return []
    if name != "adamw":
        return [_shards(name)]
    return [
        "its gain is the teacher's update in the same pass, and flat ZeRO shards have no teachers; "
        "pass --train.zero-stage 0"
    ]


def _shards(name: str) -> str:
    return (
        f"{TITLES[name]}'s trust ratios, one for each parameter, would be wrong on flat ZeRO shards; "
        "pass --train.zero-stage 0"
    )


def _apex(device: torch.device) -> list[str]:
    against = [] if device.type == "cuda" else [f"it runs on CUDA devices, not on the {device.type.upper()}"]
    if importlib.util.find_spec("apex") is None:
        return [*against, "apex is not installed"]
    if importlib.util.find_spec("amp_C") is None:
        return [*against, "apex is installed without its compiled kernels (amp_C)"]
    return against


def _deepspeed(name: str, device: torch.device) -> list[str]:
    """DeepSpeed compiles its optimisers on first use, Adam for the GPU or the CPU, LAMB for the GPU."""
    if name == "lamb" and device.type != "cuda":
        return [f"DeepSpeed's FusedLamb runs on CUDA devices, not on the {device.type.upper()}"]
    from . import ds  # noqa: F401 - tells DeepSpeed which accelerator there is

    try:
        from deepspeed.ops import op_builder

        builder = op_builder.FusedLambBuilder if name == "lamb" else op_builder.FusedAdamBuilder
        compatible = builder().is_compatible(verbose=False)
    except Exception as error:  # builders raise whatever a missing compiler makes of them
        return [f"DeepSpeed cannot compile its optimiser here: {error}".splitlines()[0]]
    return [] if compatible else ["DeepSpeed cannot compile its optimiser here: ds_report says what is missing"]


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
        ConfigError: none can, or not the one that was asked for, or weights cannot be decayed, or gradients clipped or
            kept, as asked.
    """
    optim, stage = config.optim, config.train.zero_stage
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if optim.name == "lars" and optim.decay == "all":
        raise ConfigError(
            "optim.decay all cannot run with optim.name lars: every variant spares vectors both decay and trust ratio; "
            "pass --optim.decay matrices"
        )
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
    if optim.clip_per_tensor and optim.clip_per_part:
        raise ConfigError("gradients are clipped by tensor or by part: pass --optim.no-clip-per-tensor or -part")
    if optim.clips_pieces and not optim.clip:
        name = "clip_per_tensor" if optim.clip_per_tensor else "clip_per_part"
        raise ConfigError(f"optim.{name} without a limit does nothing: pass --optim.clip, 3.0 in DINO's code")


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
            the others in stage 0, DeepSpeed in stages 1 to 3.
        groups: parameter groups, each with its weight decay, which SGD adds to the gradient (L2).
        teachers: teacher of each parameter that has one; `FusedAdamWEMA` alone updates them.
    """
    adam: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "sgd":
        # Not told by `found_inf`: the fused kernel would keep the momentum of a skipped first step uninitialised.
        return heeding_the_flag(torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, fused=True))
    if implementation == "torch":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if implementation == "vitrail":
        return _build_vitrail(optim, groups, adam, teachers)
    if optim.name == "lamb":
        return heeding_the_flag(_foreign_lamb(implementation, groups, adam))
    module = importlib.import_module("apex.optimizers" if implementation == "apex" else "deepspeed.ops.adam")
    return heeding_the_flag(module.FusedAdam(groups, **adam, adam_w_mode=True))


def _foreign_lamb(implementation: str, groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """LAMB of apex, or of DeepSpeed, which holds trust ratios between 0.01 and 10; neither is to clip."""
    optimizer: torch.optim.Optimizer
    if implementation == "apex":
        module = importlib.import_module("apex.optimizers")
        optimizer = module.FusedLAMB(groups, **adam, max_grad_norm=math.inf)
    else:
        optimizer = importlib.import_module("deepspeed.ops.lamb").FusedLamb(groups, **adam)
    return optimizer


def heeding_the_flag(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimiser pass over a step before which its attribute `held_back` was set to a raised flag.

    torch's fused AdamW has `found_inf` for that, and reads it on the device; this one is read on the host.
    """
    taken = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        flag = getattr(optimizer, "held_back", None)
        return taken(*args, **kwargs) if flag is None or not bool(flag) else None

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def _build_vitrail(
    optim: OptimConfig,
    groups: list[dict[str, Any]],
    adam: dict[str, Any],
    teachers: dict[torch.Tensor, torch.Tensor],
) -> torch.optim.Optimizer:
    guard: dict[str, Any] = {
        "max_grad_norm": None if optim.clip_per_part else optim.clip or None,
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
