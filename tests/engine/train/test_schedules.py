"""Learning rate and weight decay, step by step, against the arrays of the official DINO code."""

from dataclasses import replace

import pytest
import training

from vitrail.engine.train import OptimConfig
from vitrail.engine.train.demo import shrink
from vitrail.engine.train.schedules import learning_rate, weight_decay

STEPS_PER_EPOCH, EPOCHS = 1251, 100
TOTAL = STEPS_PER_EPOCH * EPOCHS
DINO = OptimConfig(schedule="dino", lr=2e-3, min_lr=1e-6, warmup_epochs=10, weight_decay=0.04, final_weight_decay=0.4)


def rate(tmp_path, optim, step):
    config = replace(training.tiny_config(tmp_path, epochs=EPOCHS), optim=optim)
    return learning_rate(config, step, steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, "0"),
        (1, "1.59884882884e-07"),
        (12509, "0.002"),
        (12510, "0.002"),
        (12511, "0.00199999999961"),
        (62550, "0.00117406135358"),
        (125099, "1.00000038909e-06"),
    ],
)
def test_dinos_learning_rate(tmp_path, step, expected):
    """Printed by the official `cosine_scheduler` for 100 epochs of 1251 steps."""
    assert f"{rate(tmp_path, DINO, step):.12g}" == expected


@pytest.mark.parametrize(
    ("step", "expected"), [(0, "0.04"), (1, "0.0400000000568"), (62550, "0.22"), (125099, "0.399999999943")]
)
def test_dinos_weight_decay(step, expected):
    assert f"{weight_decay(DINO, step, total_steps=TOTAL):.12g}" == expected


def test_weight_decay_stays_unless_it_is_to_end_elsewhere():
    assert weight_decay(replace(DINO, final_weight_decay=None), 1, total_steps=TOTAL) is None
    assert weight_decay(replace(DINO, final_weight_decay=0.0), TOTAL // 2, total_steps=TOTAL) == pytest.approx(0.02)


def test_maes_learning_rate_reaches_the_peak_with_the_warmup(tmp_path):
    optim = replace(DINO, schedule="mae")
    rates = [rate(tmp_path, optim, step) for step in (0, 12509, 12510, 12511)]
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(2e-3 * 12509 / 12510, rel=1e-12)
    assert rates[2] == 2e-3 > rates[3]


SIMMIM = OptimConfig(schedule="step", lr=4e-4, warmup_epochs=10, warmup_lr=2e-6, milestones=(90, 70))


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 2e-6), (2, 8.16e-5), (10, 4e-4), (69.999, 4e-4), (70, 4e-5), (89.999, 4e-5), (90, 4e-6), (99.999, 4e-6)],
)
def test_a_learning_rate_in_steps(tmp_path, epoch, expected):
    """The warm-up by hand; at the very milestone the next value holds."""
    assert rate(tmp_path, SIMMIM, round(epoch * STEPS_PER_EPOCH)) == pytest.approx(expected, rel=1e-12)


def test_the_factor_is_that_of_the_configuration(tmp_path):
    assert rate(tmp_path, replace(SIMMIM, factor=0.5), TOTAL - 1) == pytest.approx(1e-4)
    assert rate(tmp_path, replace(SIMMIM, milestones=()), TOTAL - 1) == 4e-4


@pytest.mark.parametrize(("schedule", "step", "share"), [("mae", 1251, 0.1), ("dino", 12509, 1.0), ("dino", 0, 0.0)])
def test_every_warmup_may_begin_above_zero(tmp_path, schedule, step, share):
    optim = replace(DINO, schedule=schedule, warmup_lr=1e-4)
    assert rate(tmp_path, optim, step) == pytest.approx(1e-4 + share * 1.9e-3, rel=1e-12)


def test_a_demo_has_its_milestones_where_the_recipe_has_them(tmp_path):
    config = replace(training.tiny_config(tmp_path, epochs=EPOCHS), optim=SIMMIM)
    small = shrink(config)
    assert small.optim.milestones == pytest.approx([0.9 * small.train.epochs, 0.7 * small.train.epochs])
    assert small.optim.warmup_lr == 0.0 < small.peak_lr


@pytest.mark.parametrize(("warmup_epochs", "first"), [(0.0, 2e-3), (1 / STEPS_PER_EPOCH, 0.0)])
def test_warmups_of_no_step_and_of_one(tmp_path, warmup_epochs, first):
    optim = replace(DINO, warmup_epochs=warmup_epochs)
    assert rate(tmp_path, optim, 0) == first
    assert rate(tmp_path, optim, 1) == pytest.approx(2e-3)
