"""Watching a run for trouble that no error shows, and saying what is to follow.

Vision transformers fail quietly: the loss goes on falling while the features have been ruined for a while. What shows
it are dips in the nearest-neighbour accuracy, and, before these, spikes of the gradient, which come in the first layer
tens of steps before the last (MoCo v3: Chen, Xie and He, arXiv 2104.02057, 4.1).

The trainer hands over norms, logged means and evaluations; the guard returns alarms. It changes nothing itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import Source
from .config import ConfigError, GuardConfig, TrainingError
from .ds import Judge, Norm, Step
from .spikes import Spike, SpikeDetector, is_dip

SIGNALS = ("gradient_norm", "first_layer_gradient_norm")
POLICIES = {
    "spike": ("warn", "skip", "rollback", "stop"),
    "dip": ("warn", "rollback", "stop"),
    "collapse": ("warn", "rollback", "stop"),
    "nonfinite": ("skip", "rollback", "stop"),
}
# Share of the loss of chance, or of one where that is small, that a collapsed loss keeps within.
NEAR_CHANCE = 0.01
# Steps without a spike that end a row of neighbouring ones.
QUIET = 10


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong, and what is to follow."""

    kind: Literal["spike", "dip", "collapse", "nonfinite"]
    step: int
    """Step at which it was seen; the first step is 1."""
    message: str
    """One line for people."""
    action: Literal["warn", "skip", "rollback", "stop", "over"]
    """What is done; over: nothing, the trouble has passed."""
    before: int = 0
    """Newest step whose checkpoint is from before the trouble, for a rollback."""
    values: dict[str, Any] = field(default_factory=dict)
    """What was seen, for machines."""


@dataclass
class GuardState:
    """What the guard remembers, apart from the detectors' windows."""

    row: tuple[int, int, int, float] | None = None
    """First and last step of a row of neighbouring spikes, their number and their largest ratio to the median."""
    nonfinite: int = 0
    """Steps in a row, up to now, whose gradients were not finite."""
    near_chance: int = 0
    """Logging intervals in a row with the loss of chance,"""
    flat: int = 0
    """and with collapsed embeddings."""
    healthy: int = 0
    """Step that the last logging interval without either ended at."""
    best: float = 0.0
    """Best nearest-neighbour accuracy."""
    good: int | None = None
    """Step of the last evaluation without an alarm."""


