"""What the guard takes for trouble, what it takes for noise, and what follows."""

import json
import math

import guarding
import numpy as np
import pytest
import torch
import training
from guarding import COLLAPSE, SPIKE, STEPS
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.engine.data import DataConfig, build_loader, open_source
from vitrail.engine.data.order import Order, permutation
from vitrail.engine.evaluate.knn import evenly
from vitrail.engine.evaluate.rank import rankme
from vitrail.engine.methods.base import Schedule
from vitrail.engine.show.pictures import draw_curves, read_alarms
from vitrail.engine.train import ConfigError, GuardConfig, TrainingError
from vitrail.engine.train.ds import Step
from vitrail.engine.train.guard import QUIET, Alarm, Guard
from vitrail.engine.train.spikes import LEAST_SIGMA, SpikeDetector, is_dip

# --- spikes ---------------------------------------------------------------------------------------------------------


def detector(**changes):
    return SpikeDetector(**{"window": 200, "history": 20, "deviations": 6.0, "ratio": 3.0, **changes})


def found(norms, **changes):
    """Places of the spikes in a series."""
    judge = detector(**changes)
    return [place for place, norm in enumerate(norms) if judge.add(float(norm)) is not None]


def noise(steps, sigma=0.3, seed=0):
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps))


def test_a_spike_in_noise_is_found_and_noise_is_not():
    norms = noise(3000)
    assert found(norms) == []
    norms[[50, 1500]] *= 20
    assert found(norms) == [50, 1500]


def test_a_spike_is_described():
    judge = detector()
    for norm in noise(100, sigma=0.1):
        judge.add(float(norm))
    spike = judge.add(50.0)
    assert spike.value == 50.0
    assert spike.median == pytest.approx(1.0, rel=0.1)
    assert spike.deviations == pytest.approx(math.log(50 / spike.median) / 0.1, rel=0.3)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_slow_drift_is_no_spike(direction):
    """By a factor of a hundred in both directions."""
    assert found(noise(3000, sigma=0.2) * np.logspace(0, 2 * direction, 3000)) == []


def test_a_change_of_level_is_learned():
    norms = noise(1500, sigma=0.1)
    norms[500:] *= 10
    norms[1400] *= 10
    places = found(norms)
    assert places[0] == 500
    assert max(place for place in places if place != 1400) < 500 + 2 * 200
    assert 1400 in places  # it is the measure of what follows


def test_heavy_tails_are_mostly_noise():
    """Student's t with four degrees of freedom lies outside six deviations every 500 steps; a factor of 3 is rarer."""
    norms = np.exp(0.1 * np.random.default_rng(1).standard_t(4, 5000))
    assert len(found(norms)) <= 3
    assert len(found(norms, ratio=1.0)) > 8


def test_both_limits_must_be_passed():
    quiet, loud = noise(200, sigma=1e-4), noise(200, sigma=1.0)
    assert found([*quiet, 2.0]) == []  # thousands of deviations, but not three times the median
    assert found([*loud, 20.0]) == []  # twenty times the median, but three deviations
    assert found([*quiet, 4.0]) == [200]
    assert found([*loud, 2000.0]) == [200]


def test_too_few_steps_say_nothing():
    assert found([1.0] * 19 + [1e6]) == []
    assert found([1.0] * 20 + [1e6]) == [20]


def test_spikes_do_not_hide_the_next():
    norms = noise(400, sigma=0.1)
    norms[100:200:10] = 1e6
    norms[210] = 5.0
    assert found(norms) == [*range(100, 200, 10), 210]
    judge = detector()
    for norm in norms:
        judge.add(float(norm))
    assert math.log(3) - 0.1 < max(judge.state) < math.log(3) + 0.1  # what would just have been none


def test_a_gradient_of_zero_is_passed_over():
    assert found([0.0] * 50 + [1.0] * 20 + [0.0, 10.0]) == [71]


