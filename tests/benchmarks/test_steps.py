"""Whole-step benchmarks: what becomes of what their processes print."""

import importlib.util
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from bench import steps
from bench.environment import ROOT
from bench.plugin import Session
from bench.roofline import Roofline
from bench.rows import Store

CPU = torch.device("cpu")
PEER = "plain PyTorch"
LACKING = {"outcome": "out of memory", "limit": 1 << 30}


def case(rounds: dict[str, int], **changes) -> steps.StepCase:
    settings = {"op": "mae_step", "name": "tiny", "model": "small", "batch": 4, "rounds": rounds, "steps": 2, **changes}
    return steps.StepCase(**settings)


def printed(seconds: list[float], loss: float = 1.0) -> dict:
    figures = {"first_step_s": 9.0, "peak_bytes": 300, "step_bytes": 200, "flops": 8e9, "limit": 1 << 30}
    return {"loss": loss, "seconds": seconds, **figures}


@pytest.fixture
def session(tmp_path):
    """A run that measures on the CPU and writes to a folder of its own."""
    return Session(device=CPU, dry=False, resume=False, deadline=None, store=Store(tmp_path / "rows"))


@pytest.fixture
def play(monkeypatch):
    """Let processes print prepared lines, a list for each implementation, and give the machine a roofline."""

    def start(lines: dict[str, list[dict]]) -> list[tuple[str, int]]:
        started = []

        def run(case, implementation, device, caches):
            started.append((implementation, case.batch))
            return lines[implementation].pop(0)

        monkeypatch.setattr(steps, "run", run)
        return started

    monkeypatch.setattr(steps.roofline, "measured", lambda device: (Roofline(1e10, {torch.bfloat16: 1e11}), ()))
    monkeypatch.setattr(steps.peers, "absent", lambda name, device: None)
    return start


def test_ratios_are_those_of_the_rounds_in_common_and_processes_alternate(play, session):
    lines = {
        "vitrail": [printed([1.0, 2.0]), printed([4.0, 4.0])],
        "transformers": [printed([2.0, 4.0]), printed([12.0, 12.0])],
        "vitrail compiled": [printed([0.5, 0.5])],
    }
    started = play(lines)
    rows = steps.measure(case({"vitrail": 2, "transformers": 2, "vitrail compiled": 1}), session).rows
    assert [name for name, _ in started] == ["vitrail", "transformers", "vitrail compiled", "vitrail", "transformers"]
    row = rows["vitrail"]
    assert row.speed_over["transformers"][0] == pytest.approx(2.5)  # of 2, 2, 3, 3
    assert row.speed_over["vitrail compiled"][0] == pytest.approx((0.5 + 0.25) / 2)  # the first round alone
    assert row.samples == 4
    assert row.median_s == pytest.approx(3.0)
    assert row.extra["images_per_s"] == pytest.approx(4 / 3)
    assert row.roofline == pytest.approx(8e9 / 1e11 / 3)
    assert "mfu" not in row.extra


@pytest.mark.parametrize("loss", [1.002, float("nan")])
def test_losses_that_differ_make_no_rows(play, session, loss):
    play({"vitrail": [printed([1.0])], "transformers": [printed([1.0], loss)]})
    outcome = steps.measure(case({"vitrail": 1, "transformers": 1}), session)
    assert not outcome.rows
    assert outcome.failed.keys() == {"vitrail", "transformers"}
    assert "do not compute the same loss" in outcome.failed["vitrail"]


def test_an_implementation_without_memory_has_a_row_without_figures(play, session):
    started = play({"vitrail": [printed([1.0]), printed([1.0])], "transformers": [dict(LACKING)]})
    rows = steps.measure(case({"vitrail": 2, "transformers": 2}), session).rows
    assert started.count(("transformers", 4)) == 1
    row = rows["transformers"]
    assert (row.outcome, row.median_s, row.peak_bytes, row.speed_over) == ("out of memory", None, None, {})
    assert row.extra == {"limit_bytes": 1 << 30}
    assert rows["vitrail"].speed_over == {}


