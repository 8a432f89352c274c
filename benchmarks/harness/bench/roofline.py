"""What this machine can do at most, measured at the start of a run: copy bandwidth and matrix rates."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .clock import time_in_turns
from .rows import Row, quantiles

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # of each side: many times the caches
SIDE = {"cuda": 8192, "cpu": 2048}
# A CPU without fp16 arithmetic takes a minute for one product, and nobody trains in it there.
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Roofline:
    """Bytes per second, read plus written, of a large copy; operations per second of a large product, by dtype."""

    copy: float
    matrix: dict[torch.dtype, float]

    def floor(self, nbytes: int, flops: float, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds that no implementation can undercut, and which side says so.

        A case in float64 or in integers has no matrix products, so that only its bytes count.
        """
        memory = nbytes / self.copy
        matrix = flops / self.matrix[dtype] if flops else 0.0
        return (memory, "memory") if memory >= matrix else (matrix, "matrix")


@functools.cache
def measured(device: torch.device) -> tuple[Roofline, tuple[Row, ...]]:
    """Measure the machine, once for each process.

    Returns:
        The constants, and the rows that document them.
    """
    size = COPY_BYTES[device.type]
    copied = _copies(size, device)
    rows = [_row("copy", {"bytes": size}, torch.uint8, copied, nbytes=2 * size)]
    matrix = {}
    for dtype in DTYPES[device.type]:
        side = SIDE[device.type] // (2 if dtype == torch.float32 else 1)
        # Random values: a GPU multiplies zeros faster than it multiplies numbers.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        samples = _time(functools.partial(torch.mm, a, b, out=out), device)
        matrix[dtype] = 2 * side**3 / statistics.median(samples)
        rows.append(_row("matrix product", {"side": side}, dtype, samples, flops=2.0 * side**3))
    return Roofline(2 * size / statistics.median(copied), matrix), tuple(rows)


def _copies(size: int, device: torch.device) -> list[float]:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _time(lambda: target.copy_(source), device)


def _time(call: Callable[[], Any], device: torch.device) -> list[float]:
    return time_in_turns({"call": [call]}, device, seconds=0.5)["call"].samples


def _row(
    case: str, shape: dict[str, Any], dtype: torch.dtype, samples: list[float], *, nbytes: int = 0, flops: float = 0.0
) -> Row:
    middle, spread = quantiles(samples)
    return Row(
        suite="kernels",
        op="roofline",
        case=case,
        implementation="torch",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        direction="forward",
        cache="cold",
        samples=len(samples),
        median_s=middle,
        quantiles_s=spread,
        bytes=nbytes or None,
        flops=flops or None,
        gb_per_s=nbytes / middle / 1e9 if nbytes else None,
        tflop_per_s=flops / middle / 1e12 if flops else None,
    )