@settings(deadline=None, max_examples=50)
@given(
    logs=st.lists(st.floats(-3, 3), min_size=25, max_size=60),
    scale=st.floats(1e-6, 1e6),
)
def test_the_scale_of_norms_does_not_matter(logs, scale):
    norms = np.exp(np.round(logs, 2))
    changes = {"ratio": 2.9997, "deviations": 2.0003}  # no rounded value lies on a limit
    assert found(norms * scale, **changes) == found(norms, **changes)


# --- dips -----------------------------------------------------------------------------------------------------------


def test_a_dip_is_larger_than_the_limit_and_than_chance():
    assert is_dip(0.60, 0.70, images=50_000, drop=0.02)
    assert not is_dip(0.685, 0.70, images=50_000, drop=0.02)  # 5 deviations, but too small to matter
    assert not is_dip(0.60, 0.70, images=100, drop=0.02)  # 3 deviations are 20 points
    # the limit of chance, by hand: 3 x (sqrt(0.7 x 0.3 / 1000) + sqrt(0.61 x 0.39 / 1000)) = 0.0897
    assert not is_dip(0.6105, 0.70, images=1000, drop=0.02)
    assert is_dip(0.6095, 0.70, images=1000, drop=0.02)
    assert is_dip(0.9, 1.0, images=1000, drop=0.02)


def guard(chance=None, images=1000, **changes):
    return Guard(
        GuardConfig(**changes), device=torch.device("cpu"), world=1, warmup_epochs=1, chance=chance, images=images
    )


def evaluate(watch, step, knn, rankme=100.0, epoch=10.0):
    return watch.after_evaluation(step, epoch, {"knn": knn, "rankme": rankme})


def test_binomial_noise_is_no_dip_and_a_dip_is_told_with_the_last_good_step():
    watch, random = guard(dip="rollback"), np.random.default_rng(0)
    for step in range(100):
        assert evaluate(watch, step, random.binomial(1000, 0.6) / 1000) == []
    best = watch.state()["memory"]["best"]
    assert 0.6 < best < 0.65
    (alarm,) = evaluate(watch, 100, 0.5)
    assert (alarm.kind, alarm.action, alarm.step, alarm.before) == ("dip", "rollback", 100, 99)
    assert alarm.values["knn"] == pytest.approx(0.5)
    assert alarm.values["best"] == best
    assert evaluate(watch, 101, 0.5)[0].before == 99  # an evaluation with an alarm is none to go back to
    assert evaluate(watch, 102, 0.6) == []
    assert evaluate(watch, 103, 0.5)[0].before == 102


# --- collapse -------------------------------------------------------------------------------------------------------


def log(watch, losses, *, epoch=2.0, **values):
    """The alarms of some logging intervals of ten steps, by number of the interval."""
    alarms = {}
    for number, loss in enumerate(losses):
        for alarm in watch.after_logging(10 * (number + 1), epoch, {"loss": loss, **values}):
            alarms[number] = alarm
    return alarms


def test_a_loss_of_chance_is_a_collapse_after_some_intervals():
    chance = math.log(255)
    alarms = log(guard(chance=chance, intervals=3, collapse="stop"), [5.0, 3.0, *[chance * 1.009] * 9])
    assert list(alarms) == [4]  # once
    alarm = alarms[4]
    assert (alarm.kind, alarm.action, alarm.step, alarm.before) == ("collapse", "stop", 50, 20)
    assert alarm.values["chance_loss"] == chance


def test_what_is_no_collapse():
    chance = math.log(255)
    assert log(guard(chance=None, intervals=3), [chance] * 9) == {}
    assert log(guard(chance=chance, intervals=3), [chance] * 9, epoch=1.0) == {}  # it warms up
    assert log(guard(chance=chance, intervals=3), [chance, chance, 3.0] * 4) == {}
    assert log(guard(chance=chance, intervals=3), [chance * 0.98] * 9) == {}
    assert log(guard(chance=chance, intervals=3, enabled=False), [chance] * 9) == {}


