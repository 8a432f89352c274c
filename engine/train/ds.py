"""DeepSpeed: processes, the engine's configuration and the few calls that differ between its stages."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.kernels import multi_tensor_norm, multi_tensor_scale_
from vitrail.kernels.multi_tensor_norm.clip import clip_scales, multi_tensor_clip_
from vitrail.kernels.multi_tensor_norm.op import Norms
from vitrail.kernels.optimizers import FusedOptimizer

from ..data.cache import available_threads
from ..methods.base import Method
from . import optimizers
from .config import OptimConfig, RunConfig
from .host_memory import keep_freed_memory
from .param_groups import PART, SCALE, SCHEDULED, parameter_groups
from .shard_clipping import PartClipping, ShardClipping

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it had to guess

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad

deepspeed_logger.setLevel(logging.WARNING)


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes, or a group of one.

    Returns:
        Rank, world size and this rank's device.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    if "LOCAL_SIZE" in os.environ:  # what DeepSpeed's launcher calls torchrun's LOCAL_WORLD_SIZE
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # the ranks of this host share its cores
            torch.set_num_threads(available_threads())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes, for a run on `world` ranks."""
    train, optim = config.train, config.optim
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world),
        "zero_allow_untested_optimizer": optim.name == "sgd",  # elementwise, so right on flat shards
        # guarded_step clips in stage 0, ShardClipping each parameter and PartClipping each part in the others
        "gradient_clipping": optim.clip if train.zero_stage and not optim.clips_pieces else 0.0,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": train.zero_stage,
            # Replaces F.linear globally, and rounds three-dimensional inputs differently from nn.Linear.
            "memory_efficient_linear": False,
        },
        "torch_autocast": {
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": _linear_classes() if train.reduce_dtype == "bf16" else [],
        },
        "data_types": {"grad_accum_dtype": train.reduce_dtype},
    }


def _linear_classes() -> list[str]:
    """Modules whose gradients may be reduced in bf16; DeepSpeed compares exact classes, so ours are named too."""
    return [
        "torch.nn.Linear",
        "vitrail.engine.models.attention.QKVLinear",
        "vitrail.engine.models.block.GELULinear",
        "vitrail.engine.models.mae_decoder.PaddedLinear",
        "vitrail.kernels.modules.PatchProjection",
    ]


def initialise(
    method: Method, config: RunConfig, world: int, teachers: dict[Tensor, Tensor] | None = None
) -> DeepSpeedEngine:
    """Wrap a method, already on its device, with its optimiser and the sharding of `train.zero_stage`.

    Args:
        method: what is trained.
        config: the run.
        world: number of ranks.
        teachers: teacher of each trained parameter that has one, for the optimiser that steps both in one pass.

    Raises:
        ConfigError: the optimiser that `config` names cannot run here.
    """
    implementation = optimizers.choose(config)
    groups = parameter_groups(method, config)
    optimizer = optimizers.build(implementation, config.optim, groups, teachers or {})
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=deepspeed_config(config, world))
    if config.optim.clip_per_tensor and config.train.zero_stage:
        ShardClipping(engine, config.optim.clip)
    if config.optim.clip_per_part and config.train.zero_stage:
        PartClipping(engine, config.optim.clip)
    return engine


def set_rates(engine: DeepSpeedEngine, lr: float, weight_decay: float | None = None) -> None:
    """Write the coming step's learning rate and weight decay into the groups, where all stages read them.

    Args:
        engine: what `initialise` returned.
        lr: for every group that does not hold its own, times the group's factor.
        weight_decay: for every group whose decay is scheduled; None where none is.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", lr) * group.get(SCALE, 1.0)
        if SCHEDULED in group:
            group["weight_decay"] = weight_decay


def rates(engine: DeepSpeedEngine) -> dict[str, float]:
    """Learning rate of the last step, without any factor, and where it is scheduled its weight decay."""
    groups = engine.optimizer.param_groups
    decay = next((group["weight_decay"] for group in groups if SCHEDULED in group), None)
    return {"lr": groups[0]["lr"] / groups[0].get(SCALE, 1.0)} | ({} if decay is None else {"weight_decay": decay})


def stepping_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimiser that `initialise` built, which ZeRO stages 1 to 3 wrap and step with flat shards."""
    outer = engine.optimizer
    optimizer: torch.optim.Optimizer = outer.optimizer if engine.zero_optimization_stage() else outer
    return optimizer


Norm = Tensor | float
"""A gradient norm, on the device or, where DeepSpeed has read it already, on the host."""
Judge = Callable[[Norm, Norm | None], bool]
"""Told the finite global norm and the first layer's: whether to hold the step back. Equal on all ranks."""


class Step(NamedTuple):
    """What became of an optimiser step."""

    applied: bool
    """Whether the parameters changed."""
    held: bool
    """Whether the judge held it back; otherwise a step that was not applied had a gradient that is not finite."""
    norm: Norm
    """Global gradient norm before clipping."""
    first_norm: Tensor | None
    """Norm of the first layer's gradient before clipping, None where no such layer was named."""


