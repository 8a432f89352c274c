"""Runs that go wrong on purpose, in processes of their own; a script as `training.py` is."""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training
from training import IMAGES, Twice, TwiceConfig, tiny_config

from vitrail.engine.methods.base import MomentumPair, Schedule
from vitrail.engine.train import GuardConfig, RunConfig, TrainingError

STEPS = 9
SPIKE = 4  # the batch, counted from 0, whose loss is too large
COLLAPSE = 4  # the step, counted from 0, from which on embeddings are reported to be alike


@dataclass(kw_only=True)
class TroubledConfig(TwiceConfig):
    """A masked autoencoder that goes wrong as it is told to."""

    spike: int | None = None
    """Batch whose loss is 10,000 times too large, wherever in the run it comes."""
    collapse: bool = False
    """Whether embeddings are reported to be alike from step COLLAPSE on."""
    nonfinite: tuple[int, ...] = ()
    """Steps whose losses on the last rank are not numbers."""

    def build(self) -> "Troubled":
        return Troubled(self)


class Troubled(Twice):
    """Keeps which batches it has seen; has a teacher, and a buffer that counts applied steps."""

    def __init__(self, config: TroubledConfig) -> None:
        super().__init__(config)
        self.trouble = config
        self.batches: list[int] = []
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch: Any, schedule: Schedule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(batch, schedule)
        if batch.micro == 0:
            self.batches.append(batch.step)
        if batch.step == self.trouble.spike:
            loss = loss * 1e4
        if schedule.step in self.trouble.nonfinite and torch.distributed.get_rank() == 1:
            loss = loss * math.inf
        metrics["loss"] = loss.detach()
        if self.trouble.collapse:
            metrics["feature_std"] = torch.tensor(0.01 if schedule.step >= COLLAPSE else 0.9)
        return loss, metrics

    def momentum_pairs(self) -> list[MomentumPair]:
        return [MomentumPair(self.teacher, self.encoder)]

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        return 0.5

    def after_step(self, applied: bool) -> None:
        super().after_step(applied)
        self.count += applied


def troubled_config(
    output: Path,
    *,
    guard: dict[str, Any],
    trouble: dict[str, Any],
    saving: int = 100,
    implementation: str = "auto",
    **train: Any,
) -> RunConfig:
    """Nine steps of 16 images in two micro-batches on two ranks, in fp32; a checkpoint every `saving` steps."""
    epoch = IMAGES // 16
    settings = {"epochs": STEPS / epoch, "micro_batch": 4, "save_every": saving / epoch, "precision": "fp32", **train}
    config = tiny_config(output, **settings)
    method = TroubledConfig(**{**vars(config.method), **trouble})
    optim = replace(config.optim, implementation=implementation)
    return replace(config, method=method, optim=optim, guard=GuardConfig(history=4, **guard))


# --- what runs inside the processes ---------------------------------------------------------------------------------


def digest(trainer: Any) -> str:
    """Hash of the weights, the teacher's too, buffers and moments of all ranks, to the last bit."""
    from vitrail.engine.train.checkpoint import whole_state

    stage = trainer.config.train.zero_stage
    mine = hashlib.sha256()
    for value in whole_state(trainer.method, sharded=stage == 3).values():
        mine.update(value.contiguous().numpy().tobytes())
    optimizer = trainer.engine.optimizer
    for state in (optimizer.optimizer if stage else optimizer).state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                mine.update(state[name].numpy().tobytes())
    found = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine.hexdigest())
    return " ".join(found)


def run(config: RunConfig) -> dict[str, Any]:
    """Train; report the state after each step and after each return to a checkpoint, and what is left behind."""
    report: dict[str, Any] = {"digests": {}, "back": [], "error": None}
    trainers = []

    def before(trainer: Any) -> None:
        trainers.append(trainer)
        plain = trainer._go_back

        def go_back(cause: Any) -> None:
            plain(cause)
            report["back"].append([trainer.state.step, digest(trainer)])
            report.update(amended=state_of(config), left=saved(config))

        trainer._go_back = go_back

    def after(trainer: Any) -> None:
        report["digests"].setdefault(trainer.state.step, digest(trainer))

    try:
        training.train(config, before=before, after=after)
    except TrainingError as error:
        report["error"] = str(error)
    method = trainers[0].method
    report |= {"batches": method.batches, "applied": method.applied, "count": method.count.item()}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        output = config.train.output
        report["saved"] = saved(config)
        report["final"] = state_of(config) if report["saved"] else None
        report["lines"] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        report["dumps"] = {path.name: json.loads(path.read_text()) for path in (output / "nonfinite").glob("*")}
    return report


def saved(config: RunConfig) -> list[int]:
    """Steps of all that lies among a run's checkpoints."""
    return sorted(int(path.name[-8:]) for path in (config.train.output / "checkpoints").glob("*"))


def state_of(config: RunConfig) -> dict[str, Any]:
    """What the newest checkpoint says of the run's position and of the guard."""
    newest = max((config.train.output / "checkpoints").glob("step_*"))
    found: dict[str, Any] = json.loads((newest / "state.json").read_text())
    return {name: found[name] for name in ("step", "data_shift", "rollbacks", "guard")}


def everything(scratch: Path) -> Any:
    """A spike under every stage and under every policy, and one run for each other kind of trouble."""
    spike: dict[str, Any] = {"trouble": {"spike": SPIKE}}
    skip, rollback = {"guard": {"spike": "skip"}, **spike}, {"guard": {"spike": "rollback"}, **spike}
    runs: dict[str, dict[str, Any]] = {
        "warn": {"guard": {"spike": "warn"}, **spike},
        "stop": {"guard": {"spike": "stop"}, "saving": 3, **spike},
        "torch": {"zero_stage": 0, "implementation": "torch", **skip},
        "collapse": {
            "guard": {"collapse": "rollback", "intervals": 3, "max_rollbacks": 1},
            "trouble": {"collapse": True},
            "saving": 2,
            "keep": 5,
        },
        "nonfinite": {"guard": {"max_nonfinite": 2}, "trouble": {"nonfinite": (2, 4, 5)}},
    }
    for stage in range(4):
        runs[f"skip{stage}"] = {"zero_stage": stage, **skip}
        runs[f"rollback{stage}"] = {"zero_stage": stage, "saving": 3, "log_every": 100, **rollback}
    return {name: run(troubled_config(scratch / name, **settings)) for name, settings in runs.items()}


if __name__ == "__main__":
    training.run_in_process({"everything": everything})
