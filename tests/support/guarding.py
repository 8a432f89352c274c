"""Runs that go wrong on purpose, in processes of their own; a script as `training.py` is."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training
from training import IMAGES, Twice, TwiceConfig, tiny_config

from vitrail.engine.methods.base import Schedule
from vitrail.engine.train import GuardConfig, RunConfig, TrainingError

STEPS = 10
SPIKE = 6  # the batch, counted from 0, whose loss is too large
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
    """Keeps which batches it has seen; has a buffer that counts applied steps."""

    def __init__(self, config: TroubledConfig) -> None:
        super().__init__(config)
        self.trouble = config
        self.batches: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch: Any, schedule: Schedule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(batch, schedule)
        if batch.micro == 0:
            self.batches.append(batch.step)
        if batch.step == self.trouble.spike:
            loss = loss * 1e4
        if schedule.step in self.trouble.nonfinite and torch.distributed.get_rank() == 1:
            loss = loss * math.inf
        if self.trouble.collapse:
            metrics["feature_std"] = torch.tensor(0.01 if schedule.step >= COLLAPSE else 0.9)
        return loss, metrics

    def after_step(self, applied: bool) -> None:
        super().after_step(applied)
        self.count += applied


def troubled_config(
    output: Path, *, guard: dict[str, Any], trouble: dict[str, Any], implementation: str = "auto", **train: Any
) -> RunConfig:
    """Ten steps of 16 images in two micro-batches on two ranks, in fp32; a checkpoint after every second."""
    epoch = IMAGES // 16
    settings = {"epochs": STEPS / epoch, "micro_batch": 4, "save_every": 2 / epoch, "precision": "fp32", **train}
    config = tiny_config(output, **settings)
    method = TroubledConfig(**{**vars(config.method), **trouble})
    optim = replace(config.optim, implementation=implementation)
    return replace(config, method=method, optim=optim, guard=GuardConfig(history=4, **guard))


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- what runs inside the processes ---------------------------------------------------------------------------------


def digest(trainer: Any) -> str:
    """Hash of this rank's weights, buffers and moments, to the last bit."""
    from vitrail.engine.train.checkpoint import whole_state

    stage = trainer.config.train.zero_stage
    found = hashlib.sha256()
    for value in whole_state(trainer.method, sharded=stage == 3).values():
        found.update(value.contiguous().numpy().tobytes())
    optimizer = trainer.engine.optimizer
    for state in (optimizer.optimizer if stage else optimizer).state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                found.update(state[name].numpy().tobytes())
    return found.hexdigest()


def run(config: RunConfig) -> dict[str, Any]:
    """Train; report states after each step and after each return to a checkpoint, batches, alarms, checkpoints."""
    report: dict[str, Any] = {"digests": {}, "back": [], "error": None}
    trainers = []

    def before(trainer: Any) -> None:
        trainers.append(trainer)
        report["digests"][trainer.state.step] = digest(trainer)
        plain = trainer._go_back

        def go_back(alarm: Any) -> None:
            plain(alarm)
            report["back"].append([trainer.state.step, digest(trainer)])
            report["amended"] = json.loads(newest(config).joinpath("state.json").read_text())

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
    report["saved"] = [int(path.name[-8:]) for path in sorted((config.train.output / "checkpoints").glob("*"))]
    if torch.distributed.get_rank() == 0:
        report["lines"] = read(config.train.output / "metrics.jsonl")
    return report


def newest(config: RunConfig) -> Path:
    """The newest checkpoint of a run."""
    return max((config.train.output / "checkpoints").glob("step_*"))


def everything(scratch: Path) -> Any:
    """A spike under every stage and policy, and one run for each other kind of trouble."""
    report: dict[str, Any] = {}
    spike = {"spike": SPIKE}
    for stage in range(4):
        for policy in ("warn", "skip", "rollback", "stop"):
            name = f"{policy}{stage}"
            log_every = 3 if policy == "rollback" else 1
            config = troubled_config(
                scratch / name, guard={"spike": policy}, trouble=spike, zero_stage=stage, log_every=log_every
            )
            report[name] = run(config)
    config = troubled_config(
        scratch / "torch", guard={"spike": "skip"}, trouble=spike, implementation="torch", zero_stage=0
    )
    report["torch"] = run(config)
    guard = {"collapse": "rollback", "intervals": 3, "max_rollbacks": 1}
    report["collapse"] = run(
        troubled_config(scratch / "collapse", guard=guard, trouble={"collapse": True}, keep=5)
    )
    report["nonfinite"] = run(
        troubled_config(scratch / "nonfinite", guard={"max_nonfinite": 2}, trouble={"nonfinite": (2, 4, 5)})
    )
    return report


if __name__ == "__main__":
    training.run_in_process({"everything": everything})