def test_a_chance_of_zero_or_below_is_watched_too():
    assert list(log(guard(chance=-1.0, intervals=2), [-0.995] * 3)) == [1]
    assert list(log(guard(chance=0.0, intervals=2), [0.005] * 3)) == [1]
    assert log(guard(chance=0.0, intervals=2), [0.02] * 3) == {}


def test_embeddings_that_are_all_alike_are_a_collapse():
    assert log(guard(intervals=3), [1.0] * 9, feature_std=0.06) == {}
    alarms = log(guard(intervals=3), [1.0] * 9, feature_std=0.04)
    assert list(alarms) == [2]
    assert alarms[2].values == {"feature_std": 0.04}


def test_a_rank_of_one_is_a_collapse_after_the_warm_up():
    watch = guard(collapse="rollback")
    assert evaluate(watch, 10, 0.2, rankme=1.1, epoch=0.5) == []
    assert evaluate(watch, 20, 0.3, rankme=2.1) == []
    for rank in (1.9, math.nan):
        (alarm,) = evaluate(watch, 30, 0.3, rankme=rank)
        assert (alarm.kind, alarm.action, alarm.before) == ("collapse", "rollback", 20)


def test_rankme_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for rank in (1, 5, 64):
        assert rankme(basis[:, :rank] @ basis[:rank]) == pytest.approx(rank, rel=2e-4)
    assert rankme(torch.ones(100, 8)) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.zeros(100, 8)) == pytest.approx(1.0, abs=1e-4)
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # entropy of 1/2, 1/4, 1/8, 1/8: 1.75 bits
    assert rankme(basis[:, :4] * weights @ basis[:4]) == pytest.approx(2**1.75, rel=1e-4)
    assert math.isnan(rankme(torch.full((4, 4), math.inf)))


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rankme_equals_a_singular_value_decomposition(shape, dtype):
    decay = torch.logspace(0, -5, shape[1])
    features = ((torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1) * decay).to(dtype)
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    expected = math.exp(-(p * np.log(p)).sum())
    assert rankme(features) == pytest.approx(expected, rel=1e-6)
    assert rankme(features.double() * 1000) == pytest.approx(expected, rel=1e-6)


def test_rows_for_the_rank_are_spread_over_the_bank():
    vectors = torch.arange(10)[:, None]
    assert evenly(vectors, 4).flatten().tolist() == [0, 2, 5, 7]
    assert evenly(vectors, 10) is vectors


# --- what the guard remembers and asks for --------------------------------------------------------------------------


def steps(watch, norms, start=1):
    """Show the guard applied steps, all norms of the first layer being half of the others."""
    for step, norm in enumerate(norms, start):
        watch.observe(step, Step(True, False, torch.tensor(norm), torch.tensor(norm / 2)))


def test_neighbouring_spikes_are_told_once():
    watch = guard(spike="rollback")
    steps(watch, [1.0] * 50 + [10.0, 20.0, 1.0, 10.0] + [1.0] * 20 + [10.0])
    first, over, second = watch.review(75, read=True)
    assert (first.step, first.before, first.action) == (51, 50, "rollback")
    assert first.values == {
        "signal": "gradient_norm",
        "value": 10.0,
        "median": 1.0,
        "deviations": pytest.approx(math.log(10) / LEAST_SIGMA),
    }
    assert (over.action, over.step) == ("over", 54 + QUIET + 1)
    assert over.values == {"first": 51, "last": 54, "count": 3, "largest_ratio": pytest.approx(20.0)}
    assert (second.step, second.action) == (75, "rollback")
    assert watch.review(75, read=True) == []


def test_a_spike_of_the_first_layer_alone_is_told():
    watch = guard()
    steps(watch, [1.0] * 50)
    watch.observe(51, Step(True, False, torch.tensor(1.1), torch.tensor(5.0)))
    (alarm,) = watch.review(51, read=True)
    assert alarm.values["signal"] == "first_layer_gradient_norm"
    assert "first layer gradient norm 5, median 0.5" in alarm.message


