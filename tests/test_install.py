"""What an installation leaves behind, and what it must leave alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """vitrail built and installed as by a user without a compiler, into a folder of its own."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("kernels", "engine", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    # A torch that cannot be imported, as in the isolated build that pip makes by default.
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    environment = {**os.environ, "PYTHONPATH": str(hidden), "VITRAIL_BUILD_EXT": "auto"}
    subprocess.run([*pip, str(target), str(source)], check=True, capture_output=True, env=environment)
    return target


def test_an_installation_without_a_compiler_says_what_is_missing(installed, tmp_path):
    assert not list((installed / "vitrail" / "kernels").glob("_C*"))
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "400"}
    command = [sys.executable, "-m", "vitrail.kernels"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "torch cannot be imported while building (No module named 'torch')" in ran.stdout
    assert "pip install --no-build-isolation" in ran.stdout


def test_only_the_namespace_lands_in_site_packages(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names <= {"vitrail", "bin"}
    assert {path.name for path in (installed / "vitrail").iterdir()} - {"__pycache__"} == {
        "engine",
        "kernels",
        "recipes",
    }


def test_the_wheel_holds_every_package_and_the_tables(installed):
    for folder in ("kernels", "engine", "recipes"):
        expected = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")}
        found = {p.relative_to(installed / "vitrail") for p in (installed / "vitrail" / folder).rglob("*.py")}
        assert found == expected
    for table in (ROOT / "kernels").glob("*.json"):
        assert (installed / "vitrail" / "kernels" / table.name).is_file()


def test_transformers_still_imports_with_vitrail_installed(installed, tmp_path):
    """transformers looks for a package called `kernels`; ours must never be found under that name."""
    program = (
        "import importlib.util, vitrail.kernels, vitrail.engine.models.vit, transformers\n"
        "from transformers import ViTMAEForPreTraining\n"
        "found = importlib.util.find_spec('kernels')\n"
        "assert found is None or 'vitrail' not in str(found.origin), found\n"
        "assert importlib.util.find_spec('engine') is None\n"
        f"assert vitrail.kernels.__file__.startswith({str(installed)!r}), vitrail.kernels.__file__\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_the_command_is_installed(installed):
    assert "vitrail.engine.cli:main" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()
