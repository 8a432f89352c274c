"""The README's claims that can be executed."""

import re
from pathlib import Path

import torch

from vitrail.kernels import NTXentLoss

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run_example(section: str) -> dict:
    """Runs the example under a heading; returns its names."""
    text = re.split(r"^##+ ", README.split(f"# {section}\n")[1], flags=re.MULTILINE)[0]
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["loss"].isfinite()
    return names


def test_the_swin_of_the_example_is_patched_and_trains(capsys):
    torch.manual_seed(0)
    model = run_example("Windows")["model"]
    assert capsys.readouterr().out == "4 blocks\n"
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_loss_of_the_example_goes_into_a_plain_loop():
    torch.manual_seed(0)
    names = run_example("Losses")
    assert torch.count_nonzero(names["model"].weight.grad)
    assert isinstance(names["criterion"], NTXentLoss)


def test_the_optimiser_of_the_example_moves_student_and_teacher():
    torch.manual_seed(0)
    names = run_example("Optimisers")
    assert names["optimizer"].norms.total > 0
    for parameter, average in names["pairs"].items():
        assert not torch.equal(parameter, average)


def test_the_example_runs_and_trains_its_parts():
    names = run_example("Kernels")
    for tensor in (names["embed"].proj.weight, names["head"].weight, names["mask_token"]):
        assert tensor.grad is not None
        assert torch.count_nonzero(tensor.grad)


def test_links_and_pictures_exist():
    pages = [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        ROOT / "recipes/README.md",
        *ROOT.glob("kernels/*/README.md"),
        ROOT / "csrc/README.md",
    ]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_recipe_is_in_the_table():
    table = (ROOT / "recipes/README.md").read_text()
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"__init__.py"}
    assert recipes <= set(re.findall(r"`(\w+\.py)`", table))
