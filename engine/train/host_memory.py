"""The C library's memory, which a training step on a CPU frees and takes again thousands of times."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.")
"""What glibc's environment variables for the same thing are called, or have in their values."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, for its next step to take.

    PyTorch's tensors on a CPU come from malloc, and glibc's returns large ones to the operating system. The next step
    asks for them again, and the system clears them page by page as they are touched: in a step of SiT with ViT-S/16
    on 16 images 350,000 page faults, a tenth of its time. Kept, the memory is what a step needs at its peak, which it
    would come to need again a step later, and what is lost between its pieces until, after some steps, all fit.

    Whoever sets one of glibc's environment variables for this (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_`,
    `MALLOC_MMAP_THRESHOLD_`, or `glibc.malloc.` in `GLIBC_TUNABLES`) has decided otherwise, and is left alone.

    Returns:
        Whether it does; not where the environment has decided, nor where the C library cannot be told (musl, macOS).
    """
    if any(name in os.environ or name in os.environ.get("GLIBC_TUNABLES", "") for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Never trim the heap, and take nothing from outside it: what is mapped by itself is unmapped when it is freed.
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))
