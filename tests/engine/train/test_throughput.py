"""Counting images, operations and waiting between two log lines."""

import pytest
import torch

from vitrail.engine.train import throughput
from vitrail.engine.train.throughput import Throughput, peak_flops, peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told the time."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_of_all_ranks_and_operations_of_one(clock):
    counter = Throughput(CPU, world=4, started=clock[0])
    counter.add(32, 8e9, 0.5)
    counter.add(32, 8e9, 0.5)
    clock[0] += 2.0
    values = counter.read()
    assert values["images_per_second"] == pytest.approx(64 * 4 / 2)
    assert values["gflops"] == pytest.approx(8.0)
    assert values["data_wait"] == pytest.approx(0.5)
    assert "mfu" not in values


def test_reading_restarts_the_count_and_pauses_are_left_out(clock):
    counter = Throughput(CPU, world=1, started=clock[0])
    counter.add(10, 0.0, 0.0)
    clock[0] += 1.0
    counter.read()
    counter.add(10, 0.0, 0.0)
    clock[0] += 1.0
    with counter.paused():
        clock[0] += 50.0
    clock[0] += 1.0
    assert counter.read()["images_per_second"] == pytest.approx(5.0)


def test_share_of_the_peak(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e12)
    counter = Throughput(CPU, world=2, started=clock[0])
    counter.add(1, 5e11, 0.0)
    clock[0] += 1.0
    assert counter.read()["mfu"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Unheard of", None),
    ],
)
def test_peak_table(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == expected
    assert peak_flops(CPU) is None


def test_peak_memory_grows_with_an_allocation():
    before = peak_memory(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(CPU) >= max(before, block.numel())
