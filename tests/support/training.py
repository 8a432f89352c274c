"""Tiny training runs in processes of their own.

As a script, run by plain Python or `ranks.py`, it executes one function of `CASES` on every rank and writes what rank 0
returns as JSON: `training.py <case> <result.json> <scratch folder>`.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.engine.data import DataConfig, open_source
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import ViTConfig
from vitrail.engine.train.config import EvaluateConfig, OptimConfig, RunConfig, TrainConfig

STEPS = 6
# The demo of a recipe, cut to six steps of 16 images and a network whose features of all images take a moment.
SHORT_DEMO = [
    "--demo",
    *("--train.batch-size", "16", "--train.micro-batch", "8", "--train.epochs", "0.008", "--train.log-every", "1"),
    *("--evaluate.knn-every", "0", "--optim.warmup-epochs", "0.001", "--data.threads", "1"),
    *("--method.encoder.width", "48", "--method.encoder.depth", "1", "--method.encoder.heads", "2"),
]
IMAGES = 12_000


@dataclass(kw_only=True)
class TwiceConfig(MAEConfig):
    """A masked autoencoder whose encoder runs twice per step, as those of multi-view methods do."""

    poison: int | None = None
    """Step whose loss is not a number."""

    def build(self) -> "Twice":
        return Twice(self)


class Twice(MAE):
    """Adds the loss under a second mask; keeps what `after_step` was told."""

    def __init__(self, config: TwiceConfig) -> None:
        super().__init__(config)
        self.poison = config.poison
        self.applied: list[bool] = []

    def forward(self, batch: Any, schedule: Schedule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (images,) = batch.views
        noise = schedule.uniform(images.shape[0], 2 * self.encoder.length, images.device)
        first, second = noise.chunk(2, dim=1)
        loss = self.loss(images, self.masks(first)) + self.loss(images, self.masks(second))
        if schedule.step == self.poison:
            loss = loss * math.nan
        return loss, {"loss": loss.detach()}

    def after_step(self, applied: bool) -> None:
        self.applied.append(applied)


def tiny_config(output: Path, **train: Any) -> RunConfig:
    """Six steps of batch 16 on the demo images."""
    encoder = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4, drop_path=0.0)
    return RunConfig(
        method=TwiceConfig(encoder=encoder, decoder_width=16, decoder_depth=2, decoder_heads=2),
        data=DataConfig(source="demo", threads=1),
        optim=OptimConfig(lr=1e-2, warmup_epochs=0.001),
        train=replace(
            TrainConfig(
                epochs=STEPS / (IMAGES // 16),
                batch_size=16,
                micro_batch=8,
                log_every=1,
                save_every=100,
                output=output,
            ),
            **train,
        ),
        evaluate=EvaluateConfig(knn_every=0),
    )


def logged(output: Path, name: str = "loss", *, kind: str = "train") -> list[float]:
    """A quantity of every logged training step or evaluation, the last line of a step counting."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return list({r["step"]: r[name] for r in lines if r["kind"] == kind}.values())


def events(output: Path) -> list[str]:
    """Messages of a run's events."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [r["message"] for r in lines if r["kind"] == "event"]


def start(script: str | Path, *args: str, ranks: int = 1, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a script on some ranks, its output captured."""
    command = [sys.executable, str(script), *args]
    if ranks > 1:
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), str(script), *args]
    # One thread per rank: the order of sums, and with it the last bits, depends on the number of threads.
    settings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: "subprocess.Popen[str]", *, timeout: float = 300) -> str:
    """Wait for a started script and return its output; a failure shows the output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def run_case(case: str, scratch: Path, *, ranks: int, script: str = __file__) -> Any:
    """Run one of the script's `CASES` on some ranks and return its result."""
    result = scratch / "result.json"
    finish(start(script, case, str(result), str(scratch), ranks=ranks))
    return json.loads(result.read_text())


# --- what runs inside the processes ---------------------------------------------------------------------------------


