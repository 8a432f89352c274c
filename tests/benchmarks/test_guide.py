"""What benchmarks/README.md says can be done."""

import re
from dataclasses import fields
from pathlib import Path

import torch
from bench import Sizes, measure
from bench.rows import Row

import vitrail.kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GUIDE = (BENCHMARKS / "README.md").read_text()


def test_the_example_of_a_case_builds_and_is_checked(monkeypatch):
    monkeypatch.setattr(vitrail.kernels, "my_op", lambda x: x.softmax(-1), raising=False)
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict = {}
    exec(example, names)
    (case,) = names["cases"](Sizes(batch=2))
    for direction in case.directions:
        outcome, functions = measure.prepare(case, direction, torch.device("cpu"))
        assert list(functions) == ["vitrail", "eager", "compiled"]
        assert outcome.failed == {}
    assert names["test_my_op"].cases is names["cases"]


def test_every_op_has_a_benchmark_and_every_folder_is_described():
    ops = {path.parent.name for path in (BENCHMARKS.parent / "kernels").glob("*/op.py")}
    assert {f"bench_{op}.py" for op in ops} <= {path.name for path in (BENCHMARKS / "kernels").iterdir()}
    folders = {path.parent.name for path in BENCHMARKS.glob("*/bench_*.py")}
    assert all(f"`{folder}/`" in GUIDE for folder in folders | {"harness"})


def test_the_fields_that_the_guide_names_exist():
    section = GUIDE.split("## What a row says")[1].split("How it gets there")[0]
    named = set(re.findall(r"`([a-z_]+)`", section))
    assert named <= {field.name for field in fields(Row)}
    assert {"median_s", "peak_bytes", "speed_over", "absent"} <= named