def test_norms_stay_on_the_device_until_they_are_asked_for(monkeypatch):
    watch, read = guard(), []
    monkeypatch.setattr(watch, "_read", lambda rows: read.append(len(rows)) or [[1.0, 1.0]] * len(rows))
    steps(watch, [1.0] * 7)
    assert watch.judge is None
    assert watch.review(7, read=False) == []
    assert read == []
    watch.review(7, read=True)
    assert read == [7]


def test_the_judge_holds_back_spikes_and_reads_at_once():
    watch = guard(spike="skip")
    one, ten = torch.tensor(1.0), torch.tensor(10.0)
    for step in range(1, 51):
        assert not watch.judge(one, one)
        watch.observe(step, Step(True, False, one, one))
    assert watch.judge(one, ten)
    watch.observe(51, Step(False, True, one, ten))
    (alarm,) = watch.review(51, read=False)
    assert (alarm.action, alarm.step, alarm.values["signal"]) == ("skip", 51, "first_layer_gradient_norm")
    watch.observe(52, Step(False, False, math.inf, None))  # the judge is not asked about a step that is not finite
    assert watch.state()["memory"]["row"][2] == 1


def test_a_step_that_is_not_finite_stays_out_of_the_window():
    watch = guard()
    steps(watch, [1.0] * 50)
    watch.observe(51, Step(False, False, math.inf, torch.tensor(math.nan)))
    steps(watch, [1.0], start=52)
    assert watch.review(52, read=True) == []
    assert len(watch.state()["windows"]["gradient_norm"]) == 51


def test_a_memory_survives_a_checkpoint():
    first, second = guard(chance=5.0), guard(chance=5.0)
    steps(first, [1.0] * 50 + [10.0])
    first.review(51, read=True)
    evaluate(first, 51, 0.6)
    log(first, [5.0] * 9)
    second.load(json.loads(json.dumps(first.state())))
    for watch in (first, second):
        steps(watch, [10.0, *[1.0] * 20, 10.0], start=52)
        over, again = watch.review(73, read=True)
        assert over.values["count"] == 2
        assert again.step == 73
        assert evaluate(watch, 73, 0.4)[0].before == 51
        assert list(log(watch, [5.0])) == [0]  # the tenth interval
    second.load({})
    steps(second, [10.0], start=74)
    assert second.review(74, read=True) == []


def test_policies_that_make_no_sense_are_refused():
    for kind, policy, why in (
        ("dip", "skip", "no single step"),
        ("collapse", "skip", "no single step"),
        ("nonfinite", "warn", "never applied"),
        ("spike", "panic", "no such policy"),
    ):
        with pytest.raises(ConfigError, match=rf"guard\.{kind} {policy} is not possible: .*{why}.*, pass .* or stop"):
            guard(**{kind: policy})


def test_a_disabled_guard_looks_at_nothing():
    watch = guard(enabled=False, spike="skip")
    steps(watch, [1.0] * 50 + [100.0])
    assert watch.judge is None
    assert watch.review(51, read=True) == []
    assert evaluate(watch, 1, 0.9) + evaluate(watch, 2, 0.1, rankme=1.0) == []


def test_the_verdict_on_several_alarms():
    watch = guard(max_rollbacks=2)
    warn, late, early, stop = (
        Alarm("spike", 9, "warned", "warn", before=1),
        Alarm("dip", 9, "late", "rollback", before=7),
        Alarm("collapse", 9, "early", "rollback", before=5),
        Alarm("spike", 9, "stopped", "stop"),
    )
    assert watch.verdict([], rollbacks=9) is None
    assert watch.verdict([warn], rollbacks=9) is None
    assert watch.verdict([warn, late, early], rollbacks=1) is early
    with pytest.raises(TrainingError, match=r"early.*gone back 2 times"):
        watch.verdict([late, early], rollbacks=2)
    with pytest.raises(TrainingError, match="stopped"):
        watch.verdict([early, stop], rollbacks=0)


