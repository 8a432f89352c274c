"""setup.py: which CUDA toolkit it takes, what it compiles for, and what it says when there is nothing to build with."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.kernels import extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, which then sets nothing up; and no toolkit but what a test names."""
    spec = importlib.util.spec_from_file_location("vitrail_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variable in ("CUDA_HOME", "CUDA_PATH", "VITRAIL_BUILD_EXT", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    return module


def toolkit(folder: Path, release: str = "13.0", *, libraries: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit of some release, complete or not."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    if libraries:
        (folder / "lib64").mkdir()
    return folder


def test_the_toolkit_is_the_folder_that_has_compiler_and_libraries(setup, tmp_path, monkeypatch):
    """An nvcc on PATH may be a wrapper whose neighbours are something else."""
    wrapper, complete = toolkit(tmp_path / "wrapper", libraries=False), toolkit(tmp_path / "complete")
    monkeypatch.setenv("PATH", f"{wrapper / 'bin'}:{complete / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_PATH", str(complete))
    assert setup.find_toolkit() == complete
    assert setup.toolkit_version(complete) == (13, 0)
    chosen = toolkit(tmp_path / "chosen", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(chosen))
    assert setup.find_toolkit() == chosen
    monkeypatch.setenv("CUDA_HOME", str(wrapper))
    assert setup.find_toolkit() == complete


def test_without_a_toolkit_the_folders_are_named(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "toolkit_candidates", lambda: iter([tmp_path / "one", tmp_path / "two"]))
    with pytest.raises(
        setup.NotBuiltError, match=r"no CUDA toolkit .* in .*/one, .*/two; install one and set CUDA_HOME"
    ):
        setup.find_toolkit()


def test_an_nvcc_that_says_nothing_is_refused(setup, tmp_path):
    folder = toolkit(tmp_path / "mute")
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(setup.NotBuiltError, match=r"does not tell its version"):
        setup.toolkit_version(folder)


@pytest.mark.parametrize(
    ("version", "real", "virtual"),
    [
        ((12, 6), ["sm_80", "sm_90a"], "compute_90"),
        ((12, 8), ["sm_80", "sm_90a", "sm_100"], "compute_100"),
        ((13, 0), ["sm_80", "sm_90a", "sm_100"], "compute_100"),
    ],
)
def test_architectures_follow_the_toolkit(setup, version, real, virtual):
    codes = [flag.rsplit("code=", 1)[1] for flag in setup.architecture_flags(version)]
    assert codes == [*real, virtual]


def test_a_toolkit_of_another_major_version_is_refused(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "old", "11.8")))
    with pytest.raises(
        setup.NotBuiltError, match=r"is 11\.8, torch was built for 1\d\.\d; set CUDA_HOME to a toolkit 1\d"
    ):
        setup.extension()