def test_batches_double_until_nobody_has_memory(play, session):
    sweeping = load("bench_mae_batch")
    lines = {
        "vitrail": [printed([1.0, 1.0]), printed([2.0, 2.0]), printed([4.0, 4.0]), dict(LACKING)],
        "transformers": [printed([2.0, 2.0]), dict(LACKING)],
    }
    started = play(lines)
    largest = sweeping.sweep(session)
    first = sweeping.FIRST
    assert started[:4] == [(name, batch) for batch in (first, 2 * first) for name in ("vitrail", "transformers")]
    assert started[4:] == [("vitrail", 4 * first), ("vitrail", 8 * first)]
    assert largest.rows["vitrail"].shape["batch"] == 4 * first
    assert largest.rows["transformers"].shape["batch"] == first
    written = {
        (row.implementation, row.shape["batch"] // first): row.outcome for row in session.store.read("mae_batch")
    }
    assert written == {
        **{("vitrail", step): "ok" for step in (1, 2, 4)},
        ("transformers", 1): "ok",
        ("vitrail", 8): "out of memory",
        ("transformers", 2): "out of memory",
    }
    assert all(sweeping.ended(session, name) for name in sweeping.IMPLEMENTATIONS)


def test_no_process_starts_after_the_time_is_up(play, session):
    session.deadline = 0.0
    started = play({"vitrail": [printed([1.0])], "transformers": []})
    outcome = steps.measure(case({"vitrail": 2, "transformers": 2}), session)
    assert [name for name, _ in started] == ["vitrail"]  # one at least, or nothing would ever be measured
    assert outcome.rows["vitrail"].samples == 1
    assert outcome.absent == {"transformers": "the time is up: run again to go on"}


def test_a_process_that_fails_is_quoted(monkeypatch, session, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("raise ValueError('no such thing')")
    monkeypatch.setattr(steps, "CHILD", script)
    outcome = steps.measure(case({"vitrail": 1}), session)
    assert not outcome.rows
    assert outcome.failed == {"vitrail": "RuntimeError: the process ended with status 1: ValueError: no such thing"}


def test_both_implementations_compute_the_same_first_loss():
    tiny = case({"vitrail": 1, "transformers": 1, "transformers compiled": 1}, image_size=64, mask_ratio=0.5)
    runs = {name: steps.try_out(tiny, name) for name in tiny.rounds}
    assert steps.agree([run["loss"] for run in runs.values()]), runs
    assert runs["vitrail"]["flops"] == runs["transformers"]["flops"] > 0
    assert tiny.shape["visible"] == tiny.shape["masked"] == 8


@pytest.mark.parametrize(("family", "peer"), [("moco_v3", "plain PyTorch"), ("simclr", "lightly")])
class TestJointSteps:
    def test_implementations_train_alike(self, family, peer, monkeypatch):
        """Losses of three steps in float32: the same views, models, losses, optimisers and teachers."""
        exact = partial(torch.autocast, enabled=False)
        monkeypatch.setattr(torch, "autocast", exact)
        losses, flops = {}, set()
        for name in ("vitrail", "vitrail checkpointed", peer, f"{peer}, explicit attention"):
            settings = {"model": "small", "batch": 8, "image_size": 32, "depth": 2}
            work = steps.child().Work(family=family, implementation=name, **settings)
            step, operations = steps.child().FAMILIES[family].prepare(work, CPU)
            losses[name] = [step().item() for _ in range(3)]
            flops.add(operations)
        assert losses[peer] == pytest.approx(losses["vitrail"], rel=1e-4)
        assert losses[f"{peer}, explicit attention"] == pytest.approx(losses["vitrail"], rel=1e-4)
        assert losses["vitrail checkpointed"] == pytest.approx(losses["vitrail"], rel=1e-6)
        assert losses["vitrail"][2] < losses["vitrail"][0]
        assert len(flops) == 1

    def test_dry_runs_agree(self, family, peer):
        tiny = case({}, family=family)
        runs = {name: steps.try_out(tiny, name) for name in ("vitrail", peer)}
        assert steps.agree([run["loss"] for run in runs.values()]), runs
        assert tiny.shape == {"batch": 4, "image": 224, "patch": 16, "views": 2}

    def test_cases_name_what_there_is(self, family, peer):
        module = steps.child().FAMILIES[family]
        known = set(module.IMPLEMENTATIONS[family])
        file = load(f"bench_{family}_step")
        for kind in ("cpu", "cuda"):
            for one in file.cases(kind):
                assert one.model in module.MODELS
                assert {"vitrail", peer} < {*one.rounds} < known

    def test_who_lacks_timm_measures_ours_alone(self, family, peer, monkeypatch, session):
        monkeypatch.setattr(steps.peers, "_importable", lambda module: module != "timm")
        monkeypatch.setattr(steps, "run", lambda *arguments: printed([1.0]))
        outcome = steps.Outcome()
        runs = steps.collect(case({"vitrail": 1, peer: 1}, family=family), session, outcome)
        assert list(runs) == ["vitrail"]
        assert outcome.absent == {peer: "timm is not installed: pip install timm"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", steps.MULTI_CROP)
class TestCropSteps:
    def test_implementations_train_alike(self, family, monkeypatch):
        """Losses of steps in float32: the same crops, networks, losses, centres, optimisers and teachers."""
        monkeypatch.setattr(torch, "autocast", partial(torch.autocast, enabled=False))
        crop_steps = steps.child().FAMILIES[family]
        monkeypatch.setattr(crop_steps, "CLIP", 0.02)  # some gradients are longer, others are not
        losses, flops = {}, set()
        checkpointed = ["vitrail checkpointed"] if family == "dino" else []
        for name in ("vitrail", *checkpointed, PEER, f"{PEER}, explicit attention"):
            sizes = {"batch": 2, "image_size": 64, "local_size": 32, "depth": 2, "prototypes": 512}
            work = steps.child().Work(family=family, implementation=name, model="tiny", **sizes)
            step, operations = crop_steps.prepare(work, CPU)
            losses[name] = [step().item() for _ in range(2)]
            flops.add(operations)
        for others in losses.values():
            assert others == pytest.approx(losses["vitrail"], rel=2e-6)
        assert losses["vitrail"][1] < losses["vitrail"][0]
        assert len(flops) == 1

    def test_dry_runs_agree(self, family):
        tiny = case({}, family=family)
        runs = {name: steps.try_out(tiny, name) for name in ("vitrail", PEER)}
        assert steps.agree([run["loss"] for run in runs.values()]), runs

    def test_cases_name_what_there_is_and_say_its_sizes(self, family):
        module = steps.child().FAMILIES[family]
        for one in (one for kind in ("cpu", "cuda") for one in load(f"bench_{family}_step").cases(kind)):
            assert {"vitrail", PEER} < {*one.rounds} <= {*module.IMPLEMENTATIONS[family]}
            work = steps.child().Work(family=family, implementation="vitrail", model=one.model, batch=one.batch)
            with torch.device("meta"):
                config = module.build(work).config
            said = {"patch": config.encoder.patch_size, "image": config.encoder.image_size}
            said |= {"crops": config.local_crops, "crop_image": config.local_size, "prototypes": config.prototypes}
            assert one.shape == {"batch": one.batch, "views": 2, **said}


class TestSiTSteps:
    def test_implementations_train_alike(self, monkeypatch):
        """Losses of steps in float32 on the same corrupted views, which the loader's work then takes the place of."""
        monkeypatch.setattr(torch, "autocast", partial(torch.autocast, enabled=False))
        sit_steps = steps.child().FAMILIES["sit"]
        joint_steps = sys.modules[sit_steps.trainers_step.__module__]
        first = joint_steps.schedule
        monkeypatch.setattr(joint_steps, "schedule", lambda step, rows: first(0, rows))
        losses, flops = {}, set()
        for name in ("vitrail", PEER, f"{PEER}, explicit attention, corrupting"):
            sizes = {"batch": 8, "image_size": 64, "depth": 2}
            work = steps.child().Work(family="sit", implementation=name, model="small", **sizes)
            step, operations = sit_steps.prepare(work, CPU)
            losses[name] = [step().item() for _ in range(3)]
            flops.add(operations)
        corrupting = losses.pop(f"{PEER}, explicit attention, corrupting")
        for others in losses.values():
            assert others == pytest.approx(losses["vitrail"], rel=2e-5)
        assert losses["vitrail"][2] < losses["vitrail"][0] == pytest.approx(corrupting[0], rel=2e-6)
        assert abs(corrupting[1] - losses["vitrail"][1]) > 0.1
        assert len(flops) == 1

    def test_the_loader_places_as_many_rectangles(self):
        """As test_corruption.py counts, though this code shares nothing with ours."""
        sit_steps = steps.child().FAMILIES["sit"]
        images = torch.rand(60, 3, 224, 224)
        corrupted, mask = sit_steps.corrupt_batch(images, sit_steps.Corruption(align=16))
        shares = mask.mean((1, 2, 3))
        kept, replaced = shares[shares > 0.45], shares[shares < 0.45]
        assert kept.mean().item() == pytest.approx(0.511, abs=0.01)
        assert replaced.mean().item() == pytest.approx(0.315, abs=0.01)
        assert torch.equal(corrupted[mask == 0], images[mask == 0])

    def test_dry_runs_agree(self):
        tiny = case({}, family="sit")
        runs = {name: steps.try_out(tiny, name) for name in ("vitrail", PEER)}
        assert steps.agree([run["loss"] for run in runs.values()]), runs
        assert tiny.shape == {"batch": 4, "image": 224, "patch": 16, "views": 2}

    def test_cases_name_what_there_is(self):
        module = steps.child().FAMILIES["sit"]
        for one in (one for kind in ("cpu", "cuda") for one in load("bench_sit_step").cases(kind)):
            assert one.model in module.MODELS
            assert {"vitrail", PEER} < {*one.rounds} <= {*module.IMPLEMENTATIONS["sit"]}


def test_a_child_refuses_who_is_not_of_the_family(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["child.py", "lightly", "--family", "moco_v3"])
    with pytest.raises(SystemExit):
        steps.child().main()
    assert "moco_v3 has ('vitrail', 'vitrail checkpointed', 'plain PyTorch', " in capsys.readouterr().err


def test_a_process_that_lacks_memory_says_so(tmp_path):
    run = steps.run(case({}, batch=8192, limit=1600 << 20), "vitrail", CPU, tmp_path)
    assert run == {"outcome": "out of memory", "limit": 1600 << 20}


@pytest.mark.slow
def test_a_process_prints_its_figures(tmp_path):
    run = steps.run(case({}, batch=2, image_size=32), "vitrail", CPU, tmp_path)
    assert len(run["seconds"]) == 2
    assert min(run["seconds"]) > 0
    assert run["peak_bytes"] > run["step_bytes"] > 3 * 4 * 40e6  # gradients and two moments of more than 40 M weights
    assert run["loss"] == pytest.approx(1.2, abs=0.3)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    exhausted = steps.child().exhausted
    assert exhausted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert exhausted(MemoryError())
    assert exhausted(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not exhausted(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_steps_need_neither_the_launcher_nor_the_loader():
    program = f"""
import sys

for name in ("tyro", "deepspeed", "nvidia", "nvidia.dali", "lightly", "tensorboard", "sklearn"):
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, {str(steps.CHILD.parent)!r})
import child

for module in child.FAMILIES.values():
    module.load()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "steps" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
