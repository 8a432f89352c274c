"""Launch configurations: the lookup, and what every candidate computes."""

import importlib
import json
import logging
from functools import partial

import pytest
import torch
from ladder import check_accuracy
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded
from tuning_problems import FUNCTIONS, PROBLEMS

from vitrail.kernels import tuner, tuning
from vitrail.kernels.checks import interpreting
from vitrail.kernels.tuning import PACKAGE, Tunable, combinations, forced, gpu_slug, lookup

pytest.importorskip("triton")

GPU = "NVIDIA H200"
CUDA = torch.device("cuda", 0)
DEFAULT = {"BLOCK": 64, "num_warps": 4}
EXAMPLE = Tunable(
    op="example",
    kernel="example_kernel",
    default=DEFAULT,
    candidates=combinations(BLOCK=(32, 64, 128), num_warps=(2, 4)),
    exact=("dtype", "adjacent"),
    sizes=("rows", "columns"),
)
SMALL, LARGE = {"BLOCK": 32, "num_warps": 2}, {"BLOCK": 128, "num_warps": 2}
TUNABLES = [tunable for module in tuner.kernel_modules().values() for tunable in module.TUNABLES]


def entry(rows=1024, columns=512, config=SMALL, dtype="bfloat16", adjacent=True, kernel="example_kernel"):
    key = {"dtype": dtype, "adjacent": adjacent, "rows": rows, "columns": columns}
    return {"kernel": kernel, "key": key, "config": config, "us": 1.0, "default_us": 2.0}


def write(folder, *entries, gpu=GPU, op="example"):
    path = folder / op / "configs" / f"{gpu_slug(GPU)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu, "capability": "9.0", "driver": None, "entries": entries}))
    return path