def test_a_torch_without_cuda_is_refused(setup, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(setup.NotBuiltError, match="is built without CUDA"):
        setup.extension()


def test_the_switch(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "toolkit_candidates", lambda: iter([tmp_path]))
    modules, facts = setup.prepare()
    assert modules == []
    assert "no CUDA toolkit" in facts["missing"]
    assert "building without the compiled extension: no CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setenv("VITRAIL_BUILD_EXT", "1")
    with pytest.raises(SystemExit, match="VITRAIL_BUILD_EXT=1, but no CUDA toolkit"):
        setup.prepare()
    monkeypatch.setenv("VITRAIL_BUILD_EXT", "0")
    assert setup.prepare() == ([], {"missing": "VITRAIL_BUILD_EXT=0 left it out when vitrail was installed"})
    monkeypatch.setenv("VITRAIL_BUILD_EXT", "yes")
    with pytest.raises(SystemExit, match="VITRAIL_BUILD_EXT must be 0, 1 or auto, got 'yes'"):
        setup.prepare()


def test_users_may_choose_the_architectures(setup, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", torch.version.cuda)))
    built, facts = setup.extension()
    assert any("sm_90a" in flag for flag in built.extra_compile_args["nvcc"])
    assert not any("mad=true" in flag for flag in built.extra_compile_args["nvcc"])
    assert "-fmad=false" in built.extra_compile_args["nvcc"]
    assert "-ffp-contract=off" in built.extra_compile_args["cxx"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    built, facts = setup.extension()
    assert not any("gencode" in flag for flag in built.extra_compile_args["nvcc"])
    assert facts["architectures"] == "9.0a"


def test_sources_are_all_of_csrc(setup, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", torch.version.cuda)))
    built, _ = setup.extension()
    listed = {Path(name) for name in (*built.sources, *built.depends)}
    assert listed == {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES}
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    with pytest.raises(setup.NotBuiltError, match=r"there is no source in .*csrc; install from a complete checkout"):
        setup.extension()


SUFFIXES = (".cpp", ".cu", ".h", ".cuh")


def test_it_is_built_where_a_toolkit_is(setup):
    """The reason why CI cannot pass without compiling and linking the extension."""
    try:
        setup.find_toolkit()
    except setup.NotBuiltError as error:
        pytest.skip(str(error))
    if json.loads((ROOT / "kernels" / "extension.json").read_text()).get("missing", "").startswith("VITRAIL_BUILD_EXT"):
        pytest.skip("VITRAIL_BUILD_EXT=0 left it out")
    assert extension.missing() is None


def test_host_code_keeps_to_the_stable_abi():
    """Headers beyond torch/csrc/stable and torch/headeronly would tie the library to one version of torch."""
    included = {
        line.split()[1].strip("<>")
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in SUFFIXES
        for line in path.read_text().splitlines()
        if line.startswith(("#include <torch", "#include <ATen", "#include <c10"))
    }
    assert included
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in included), included


def test_a_library_of_other_sources_is_not_used(setup, tmp_path, monkeypatch):
    """After an update of a checkout the old library may not fit the new Python code."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.h").write_text("int one();")
    assert setup.digest(sources) == extension.digest(sources)
    before = setup.digest(sources)
    (sources / "README.md").write_text("words")
    assert extension.digest(sources) == before
    (sources / "one.h").write_text("int two();")
    assert extension.digest(sources) != before
    monkeypatch.setattr(extension, "SOURCES", sources)
    monkeypatch.setattr(extension, "library", lambda: "there")
    monkeypatch.setattr(extension, "facts", lambda: {"sources": before})
    extension.missing.cache_clear()
    try:
        assert "was built from other sources than those in" in extension.missing()
    finally:
        monkeypatch.undo()
        extension.missing.cache_clear()


def test_a_missing_extension_is_explained(monkeypatch, tmp_path):
    """What users read who have no compiler: what is missing, and what to do."""
    record = tmp_path / "extension.json"
    record.write_text(json.dumps({"missing": "no CUDA toolkit in /usr/local/cuda"}))
    monkeypatch.setattr(extension, "RECORD", record)
    monkeypatch.setattr(extension, "library", lambda: None)
    extension.missing.cache_clear()
    try:
        (reason,) = extension.reasons(extension.torch.device("cpu"))
        assert "no CUDA toolkit in /usr/local/cuda; VITRAIL_BUILD_EXT=1 pip install --no-build-isolation" in reason
        with pytest.raises(RuntimeError, match="no CUDA toolkit in /usr/local/cuda"):
            extension.ops()
    finally:
        monkeypatch.undo()
        extension.missing.cache_clear()


def test_everything_works_without_it():
    """In a process that cannot import the extension, as on a machine without a compiler."""
    program = (
        "import sys, logging, torch\n"
        "sys.modules['vitrail.kernels._C'] = None\n"  # importing it now fails
        "logging.basicConfig(format='%(message)s')\n"
        "from vitrail.kernels import FusedAdamWEMA, explain, masked_patch_gather, multi_tensor_ema_\n"
        "teacher = [torch.zeros(3)]\n"
        "multi_tensor_ema_(teacher, [torch.ones(3)], 0.5)\n"
        "assert teacher[0].tolist() == [0.5] * 3\n"
        "param = torch.nn.Parameter(torch.ones(2)); param.grad = torch.ones(2)\n"
        "FusedAdamWEMA([param], max_grad_norm=1.0).step()\n"
        "assert param[0] < 1\n"
        "images = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)\n"
        "masked_patch_gather(images, torch.tensor([[1]]), 14)\n"
        "print(explain('multi_tensor_ema_', teacher, teacher, 0.5)['cuda'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert ran.returncode == 0, ran.stderr
    assert "the compiled extension does not load" in ran.stdout
    assert (
        "multi_tensor_ema_ (forward): reference, not cuda, because the compiled extension does not load" in ran.stderr
    )