def test_many_steps_in_a_row_that_are_not_finite(tmp_path):
    lost = Step(False, False, math.inf, None)
    for policy, last in (("skip", "stop"), ("rollback", "rollback")):
        watch = guard(nonfinite=policy, max_nonfinite=3)
        actions = []
        for step in range(1, 7):
            taken = Step(True, False, torch.tensor(1.0), None) if step == 3 else lost
            watch.observe(step, taken)
            if taken is lost:
                watch.nonfinite(step, tmp_path / "file")
            actions += [(alarm.action, alarm.before) for alarm in watch.review(step, read=False)]
        assert actions == [("skip", 0), ("skip", 0), ("skip", 3), ("skip", 3), (last, 3)]
    watch = guard(nonfinite="stop")
    watch.nonfinite(1, tmp_path / "file")
    assert [alarm.action for alarm in watch.review(1, read=False)] == ["stop"]


# --- trained on two ranks -------------------------------------------------------------------------------------------

launched = [pytest.mark.launch, pytest.mark.slow]
STAGES = "0123"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return training.run_case("everything", tmp_path_factory.mktemp("guard"), ranks=2, script=guarding.__file__)


def alarms(run):
    return [(line["alarm"], line["action"], line["step"]) for line in run["lines"] if "alarm" in line]


def logged(run, name):
    return [line[name] for line in run["lines"] if line["kind"] == "train"]


def first_layer_norms(steps):
    """Norms of the first layer's gradient, computed by plain PyTorch, of steps on the initial weights."""
    config = guarding.troubled_config("unused", guard={}, trouble={})
    torch.manual_seed(config.train.seed)
    method = config.method.build()
    loader = build_loader(
        open_source(config.data, "train"),
        method.views(),
        micro_batch=16,
        accumulation=1,
        rank=0,
        world=1,
        seed=config.train.seed,
        device="cpu",
        config=config.data,
    )
    norms = []
    for step, batch in zip(range(steps), loader, strict=False):
        method.zero_grad()
        schedule = Schedule(
            step=step, total_steps=STEPS, epoch=0.0, seed=config.train.seed, first_row=0, global_rows=16
        )
        loss, _ = super(guarding.Troubled, method).forward(batch, schedule)
        loss.backward()
        norms.append(torch.stack([p.grad.square().sum() for p in method.first_layer()]).sum().sqrt().item())
    loader.close()
    return norms


