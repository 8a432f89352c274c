"""Images per second, share of the machine's peak, time lost waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Dense bf16 peak in FLOP/s as the vendors state it; the first name that the device name contains counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, None where it is not known (CPUs among others)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Most memory held so far by this process, bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@dataclass
class Throughput:
    """Counts between two log lines; reading it restarts the count.

    The clock is the host's. At a log line the loss is read from the device, so both have caught up with each other.
    """

    device: torch.device
    world: int
    images: int = 0
    flops: float = 0.0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, images: int, flops: float, waited: float) -> None:
        """Count a micro-batch of this rank: images, their operations, seconds spent waiting for them."""
        self.images += images
        self.flops += flops
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the body's time, an evaluation's or a checkpoint's, out of the count."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """Images/s over all ranks, GFLOP/s per rank, share of the peak where it is known, share spent waiting."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rate = self.flops / seconds
        values = {
            "images_per_second": self.images * self.world / seconds,
            "gflops": rate / 1e9,
            "data_wait": self.waited / seconds,
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            values["mfu"] = rate / peak
        self.images, self.flops, self.waited, self.started = 0, 0.0, 0.0, time.perf_counter()
        return values
