"""What the kernel benchmarks share: the device, MAE's sizes on it, and a measurement that checks before it times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def batch(device: torch.device) -> int:
    """256 images on a GPU, as in the published arithmetic; few on a CPU, whose ratios are all that counts."""
    return 256 if device.type == "cuda" else 16


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Returns a function that checks a call against float64 and then times it, host and device together."""

    def run(call: Callable[[], Any], *, truth: Any, bytes_moved: int, tolerance: float) -> None:
        results = call()
        pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (results, truth)), strict=True)
        for result, expected in pairs:
            largest = expected.abs().max().item() if expected.numel() else 0
            torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=tolerance * largest)

        def timed() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark(timed)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        benchmark.extra_info.update(device=name, torch=torch.__version__, bytes=bytes_moved)
        if benchmark.stats is not None:  # none under --benchmark-disable
            benchmark.extra_info["GB/s"] = round(bytes_moved / benchmark.stats.stats.median / 1e9, 2)

    return run
