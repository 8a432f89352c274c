"""Where numbers go: sums on the device, then JSONL, TensorBoard and the terminal, on rank 0 alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

if TYPE_CHECKING:
    from .checkpoint import TrainState
    from .guard import Alarm


class DeviceMeans:
    """Running means of scalar tensors that never leave the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one micro-batch's detached scalars; the names must be the same every time."""
        for name, value in values.items():
            held = self._sums.get(name)
            self._sums[name] = value.detach().float().clone() if held is None else held.add_(value.detach())
        self._count += 1

    def read(self) -> dict[str, float]:
        """Means over all micro-batches of all ranks since the last call: one collective, one device read."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        packed = torch.stack([self._sums[name] for name in names]) / self._count
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(packed)
            packed /= torch.distributed.get_world_size()
        self._sums, self._count = {}, 0
        return dict(zip(names, packed.tolist(), strict=True))


class Recorder:
    """Writes a run's numbers and events; on other ranks than 0 it does nothing.

    `metrics.jsonl` holds one object per line: `{"kind": "train" | "knn" | "event", "step": ..., ...}`.
    """

    def __init__(self, output: Path, *, rank: int, start_step: int, total_steps: int) -> None:
        self.active = rank == 0
        self.total_steps = total_steps
        self._bad_files: set[str] = set()
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        output.mkdir(parents=True, exist_ok=True)
        self._file = (output / "metrics.jsonl").open("a", encoding="utf-8")
        self._board_folder = str(output / "tensorboard")
        self._board = SummaryWriter(self._board_folder, purge_step=start_step + 1 if start_step else None)
        self.console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, status="")
        self._progress.start()

    def train(self, step: int, values: dict[str, float]) -> None:
        """A logging step of the training loop."""
        self._write("train", step, values)
        if not self.active:
            return
        line = describe(values)
        self._progress.update(self._task, status=line)
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.total_steps}  {line}", highlight=False, soft_wrap=True)

    def rewind(self, *, left: int, state: TrainState) -> None:
        """Go back from step `left` to a checkpoint's: TensorBoard drops what came after it, `metrics.jsonl` goes on."""
        step = state.step
        message = f"went back from step {left} to step {step}, passing over {left - step} batches"
        self.event(step, message, rollback_from=left, rollbacks=state.rollbacks, data_shift=state.data_shift)
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._board.close()
        self._board = SummaryWriter(self._board_folder, purge_step=step + 1)
        self._progress.update(self._task, completed=step)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.active:
            self._progress.update(self._task, completed=step)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """A result of an online evaluation."""
        self._write("evaluation", step, values)
        self.say("  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def event(self, step: int, message: str, **details: Any) -> None:
        """Something that a reader of the run must know: a skipped step, a bad file, a resume, a checkpoint."""
        if self.active:
            self._line({"kind": "event", "step": step, "message": message, **details})
        self.say(message)

    def bad_files(self, step: int, found: Iterable[Mapping[str, str]]) -> None:
        """Name the files that could not be decoded, each once; `found` maps names to reasons, for every rank."""
        for name, reason in {name: reason for part in found for name, reason in part.items()}.items():
            if name not in self._bad_files:
                self._bad_files.add(name)
                self.event(step, f"cannot decode {name}: {reason}; another image takes its place")

    def alarm(self, alarm: Alarm) -> None:
        """An event with `alarm`, its kind, `action`, what is done, and the values that raised it; printed loudly."""
        if not self.active:
            return
        details = {"alarm": alarm.kind, "action": alarm.action, **alarm.values}
        self._line({"kind": "event", "step": alarm.step, "message": alarm.message, **details})
        self.say(f"ALARM: {alarm.message}", style="bold red")

    def say(self, message: str, *, style: str | None = None) -> None:
        """Print above the progress bar."""
        if self.active:
            self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self._progress.stop()
            self._file.close()
            self._board.close()

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self._line({"kind": kind, "step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def _line(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()


def describe(values: dict[str, float]) -> str:
    """One log line for people."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
    if "gradient_norm" in values:
        parts.append(f"grad {values['gradient_norm']:.3g}")
    if "first_layer_gradient_norm" in values:
        parts.append(f"first layer {values['first_layer_gradient_norm']:.3g}")
    parts.append(f"{values['images_per_second']:.0f} img/s")
    parts.append(f"wait {100 * values['data_wait']:.0f} %")
    parts.append(f"MFU {100 * values['mfu']:.1f} %" if "mfu" in values else f"{values['gflops']:.0f} GFLOP/s")
    parts.append(f"{values['memory_gib']:.1f} GiB")
    return "  ".join(parts)
