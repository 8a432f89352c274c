"""The core of the benchmark harness: rows, ratios, checks against the truth, peers, the roofline."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from bench import Case, environment, measure, peers, roofline
from bench.case import _upstream, bind
from bench.plugin import Session, conclude
from bench.roofline import Roofline
from bench.rows import Row, Store, quantiles, ratios
from rows_for_figures import cpu_rows

CPU = torch.device("cpu")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_survives_json():
    for row in cpu_rows():
        assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_absent_figures_are_not_written():
    row = next(row for row in cpu_rows() if row.outcome != "ok")
    assert not {"median_s", "peak_bytes", "speed_over", "absent", "timer"} & row.to_json().keys()
    assert row.to_json()["outcome"] == "out of memory"


def test_an_unknown_field_is_an_error():
    with pytest.raises(ValueError, match=r"unknown fields \['median_ms'\] in a row; .*: measure again"):
        Row.from_json({**cpu_rows()[0].to_json(), "median_ms": 1.0})


def test_a_missing_field_is_an_error():
    values = cpu_rows()[0].to_json()
    del values["direction"]
    with pytest.raises(ValueError, match=r"incomplete row: .*direction"):
        Row.from_json(values)


def test_a_row_without_an_environment_does_not_get_this_machines():
    values = cpu_rows()[0].to_json()
    del values["environment"], values["date"]
    assert (Row.from_json(values).environment, Row.from_json(values).date) == ({}, "")


def test_the_key_holds_what_tells_rows_apart():
    row = cpu_rows()[0]
    told = {"op", "case", "implementation", "dtype", "direction", "cache"}
    for field in fields(Row):
        other = replace(row, **{field.name: "another"})
        assert (other.key != row.key) == (field.name in told), field.name


# --- the store -------------------------------------------------------------------------------------------------------


def test_rows_are_merged_by_key_into_a_file_for_each_op(tmp_path):
    gather = [row for row in cpu_rows() if row.op == "gather"]
    store = Store(tmp_path)
    store.put(cpu_rows())
    assert {path.stem for path in tmp_path.iterdir()} == {row.op for row in cpu_rows()}
    store.put([replace(gather[1], median_s=7.0), replace(gather[1], cache="cold")])
    assert store.read("gather") == [
        gather[0],
        replace(gather[1], median_s=7.0),
        *gather[2:],
        replace(gather[1], cache="cold"),
    ]
    assert store.read("loss") == [row for row in cpu_rows() if row.op == "loss"]
    assert store.read("nothing") == []


def test_a_file_is_complete_at_any_moment(tmp_path, monkeypatch):
    store, rows = Store(tmp_path), [row for row in cpu_rows() if row.op == "gather"]
    store.put(rows[:3])

    def stop(source, target):
        assert len(json.loads(Path(source).read_text())) == len(rows)
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="power cut"):
        store.put(rows)
    monkeypatch.undo()
    assert store.read_all() == rows[:3]  # what was being written is not taken for rows


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    (tmp_path / "gather.json").write_text('[{"op": "gather", "img_per_s": 3}]')
    with pytest.raises(ValueError, match=r"gather\.json: unknown fields \['img_per_s'\]"):
        Store(tmp_path).read_all()


def test_has_wants_a_row_of_this_machine_and_code(tmp_path):
    row = replace(cpu_rows()[0], environment=environment.describe())
    missing = replace(row, cache="cold")
    store = Store(tmp_path)
    store.put([row])
    assert store.has([row.key])
    assert store.has([])
    assert not store.has([row.key, missing.key])


@pytest.mark.parametrize("name", ["device", "torch", "triton", "code", "threads"])
def test_has_does_not_take_another_machines_row(tmp_path, name):
    row = replace(cpu_rows()[0], environment={**environment.describe(), name: "another"})
    store = Store(tmp_path)
    store.put([row])
    assert not store.has([row.key])


# --- statistics ------------------------------------------------------------------------------------------------------


def test_quantiles_of_known_numbers():
    assert quantiles([6.0, 1.0, 3.0, 4.0, 2.0, 5.0]) == (3.5, [2.0, 5.0])
    assert quantiles([7.0]) == (7.0, [7.0, 7.0])


def test_ratios_are_taken_within_rounds():
    # The machine slows down tenfold in the last round; the ratio of the medians would be 1.
    found = ratios({"ours": [1.0, 4.0, 40.0], "theirs": [2.0, 4.0, 120.0]})
    assert found == {
        "ours": {"theirs": [2.0, pytest.approx(1.4), pytest.approx(2.6)]},
        "theirs": {"ours": [0.5, pytest.approx(0.4), pytest.approx(0.8)]},
    }


def test_ratios_want_as_many_samples_of_each():
    with pytest.raises(ValueError, match="shorter"):
        ratios({"ours": [1.0, 2.0], "theirs": [1.0]})


# --- against the truth -----------------------------------------------------------------------------------------------

TRUTH = (torch.linspace(1, 2, 1000, dtype=torch.float64), torch.arange(300))


def results_with(index: int, value: torch.Tensor) -> list[torch.Tensor]:
    return [value if place == index else tensor for place, tensor in enumerate(TRUTH)]


def spoiled(value: float) -> torch.Tensor:
    """The floating truth with one element off."""
    tensor = TRUTH[0].clone()
    tensor[500] = value
    return tensor


def test_what_rounding_explains_is_right():
    assert measure.difference(TRUTH, TRUTH, 0.0) is None
    assert measure.difference(results_with(0, TRUTH[0].bfloat16()), TRUTH, 2**-7) is None
    assert measure.difference(results_with(1, TRUTH[1].int()), TRUTH, 0.0) is None


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (results_with(0, spoiled(float("nan"))), "result 0 is off by nan"),
        (results_with(0, spoiled(float("inf"))), "result 0 is off by"),
        (results_with(0, spoiled(1.7)), "result 0 is off by"),  # 0.2 of one in a thousand elements
        (results_with(0, 1.02 * TRUTH[0]), "result 0 is off by"),
        (results_with(0, TRUTH[0][None]), r"result 0 has shape \[1, 1000\], expected \[1000\]"),
        (results_with(0, TRUTH[0].long()), "result 0 differs"),
        (results_with(1, TRUTH[1].flip(0)), "result 1 differs"),
        (results_with(1, TRUTH[1].to(torch.uint8)), "result 1 differs"),  # 256 has become 0
        (TRUTH[:1], "returns 1 tensors, expected 2"),
    ],
    ids=["NaN", "infinity", "one element", "all elements", "shape", "truncated", "integers", "overflow", "count"],
)
def test_what_is_wrong_is_said(got, said):
    with pytest.raises(AssertionError, match=said):
        assert measure.difference(got, TRUTH, 2**-7) is None, measure.difference(got, TRUTH, 2**-7)


def test_zeros_may_not_become_noise():
    assert measure.difference([torch.full((3,), 1e-6)], [torch.zeros(3)], 1e-5) is not None
    assert measure.difference([torch.zeros(3)], [torch.zeros(3)], 1e-5) is None


# --- cases -----------------------------------------------------------------------------------------------------------


def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


def example(**implementations) -> Case:
    return Case(
        op="triple",
        name="small",
        shape={"n": 64},
        dtype=torch.float32,
        inputs=lambda device: {"x": torch.randn(64, device=device)},
        truth=triple,
        implementations={name.replace("_", " "): (lambda f=f: f) for name, f in implementations.items()},
        bytes={"forward": 512, "forward+backward": 1024},
        flops={},
        differentiable=("x",),
    )


def crashing(x):
    raise ZeroDivisionError("by a peer")


def declining(x):
    raise NotImplementedError("not for 64\nand more of this")


def test_a_faulty_implementation_has_no_row_but_the_others_do(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", {"cpu": 0.01})
    monkeypatch.setattr(roofline, "measured", lambda device: (Roofline(1e9, {}), ()))
    case = example(vitrail=triple, eager=lambda x: 3.01 * x, timm=crashing, torch_loop=declining, compiled=triple)
    outcome = measure.measure(case, "forward", "hot", "kernels", CPU)
    assert outcome.failed.keys() == {"eager", "timm"}
    assert outcome.failed["eager"].startswith("result 0 is off by 0.003")
    assert outcome.failed["timm"] == "ZeroDivisionError: by a peer"
    assert outcome.absent == {"torch loop": "not for 64"}
    assert outcome.rows.keys() == outcome.samples.keys() == {"vitrail", "compiled"}
    for name, other in (("vitrail", "compiled"), ("compiled", "vitrail")):
        row = outcome.rows[name]
        assert row.speed_over.keys() == {other}
        assert row.absent == outcome.absent
        assert row.gb_per_s == pytest.approx(512 / row.median_s / 1e9)
        assert row.roofline == pytest.approx(512 / 1e9 / row.median_s)


def test_a_wrong_gradient_has_no_row():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    case = example(vitrail=triple, eager=Wrong.apply, timm=lambda x: 3 * x.detach())
    outcome, functions = measure.prepare(case, "forward+backward", CPU)
    assert list(functions) == ["vitrail"]
    assert outcome.failed.keys() == {"eager", "timm"}
    assert list(measure.prepare(case, "forward", CPU)[1]) == ["vitrail", "eager", "timm"]


def test_checks_do_not_share_inputs():
    case = example(vitrail=lambda x: x.mul_(3), eager=lambda x: x.mul_(3), compiled=triple)
    outcome, functions = measure.prepare(case, "forward", CPU)
    assert (outcome.failed, list(functions)) == ({}, ["vitrail", "eager", "compiled"])


def test_ours_may_not_decline():
    with pytest.raises(NotImplementedError, match="not for 64"):
        measure.prepare(example(vitrail=declining), "forward", CPU)


def test_an_absent_peer_is_not_built_and_leaves_its_reason(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "timm", peers.Peer("no_such_module", "pip install no-such-module"))
    case = example(vitrail=triple, timm=crashing, xformers=crashing)
    outcome, functions = measure.prepare(case, "forward", CPU)
    assert list(functions) == ["vitrail"]
    assert outcome.failed == {}
    assert outcome.absent["timm"] == "no_such_module is not installed: pip install no-such-module"
    assert outcome.absent.keys() == {"timm", "xformers"}


def test_a_peer_of_a_gpu_is_absent_on_a_cpu():
    gpu_only = replace(peers.PEERS["xformers"], package="torch")
    assert gpu_only.device(CPU) == "runs on CUDA only"
    assert gpu_only.device(torch.device("cuda")) is None


def test_a_compiled_peer_needs_what_the_peer_needs(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "timm", peers.Peer("no_such_module", "somehow"))
    assert peers.absent("timm compiled", CPU) == peers.absent("timm", CPU) == "no_such_module is not installed: somehow"
    assert peers.absent("vitrail compiled", CPU) is None


def test_an_unknown_peer_is_an_error():
    with pytest.raises(KeyError, match="no implementation called 'tim'"):
        measure.prepare(example(vitrail=triple, tim=triple), "forward", CPU)


# --- binding ---------------------------------------------------------------------------------------------------------


def test_forward_computes_no_gradient():
    weight = torch.randn(64, requires_grad=True)
    output = bind(example(), "forward", lambda x: x * weight, {"x": torch.randn(64)})()
    assert not output.requires_grad
    assert output.grad_fn is None


@pytest.mark.parametrize("function", [lambda x: x.square(), lambda x: x.square().sum()], ids=["tensor", "scalar"])
def test_forward_and_backward_gives_autograds_gradients(function):
    x = torch.randn(64, dtype=torch.float64)
    call = bind(example(), "forward+backward", function, {"x": x})
    leaf = x.clone().requires_grad_()
    expected = function(leaf)
    expected.backward(_upstream(expected))
    for _ in range(2):  # gradients do not pile up from call to call
        (output,), (gradient,) = call()
        assert torch.equal(output, expected)
        assert torch.equal(gradient, leaf.grad)
        assert not output.requires_grad
    assert torch.count_nonzero(gradient)
    assert not x.requires_grad


# --- the roofline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "flops", "floor"),
    [
        (10**9, 0.0, (0.5, "memory")),
        (10**9, 1e12, (0.5, "memory")),
        (10**9, 6e12, (1.5, "matrix")),
        (0, 4e12, (1.0, "matrix")),
    ],
)
def test_the_floor_is_the_larger_side(nbytes, flops, floor):
    limits = Roofline(copy=2e9, matrix={torch.bfloat16: 4e12, torch.float32: 1e12})
    assert limits.floor(nbytes, flops, torch.bfloat16) == floor


def test_the_matrix_rate_is_the_dtypes():
    limits = Roofline(copy=2e9, matrix={torch.bfloat16: 4e12, torch.float32: 1e12})
    assert limits.floor(0, 4e12, torch.float32) == (4.0, "matrix")
    assert limits.floor(2, 0.0, torch.int64) == (1e-9, "memory")


def test_a_case_that_crashes_is_tried_once_and_fails_for_everybody(tmp_path):
    session = Session(
        device=torch.device("cpu"), dry=False, resume=False, deadline=None, store=Store(tmp_path / "rows")
    )
    tries = []

    def crash() -> measure.Outcome:
        tries.append(1)
        raise RuntimeError("no more memory\nand the rest")

    with pytest.raises(RuntimeError, match="no more memory"):
        conclude(None, session, "vitrail", ("case",), crash, done=False)
    with pytest.raises(pytest.fail.Exception, match=r"ended with RuntimeError: no more memory$"):
        conclude(None, session, "eager", ("case",), crash, done=False)
    assert len(tries) == 1
    assert not (tmp_path / "rows").exists()
