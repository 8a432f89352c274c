"""The trainer on several ranks, under every ZeRO stage, interrupted, and with broken numbers."""

import math

import pytest
import training
from training import STEPS

pytestmark = [pytest.mark.launch, pytest.mark.slow]

STAGES = "0123"


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    return {
        ranks: training.run_case("everything", tmp_path_factory.mktemp(f"ranks{ranks}"), ranks=ranks)
        for ranks in (1, 2)
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_stages_give_the_same_losses_and_weights(by_ranks, ranks):
    """With an encoder that is applied twice per step, and an accumulation of two on a single rank."""
    report = by_ranks[ranks]["stages"]
    assert len(report["1"]["losses"]) == STEPS
    assert report["1"]["losses"][-1] < report["1"]["losses"][0]
    for stage in STAGES:
        assert report[stage]["losses"] == pytest.approx(report["1"]["losses"], rel=1e-6)
        assert report[stage]["norms"] == pytest.approx(report["1"]["norms"], rel=1e-5)
        assert report[stage]["weights"] == pytest.approx(report["1"]["weights"], rel=1e-4, abs=1e-4)


def test_two_ranks_equal_one(by_ranks):
    for stage in STAGES:
        one, two = by_ranks[1]["stages"][stage], by_ranks[2]["stages"][stage]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_runs_continue_exactly(by_ranks, ranks):
    """SIGTERM reaches one rank after step 3; all ranks save, leave, and the same command goes on."""
    for stage in STAGES:
        run, left_alone = by_ranks[ranks]["resume"][stage], by_ranks[ranks]["stages"][stage]
        assert run["first"] == 3
        assert run["finished"]
        assert run["losses"] == left_alone["losses"]
        assert run["weights"] == left_alone["weights"]
        assert "continuing at step 3 of 6" in run["events"]
        assert any("stopped by a signal at step 3" in event for event in run["events"])


def test_a_gradient_that_is_not_finite_changes_nothing(by_ranks):
    for stage in STAGES:
        run = by_ranks[2]["poisoned"][stage]
        assert run["applied"] == [True, True, False, True, True, True]
        assert run["finite"]
        assert math.isnan(run["losses"][2])
        assert all(map(math.isfinite, run["losses"][3:]))
        assert run["skipped"] == [0, 0, 1, 1, 1, 1]
        assert any(event.startswith("step 3 skipped: its gradient is not finite") for event in run["events"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_files_are_named_counted_and_survived(by_ranks, ranks):
    report = by_ranks[ranks]["bad_files"]
    assert len(report["counted"]) == 8  # four epochs of two steps
    named = {
        event.split()[2].rstrip(":").rsplit("/", 1)[-1]
        for event in report["events"]
        if event.startswith("cannot decode")
    }
    assert named == {"03.jpg", "13.jpg", "23.jpg", "33.jpg"}
    assert report["counted"][-1] >= 4  # ranks count for themselves


def test_options_keep_the_losses(by_ranks):
    report = by_ranks[1]["options"]
    plain = report["plain"]
    assert report["graphs"] > 0  # something was compiled
    assert report["checkpointed"] == plain
    for name in ("compiled", "fp32", "bf16 reduction", "one pass", "accumulated"):
        assert report[name] == pytest.approx(plain, rel=1e-3), name
    assert report["fp32"] != plain
    assert report["bf16 reduction"] != plain
    assert len(report["clipped"]) == STEPS
    assert min(report["clipped"]) > 0.1  # the norm is logged before clipping
    assert len(report["replayed"]) >= STEPS
    assert min(report["replayed"]) < report["replayed"][0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_online_accuracy_is_the_same_whole_or_sharded_and_disturbs_nothing(by_ranks, ranks):
    stages, report = by_ranks[ranks]["stages"], by_ranks[ranks]["knn"]
    (whole, losses), (sharded, sharded_losses) = report["0"], report["3"]
    assert len(whole) == 2
    assert all(0.05 < accuracy < 0.6 for accuracy in whole)
    assert sharded == pytest.approx(whole, abs=0.003)
    assert losses == stages["0"]["losses"]  # evaluating draws no random number and leaves no trace
    assert sharded_losses == stages["3"]["losses"]