def find(rows=1024, columns=512, dtype=torch.bfloat16, adjacent=True):
    return lookup(EXAMPLE, GPU, (dtype, adjacent), (rows, columns))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that configurations are read from."""
    monkeypatch.setenv("VITRAIL_CONFIGS", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="vitrail.kernels")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("h200", "h200"),
    ],
)
def test_slugs(name, slug):
    assert gpu_slug(name) == slug


def test_the_exact_key_wins_then_the_nearest_then_the_default(folder):
    write(folder, entry(columns=512, config=SMALL), entry(columns=4096, config=LARGE))
    assert find() == SMALL
    assert find(rows=1100, columns=700) == SMALL  # the same powers of two
    assert find(rows=2048, columns=1024) == SMALL  # a factor 2 twice, as far as it may be
    assert find(rows=512, columns=256) == SMALL
    assert find(columns=2048) == LARGE  # 2 from one, 4 from the other
    assert find(columns=2**14) == LARGE
    assert find(columns=2**15) == DEFAULT
    assert find(rows=2048, columns=2**14) == DEFAULT  # a factor 2 and a factor 4
    assert find(rows=0) == DEFAULT


def test_what_must_match_exactly_does(folder):
    write(folder, entry(), entry(kernel="other_kernel", config=LARGE))
    assert find(dtype=torch.float16) == DEFAULT
    assert find(adjacent=False) == DEFAULT


def test_without_a_file_for_the_gpu_the_default_is_taken(folder, warnings):
    write(folder, entry())
    assert lookup(EXAMPLE, "NVIDIA H100 80GB HBM3", (torch.bfloat16, True), (1024, 512)) == DEFAULT
    assert not warnings()


def test_a_launcher_is_answered_by_the_file_of_its_gpu_read_once(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    path = write(folder, entry())
    call = ((torch.bfloat16, True), (1000, 500))
    assert EXAMPLE.config(CUDA, *call) == SMALL
    path.unlink()
    assert EXAMPLE.config(CUDA, *call) == SMALL
    for device in ("cpu", "meta"):
        assert EXAMPLE.config(torch.device(device), *call) == DEFAULT
    tuning.forget()
    assert EXAMPLE.config(CUDA, *call) == DEFAULT


def test_the_flag_switches_the_lookup_off(folder, monkeypatch, warnings):
    write(folder, entry())
    monkeypatch.setenv("VITRAIL_CONFIGS", "default")
    tuning.forget()
    assert find() == DEFAULT
    monkeypatch.delenv("VITRAIL_CONFIGS")
    tuning.forget()
    assert tuning.source() == PACKAGE
    assert not warnings()


def test_a_flag_that_means_nothing_is_warned_of_once(monkeypatch, warnings, folder):
    monkeypatch.setenv("VITRAIL_CONFIGS", "tunde")
    tuning.forget()
    assert find() == find(rows=3) == DEFAULT
    assert warnings() == [
        "VITRAIL_CONFIGS=tunde is neither tuned, nor default, nor a folder: launches take the defaults"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"gpu": "NVIDIA H200", "entr', "Unterminated string"),
        ("[]", "does not name a GPU"),
        ('{"gpu": "NVIDIA A100-SXM4-80GB", "entries": []}', "measured on NVIDIA A100-SXM4-80GB"),
        ('{"gpu": "NVIDIA H200"}', "no list of entries"),
        ('{"gpu": "NVIDIA H200", "entries": ["fast"]}', "no list of entries"),
        (b"\xff\xfe", "decode"),
    ],
)
def test_a_broken_or_foreign_file_is_warned_of_once(folder, warnings, text, reason):
    path = write(folder)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find() == find(rows=3) == DEFAULT
    (message,) = warnings()
    assert message.startswith(f"{path} is ignored: ")
    assert reason in message
    assert message.endswith("delete it, or write it anew with python -m vitrail.kernels tune example")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry(config={"BLOCK": 32, "num_wraps": 2}), "does not set BLOCK, num_warps"),
        (entry(config={"BLOCK": 48, "num_warps": 2}), "is not among the kernel's candidates"),
        (entry(config=None), "does not set BLOCK, num_warps"),
        ({**entry(), "key": {"rows": 1024}}, "does not name dtype, adjacent, rows, columns"),
        (entry(rows="many"), "are not positive integers"),
        (entry(rows=0), "are not positive integers"),
    ],
)
def test_a_bad_entry_is_ignored_with_one_warning_and_the_others_hold(folder, warnings, bad, reason):
    write(folder, bad, entry(columns=4096, config=LARGE))
    assert find() == find(rows=1025) == DEFAULT
    assert find(columns=4096) == LARGE
    (message,) = warnings()
    assert "1 of 2 entries for example_kernel are ignored" in message
    assert reason in message


def test_numbers_that_equal_a_candidate_become_it(folder):
    write(folder, entry(config={"BLOCK": 32.0, "num_warps": 2}))
    assert isinstance(find()["BLOCK"], int)


def test_forcing_ends_with_the_block():
    call = (torch.device("cpu"), (torch.bfloat16, True), (1000, 500))
    with forced(EXAMPLE, LARGE) as keys:
        assert EXAMPLE.config(*call) == LARGE
    assert EXAMPLE.config(*call) == DEFAULT
    assert keys == [{"dtype": "bfloat16", "adjacent": True, "rows": 1024, "columns": 512}]


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: tunable.kernel)
def test_candidates_include_the_default_and_set_the_same(tunable):
    assert tunable.default in tunable.candidates
    assert all(config.keys() == tunable.default.keys() for config in tunable.candidates)
    assert len(tunable.candidates) == len({str(config) for config in tunable.candidates}) > 1


def check_candidate(tunable: Tunable, config: dict[str, int]) -> None:
    function = FUNCTIONS[tunable.op]
    for problem in PROBLEMS[tunable.op]:
        with forced(tunable, config) as keys:
            check_accuracy(function, partial(function, impl="reference"), problem, torch.float32, "triton")
            check_guarded(function, problem.to(torch.float32))
        assert keys, f"{tunable.kernel} was not launched"


def candidates() -> list[tuple[Tunable, dict[str, int]]]:
    """Every candidate; in the interpreter, which has no warps, one of those that differ in nothing else."""
    found = {}
    for tunable in TUNABLES:
        for config in tunable.candidates:
            shown = {name: value for name, value in config.items() if name != "num_warps" or not interpreting()}
            found.setdefault((tunable.kernel, str(shown)), (tunable, config))
    return list(found.values())


@pytest.mark.parametrize(
    ("tunable", "config"), candidates(), ids=lambda value: value.kernel if isinstance(value, Tunable) else str(value)
)
def test_every_candidate_computes_what_the_reference_does(tunable, config):
    check_candidate(tunable, config)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("gather_kernel", 'triton.cdiv(columns, config["BLOCK"])', "triton.cdiv(columns, 256)"),
        ("gather_kernel", 'triton.cdiv(batch * count, config["ROWS"])', "triton.cdiv(batch * count, 4)"),
        ("scatter_kernel", 'triton.cdiv(patch_width(patch_size), config["BLOCK"])', "triton.cdiv(588, 256)"),
        ("rank_kernel", 'triton.cdiv(length, config["BLOCK"])', "triton.cdiv(length, 64)"),
        ("restore_kernel", 'triton.cdiv(tokens, config["ROWS"])', "triton.cdiv(tokens, 4)"),
        ("restore_backward_kernel", "(tokens, shares, triton.cdiv(width, block))", "(tokens, shares, 3)"),
    ],
)
def test_a_grid_for_another_candidate_is_noticed(kernel, old, new, tmp_path):
    tunable = next(tunable for tunable in TUNABLES if tunable.kernel == kernel)
    smallest = min(tunable.candidates, key=lambda config: tuple(config.values()))
    fault = Fault("grid", f"vitrail.kernels.{tunable.op}.kernel", old, new)
    check_noticed(fault, tmp_path, lambda: check_candidate(tunable, smallest))


def test_partial_sums_do_not_depend_on_the_configuration():
    kernel = importlib.import_module("vitrail.kernels.restore_tokens.kernel")
    for build in kernel.representative_calls().values():
        passes = build(device="meta")
        found = set()
        for config in kernel.CANDIDATES:
            launch = tuner.Trial(kernel.RESTORE_BACKWARD, kernel, "backward", passes["backward"]).launch(config)
            found.add((launch.args[3].shape, launch.args[4].shape, launch.args[10]))
        assert len(found) == 1


def test_calls_that_are_tuned_are_of_32_bit_offsets_and_launch_every_tunable():
    launched = set()
    for module in tuner.kernel_modules().values():
        for build in module.tuning_calls().values():
            passes = build(device="meta")
            for tunable in module.TUNABLES:
                keys = [tuner.Trial(tunable, module, which, passes[which]).key() for which in passes]
                launched |= {tunable.kernel for key in keys if key}
                assert not any(key["int64"] for key in keys if key)
    assert launched == {tunable.kernel for tunable in TUNABLES}


def check_file(path) -> None:
    entries = tuning.parse(path.read_text(), path.stem)
    by_kernel = {t.kernel: t for t in TUNABLES if t.op == path.parents[1].name}
    assert entries
    for found in entries:
        assert found["kernel"] in by_kernel
        assert by_kernel[found["kernel"]].fault(found) is None
        assert found["us"] <= found["default_us"]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/configs/*.json")), ids=lambda path: str(path.name))
def test_shipped_files_name_known_candidates(path):
    check_file(path)


def test_a_shipped_file_with_an_unknown_kernel_would_be_noticed(folder):
    with pytest.raises(AssertionError):
        check_file(write(folder, entry(), op="random_masking"))
