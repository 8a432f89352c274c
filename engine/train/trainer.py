"""The training loop."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from ..data import Batch, Loader, Source, build_loader
from ..evaluate.knn import OnlineKNN
from ..methods.base import Method, Schedule
from ..models.batch_norm import defer_statistics, settle_statistics
from ..models.recompute import Recomputable
from . import checkpoint
from .config import RunConfig, TrainingError
from .ds import Norm, Step, guarded_step, initialise, rates, set_rates
from .ema import TeacherEMA, parameter_pairs, steppable
from .grad_cache import GradientCache, check_comparisons, compared_images
from .guard import Alarm, Guard, dump_batch
from .held import HeldParameters
from .metrics import DeviceMeans, Recorder
from .optimizers import TITLES, choose
from .prepare import prepare
from .schedules import learning_rate, weight_decay
from .throughput import Throughput


@dataclass
class RunResult:
    """What a finished, or interrupted, run leaves behind."""

    method: Method
    """The trained method, on its device."""
    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole run."""
    train_seconds: float
    """Time spent in this process's training loop, evaluations and checkpoints included."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.step >= self.total_steps


class Trainer:
    """Runs one configuration to its end, from the newest checkpoint on."""

    def __init__(
        self, config: RunConfig, *, train: Source, val: Source | None, rank: int, world: int, device: torch.device
    ) -> None:
        self.config = config
        self.rank, self.world, self.device = rank, world, device
        self.source, self.val = train, val
        self.accumulation = config.accumulation(world)
        self.output = config.train.output
        torch.manual_seed(config.train.seed)
        self.method = config.method.build()
        notice = check_comparisons(self.method, config, world)
        defer_statistics(self.method)
        init = config.train.init_from
        stretched = [] if init is None else checkpoint.load_weights(self.method, init)
        self.guard = self._guard()
        prepare_blocks(self.method, recompute=config.train.checkpoint_activations, compiled=config.train.compile)
        self.method.to(device).train()
        pairs = parameter_pairs(self.method)
        self.engine = initialise(self.method, config, world, steppable(pairs))
        self.ema = TeacherEMA(pairs, self.engine)
        self.held = HeldParameters(self.method, self.engine)
        cached = config.train.grad_cache and self.accumulation > 1
        self.cache = GradientCache(self.method, self.engine, config.train.precision) if cached else None
        self.first_layer = self.method.first_layer() if config.guard.enabled else []
        torch.manual_seed(config.train.seed + 1 + rank)  # stochastic depth differs between ranks
        self.state = self._restore()
        if not self.state.step and config.train.init_from is None:
            prepare(self.method, self.source, config.data, world=world, device=device)
        self.loader = self._loader()
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = math.ceil(config.train.epochs * self.steps_per_epoch)
        self.recorder = Recorder(self.output, rank=rank, start_step=self.state.step, total_steps=self.total_steps)
        if notice:
            self.recorder.event(self.state.step, notice)
        if stretched and not self.state.step:
            self.recorder.event(0, f"positions stretched to another grid: {', '.join(stretched)}")
        self.means = DeviceMeans()
        self.throughput = Throughput(device, world)
        self.knn = self._knn()
        self._norms: dict[str, Norm] = {}
        self._stop_requested = False
        self._bad_files_counted = 0

    def run(self) -> RunResult:
        """Train until the last step, or until SIGTERM or SIGINT has been answered with a checkpoint.

        Raises:
            TrainingError: the guard ended the run. The checkpoints that it left alone stay.
        """
        started = time.perf_counter()
        handlers = {name: signal.signal(name, self._request_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._describe()
            batches = self._batches()
            self.throughput.read()
            while self.state.step < self.total_steps:
                self._step(batches)
                if self._after_step():
                    break
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
            self.loader.close()
            self.recorder.close()
        return RunResult(self.method, self.state.step, self.total_steps, time.perf_counter() - started)

    def _batches(self) -> Iterator[Batch]:
        """The loader's batches, and those of the loader that takes its place after a return to a checkpoint."""
        while True:
            loader = self.loader
            for batch in loader:
                yield batch
                if self.loader is not loader:
                    break

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimiser step: all micro-batches of a global batch."""
        config, step = self.config, self.state.step
        lr = learning_rate(config, step, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        set_rates(self.engine, lr, weight_decay(config.optim, step, total_steps=self.total_steps))
        self.held.update(step / self.steps_per_epoch)
        momentum = self._ema_momentum()
        self.ema.prepare(momentum)
        taken: Step | None = None
        seen: list[tuple[Tensor, Tensor]] = []
        for batch, loss, metrics in self._losses(batches):
            self.engine.backward(loss)
            taken = guarded_step(self.engine, config.optim, self.first_layer, self.guard.judge)
            self.means.add(metrics)
            seen.append((batch.indices, metrics["loss"]))
        assert taken is not None, "DeepSpeed counts other micro-batches to a step than the loader"
        if taken.applied:
            self.ema.update(momentum)
        self.method.after_step(taken.applied)
        settle_statistics(self.method, taken.applied)
        self.state.step += 1
        self._watch(taken, seen)

    def _losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor, dict[str, Tensor]]]:
        """The micro-batches of a step with loss and metrics; each loss is sent back before the next is asked for."""
        schedules = [self._schedule(self.state.step, micro) for micro in range(self.accumulation)]
        if self.cache is None:
            for schedule in schedules:
                batch = self._next(batches)
                yield batch, *self.engine(batch, schedule)
        else:
            every = [self._next(batches) for _ in schedules]
            for batch, part in zip(every, self.cache.losses(every, schedules), strict=True):
                yield batch, *part

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Take a micro-batch and count it."""
        waiting = time.perf_counter()
        batch = next(batches)
        images = len(batch.indices)
        self.throughput.add(images, self.method.flops(images), time.perf_counter() - waiting)
        return batch

    def _watch(self, taken: Step, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Show the guard the step just taken; write down the batch of one whose gradient is not finite."""
        self._norms = {"gradient_norm": taken.norm}
        if taken.first_norm is not None:
            self._norms["first_layer_gradient_norm"] = taken.first_norm
        step = self.state.step
        self.guard.observe(step, taken)
        if taken.applied:
            return
        self.state.skipped += 1
        if not taken.held:
            self.guard.nonfinite(
                step, dump_batch(self.output, step, seen, self.source, rank=self.rank, world=self.world)
            )

    def _schedule(self, step: int, micro: int = 0) -> Schedule:
        """Where a micro-batch of this rank stands."""
        return Schedule(
            step=step,
            total_steps=self.total_steps,
            epoch=step / self.steps_per_epoch,
            seed=self.config.train.seed,
            first_row=(micro * self.world + self.rank) * self.config.train.micro_batch,
            global_rows=self.config.train.batch_size,
        )

    def _ema_momentum(self) -> float:
        """Momentum of the teachers' update after the step about to be taken; 1, unused, where there are none."""
        if not self.ema.teachers:
            return 1.0
        step = self.state.step
        return self.method.ema_momentum(self._schedule(step), self._schedule(step + 1))

    def _after_step(self) -> bool:
        """Log, evaluate, save, each when due, unless the guard objects. Returns whether to stop before the end."""
        step, config = self.state.step, self.config
        last = step == self.total_steps
        stop = self._stop_requested and self.world == 1
        logging, saving = last or step % config.train.log_every == 0, last or self._due(config.train.save_every)
        alarms: list[Alarm] = []
        if logging:
            stop, bad_files = self._compare_notes()
            alarms = self._log(bad_files)
        self.recorder.advance(step)
        stop = stop and not last
        with self.throughput.paused():
            alarms = self.guard.review(step, read=logging or saving or stop) + alarms
            if self._heed(alarms):
                return False
            if self.knn is not None and not stop and (last or self._due(config.evaluate.knn_every)):
                values = self.knn(self.method)
                self.recorder.evaluation(step, values)
                if self._heed(self.guard.after_evaluation(step, step / self.steps_per_epoch, values)):
                    return False
            if saving or stop:
                self.state.guard = self.guard.state()
                path = checkpoint.save(self.output, self.engine, self.state, config, dataset=self.source.fingerprint)
                self.recorder.event(step, f"checkpoint {path}")
        if stop:
            self.recorder.event(step, f"stopped by a signal at step {step}; the same command continues from here")
        return stop

    def _heed(self, alarms: list[Alarm]) -> bool:
        """Tell what the guard has found and do what its alarms ask for. Returns whether the run went back.

        Raises:
            TrainingError: an alarm ends the run, or there is nothing to go back to.
        """
        for alarm in alarms:
            self.recorder.alarm(alarm)
        try:
            cause = self.guard.verdict(alarms, rollbacks=self.state.rollbacks)
            if cause is not None:
                self._go_back(cause)
        except TrainingError as error:
            self.recorder.event(self.state.step, f"stopped at step {self.state.step}: {error}")
            raise
        return cause is not None

    def _go_back(self, cause: Alarm) -> None:
        """Return to the newest checkpoint from before the trouble and pass over the batches since."""
        step = self.state.step
        self.state = checkpoint.go_back(
            self.output,
            self.engine,
            self.state,
            self.config,
            dataset=self.source.fingerprint,
            before=cause.before,
            why=cause.message,
        )
        self.guard.load(self.state.guard)
        self.means, self._norms = DeviceMeans(), {}
        self.loader.close()
        self.loader = self._loader()
        self.recorder.rewind(left=step, state=self.state)

    def _log(self, bad_files: int) -> list[Alarm]:
        """Read the device and write a line; name the files that could not be decoded since the last one.

        Returns:
            What the guard says to the means.
        """
        step = self.state.step
        values = self.means.read()
        values |= rates(self.engine)
        values |= {name: float(norm) for name, norm in self._norms.items()}
        values |= self.throughput.read()
        values["epoch"] = step / self.steps_per_epoch
        values["skipped"] = self.state.skipped
        values["bad_files"] = bad_files
        self.recorder.train(step, values)
        self._name_bad_files(bad_files)
        return self.guard.after_logging(step, values["epoch"], values)

    def _name_bad_files(self, bad_files: int) -> None:
        if bad_files == self._bad_files_counted:
            return
        self._bad_files_counted = bad_files
        found: list[dict[str, str]] = [{}] * self.world
        torch.distributed.all_gather_object(found, dict(self.loader.bad_files))
        self.recorder.bad_files(self.state.step, found)

    def _due(self, every_epochs: float) -> bool:
        """Whether an action of every so many epochs falls on this step."""
        interval = round(every_epochs * self.steps_per_epoch)
        return interval > 0 and self.state.step % interval == 0

    def _compare_notes(self) -> tuple[bool, int]:
        """Whether any rank has been told to stop, and how many bad files all ranks have met."""
        notes = torch.tensor([int(self._stop_requested), len(self.loader.bad_files)], device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(notes)
        stop, bad_files = notes.tolist()
        return stop > 0, bad_files

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _loader(self) -> Loader:
        config = self.config
        return build_loader(
            self.source,
            self.method.views(),
            micro_batch=config.train.micro_batch,
            accumulation=self.accumulation,
            rank=self.rank,
            world=self.world,
            seed=config.train.seed,
            device=self.device,
            config=config.data,
            start_step=self.state.step + self.state.data_shift,
        )

    def _guard(self) -> Guard:
        config = self.config
        return Guard(
            config.guard,
            device=self.device,
            world=self.world,
            warmup_epochs=config.optim.warmup_epochs,
            chance=self.method.chance_loss(compared_images(config, self.world)),
            images=len(self.val) if self.val is not None else 0,
        )

    def _knn(self) -> OnlineKNN | None:
        config = self.config.evaluate
        if not config.knn_every:
            return None
        if self.val is None or not self.val.classes:
            why = "there is no validation split (data.val_path)" if self.val is None else "the images have no labels"
            self.recorder.event(self.state.step, f"no online nearest-neighbour accuracy: {why}")
            return None
        return OnlineKNN(
            config,
            self.source,
            self.val,
            self.config.data,
            precision=self.config.train.precision,
            rank=self.rank,
            world=self.world,
        )

    def _restore(self) -> checkpoint.TrainState:
        """Continue from the newest checkpoint, if that is wanted and there is one."""
        saved = checkpoint.checkpoints(self.output)
        if not saved or not self.config.train.resume:
            return checkpoint.TrainState()
        state = checkpoint.restore(saved[-1], self.engine, self.config, dataset=self.source.fingerprint)
        self.guard.load(state.guard)
        return state

    def _describe(self) -> None:
        """Say what runs, before the first step."""
        config, method = self.config, self.method
        if self.rank == 0:
            (self.output / "config.json").write_text(json.dumps(config.as_dict(), indent=1))
        count = sum(getattr(p, "ds_numel", p.numel()) for p in method.parameters() if p.requires_grad)
        if self.state.step:
            self.recorder.event(self.state.step, f"continuing at step {self.state.step} of {self.total_steps}")
        self.recorder.say(
            f"{type(method).__name__}: {count / 1e6:.1f} M parameters on {self.world} x {self.device.type}, "
            f"{config.train.precision}, {TITLES[config.optim.name]} of {choose(config)}, "
            f"ZeRO-{config.train.zero_stage}; {len(self.source)} images, batch "
            f"{config.train.batch_size} = {config.train.micro_batch} x {self.accumulation} x {self.world}, "
            f"{self.total_steps} steps, peak lr {config.peak_lr:.3g}"
        )


def prepare_blocks(method: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Switch on activation checkpointing and per-block compilation; both keep the names of the parameters."""
    for module in method.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute
            if compiled:
                module.compile()
