"""Teachers that follow their students: exponential moving averages in float32, under every ZeRO stage.

Stages 0 to 2 hold whole parameters on every rank, and every rank updates its own copy. Stage 3 shards them, teachers
as well as students; parameters of one shape are cut at the same places, so each rank updates its own shard and nothing
is sent, except for the small parameters that DeepSpeed keeps whole.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from vitrail.kernels import FusedAdamWEMA, multi_tensor_ema_

from ..methods.base import Method, MomentumPair

Pairs = list[tuple[nn.Parameter, nn.Parameter]]
"""Teacher and student, parameter by parameter."""


def parameter_pairs(method: Method) -> Pairs:
    """Match the parameters of a method's `momentum_pairs` by name; call it before DeepSpeed shards them.

    A parameter that belongs to several pairs, such as a head shared by two networks, is listed once.

    Raises:
        ValueError: names or shapes differ, or a teacher's parameter is not float32, requires gradients or follows two
            students.
    """
    followed: dict[nn.Parameter, nn.Parameter] = {}
    for pair in method.momentum_pairs():
        for teacher, student in _match(pair):
            if followed.setdefault(teacher, student) is not student:
                raise ValueError(
                    f"a teacher's parameter of shape {tuple(teacher.shape)} follows two students: "
                    "pair it once in momentum_pairs"
                )
    return list(followed.items())


def _match(pair: MomentumPair) -> Pairs:
    """The parameters of one pair of networks, after all checks."""
    teacher, student = (dict(network.named_parameters()) for network in (pair.teacher, pair.student))
    optional = set(pair.student_only)
    unmatched = {
        "of the teacher alone": sorted(teacher.keys() - student.keys()),
        "of the student alone": sorted(student.keys() - teacher.keys() - optional),
        "in student_only but not of the student alone": sorted(optional - (student.keys() - teacher.keys())),
    }
    common = [name for name in teacher if name in student]
    unmatched["of different shapes"] = [
        f"{name} {tuple(teacher[name].shape)} and {tuple(student[name].shape)}"
        for name in common
        if teacher[name].shape != student[name].shape
    ]
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in unmatched.items() if names)
    if told:
        raise ValueError(f"teacher and student do not have the same parameters ({told})")
    trained = [name for name in common if teacher[name].requires_grad]
    if trained:
        raise ValueError(
            f"the teacher's parameters must not require gradients, got {', '.join(trained)}: "
            "call teacher.requires_grad_(False)"
        )
    narrow = [f"{name} {teacher[name].dtype}" for name in common if teacher[name].dtype != torch.float32]
    if narrow:
        raise ValueError(
            f"the teacher's parameters must be float32, got {', '.join(narrow)}: in a narrower type the average "
            "does not move; call teacher.float()"
        )
    return [(teacher[name], student[name]) for name in common]


def steppable(pairs: Pairs) -> dict[Tensor, Tensor]:
    """Teacher by student, where one optimiser can step both: each student with a gradient and its first teacher."""
    teachers: dict[Tensor, Tensor] = {}
    for teacher, student in pairs:
        if student.requires_grad:
            teachers.setdefault(student, teacher)
    return teachers


class TeacherEMA:
    """Updates a method's teachers once per applied step.

    In ZeRO stage 0 `FusedAdamWEMA` updates the teachers of the parameters that it steps, in the same pass; what is
    left for `update` then are the teachers of frozen parameters.
    """

    def __init__(self, pairs: Pairs, engine: DeepSpeedEngine) -> None:
        """Take over the pairs, matched before `engine` was made of the method that holds them."""
        self.teachers = len(pairs)
        self.sharded = engine.zero_optimization_stage() == 3
        self.fused = engine.optimizer if isinstance(engine.optimizer, FusedAdamWEMA) else None
        done = set(map(id, steppable(pairs).values())) if self.fused is not None else set()
        self.pairs = [(teacher, student) for teacher, student in pairs if id(teacher) not in done]
        if self.sharded:
            _check_shards(self.pairs)

    def prepare(self, momentum: float) -> None:
        """Say the momentum of the update that belongs to the step about to be taken."""
        if self.fused is not None:
            for group in self.fused.param_groups:
                group["ema_momentum"] = momentum

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the teachers towards their students' present weights; call it after an applied step.

        In stage 3 it is collective.
        """
        if not self.pairs:
            return
        if not self.sharded:
            teachers, students = zip(*self.pairs, strict=True)
            multi_tensor_ema_(teachers, students, momentum)
            return
        multi_tensor_ema_([_shard(t) for t, _ in self.pairs], [_shard(s) for _, s in self.pairs], momentum)
        whole: list[Any] = [t for t, _ in self.pairs if _attribute(t, "ds_status") == ZeroParamStatus.AVAILABLE]
        if whole:  # small parameters that stay gathered: their whole copy is stale now
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def _attribute(parameter: nn.Parameter, name: str) -> Any:
    """What DeepSpeed has attached to a parameter."""
    return getattr(parameter, name)


def _shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a sharded parameter, one-dimensional."""
    shard: Tensor = _attribute(parameter, "ds_tensor")
    return shard


def _check_shards(pairs: Pairs) -> None:
    """Raises RuntimeError unless teachers and students are cut alike and the teachers' shards are float32."""
    for teacher, student in pairs:
        mine, other = _shard(teacher), _shard(student)
        if mine.shape != other.shape or mine.device != other.device or mine.dtype != torch.float32:
            raise RuntimeError(
                "DeepSpeed cut a teacher's parameter differently from its student's: "
                f"{tuple(mine.shape)} {mine.dtype} on {mine.device} and {tuple(other.shape)} {other.dtype} on "
                f"{other.device}; train with --train.zero-stage 2 or lower"
            )
