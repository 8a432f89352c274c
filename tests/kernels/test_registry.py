import logging
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from ladder import kernel_device

from vitrail.kernels import UnsupportedError, explain, masked_patch_gather, random_masking, registry
from vitrail.kernels.checks import interpreting
from vitrail.kernels.launch import INT32_BYTES, needs_int64
from vitrail.kernels.registry import Implementation, Op, ops


@dataclass
class DeviceTensor(torch.Tensor):
    """A CPU tensor that claims to be on a GPU, for choices that are made from metadata alone."""

    device = torch.device("cuda", 0)


def on_gpu(*size: int) -> torch.Tensor:
    return torch.empty(*size).as_subclass(DeviceTensor)


def make_op(*reasons_by_implementation: tuple[str, list[str]]) -> Op:
    return Op(
        name="example",
        bind=lambda *args: args,
        implementations=tuple(
            Implementation(name, "math", {"forward": lambda *_, reasons=reasons: reasons}, "anything")
            for name, reasons in reasons_by_implementation
        ),
    )


def test_auto_takes_the_first_implementation_without_reasons():
    op = make_op(("cuda", ["no compiler was there"]), ("triton", []), ("reference", []))
    assert op.choose("forward", "auto", (on_gpu(2),)).name == "triton"
    assert op.choose("forward", "auto", (torch.empty(2),)).name == "reference"
    assert op.choose("forward", "reference", (on_gpu(2),)).name == "reference"


def with_reservation(*reservations: str) -> Op:
    """An op whose kernel could run but had better not."""
    kernel, chunked, reference = make_op(("triton", []), ("chunked", []), ("reference", [])).implementations
    kernel = replace(kernel, reservations={"forward": lambda *_: list(reservations)})
    return Op(name="example", bind=lambda *args: args, implementations=(kernel, chunked, reference))


def test_auto_heeds_a_reservation_and_a_name_does_not(monkeypatch, caplog):
    op = with_reservation("the others are faster")
    with caplog.at_level(logging.WARNING, logger="vitrail.kernels"):
        assert op.choose("forward", "auto", (on_gpu(11),)).name == "chunked"
    (record,) = caplog.records
    assert record.getMessage() == (
        "example (forward): chunked, not triton, because it could run, but the others are faster"
    )
    assert op.choose("forward", "triton", (on_gpu(11),)).name == "triton"
    assert with_reservation().choose("forward", "auto", (on_gpu(11),)).name == "triton"
    monkeypatch.setenv("VITRAIL_IMPL", "triton")
    assert op.choose("forward", "auto", (on_gpu(11),)).name == "triton"


def test_a_reservation_is_not_asked_about_what_cannot_run():
    op = make_op(("triton", ["no"]), ("reference", []))
    kernel = replace(op.implementations[0], reservations={"forward": lambda *_: 1 / 0})
    assert kernel.against("forward", (on_gpu(2),)) == ["no"]
    assert kernel.against("forward", ()) == ["no"]


def test_explain_tells_reservations(monkeypatch):
    monkeypatch.setattr(registry, "_ops", {"example": with_reservation("the others are faster")})
    reasons = explain("example", on_gpu(2))
    assert reasons == {"triton": ["it could run, but the others are faster"], "chunked": [], "reference": []}


def test_on_the_cpu_auto_passes_over_the_interpreter_and_no_more():
    op = make_op(("triton", []), ("cuda", []), ("chunked", []), ("reference", []))
    assert op.choose("forward", "auto", (torch.empty(2),)).name == "cuda"
    assert op.choose("forward", "auto", ([torch.empty(2)], 3)).name == "cuda"
    assert op.choose("forward", "auto", (on_gpu(2),)).name == "triton"
    assert op.choose("forward", "auto", ([on_gpu(2)], torch.empty(()))).name == "triton"
    assert op.choose("forward", "chunked", (on_gpu(2),)).name == "chunked"


def refusing(monkeypatch) -> tuple[Op, list[str]]:
    """An op whose first implementation finds only when called that it cannot run; and a list of what ran."""
    ran: list[str] = []

    def forward(name):
        def run(*_):
            ran.append(name)
            if name == "cuda":
                raise UnsupportedError("example", name, ["the tensors lie badly"])
            return name

        return run

    monkeypatch.setattr(Implementation, "function", lambda self, which: forward(self.name))
    cuda, reference = make_op(("cuda", ["the tensors lie badly"]), ("reference", [])).implementations
    cuda = replace(cuda, quick={"forward": lambda *_: []})
    return Op(name="example", bind=lambda *args: args, implementations=(cuda, reference)), ran


def test_a_pass_that_is_not_there_is_refused():
    forward_only = make_op(("cuda", []), ("reference", []))
    args = (on_gpu(2),)
    assert forward_only.implementations[0].why_not("backward", args) == ["it has no backward pass"]
    with pytest.raises(UnsupportedError, match="it has no backward pass"):
        forward_only.choose("backward", "cuda", args)


def test_an_implementation_may_refuse_when_called(monkeypatch, caplog):
    op, ran = refusing(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="vitrail.kernels"):
        assert op.run("forward", "auto", torch.empty(2)) == "reference"
    assert ran == ["cuda", "reference"]
    assert "reference, not cuda, because the tensors lie badly" in caplog.text
    with pytest.raises(UnsupportedError, match="the tensors lie badly"):
        op.run("forward", "cuda", torch.empty(2))
    assert ran == ["cuda", "reference", "cuda"]


