"""Packages, extras, entry point and the compiled extension of vitrail.

The top-level folders are mapped into one namespace (`kernels/` is imported as `vitrail.kernels`), so that nothing
called `kernels` or `engine` is ever installed: transformers imports a PyPI package of the name `kernels`.

The extension `vitrail.kernels._C` is built where torch can be imported and a CUDA toolkit is found, without a GPU;
everything works without it. VITRAIL_BUILD_EXT=1 makes a failure to build it an error, 0 leaves it out. pip hides torch
from a build unless it is told not to: `pip install --no-build-isolation .`
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = ("kernels", "engine", "recipes")
SWITCH = "VITRAIL_BUILD_EXT"
RECORD = Path("kernels/extension.json")  # what was built or why not, for `vitrail doctor`

packages = [
    f"vitrail.{name}" for folder in FOLDERS for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
]


class NotBuiltError(Exception):
    """Why the extension cannot be built here, in one sentence."""


def toolkit_candidates() -> Iterator[Path]:
    """Yields the folders that may hold a CUDA toolkit, the user's choice first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).parent.parent
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")

    def version(folder: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", folder.name)]

    yield from sorted(Path("/usr/local").glob("cuda-*"), key=version, reverse=True)
    yield Path("/opt/cuda")


def find_toolkit() -> Path:
    """Returns the first folder with a compiler and the libraries; an nvcc on PATH may be a wrapper far from both.

    Raises:
        NotBuiltError: There is none.
    """
    looked = list(dict.fromkeys(toolkit_candidates()))
    for folder in looked:
        if (folder / "bin/nvcc").is_file() and (folder / "lib64").is_dir():
            return folder
    raise NotBuiltError(
        f"no CUDA toolkit (a folder with bin/nvcc and lib64) in {', '.join(map(str, looked))}; "
        "install one and set CUDA_HOME to it"
    )


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    """Returns the version of a toolkit's nvcc."""
    said = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise NotBuiltError(f"{toolkit / 'bin/nvcc'} does not tell its version; set CUDA_HOME to another toolkit")
    return int(found[1]), int(found[2])


def architecture_flags(version: tuple[int, int]) -> list[str]:
    """Returns nvcc's flags for 8.0, 9.0a, 10.0 as far as the toolkit knows them, and PTX for what comes later."""
    newest = "100" if version >= (12, 8) else "90"
    real = ["80", "90a"] + (["100"] if newest == "100" else [])
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in real]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def extension() -> tuple[Extension, dict[str, str]]:
    """Returns the extension and what is known of it before it is compiled.

    Raises:
        NotBuiltError: Something that it needs is missing.
    """
    if sys.platform != "linux":
        raise NotBuiltError(f"the extension is written for Linux, this is {sys.platform}")
    try:
        import torch
    except ImportError as error:
        raise NotBuiltError(
            f"torch cannot be imported while building ({error}); install it first, then vitrail with "
            "pip install --no-build-isolation"
        ) from None
    if torch.version.cuda is None:
        raise NotBuiltError(f"torch {torch.__version__} is built without CUDA; install a CUDA build of it")
    toolkit = find_toolkit()
    version = toolkit_version(toolkit)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        raise NotBuiltError(
            f"the CUDA toolkit in {toolkit} is {version[0]}.{version[1]}, torch was built for {torch.version.cuda}; "
            f"set CUDA_HOME to a toolkit {torch.version.cuda.split('.')[0]}.x"
        )
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix != ".cuh")
    if not sources:
        raise NotBuiltError(f"there is no source in {ROOT / 'csrc'}; install from a complete checkout")
    os.environ["CUDA_HOME"] = str(toolkit)  # read by the next import
    from torch.utils.cpp_extension import CUDAExtension

    strict = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]  # the stable ABI of torch 2.11
    chosen = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else architecture_flags(version)
    built = CUDAExtension(
        name="vitrail.kernels._C",
        sources=sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")),
        extra_compile_args={
            # A multiply-add is fused where the source says so and nowhere else: both sides round alike.
            "cxx": [
                *strict,
                "-g0",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            "nvcc": [*strict, "-fmad=false", "--threads=2", *chosen],
        },
        py_limited_api=True,
    )
    told = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(flag.rsplit("code=", 1)[1] for flag in chosen)
    return built, {
        "toolkit": f"{version[0]}.{version[1]}",
        "torch": torch.__version__,
        "architectures": told,
        "sources": digest(ROOT / "csrc"),
    }


def digest(folder: Path) -> str:
    """Returns a hash of the sources, as vitrail.kernels.extension computes it to notice a library of other ones."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def wanted() -> str:
    """Returns the switch: 0, 1 or auto."""
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"{SWITCH} must be 0, 1 or auto, got {choice!r}")
    return choice


def prepare() -> tuple[list[Extension], dict[str, str]]:
    """Returns the extensions to build, none or one, and the record of it."""
    if wanted() == "0":
        return [], {"missing": f"{SWITCH}=0 left it out when vitrail was installed"}
    try:
        built, facts = extension()
    except NotBuiltError as error:
        if wanted() == "1":
            raise SystemExit(f"{SWITCH}=1, but {error}") from None
        sys.stderr.write(f"vitrail: building without the compiled extension: {error}\n")
        return [], {"missing": str(error)}
    return [built], facts


def commands(ext_modules: list[Extension], facts: dict[str, str]) -> dict[str, type]:
    """Returns the build commands: torch's compiles the extension, both note what came of it."""
    if ext_modules:
        from torch.utils.cpp_extension import BuildExtension as Base
    else:
        Base = build_ext

    class BuildExtension(Base):  # type: ignore[misc,valid-type]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted() == "1":
                    raise
                sys.stderr.write(f"vitrail: building without the compiled extension: {error}\n")
                facts.clear()
                facts["missing"] = f"it failed to compile when vitrail was installed: {str(error).splitlines()[0]}"
                self.extensions = []
            record(ROOT if self.inplace else Path(self.build_lib) / "vitrail")

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            record(ROOT if self.editable_mode else Path(self.build_lib) / "vitrail")

    def record(root: Path) -> None:
        (root / RECORD).write_text(json.dumps(facts, indent=1) + "\n")

    return {"build_ext": BuildExtension, "build_py": BuildPython}


if __name__ == "__main__":
    ext_modules, facts = prepare()
    setup(
        name="vitrail",
        version="0.1.0",
        description="A performance-optimised, kernel-level training engine for self-supervised vision transformers",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=packages,
        package_dir={f"vitrail.{folder}": folder for folder in FOLDERS},
        package_data={"vitrail.kernels": ["*.json", "*/README.md", "*/configs/*.json"]},
        ext_modules=ext_modules,
        cmdclass=commands(ext_modules, facts),
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
        entry_points={"console_scripts": ["vitrail = vitrail.engine.cli:main"]},
        # The ranges that the code is written for; constraints.txt holds the exact versions that the tests run on.
        install_requires=[
            "torch>=2.11,<2.16",
            "triton>=3.6,<3.10; platform_system == 'Linux'",
            "deepspeed>=0.19.8",
            "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
            "numpy>=1.26",
            "pillow>=10",
            "tyro>=0.9",
            "rich>=13",
            "safetensors>=0.4",
            "tensorboard>=2.15",
            "scikit-learn>=1.3",
            "matplotlib>=3.8",
        ],
        extras_require={
            "xformers": ["xformers>=0.0.35"],
            "docs": ["mkdocs-material>=9.5"],
            # Peers of the benchmarks beside those of "dev"; whoever is missing is left out of the rows with the reason.
            "bench": ["lightly>=1.5", "liger-kernel>=0.6"],
            "dev": [
                "pytest>=8",
                "pytest-benchmark>=5",
                "pytest-xdist>=3.6",
                "hypothesis>=6.100",
                "ruff>=0.6",
                "mypy>=1.11",
                "pre-commit>=3.7",
                "ninja",
                "torchvision",
                "transformers>=5",
                "timm>=1.0",
            ],
        },
    )
