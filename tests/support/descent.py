"""Networks that are pulled to moving targets, whose every step has a formula; a script as `training.py` is."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import momentum
import torch
import training
from torch import nn

from vitrail.engine.data.views import RandomResizedCrop, View
from vitrail.engine.methods.base import Method, MethodConfig, Schedule
from vitrail.engine.train.config import OptimConfig, RunConfig

POISON = (0, 2)  # steps whose loss is not a number: before there is a momentum, and after
RELEASE = 4  # steps in which the prototypes are held
STOPS = (3, 5)  # steps before the interruptions: one while they are held, one after
WARMUP = 2  # steps
SGD = OptimConfig(
    name="sgd",
    lr=0.25,
    momentum=0.9,
    weight_decay=0.125,
    decay="all",
    warmup_epochs=0,
    clip=20.0,  # below the common norm
)
ADAMW = OptimConfig(
    name="adamw",
    lr=0.25,
    schedule="dino",
    warmup_epochs=WARMUP * 16 / training.IMAGES,
    betas=(0.8, 0.9),
    eps=0.1,  # large, so that the length of the gradient counts
    weight_decay=0.04,
    final_weight_decay=0.4,
    clip=5.0,  # between the norms of the tensors
    clip_per_tensor=True,
)
OPTIMS = {"sgd": SGD, "adamw": ADAMW}


def target(step: int) -> float:
    """Where every weight is pulled at a step."""
    return math.sin(1.0 + step)


def start(shape: torch.Size) -> torch.Tensor:
    """Weights before the first step."""
    return torch.linspace(-1.0, 1.0, shape.numel()).view(shape)


class Pulled(nn.Linear):
    """Its gradients are its weights' distances to the target."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(start(parameter.shape))

    def forward(self, goal: float) -> torch.Tensor:
        return sum(0.5 * (parameter - goal).square().sum() for parameter in self.parameters())


@dataclass(kw_only=True)
class DescentConfig(MethodConfig):
    """Networks of which one keeps its learning rate and one is held at first."""

    def build(self) -> "Descent":
        return Descent()

    def demo(self) -> "DescentConfig":
        return self


class Descent(Method):
    """ZeRO-3 shards the encoder's matrix, above 100,000 elements, and keeps the rest whole.

    Of the prototypes' bias, one number in a group of its own, the second rank has nothing in stages 1 and 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.neck = Pulled(500, 211), Pulled(11, 5)
        self.predictor, self.prototypes = Pulled(7, 3), Pulled(40, 1)
        self.applied: list[bool] = []

    def views(self) -> list[View]:
        return [View(name="crop", ops=(RandomResizedCrop(size=(32, 32)),))]

    def forward(self, batch: Any, schedule: Schedule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        goal = target(schedule.step)
        loss = sum(network(goal) for network in self.children())
        if schedule.step in POISON:
            loss = loss * math.nan
        return loss, {"loss": loss.detach()}

    def unscheduled(self) -> list[nn.Module]:
        return [self.predictor]

    def held(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(RELEASE * 16 / training.IMAGES, list(self.prototypes.parameters()))]

    def after_step(self, applied: bool) -> None:
        self.applied.append(applied)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()

    def flops(self, images: int) -> float:
        return float(images)


def descent_config(output: Path, optim: OptimConfig = SGD, **train: Any) -> RunConfig:
    """The steps of `training.tiny_config`, in fp32."""
    config = training.tiny_config(output, precision="fp32", **train)
    return replace(config, method=DescentConfig(), optim=optim)


# --- what runs inside the processes ---------------------------------------------------------------------------------


def stages(scratch: Path) -> Any:
    """Every stage under both optimisers, interrupted twice and continued; keeps the weights of held prototypes."""
    report: dict[str, Any] = {}
    for stage in range(4):
        for name, optim in OPTIMS.items():
            key = f"{name}{stage}"
            config = descent_config(scratch / f"run {key}", optim, zero_stage=stage)
            first, second = (momentum.train(config, f"{key} after {stop}", stop_after=stop) for stop in STOPS)
            applied = [run["applied"] for run in (first, second, momentum.train(config, key))]
            report[key] = {"applied": applied}
            if torch.distributed.get_rank() == 0:
                kinds = ("lr", "gradient_norm", *(["weight_decay"] if optim.final_weight_decay is not None else []))
                report[key] |= {kind: training.logged(config.train.output, kind) for kind in kinds}
    return report


CASES = {"stages": stages}

if __name__ == "__main__":
    training.run_in_process(CASES)
