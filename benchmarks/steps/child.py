"""Training steps of one implementation, in a process of its own so that memory is its own. Prints one line of JSON.

    python benchmarks/steps/child.py vitrail --model small --batch 16
    python benchmarks/steps/child.py "transformers compiled" --model huge --batch 256 --steps 10
    python benchmarks/steps/child.py "plain PyTorch" --family moco_v3 --model small --batch 32

What a step is, is said in `mae_steps.py`, `joint_steps.py`, `crop_steps.py` and `sit_steps.py`. `bench/steps.py` starts
these processes in turns and makes rows of what they print.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import resource
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import crop_steps
import joint_steps
import mae_steps
import sit_steps
import torch
from torch import Tensor
from work import Work

from vitrail.engine.train.throughput import peak_memory

FAMILIES = {
    family: module for module in (mae_steps, joint_steps, crop_steps, sit_steps) for family in module.IMPLEMENTATIONS
}
# What allocators say that raise no class of their own: PyTorch's on a CPU, the C++ library's, CUDA's and cuBLAS's.
EXHAUSTED = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def measure(work: Work) -> dict[str, Any]:
    """Run the steps here.

    Returns:
        `loss` of the first step, `seconds` of each timed one, `first_step_s` (compilation included), `peak_bytes` of
        the process while it trains, `step_bytes` (what the steps added to model and images), `flops` of a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, flops = FAMILIES[work.family].prepare(work, device)
    before = forget_peak(device)
    started = time.perf_counter()
    loss = step().item()
    first_step = time.perf_counter() - started
    for _ in range(work.warmup):
        step()
    seconds = timed(step, work.steps, device)
    peak = peak_memory(device)
    return {
        "loss": loss,
        "seconds": seconds,
        "first_step_s": first_step,
        "peak_bytes": peak,
        "step_bytes": peak - before,
        "flops": flops,
    }


def timed(step: Callable[[], Tensor], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps in a row; on a GPU between events, so that the host may run ahead as it does."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        events[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for _ in range(count):
        step()
        marks.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(marks)]


def forget_peak(device: torch.device) -> int:
    """Let the peak begin anew, since building a model takes memory for a moment; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    # Some containers forbid it; the peak of building then counts, for all implementations alike.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def restrict(work: Work) -> None:
    """Make allocations beyond the limit fail, where a machine without memory would kill the process.

    Libraries are loaded and threads started before: neither says in a recognisable way that it lacks memory.
    """
    FAMILIES[work.family].load()
    square = torch.ones(256, 256)
    torch.mm(square, square)
    resource.setrlimit(resource.RLIMIT_DATA, (work.limit, work.limit))


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in EXHAUSTED)


def attempt(work: Work) -> dict[str, Any]:
    """`measure`, or `{"outcome": "out of memory"}`."""
    try:
        return measure(work)
    except (RuntimeError, MemoryError) as error:
        if not exhausted(error):
            raise
        return {"outcome": "out of memory"}


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation")
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=16)
    for field in fields(Work):
        if field.default is not MISSING:
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=type(field.default), default=field.default)
    work = Work(**vars(parser.parse_args()))
    known = FAMILIES[work.family]
    if work.implementation not in known.IMPLEMENTATIONS[work.family] or work.model not in known.MODELS:
        parser.error(f"{work.family} has {known.IMPLEMENTATIONS[work.family]} and {tuple(known.MODELS)}")
    if work.limit:
        restrict(work)
    print(json.dumps(attempt(work)))


if __name__ == "__main__":
    main()
