"""DeepSpeed: processes, the engine's configuration and the few calls that differ between its stages."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor

from vitrail.kernels import multi_tensor_norm, multi_tensor_scale_
from vitrail.kernels.multi_tensor_norm.clip import clip_scales
from vitrail.kernels.multi_tensor_norm.op import Norms
from vitrail.kernels.optimizers import FusedOptimizer

from ..data.cache import available_threads
from ..methods.base import Method
from . import optimizers
from .config import OptimConfig, RunConfig
from .param_groups import parameter_groups

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it had to guess

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger

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
        if "OMP_NUM_THREADS" not in os.environ:  # the ranks of this host share its cores
            torch.set_num_threads(available_threads())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes, for a run on `world` ranks."""
    train = config.train
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world),
        "zero_allow_untested_optimizer": config.optim.name == "sgd",  # elementwise, so right on flat shards
        "gradient_clipping": config.optim.clip if train.zero_stage else 0.0,  # guarded_step clips in stage 0
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
    return engine


def set_learning_rate(engine: DeepSpeedEngine, lr: float) -> None:
    """Write the learning rate into every group that does not hold its own; all stages read it from there."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", lr)


def guarded_step(engine: DeepSpeedEngine, optim: OptimConfig) -> tuple[bool, Tensor | float | None]:
    """Finish a micro-batch; at the end of an accumulation, step unless the gradient is not finite.

    Stages 1 to 3 check and clip the gradient themselves. Stage 0 under autocast does not check and would poison the
    weights: there vitrail's optimisers do both within their step, and the others are handed the flag.

    Returns:
        Whether the parameters changed (False between boundaries), and the global gradient norm before clipping.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    whole = engine.zero_optimization_stage() == 0 and boundary
    norms = _guard(engine.optimizer, optim) if whole and not isinstance(engine.optimizer, FusedOptimizer) else None
    engine.step()
    if not boundary:
        return False, None
    if not whole:
        return engine.was_step_applied(), engine.get_global_grad_norm()
    norms = norms or engine.optimizer.norms
    return not bool(norms.found_inf), norms.total


def _guard(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> Norms:
    """Tell an optimiser that is not vitrail's whether to step; scale its gradients, or have torch's scale them."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = multi_tensor_norm(gradients)
    told: Any = optimizer
    fused = isinstance(optimizer, torch.optim.AdamW)
    if fused:
        told.found_inf = norms.found_inf
    else:
        told.held_back = norms.found_inf
    if optim.clip:
        scales = clip_scales(norms, optim.clip, per_tensor=optim.clip_per_tensor)
        if fused and not optim.clip_per_tensor:
            told.grad_scale = 1.0 / scales  # its kernel divides by one number for all gradients
        else:
            multi_tensor_scale_(gradients, scales)
    return norms