def test_explain_asks_for_every_reason(monkeypatch):
    op, ran = refusing(monkeypatch)
    monkeypatch.setattr(registry, "_ops", {"example": op})
    assert explain("example", torch.empty(2)) == {"cuda": ["the tensors lie badly"], "reference": []}
    assert not ran


def test_the_choices_are_checked():
    for impl in ("auto", "cuda", "triton", "chunked", "reference"):
        registry.check_impl(impl)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'cuda', 'triton', 'chunked', 'reference'"):
        registry.check_impl("eager")


def test_a_named_implementation_that_cannot_run_raises_its_reasons():
    op = make_op(("triton", ["first reason", "second reason"]), ("reference", []))
    with pytest.raises(UnsupportedError, match="example: impl='triton' cannot run this call") as caught:
        op.choose("forward", "triton", (torch.empty(2),))
    assert caught.value.reasons == ["first reason", "second reason"]
    assert "\n  - second reason" in str(caught.value)


def test_rejections_are_logged_once_per_reason(caplog):
    phases = iter(["the moon is full", "the moon is full", "the moon is new"])
    op = make_op(("triton", []), ("reference", []))
    kernel = replace(op.implementations[0], reasons={"forward": lambda *_: [next(phases)]})
    op = replace(op, implementations=(kernel, op.implementations[1]))
    with caplog.at_level(logging.WARNING, logger="vitrail.kernels"):
        for size in (5, 6, 6):
            op.choose("forward", "auto", (on_gpu(size),))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"example (forward): reference, not triton, because the moon is {x}" for x in ("full", "new")]


def test_nothing_is_logged_for_cpu_tensors(caplog):
    with caplog.at_level(logging.DEBUG, logger="vitrail.kernels"):
        random_masking(2, 8, 4)
    assert not caplog.records


def test_the_environment_variable_decides_what_auto_means(monkeypatch):
    op = make_op(("triton", []), ("reference", []))
    monkeypatch.setenv("VITRAIL_IMPL", "triton")
    assert op.choose("forward", "auto", (torch.empty(2),)).name == "triton"
    monkeypatch.setenv("VITRAIL_IMPL", "nonsense")
    with pytest.raises(UnsupportedError, match="no 'nonsense' implementation; it has triton, reference"):
        op.choose("forward", "auto", (torch.empty(2),))


def test_explain_takes_the_function_or_its_name_and_checks_the_call():
    arguments = (torch.zeros(1, 16, 16, 3, device=kernel_device()), torch.zeros(1, 2, dtype=torch.int64), 8)
    arguments = (arguments[0], arguments[1].to(kernel_device()), arguments[2])
    (refused,) = explain(masked_patch_gather, *arguments).pop("cuda")
    assert "uint8" in refused or "extension" in refused
    expected = {"cuda": [refused], "triton": [], "reference": []}
    assert explain(masked_patch_gather, *arguments) == expected
    assert explain("masked_patch_gather", *arguments, impl="triton") == expected
    with pytest.raises(KeyError, match="no op called 'gather'"):
        explain("gather")
    with pytest.raises(ValueError, match="pad_to=1"):
        explain(masked_patch_gather, *arguments, pad_to=1)


@pytest.mark.skipif(not interpreting(), reason="needs the interpreter")
def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match="set TRITON_INTERPRET=1 to test the kernel"):
        random_masking(2, 8, 4, impl="triton")


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr("vitrail.kernels.checks.triton_installed", lambda: False)
    assert explain(random_masking, 2, 8, 4) == {
        "triton": ["triton is not installed; pip install triton"],
        "reference": [],
    }


def test_every_op_ends_with_a_reference_that_takes_everything():
    assert len(ops()) >= 4
    for op in ops():
        assert op.implementations[-1].name == "reference"
        assert all(predicate() == [] for predicate in op.implementations[-1].reasons.values())
        for implementation in op.implementations:
            assert all(callable(implementation.function(which)) for which in implementation.reasons)


def test_importing_imports_neither_triton_nor_rich_nor_the_engine():
    code = "import sys, vitrail.kernels; print([m for m in ('triton', 'rich', 'vitrail.engine') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_report_names_the_environment_the_flags_and_every_op():
    command = [sys.executable, "-m", "vitrail.kernels"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in (torch.__version__, "VITRAIL_IMPL", "TRITON_INTERPRET", *(op.name for op in ops())):
        assert word in printed


@pytest.mark.parametrize(
    ("size", "stride", "dtype", "expected"),
    [
        ((INT32_BYTES,), (1,), torch.uint8, False),
        ((INT32_BYTES + 1,), (1,), torch.uint8, True),
        ((2**29 - 1,), (1,), torch.float32, False),
        ((2**29,), (1,), torch.float32, True),
        ((2, 2), (2**30, 1), torch.uint8, False),  # few elements, far apart
        ((4, 2), (2**30, 1), torch.uint8, True),
        ((0, 2**31), (2**31, 1), torch.uint8, False),
        ((2**33,), (0,), torch.uint8, False),  # expanded
    ],
)
def test_64_bit_offsets_exactly_where_32_bits_do_not_reach(size, stride, dtype, expected):
    tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    assert needs_int64(tensor) is expected
    assert needs_int64(None, torch.empty(1), tensor) is expected