def guarded_step(
    engine: DeepSpeedEngine,
    optim: OptimConfig,
    first_layer: Sequence[nn.Parameter] = (),
    judge: Judge | None = None,
) -> Step | None:
    """Finish a micro-batch; at the end of an accumulation, step unless the gradient is not finite. Collective.

    Stages 1 to 3 check and clip the gradient themselves. Stage 0 under autocast does not check and would poison the
    weights: there vitrail's optimisers do both within their step, and the others are handed the flag.

    Args:
        engine: what `initialise` returned, after its backward pass.
        optim: settings of the optimiser.
        first_layer: parameters whose gradient norm is wanted.
        judge: may hold back a step whose gradient is finite.

    Returns:
        None between boundaries.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    first_norm = gradient_norm(first_layer) if first_layer else None
    verdicts: list[tuple[bool, Norm]] = []

    def hold(norm: Norm) -> bool:
        held = judge is not None and judge(norm, first_norm)
        verdicts.append((held, norm))
        return held

    step = _step_sharded if engine.zero_optimization_stage() else _step_whole
    applied, norm = step(engine, optim, hold if judge is not None else None)
    held, norm = verdicts[0] if verdicts else (False, norm)
    return Step(applied, held, norm, first_norm)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of the gradient of some parameters over all ranks, float32 scalar: between the last backward and the step.

    Collective in stages 1 to 3, where the gradient of each parameter is put together for it: for small layers.
    """
    gradients = [safe_get_full_grad(parameter) for parameter in parameters]
    return multi_tensor_norm([gradient for gradient in gradients if gradient is not None]).total


def _step_whole(engine: DeepSpeedEngine, optim: OptimConfig, hold: Callable[[Norm], bool] | None) -> tuple[bool, Norm]:
    """The step of stage 0."""
    optimizer = engine.optimizer
    own = isinstance(optimizer, FusedOptimizer)
    norms, held = None, False
    if hold is not None or not own or optim.clip_per_part:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = multi_tensor_norm(gradients)
        held = hold is not None and not bool(norms.found_inf) and hold(norms.total)
        flag = torch.ones_like(norms.total) if held else norms.found_inf
        if own:
            optimizer.found_inf = flag
        else:
            _guard(optimizer, optim, gradients, norms, flag)
        if optim.clip_per_part:
            _clip_parts(optimizer, optim.clip)
    engine.step()
    norms = norms or optimizer.norms
    return not held and not bool(norms.found_inf), norms.total


def _guard(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, gradients: list[Tensor], norms: Norms, flag: Tensor
) -> None:
    """Tell an optimiser that is not vitrail's whether to step; scale its gradients, or have torch's scale them."""
    told: Any = optimizer
    fused = isinstance(optimizer, torch.optim.AdamW)
    if fused:
        told.found_inf = flag
    else:
        told.held_back = flag
    if optim.clip and not optim.clip_per_part:
        scales = clip_scales(norms, optim.clip, per_tensor=optim.clip_per_tensor)
        if fused and not optim.clip_per_tensor:
            told.grad_scale = 1.0 / scales  # its kernel divides by one number for all gradients
        else:
            multi_tensor_scale_(gradients, scales)


def _clip_parts(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Hold the common norm of each part's gradients to the limit."""
    parts: dict[int, list[Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group.get(PART, 0), []).extend(p.grad for p in group["params"] if p.grad is not None)
    for gradients in parts.values():
        multi_tensor_clip_(gradients, limit)


def _step_sharded(engine: DeepSpeedEngine, _: OptimConfig, hold: Callable[[Norm], bool] | None) -> tuple[bool, Norm]:
    """The step of stages 1 to 3, which DeepSpeed itself leaves out when it finds a norm that is not finite.

    To hold a step back, its optimiser is given such a norm at the place where it looks for one.
    """
    if hold is None:
        engine.step()
        return engine.was_step_applied(), engine.get_global_grad_norm()
    optimizer = engine.optimizer
    # Stage 3 checks the norm that it makes of its groups' norms, the others check their common norm.
    source = "_get_norm_groups" if engine.zero_optimization_stage() == 3 else "scaled_global_norm"
    plain = getattr(optimizer, source)

    def judged() -> Any:
        found = plain()
        parts = found if isinstance(found, list) else [found]
        norms = torch.stack([torch.as_tensor(part, dtype=torch.float32, device=engine.device) for part in parts])
        if bool((norms.isfinite() & (norms >= 0)).all()) and hold(torch.linalg.vector_norm(norms)):
            return [torch.full_like(norms[0], torch.inf)] if isinstance(found, list) else found + torch.inf
        return found

    setattr(optimizer, source, judged)
    try:
        engine.step()
    finally:
        delattr(optimizer, source)
    return engine.was_step_applied(), engine.get_global_grad_norm()