class TestLaunched:
    pytestmark = launched

    def test_the_first_layers_norm_is_that_of_plain_pytorch_under_every_stage(self, runs):
        """The first step has a learning rate of zero, so the second has the initial weights too."""
        expected = first_layer_norms(2)
        norms = {stage: logged(runs[f"skip{stage}"], "first_layer_gradient_norm") for stage in STAGES}
        for stage in STAGES:
            assert len(norms[stage]) == STEPS
            assert norms[stage][:2] == pytest.approx(expected, rel=1e-4)
            assert norms[stage] == pytest.approx(norms["0"], rel=1e-3)
            whole = logged(runs[f"skip{stage}"], "gradient_norm")
            assert all(part < norm for part, norm in zip(norms[stage], whole, strict=True))

    def test_a_warning_changes_nothing(self, runs):
        run = runs["warn"]
        assert alarms(run) == [("spike", "warn", SPIKE + 1)]
        assert run["applied"] == [True] * STEPS
        assert run["error"] is None

    @pytest.mark.parametrize("name", ["skip0", "skip1", "skip2", "skip3", "torch"])
    def test_a_skipped_spike_leaves_every_bit(self, runs, name):
        run = runs[name]
        assert alarms(run) == [("spike", "skip", SPIKE + 1)]
        assert run["applied"] == [step != SPIKE for step in range(STEPS)]
        assert run["count"] == STEPS - 1
        digests = run["digests"]
        assert digests[str(SPIKE + 1)] == digests[str(SPIKE)]
        assert len(set(digests.values())) == STEPS - 1  # moments move at a learning rate of zero as well
        assert logged(run, "skipped") == [0] * SPIKE + [1] * (STEPS - SPIKE)
        assert logged(run, "gradient_norm")[SPIKE] > 100  # what was found, not what DeepSpeed was told

    @pytest.mark.parametrize("stage", STAGES)
    def test_going_back_restores_every_bit_and_passes_over_the_data(self, runs, stage):
        """The spike of step 5 is seen when step 6 is to be saved, before any log line; the run goes back to step 3."""
        run = runs[f"rollback{stage}"]
        assert alarms(run) == [("spike", "rollback", SPIKE + 1)]
        ((step, restored),) = run["back"]
        assert (step, restored) == (3, run["digests"]["3"])
        assert restored != run["digests"]["6"]
        assert run["batches"] == [*range(6), *range(6, 12)]  # steps 4 to 9 on batches 6 to 11
        assert run["saved"] == [6, 9]
        amended = run["amended"]
        assert (amended["step"], amended["data_shift"], amended["rollbacks"]) == (3, 3, 1)
        assert len(amended["guard"]["windows"]["gradient_norm"]) == 3
        assert len(run["final"]["guard"]["windows"]["gradient_norm"]) == STEPS  # the guard went back as well
        assert run["error"] is None
        assert run["count"] == STEPS

    def test_stopping_leaves_the_checkpoint_before(self, runs):
        run = runs["stop"]
        assert alarms(run) == [("spike", "stop", SPIKE + 1)]
        assert run["error"].startswith(f"spike at step {SPIKE + 1}: ")
        assert "\n" not in run["error"]
        assert run["saved"] == [3]
        assert len(run["batches"]) == SPIKE + 1

    def test_a_collapse_goes_back_to_where_it_was_not_yet_and_at_last_stops(self, runs):
        run = runs["collapse"]
        seen = COLLAPSE + 3
        assert alarms(run) == [("collapse", "rollback", seen)] * 2
        assert [step for step, _ in run["back"]] == [COLLAPSE]
        assert run["batches"] == [*range(seen), *range(seen, seen + 3)]
        assert "gone back 1 times" in run["error"]
        assert run["left"] == [2, 4]  # step 6, saved before the alarm, is deleted
        assert run["saved"] == [2, 4, 6]  # and there again from the second try
        assert run["amended"]["step"] == COLLAPSE
        assert run["amended"]["data_shift"] == 3

    def test_a_batch_that_is_not_finite_is_written_down(self, runs):
        run = runs["nonfinite"]
        assert alarms(run) == [("nonfinite", "skip", 3), ("nonfinite", "skip", 5), ("nonfinite", "stop", 6)]
        assert "2 such steps in a row" in run["error"]
        assert run["applied"] == [True, True, False, True, False, False]
        assert run["saved"] == []
        assert sorted(run["dumps"]) == [f"step_{step:08d}.json" for step in (3, 5, 6)]
        files = [line["file"] for line in run["lines"] if line.get("alarm") == "nonfinite"]
        assert [file.rsplit("/", 1)[1] for file in files] == sorted(run["dumps"])
        dump = run["dumps"]["step_00000003.json"]
        assert dump["step"] == 3
        assert [(part["rank"], part["micro"]) for part in dump["batches"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        source = open_source(DataConfig(source="demo"), "train")
        order = permutation(len(source), 0, 0)
        for part in dump["batches"]:
            split = Order(length=len(source), micro_batch=4, accumulation=2, rank=part["rank"], world=2, seed=0)
            expected = [int(order[place]) for place in split.positions(2, part["micro"])]
            assert part["indices"] == expected
            assert part["names"] == [source.name(index) for index in expected]
            if part["rank"] == 1:
                assert part["loss"] == "inf"
            else:
                assert 0.1 < part["loss"] < 10

    def test_alarms_are_marked_in_the_curves(self, runs, tmp_path):
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("\n".join(json.dumps(line) for line in runs["nonfinite"]["lines"]))
        assert read_alarms(metrics) == [(3, "nonfinite"), (5, "nonfinite"), (6, "nonfinite")]
        draw_curves(metrics, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 10_000
