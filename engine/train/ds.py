"""DeepSpeed: processes, the engine's configuration and the few calls that differ between its stages."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..data.cache import available_threads
from .config import RunConfig
from .param_groups import decay_groups

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
        "gradient_clipping": config.optim.clip,
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


def initialise(method: nn.Module, config: RunConfig, world: int) -> DeepSpeedEngine:
    """Wrap a method, already on its device, with AdamW and the sharding of `train.zero_stage`."""
    optim = config.optim
    optimizer = torch.optim.AdamW(
        decay_groups(method, optim.weight_decay), lr=0.0, betas=optim.betas, eps=optim.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=deepspeed_config(config, world))
    return engine


def set_learning_rate(engine: DeepSpeedEngine, lr: float) -> None:
    """Write the learning rate into every group; all stages read it from there."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def guarded_step(engine: DeepSpeedEngine) -> tuple[bool, Tensor | float | None]:
    """Finish a micro-batch; at the end of an accumulation, step unless the gradient is not finite.

    Stages 1 to 3 check the gradient themselves. Stage 0 under autocast does not, and would poison the weights, so the
    norm is taken here and handed to AdamW's fused kernel as its `found_inf` flag.

    Returns:
        Whether the parameters changed (False between boundaries), and the global gradient norm before clipping.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    if engine.zero_optimization_stage() == 0 and boundary:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~norm.isfinite()
        engine.optimizer.found_inf = bad.float()
        engine.step()
        return not bool(bad), norm
    engine.step()
    if not boundary:
        return False, None
    return engine.was_step_applied(), engine.get_global_grad_norm()
