"""The examples in the ops' READMEs run, and the READMEs say what the compiled kernels do."""

import re
from importlib.resources import files

import pytest

from vitrail.kernels.registry import ops

NAMES = [op.name for op in ops()]


def read(name: str) -> str:
    """An op's README; its folder has the op's name without the underscore of an in-place op."""
    return (files("vitrail.kernels") / name.rstrip("_") / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    (example,) = re.findall(r"```python\n(.*?)```", read(name), re.DOTALL)
    names: dict = {}
    exec(compile(example, f"{name}/README.md", "exec"), names)
    assert name in names  # it is this op's example


@pytest.mark.parametrize("name", NAMES)
def test_every_section_is_there(name):
    headings = re.findall(r"^## (.*)$", read(name), re.MULTILINE)
    assert headings[:4] == ["The mathematics", "Cost", "Support", headings[3]]
    assert headings[3].startswith("Determinism and ")
    assert headings[-1] == "Drop-in example"
