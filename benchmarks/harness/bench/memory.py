"""The most memory that a call holds beyond what was there before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitrail.engine.train.throughput import peak_memory


def peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Run `call` once and return the most bytes that it held beyond those held before it.

    On a GPU that is what PyTorch allocated; on a CPU what became resident, None where the kernel does not let a process
    reset its high-water mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory that the allocator keeps would be taken again without becoming resident.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = peak_memory(device)
    call()
    return peak_memory(device) - before
