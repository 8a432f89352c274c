"""How teachers are paired with their students; runs with teachers are in test_momentum.py."""

import copy

import pytest
import torch
from torch import nn

from vitrail.engine.methods.base import Method, MomentumPair
from vitrail.engine.train.ema import parameter_pairs, steppable


class Bare(Method):
    """A method that consists of its pairs."""

    def __init__(self, *pairs: MomentumPair) -> None:
        super().__init__()
        self.pairs = list(pairs)

    def momentum_pairs(self) -> list[MomentumPair]:
        return self.pairs

    views = forward = features = flops = None


Bare.__abstractmethods__ = frozenset()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def follower(student: nn.Module) -> nn.Module:
    return copy.deepcopy(student).requires_grad_(False)


def test_parameters_are_paired_by_name_and_buffers_are_not():
    student = network()
    teacher = follower(student)
    found = parameter_pairs(Bare(MomentumPair(teacher, student)))
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert [(id(t), id(s)) for t, s in found] == [
        (id(teacher.get_parameter(name)), id(student.get_parameter(name))) for name in names
    ]


def test_no_pairs_is_the_default():
    assert Method.momentum_pairs(Bare()) == []


def test_unmatched_names_are_listed():
    student = network()
    teacher = follower(student)
    student.token, teacher.extra = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(ValueError, match=r"of the teacher alone: extra; of the student alone: token\)"):
        parameter_pairs(Bare(MomentumPair(teacher, student)))
    with pytest.raises(ValueError, match=r"\(of the teacher alone: extra\)"):
        parameter_pairs(Bare(MomentumPair(teacher, student, student_only=("token",))))
    del teacher.extra
    assert len(parameter_pairs(Bare(MomentumPair(teacher, student, student_only=("token",))))) == 5


def test_a_name_in_student_only_must_be_one():
    student = network()
    with pytest.raises(ValueError, match=r"in student_only but not of the student alone: 0\.bias, tokn"):
        parameter_pairs(Bare(MomentumPair(follower(student), student, student_only=("tokn", "0.bias"))))


def test_shapes_must_be_equal():
    student = network()
    teacher = follower(student)
    teacher[2] = nn.Linear(4, 5, bias=False).requires_grad_(False)
    with pytest.raises(ValueError, match=r"of different shapes: 2.weight \(5, 4\) and \(2, 4\)"):
        parameter_pairs(Bare(MomentumPair(teacher, student)))


def test_teachers_are_float32_and_take_no_gradient():
    student = network()
    with pytest.raises(ValueError, match=r"must be float32, got 0.weight torch.bfloat16, .*call teacher.float"):
        parameter_pairs(Bare(MomentumPair(follower(student).bfloat16(), student)))
    teacher = follower(student)
    teacher[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"must not require gradients, got 0.bias: call teacher.requires_grad_"):
        parameter_pairs(Bare(MomentumPair(teacher, student)))


def test_a_shared_parameter_moves_once_and_follows_one_student():
    student = network()
    teacher = follower(student)
    pairs = [MomentumPair(teacher, student), MomentumPair(teacher[2], student[2])]
    assert len(parameter_pairs(Bare(*pairs))) == 5
    with pytest.raises(ValueError, match=r"of shape \(2, 4\) follows two students"):
        parameter_pairs(Bare(pairs[0], MomentumPair(teacher[2], nn.Linear(4, 2, bias=False))))


def test_one_pass_takes_the_first_teacher_of_each_trained_parameter():
    student = network()
    student[0].weight.requires_grad_(False)
    first, second = follower(student), follower(student)
    pairs = parameter_pairs(Bare(MomentumPair(first, student), MomentumPair(second, student)))
    assert len(pairs) == 10
    together = steppable(pairs)
    trained = ["0.bias", "1.weight", "1.bias", "2.weight"]
    assert {id(s): id(t) for s, t in together.items()} == {
        id(student.get_parameter(name)): id(first.get_parameter(name)) for name in trained
    }
