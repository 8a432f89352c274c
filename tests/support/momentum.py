"""A tiny student that follows its teacher, in processes of their own; a script as `training.py` is."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import training
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cosine_similarity

from vitrail.engine.data.views import RandomResizedCrop, View
from vitrail.engine.methods.base import Method, MethodConfig, MomentumPair, Schedule
from vitrail.engine.models.vit import VisionTransformer, ViTConfig
from vitrail.engine.train.config import RunConfig

POISON = 2  # the step whose loss is not a number


def small_encoder() -> ViTConfig:
    """A ViT of which ZeRO-3 keeps the small parameters whole and shards the MLP's, above 100,000 elements."""
    return ViTConfig(image_size=32, patch_size=8, width=160, depth=1, heads=4)


@dataclass(kw_only=True)
class FollowConfig(MethodConfig):
    """A student that predicts its teacher's view of the same image."""

    encoder: ViTConfig = field(default_factory=small_encoder)
    timing: Literal["taken", "coming"] = "taken"
    poison: int | None = POISON

    def build(self) -> "Follow":
        return Follow(self)

    def demo(self) -> "FollowConfig":
        return self


class Branch(nn.Module):
    """Encoder and projector; the student's has a shift of its own as iBOT's has a mask token."""

    def __init__(self, config: ViTConfig, *, shifted: bool) -> None:
        super().__init__()
        self.encoder = VisionTransformer(config)
        # 15 outputs: no even number of ranks divides the bias
        self.head = nn.Sequential(nn.Linear(config.width, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 15))
        if shifted:
            self.shift = nn.Parameter(torch.zeros(config.width))

    def forward(self, images: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.encoder(images, patches)[:, 0]
        return self.head(tokens + self.shift if hasattr(self, "shift") else tokens)


class Follow(Method):
    """Two student passes on half of the patches each; the patch projection is frozen, as in MoCo v3."""

    def __init__(self, config: FollowConfig) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = Branch(config.encoder, shifted=True), Branch(config.encoder, shifted=False)
        self.predictor = nn.Linear(15, 15)
        self.student.encoder.patch_embed.requires_grad_(False)
        self.teacher.requires_grad_(False)
        self.applied: list[bool] = []
        with torch.no_grad():  # a teacher that has some way to go, in frozen parameters too
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(0.9 * self.student.get_parameter(name))

    def views(self) -> list[View]:
        return [View(name="crop", ops=(RandomResizedCrop(size=self.config.encoder.size, scale=(0.6, 1.0)),))]

    def forward(self, batch: Any, schedule: Schedule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (images,) = batch.views
        order = schedule.uniform(images.shape[0], self.student.encoder.length, images.device).argsort(dim=1)
        with torch.no_grad():
            target = self.teacher(images).float()
        predictions = [self.predictor(self.student(images, patches)).float() for patches in order.chunk(2, dim=1)]
        loss = sum(1.0 - cosine_similarity(p, target, dim=1).mean() for p in predictions)
        if schedule.step == self.config.poison:
            loss = loss * math.nan
        return loss, {"loss": loss.detach()}

    def momentum_pairs(self) -> list[MomentumPair]:
        return [MomentumPair(self.teacher, self.student, student_only=("shift",))]

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        return momentum_at((coming if self.config.timing == "coming" else taken).step)

    def after_step(self, applied: bool) -> None:
        self.applied.append(applied)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.student.encoder(images)[:, 0].float()

    def flops(self, images: int) -> float:
        return float(images)


def momentum_at(step: int) -> float:
    """A momentum that moves by a tenth of itself with every step, so that a shifted schedule is seen."""
    return 0.5 + 0.05 * step


def follow_config(output: Path, *, optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """The steps of `training.tiny_config`, in fp32, with a student that follows."""
    config = training.tiny_config(output, **{"precision": "fp32", **train})
    return replace(config, method=FollowConfig(), optim=replace(config.optim, **(optim or {})))


# --- what runs inside the processes ---------------------------------------------------------------------------------


class Witness:
    """Watches a trainer and computes the teacher in float64 from the student's weights after each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.expected = {k.removeprefix("teacher."): v.double() for k, v in self.state("teacher.").items()}
        self.error = 0.0
        self.moved: list[float] = []
        self.last = self.state("teacher.")

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        from vitrail.engine.train.checkpoint import whole_state

        sharded = self.trainer.config.train.zero_stage == 3
        names = {name for name, _ in self.trainer.method.named_parameters()}
        whole = whole_state(self.trainer.method, sharded=sharded)
        return {k: v for k, v in whole.items() if k.startswith(prefix) and k in names}

    def __call__(self) -> None:
        """After a step."""
        step, applied = self.trainer.state.step - 1, self.trainer.method.applied[-1]
        student, teacher = self.state("student."), self.state("teacher.")
        if torch.distributed.get_rank() != 0:
            return
        m = momentum_at(step + (self.trainer.method.config.timing == "coming"))
        for name, value in self.expected.items():
            if applied:
                self.expected[name] = m * value + (1 - m) * student[f"student.{name}"].double()
            got = teacher[f"teacher.{name}"].double()
            self.error = max(self.error, (got - self.expected[name]).abs().max().item())
        self.moved.append(max((v - self.last[k]).abs().max().item() for k, v in teacher.items()))
        self.last = teacher


def train(config: RunConfig, name: str | None = None, *, watch: bool = False, stop_after: int | None = None) -> Any:
    """Run a configuration; keep its last weights as `<name>.safetensors` beside its output folder."""
    from vitrail.engine.train.checkpoint import whole_state

    witnesses: list[Witness] = []
    result = training.train(
        config,
        stop_after=stop_after,
        before=(lambda trainer: witnesses.append(Witness(trainer))) if watch else None,
        after=(lambda trainer: witnesses[0]()) if watch else None,
    )
    whole = whole_state(result.method, sharded=config.train.zero_stage == 3)
    report = {"applied": result.method.applied, "step": result.step}
    if torch.distributed.get_rank() == 0:
        report["losses"] = training.logged(config.train.output)
        if name is not None:
            save_file(
                {k: v.contiguous() for k, v in whole.items()}, config.train.output.with_name(name + ".safetensors")
            )
        if watch:
            report |= {"error": witnesses[0].error, "moved": witnesses[0].moved}
    return report


def stages(scratch: Path) -> Any:
    """Every stage: watched, then interrupted and continued; stage 0 with torch's AdamW too.

    Beside them: stage 3 with gradients in bf16, and a teacher that takes the momentum of the coming step.
    """
    report: dict[str, Any] = {}
    for stage in range(4):
        report[f"stage{stage}"] = train(
            follow_config(scratch / f"stage{stage}", zero_stage=stage), f"stage{stage}", watch=True
        )
        parts = follow_config(scratch / f"parts{stage}", zero_stage=stage)
        train(parts, stop_after=3)
        report[f"parts{stage}"] = train(parts, f"parts{stage}")
    torchs = follow_config(scratch / "torch", zero_stage=0, optim={"implementation": "torch"})
    report["torch"] = train(torchs, "torch", watch=True)
    narrow = follow_config(scratch / "bf16", zero_stage=3, precision="bf16", reduce_dtype="bf16")
    report["bf16"] = train(narrow, watch=True)
    coming = follow_config(scratch / "coming", zero_stage=0)
    coming = replace(coming, method=FollowConfig(timing="coming"))
    report["coming"] = train(coming, watch=True)
    return report


OPTIMISERS: dict[str, dict[str, Any]] = {
    "lars": {"name": "lars", "lr": 2.0, "weight_decay": 1e-4, "trust_coefficient": 0.01},
    "lamb": {"name": "lamb", "lr": 1e-2, "eps": 1e-6},
    "clipped": {"clip": 0.1},
    "per tensor": {"clip": 0.02, "clip_per_tensor": True},
}


def optimisers(scratch: Path) -> Any:
    """Stage 0 with the other optimisers, interrupted and continued as well, and with both clippings.

    Beside them: both clippings with torch's AdamW, the common one in stage 1, and DeepSpeed's AdamW.
    """
    report: dict[str, Any] = {}
    for name, optim in OPTIMISERS.items():
        report[name] = train(follow_config(scratch / name, zero_stage=0, optim=optim), name, watch=True)
        if "name" in optim:
            parts = follow_config(scratch / f"parts {name}", zero_stage=0, optim=optim)
            train(parts, stop_after=3)
            report[f"parts {name}"] = train(parts, f"parts {name}")
    others: dict[str, tuple[int, dict[str, Any]]] = {
        "clipped by torch": (0, {**OPTIMISERS["clipped"], "implementation": "torch"}),
        "per tensor by torch": (0, {**OPTIMISERS["per tensor"], "implementation": "torch"}),
        "clipped in stage 1": (1, OPTIMISERS["clipped"]),
        "not clipped": (1, {}),
        "deepspeed": (1, {"implementation": "deepspeed"}),
        "clipped for deepspeed": (0, {**OPTIMISERS["clipped"], "implementation": "deepspeed"}),
    }
    for name, (stage, optim) in others.items():
        report[name] = train(follow_config(scratch / name, zero_stage=stage, optim=optim), name)
    return report


def everything(scratch: Path) -> Any:
    """Both, in one start."""
    return stages(scratch) | optimisers(scratch)


if __name__ == "__main__":
    training.run_in_process({"everything": everything})
