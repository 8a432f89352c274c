"""Freed memory stays with a process that trains on a CPU."""

import json
import os
import platform
import subprocess
import sys

import pytest

from vitrail.engine.train import host_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked for it")

FAULTS = """
import json, resource, sys
from vitrail.engine.train.{module} import {function}
import torch
kept = {function}()

def step():
    # Small ones and large ones, all freed at the end; the large ones make up some 80,000 pages of 4 KiB.
    held = [torch.ones(size) for size in (1_000, 50_000, 20_000_000, 3_000_000, 60_000_000)]
    return sum(tensor[-1].item() for tensor in held)

for _ in range(20):
    step()  # until all have found their places: a freed one may have become a little too small for the next
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    assert step() == 5
print(json.dumps([bool(kept), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4]))
"""


def faults(function, module="host_memory", **env):
    """What a function returns, and page faults of a step after it."""
    settings = {**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC")}, **env}
    code = FAULTS.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual():
    """Page faults of a step that returns what it frees to the system; fewer where the system's pages are large."""
    kept, count = faults("keep_freed_memory", MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    return count


def test_the_next_step_takes_what_the_last_one_freed(usual):
    kept, count = faults("keep_freed_memory")
    assert kept
    assert count < usual / 50


def test_a_run_on_a_cpu_asks_for_it(usual):
    _, count = faults("start_processes", module="ds", CUDA_VISIBLE_DEVICES="")
    assert count < usual / 50


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"])
def test_who_has_decided_otherwise_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.mmap_threshold=131072" if name == "GLIBC_TUNABLES" else "65536")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("the C library was asked"))
    assert not host_memory.keep_freed_memory()


def test_a_c_library_that_is_not_asked_so_says_no(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory()
