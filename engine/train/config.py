"""The typed configuration of a run: what a recipe returns and dotted flags override."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.config import DataConfig
from ..methods.base import MethodConfig


class ConfigError(ValueError):
    """A configuration that cannot run, told in one line with its remedy."""


class TrainingError(RuntimeError):
    """A run that the guard has ended, told in one line; its checkpoints from before the trouble are left."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "lars", "lamb", "sgd"] = "adamw"
    """AdamW or SGD; LARS or LAMB, whose trust ratios need whole parameters: ZeRO stage 0."""
    implementation: Literal["auto", "vitrail", "torch", "apex", "deepspeed"] = "auto"
    """Whose code steps the weights; auto: vitrail's in ZeRO stage 0, torch's in the others and for SGD."""

    base_lr: float = 1.5e-4
    """Learning rate per 256 images of the global batch, or under "root" per 1,024."""
    scaling: Literal["linear", "root"] = "linear"
    """How it grows with the batch: base_lr * batch / 256, or base_lr * sqrt(batch / 1024) as in DINOv2."""
    lr: float | None = None
    """Peak learning rate itself; replaces base_lr and scaling."""
    min_lr: float = 0.0
    """Learning rate that the cosine ends at."""
    schedule: Literal["mae", "dino", "step"] = "mae"
    """Whose cosine; DINO's, of steps, reaches the peak a step earlier and keeps it for two. step: see milestones."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the schedule "step" multiplies the learning rate, which else stays at its peak,"""
    factor: float = 0.1
    """by this factor."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up begins with."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments of AdamW and LAMB."""
    eps: float = 1e-8
    """Term added to the denominator of AdamW and LAMB (published LAMB: 1e-6), and of some variants of LARS."""
    weight_decay: float = 0.05
    """Weight decay; LARS and SGD add it to the gradient (L2), it is decoupled in the others."""
    final_weight_decay: float | None = None
    """Weight decay that half a cosine over the whole run ends at, 0.4 in DINO; None: it stays what it is."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: matrices and tokens, or vectors and biases as well; LARS spares these decay and trust ratio."""
    momentum: float = 0.9
    """Momentum of LARS and SGD."""
    trust_coefficient: float = 0.001
    """LARS: length of a layer's step as a share of the layer's norm, at a learning rate of one."""
    lars_variant: Literal["moco_v3", "simclr", "lightly", "solo"] = "moco_v3"
    """Whose LARS: they differ in the trust ratio and in whether the learning rate enters the momentum."""
    clip: float = 0.0
    """Limit of the gradient norm, 1 in the published LAMB; 0 means none."""
    clip_per_tensor: bool = False
    """Hold the norm of each parameter's gradient to the limit, as DINO's code does, not their common norm."""
    clip_per_part: bool = False
    """Hold the norm of each part that the method names to the limit, as DINOv2's code does backbone and heads."""

    @property
    def clips_pieces(self) -> bool:
        """Whether the limit is for several norms, not for that of all gradients."""
        return self.clip_per_tensor or self.clip_per_part


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    epochs: float = 800
    """Passes over the training images."""
    batch_size: int = 4096
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch: int = 64
    """Images per rank in one forward and backward pass."""
    accumulation: int | None = None
    """Micro-batches per step; None derives it from the batch, the micro-batch and the number of ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the ranks: nothing, optimiser state, + gradients, + parameters."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bf16 under autocast, parameters and statistics in fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients of linear layers are accumulated and sent; bf16 halves the traffic."""
    grad_cache: bool = False
    """Losses that compare images see the whole batch instead of a micro-batch; the backbone runs forward twice."""
    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile every transformer block."""
    seed: int = 0
    """Seed of weights, sample order, augmentation and masks."""
    log_every: int = 20
    """Steps between log lines; nothing is read from the device in between."""
    save_every: float = 20
    """Epochs between checkpoints; one is always written at the end and on SIGTERM."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    resume: bool = True
    """Continue from the newest checkpoint in the output folder, if there is one."""
    init_from: Path | None = None
    """Checkpoint folder or .safetensors file whose weights a new run starts from."""
    output: Path = Path("runs/default")
    """Folder of logs and checkpoints, and of the demo's pictures."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured on the features while training."""

    knn_every: float = 20
    """Epochs between nearest-neighbour evaluations on the validation split; 0 means never."""
    neighbours: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Softmax temperature of the votes (arXiv 1805.01978)."""
    bank: int = 100_000
    """Most training images used as the bank."""
    batch: int = 256
    """Images per forward pass, over all ranks."""


@dataclass(kw_only=True)
class GuardConfig:
    """What counts as training gone wrong, and what follows it."""

    enabled: bool = True
    """Watch for spikes, dips and collapse; a step whose gradient is not finite is passed over in any case."""
    spike: Literal["warn", "skip", "rollback", "stop"] = "warn"
    """After a spike of a gradient norm. skip passes over that very step, and reads the norms at every step for it."""
    dip: Literal["warn", "rollback", "stop"] = "warn"
    """After a nearest-neighbour accuracy clearly below the best one."""
    collapse: Literal["warn", "rollback", "stop"] = "warn"
    """After signs that all images get the same features."""
    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """stop: at the first gradient that is not finite. Otherwise, after max_nonfinite of them: stop, or roll back."""
    window: int = 200
    """Steps whose gradient norms a new one is compared with."""
    history: int = 20
    """Steps that the window must hold before anything is called a spike."""
    deviations: float = 6.0
    """A spike exceeds the median log-norm by so many robust standard deviations,"""
    ratio: float = 3.0
    """and the median norm by this factor."""
    drop: float = 0.02
    """A dip is more than this below the best accuracy, and their 3-sigma intervals on that split do not touch."""
    intervals: int = 10
    """Logging intervals in a row, after the warm-up, that make a collapse of the loss or of feature_std."""
    min_feature_std: float = 0.05
    """Collapsed below: standard deviation of normalised embeddings times the root of their width; 1 is spread out."""
    min_rank: float = 2.0
    """Collapsed below: RankMe of the online features (arXiv 2210.02885); 1 is one direction."""
    max_nonfinite: int = 20
    """Steps in a row whose gradients may be not finite."""
    max_rollbacks: int = 3
    """Returns to a checkpoint in one run; the next one stops it."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    method: MethodConfig
    """The method, its model and its published defaults."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and loading."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch, precision, checkpoints."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Online evaluation."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Alarms for spikes, dips and collapse, and what follows them."""

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        optim, batch = self.optim, self.train.batch_size
        if optim.lr is not None:
            return optim.lr
        return optim.base_lr * (batch / 256 if optim.scaling == "linear" else math.sqrt(batch / 1024))

    def accumulation(self, world: int) -> int:
        """Micro-batches per optimiser step on `world` ranks.

        Raises:
            ConfigError: batch_size is not micro_batch x accumulation x ranks.
        """
        batch, micro, wanted = self.train.batch_size, self.train.micro_batch, self.train.accumulation
        per_pass = micro * world
        if wanted is None:
            if batch % per_pass:
                raise ConfigError(
                    f"train.batch_size {batch} is not a multiple of train.micro_batch {micro} x {world} ranks: "
                    f"choose a micro-batch that divides {batch / world:g}"
                )
            return batch // per_pass
        if per_pass * wanted != batch:
            raise ConfigError(
                f"train.batch_size {batch} is not train.micro_batch {micro} x train.accumulation {wanted} x {world} "
                f"ranks = {per_pass * wanted}: change one of them, or leave train.accumulation out"
            )
        return wanted

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `vitrail.engine.methods.load` reads the method back."""
        plain: dict[str, Any] = dataclasses.asdict(self) | {"method": _named(self.method)}
        return dict(json.loads(json.dumps(plain, default=str)))

    def fingerprint(self, dataset: str) -> str:
        """Hash of everything that decides the numbers of a run, not of where and how fast it runs.

        Args:
            dataset: fingerprint of the training images.
        """
        plain = self.as_dict()
        decisive = {
            "dataset": dataset,
            "method": plain["method"],
            "optim": {k: v for k, v in plain["optim"].items() if k != "implementation"},
            "train": {k: plain["train"][k] for k in ("epochs", "batch_size", "precision", "reduce_dtype", "seed")},
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _named(config: Any) -> Any:
    """A method's configuration as a dictionary, which says the class of each part: its type allows several."""
    if not dataclasses.is_dataclass(config):
        return config
    parts = {part.name: _named(getattr(config, part.name)) for part in dataclasses.fields(config)}
    return parts | {"name": type(config).__name__}