def train(
    config: RunConfig,
    *,
    stop_after: int | None = None,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Any:
    """Run a configuration in this process.

    Args:
        config: what to run.
        stop_after: answer a SIGTERM that arrives after so many steps.
        before: called with the trainer before its first step.
        after: called with the trainer after every step.
    """
    # torch.compile asks for this each time. DeepSpeed compiles functions at import, which would import all of inductor.
    os.environ["TORCHDYNAMO_DISABLE"] = "0" if config.train.compile else "1"
    from vitrail.engine.train.ds import start_processes
    from vitrail.engine.train.trainer import Trainer

    rank, world, device = start_processes()
    source = open_source(config.data, "train")
    val = open_source(config.data, "val") if config.evaluate.knn_every else None
    trainer = Trainer(config, train=source, val=val, rank=rank, world=world, device=device)
    plain = trainer._step

    def step(batches: Any) -> None:
        plain(batches)
        if after is not None:
            after(trainer)
        if trainer.state.step == stop_after and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._step = step
    if before is not None:
        before(trainer)
    return trainer.run()


def weights(result: Any, *, sharded: bool = False) -> list[float]:
    """A fingerprint of the weights: the sum of each tensor."""
    from vitrail.engine.train.checkpoint import whole_state

    return [v.double().sum().item() for v in whole_state(result.method, sharded=sharded).values()]


def stages(scratch: Path) -> Any:
    """Losses and final weights of ZeRO 0 to 3."""
    report = {}
    for stage in range(4):
        output = scratch / f"stage{stage}"
        result = train(tiny_config(output, zero_stage=stage))
        report[stage] = {"weights": weights(result, sharded=stage == 3)}
        if torch.distributed.get_rank() == 0:
            report[stage] |= {"losses": logged(output), "norms": logged(output, "gradient_norm")}
    return report


def resume(scratch: Path) -> Any:
    """For every stage: the runs of `stages`, interrupted and continued."""
    report = {}
    for stage in range(4):
        output = scratch / f"stage{stage}"
        first = train(tiny_config(output, zero_stage=stage), stop_after=3)
        second = train(tiny_config(output, zero_stage=stage))
        report[stage] = {
            "first": first.step,
            "finished": second.finished,
            "weights": weights(second, sharded=stage == 3),
        }
        if torch.distributed.get_rank() == 0:
            report[stage] |= {"losses": logged(output), "events": events(output)}
    return report


def poisoned(scratch: Path) -> Any:
    """For every stage: a step whose gradient is not a number."""
    report = {}
    for stage in range(4):
        output = scratch / f"stage{stage}"
        config = tiny_config(output, zero_stage=stage)
        result = train(replace(config, method=replace(config.method, poison=2)))
        values = weights(result, sharded=stage == 3)
        report[stage] = {"applied": result.method.applied, "finite": all(map(math.isfinite, values))}
        if torch.distributed.get_rank() == 0:
            report[stage] |= {"losses": logged(output), "skipped": logged(output, "skipped"), "events": events(output)}
    return report


def bad_files(scratch: Path) -> Any:
    """A folder in which four of forty files are no images."""
    from PIL import Image

    images = scratch / "images"
    if os.environ.get("RANK", "0") == "0":
        building = scratch / "building"
        building.mkdir(parents=True)
        for i in range(40):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            path = building / f"{i:02}.jpg"
            Image.fromarray(pixels.numpy()).save(path)
            if i % 10 == 3:
                path.write_bytes(path.read_bytes()[:100])
        building.rename(images)
    while not images.exists():
        time.sleep(0.01)
    config = tiny_config(scratch / "run", epochs=4.0)
    train(replace(config, data=DataConfig(path=str(images), threads=1)))
    return {"counted": logged(scratch / "run", "bad_files"), "events": events(scratch / "run")}


def options(scratch: Path) -> Any:
    """Losses under the switches that may not change them much, and under other sources."""
    base = tiny_config(scratch)
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointed": {"checkpoint_activations": True},
        "compiled": {"compile": True},
        "fp32": {"precision": "fp32"},
        "bf16 reduction": {"reduce_dtype": "bf16"},
        "one pass": {"micro_batch": 16},
        "accumulated": {"micro_batch": 2, "accumulation": 8},
    }
    report = {}
    for name, change in changes.items():
        output = scratch / name
        train(replace(base, train=replace(base.train, output=output, **change)))
        report[name] = logged(output)
    report["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    clipped, replayed = scratch / "clipped", scratch / "replayed"
    train(replace(base, optim=replace(base.optim, clip=1e-6), train=replace(base.train, output=clipped)))
    replay = DataConfig(source="replay", replay_batches=2)
    train(replace(base, data=replay, train=replace(base.train, output=replayed, epochs=STEPS / 80_000)))
    return report | {"clipped": logged(clipped, "gradient_norm"), "replayed": logged(replayed)}


def knn(scratch: Path) -> Any:
    """Online accuracies of ZeRO 0 and 3, where parameters are whole and where they are sharded."""
    report = {}
    for stage in (0, 3):
        output = scratch / f"stage{stage}"
        config = tiny_config(output, zero_stage=stage)
        every = config.train.epochs / 2
        train(replace(config, evaluate=EvaluateConfig(knn_every=every, bank=500, batch=100)))
        if torch.distributed.get_rank() == 0:
            report[stage] = logged(output, "knn", kind="evaluation"), logged(output)
    return report


def short_demo(scratch: Path) -> Any:
    """Losses of a demo cut to six steps."""
    from vitrail.engine.train.launch import parse
    from vitrail.recipes.mae_vith import recipe

    config, _ = parse(recipe, [*SHORT_DEMO, "--train.output", str(scratch / "run")])
    train(config)
    return logged(scratch / "run")


def everything(scratch: Path) -> Any:
    """All cases, those that tell nothing new on one rank or on several left out; one start for all of them."""
    cases = {"stages": stages, "resume": resume, "bad_files": bad_files, "knn": knn}
    cases |= {"options": options} if os.environ.get("WORLD_SIZE", "1") == "1" else {"poisoned": poisoned}
    return {name: case(scratch / name) for name, case in cases.items()}


CASES = {"everything": everything, "short_demo": short_demo}


def run_in_process(cases: dict[str, Callable[[Path], Any]]) -> None:
    """What a script of cases does on every rank."""
    case, result_path, scratch_path = sys.argv[1:]
    outcome = cases[case](Path(scratch_path))
    if torch.distributed.get_rank() == 0:
        Path(result_path).write_text(json.dumps(outcome))
    # A rank that ends while gloo's threads still talk to another one may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_in_process(CASES)
