"""Packages, extras and entry point of vitrail.

The top-level folders are mapped into one namespace (`kernels/` is imported as `vitrail.kernels`), so that nothing
called `kernels` or `engine` is ever installed: transformers imports a PyPI package of the name `kernels`.
"""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "engine", "recipes")

packages = [
    f"vitrail.{name}" for folder in FOLDERS for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
]

setup(
    name="vitrail",
    version="0.1.0",
    description="A performance-optimised, kernel-level training engine for self-supervised vision transformers",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages,
    package_dir={f"vitrail.{folder}": folder for folder in FOLDERS},
    package_data={"vitrail.kernels": ["*.json", "*/README.md", "*/configs/*.json"]},
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