class Guard:
    """Remembers what a run looked like and raises alarms. All ranks see the same numbers: those of rank 0."""

    def __init__(
        self,
        config: GuardConfig,
        *,
        device: torch.device,
        world: int,
        warmup_epochs: float,
        chance: float | None = None,
        images: int = 0,
    ) -> None:
        """Start with an empty memory.

        Args:
            config: thresholds and policies.
            device: where the norms are.
            world: number of ranks.
            warmup_epochs: epochs in which a loss or a rank like that of a collapse is normal.
            chance: loss of a network to which all images look alike, if that tells of a collapse.
            images: validation images that an accuracy is measured on.

        Raises:
            ConfigError: a policy does not exist for its kind of alarm.
        """
        for kind, allowed in POLICIES.items():
            if (asked := getattr(config, kind)) not in allowed:
                raise ConfigError(
                    f"guard.{kind} {asked} is not possible: {_why_not(asked)}, pass {' or '.join(allowed)}"
                )
        self.config, self.device, self.world = config, device, world
        self.warmup_epochs, self.chance, self.images = warmup_epochs, chance, images
        self._detectors = {
            name: SpikeDetector(
                window=config.window, history=config.history, deviations=config.deviations, ratio=config.ratio
            )
            for name in SIGNALS
        }
        self._memory = GuardState()
        self._unread: list[tuple[int, list[Norm]]] = []
        self._judged: dict[str, Spike] = {}
        self._alarms: list[Alarm] = []

    @property
    def judge(self) -> Judge | None:
        """What holds back the steps of spikes, where the policy is to skip them."""
        return self._judge if self.config.enabled and self.config.spike == "skip" else None

    def _judge(self, norm: Norm, first_norm: Norm | None) -> bool:
        (norms,) = self._read([[norm] if first_norm is None else [norm, first_norm]])
        self._judged = self._feed(norms)
        return bool(self._judged)

    def observe(self, step: int, taken: Step) -> None:
        """Keep the norms of a step for the next `review`, or take note of what the judge has found in them."""
        if taken.applied or taken.held:
            self._memory.nonfinite = 0
        if not self.config.enabled:
            return
        if self.judge is not None:
            self._note(step, self._judged)
            self._judged = {}
        elif taken.applied:
            self._unread.append((step, [taken.norm] if taken.first_norm is None else [taken.norm, taken.first_norm]))

    def nonfinite(self, step: int, written: Path) -> None:
        """Take note of a step left out because its gradient is not finite, and of the file that lists its batch."""
        memory, config = self._memory, self.config
        memory.nonfinite += 1
        message = f"step {step} skipped: its gradient is not finite; its images are listed in {written}"
        action: Any = "stop" if config.nonfinite == "stop" else "skip"
        if config.nonfinite != "stop" and memory.nonfinite >= config.max_nonfinite:
            action = "rollback" if config.nonfinite == "rollback" else "stop"
            message += f"; {memory.nonfinite} such steps in a row"
        values = {"file": str(written), "in_a_row": memory.nonfinite}
        self._alarms.append(Alarm("nonfinite", step, message, action, step - memory.nonfinite, values))

    def review(self, step: int, *, read: bool) -> list[Alarm]:
        """The alarms since the last call.

        Args:
            step: steps done.
            read: whether to read the norms kept by `observe`: one broadcast and one read from the device.
        """
        if read and self._unread:
            steps, norms = zip(*self._unread, strict=True)
            self._unread = []
            for past, values in zip(steps, self._read(norms), strict=True):
                self._note(past, self._feed(values))
        alarms, self._alarms = self._alarms, []
        return alarms

    def verdict(self, alarms: Sequence[Alarm], *, rollbacks: int) -> Alarm | None:
        """What is to follow: nothing, or a return to a checkpoint from before the earliest trouble.

        Args:
            alarms: what was found.
            rollbacks: returns so far.

        Returns:
            The alarm to go back for, None to go on.

        Raises:
            TrainingError: the run is to end.
        """
        for alarm in alarms:
            if alarm.action == "stop":
                policy = f"guard.{alarm.kind} is {getattr(self.config, alarm.kind)}"
                raise TrainingError(f"{alarm.message} ({policy})")
        back = [alarm for alarm in alarms if alarm.action == "rollback"]
        if not back:
            return None
        cause = min(back, key=lambda alarm: alarm.before)
        if rollbacks >= self.config.max_rollbacks:
            raise TrainingError(f"{cause.message} (gone back {rollbacks} times, the limit is guard.max_rollbacks)")
        return cause

    def after_logging(self, step: int, epoch: float, values: dict[str, float]) -> list[Alarm]:
        """Look at the means of a logging interval: a loss that knows nothing, embeddings that are all alike.

        Args:
            step: steps done.
            epoch: epochs done.
            values: the same on all ranks; `loss` and, from some methods, `feature_std` are looked at.
        """
        memory, config = self._memory, self.config
        if not config.enabled:
            return []
        loss, spread = values.get("loss", math.nan), values.get("feature_std", math.inf)
        watched = epoch > self.warmup_epochs
        chance = math.inf if self.chance is None else self.chance
        at_chance = abs(loss - chance) <= NEAR_CHANCE * max(abs(chance), 1.0) if math.isfinite(chance) else False
        memory.near_chance = memory.near_chance + 1 if watched and at_chance else 0
        memory.flat = memory.flat + 1 if watched and spread < config.min_feature_std else 0
        if not memory.near_chance and not memory.flat:
            memory.healthy = step
        before = memory.healthy if memory.good is None else min(memory.healthy, memory.good)
        alarms = []
        if memory.near_chance == config.intervals:
            what = f"the loss {loss:.4f} has been that of chance, {chance:.4f}, for {config.intervals} intervals"
            alarms.append(self._collapse(step, what, {"loss": loss, "chance_loss": chance}, before=before))
        if memory.flat == config.intervals:
            what = f"feature_std {spread:.3g} has been below {config.min_feature_std} for {config.intervals} intervals"
            alarms.append(self._collapse(step, what, {"feature_std": spread}, before=before))
        return alarms

    def after_evaluation(self, step: int, epoch: float, values: dict[str, float]) -> list[Alarm]:
        """Look at an online evaluation: a dip of `knn`, too low a `rankme` after the warm-up."""
        memory, config = self._memory, self.config
        if not config.enabled:
            return []
        ((knn, rank),) = self._read([[values["knn"], values["rankme"]]])
        alarms = []
        if is_dip(knn, memory.best, images=self.images, drop=config.drop):
            message = f"nearest-neighbour accuracy {knn:.3f} at step {step}, down from {memory.best:.3f}"
            found = {"knn": knn, "best": memory.best}
            alarms.append(Alarm("dip", step, message, config.dip, memory.good or 0, found))
        memory.best = max(memory.best, knn)
        if epoch > self.warmup_epochs and not rank >= config.min_rank:
            what = f"the features have an effective rank of {rank:.3g}, below {config.min_rank}"
            alarms.append(self._collapse(step, what, {"rankme": rank}, before=memory.good or 0))
        if not alarms:
            memory.good = step
        return alarms

    def _collapse(self, step: int, what: str, values: dict[str, Any], *, before: int) -> Alarm:
        return Alarm("collapse", step, f"collapse at step {step}: {what}", self.config.collapse, before, values)

    def _feed(self, norms: Sequence[float]) -> dict[str, Spike]:
        """Give each detector its norm; what they found, by signal."""
        found = {name: self._detectors[name].add(norm) for name, norm in zip(SIGNALS, norms, strict=False)}
        return {name: spike for name, spike in found.items() if spike is not None}

    def _note(self, step: int, found: dict[str, Spike]) -> None:
        """Raise an alarm for the first of neighbouring spikes, and count the others."""
        row = self._memory.row
        if row is not None and step - row[1] > QUIET:
            first, last, count, largest = row
            self._memory.row = row = None
            if count > 1:
                message = (
                    f"the spike of step {first} had {count} steps, the last {last}, of up to {largest:.3g} x the median"
                )
                values = {"first": first, "last": last, "count": count, "largest_ratio": largest}
                self._alarms.append(Alarm("spike", step, message, "over", values=values))
        if not found:
            return
        name, spike = max(found.items(), key=lambda item: item[1].deviations)
        if row is not None:
            self._memory.row = (row[0], step, row[2] + 1, max(row[3], spike.ratio))
            return
        self._memory.row = (step, step, 1, spike.ratio)
        message = (
            f"spike at step {step}: {name.replace('_', ' ')} {spike.value:.3g}, median {spike.median:.3g} "
            f"({spike.deviations:.0f} deviations)"
        )
        if self.config.spike == "skip":
            message += "; this step and spikes that follow it are skipped"
        seen = {"signal": name, **asdict(spike)}
        self._alarms.append(Alarm("spike", step, message, self.config.spike, step - 1, seen))

    def _read(self, numbers: Sequence[Sequence[Norm]]) -> list[list[float]]:
        """Rank 0's numbers, rows of one length, on the host of every rank."""
        rows = [torch.stack([_scalar(n, self.device) for n in row]) for row in numbers]
        packed = torch.stack(rows)
        if self.world > 1:
            torch.distributed.broadcast(packed, 0)
        values: list[list[float]] = packed.tolist()
        return values

    def state(self) -> dict[str, Any]:
        """All that the guard remembers, as JSON values; `review` must have read the norms."""
        return {"memory": asdict(self._memory), "windows": {n: d.state for n, d in self._detectors.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, or from an empty dictionary."""
        self._memory = GuardState(**state.get("memory", {}))
        for name, detector in self._detectors.items():
            detector.state = state.get("windows", {}).get(name, [])
        self._unread, self._judged, self._alarms = [], {}, []


def _scalar(number: Norm, device: torch.device) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float32, device=device).reshape(())


def _why_not(policy: str) -> str:
    reasons = {
        "skip": "what an evaluation or a logging interval shows is no single step's fault",
        "warn": "such a step would ruin the weights and is never applied",
    }
    return reasons.get(policy, "there is no such policy")


def dump_batch(
    output: Path, step: int, batches: Sequence[tuple[Tensor, Tensor]], source: Source, *, rank: int, world: int
) -> Path:
    """Write down which images a step was computed from, and its losses: `nonfinite/step_00001234.json`. Collective.

    Args:
        output: the run's folder.
        step: the step, the first one being 1.
        batches: of this rank, by micro-batch: the samples' numbers int64 `[b]`, and the scalar loss.
        source: names the samples.
        rank: this process.
        world: number of processes.

    Returns:
        The file, which rank 0 has written: `{"step", "batches": [{"rank", "micro", "loss", "indices", "names"}]}`,
        where a loss that is not finite is a string, since JSON has no such numbers.
    """
    mine = [(indices.tolist(), loss.item()) for indices, loss in batches]
    found: list[list[tuple[list[int], float]]] = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(found, mine)
    path = output / "nonfinite" / f"step_{step:08d}.json"
    if rank == 0:
        parts = [
            {
                "rank": of,
                "micro": micro,
                "loss": loss if math.isfinite(loss) else str(loss),
                "indices": indices,
                "names": [source.name(index) for index in indices],
            }
            for of, part in enumerate(found)
            for micro, (indices, loss) in enumerate(part)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"step": step, "batches": parts}, indent=1))
        os.replace(partial, path)
    return path
