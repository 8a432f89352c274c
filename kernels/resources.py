"""What the compiled Triton kernels use: registers, stack, shared memory, widths of loads and stores, tensor cores.

Everything here works without a GPU. The launchers are called on meta tensors and their launches recorded for every
target; each is compiled ahead of time with the signature that the just-in-time compiler would derive; the machine code
is read back with cuobjdump. `resources.json` holds the numbers, so that a change shows up in a diff.
"""

import collections
import functools
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launch import Launch, launches_of

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes for one CTA; the compiler does not check it
TABLE = Path(__file__).with_name("resources.json")

# Modules with representative_calls(): builders, by name, of arguments on meta tensors for each pass.
KERNEL_MODULES = tuple(
    f"vitrail.kernels.{op}.kernel"
    for op in (
        "random_masking",
        "masked_patch_gather",
        "restore_tokens",
        "masked_patch_loss",
        "region_match",
        "softmax_row_pass",
        "softmax_col_pass",
        "window_attention",
    )
)

Name = TypeVar("Name", bound=Hashable)

TYPES = {
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel uses when compiled for one target.

    Attributes:
        registers: For each thread.
        stack: Bytes for each thread; anything but 0 means spills or a local array.
        shared: Bytes of shared memory for each CTA.
        local: Number of local-memory instructions (LDL, STL): spills.
        loads: Number of global load instructions by width in bits.
        stores: Number of global store instructions by width in bits.
        copies: Number of asynchronous copies from global into shared memory (LDGSTS) by width in bits.
        mma: Number of tensor-core instructions by name: HMMA, and for whole warp groups HGMMA (9.0), UTCHMMA (10.0).
    """

    registers: int
    stack: int
    shared: int
    local: int
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    mma: dict[str, int] = field(default_factory=dict)


Measured = dict[str, dict[str, Resources]]  # by kernel, and by compute capability: "80" is 8.0


@functools.cache
def collect() -> dict[tuple[str, int], Launch]:
    """Returns the launches of every representative call, by `op/call/kernel` and target.

    A launch that compiles as an earlier one does on every target is left out.
    """
    launches: dict[tuple[str, int], Launch] = {}
    seen: set[tuple[int, str]] = set()
    for module_name in KERNEL_MODULES:
        module = importlib.import_module(module_name)
        for call_name, build in module.representative_calls().items():
            passes = build(device="meta")
            recorded = {target: launches_of(module, passes, target) for target in CAPABILITIES}
            new = [
                (target, launch)
                for target, made in recorded.items()
                for launch in made
                if (target, variant(launch)) not in seen
            ]
            seen |= {(target, variant(launch)) for target, launch in new}
            kernels = dict.fromkeys(launch.kernel.__name__ for _, launch in new)
            chosen = [(target, launch) for target, made in recorded.items() for launch in made] + new
            by_name = {(launch.kernel.__name__, target): launch for target, launch in chosen}
            for kernel, target in ((kernel, target) for kernel in kernels for target in CAPABILITIES):
                if (kernel, target) in by_name:
                    name = f"{module_name.split('.')[-2]}/{call_name}/{kernel}"
                    launches[name, target] = by_name[kernel, target]
    return launches


def measure() -> Measured:
    """Compiles all launches for every target.

    Returns:
        Resources by launch and by compute capability ("80" is 8.0).
    """
    jobs = [((name, target), target) for name, target in collect()]
    table: dict[str, dict[str, Resources]] = collections.defaultdict(dict)
    for ((name, target), _), resources in zip(jobs, compile_all(collect, jobs), strict=True):
        table[name][str(target)] = resources
    return dict(table)


def compile_all(source: Callable[[], dict[Name, Launch]], jobs: list[tuple[Name, int]]) -> Iterator[Resources]:
    """Compiles launches in several processes.

    Args:
        source: Returns the launches by name; it is called in every process, and so must be picklable and quick.
        jobs: Names, each with the target to compile for.

    Yields:
        What each job's kernel uses, in order.
    """
    # Forking a process that holds torch's threads is not safe; spawned workers import afresh.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        yield from pool.map(functools.partial(_compile_job, source), jobs, chunksize=4)


def _compile_job(source: Callable[[], dict[Name, Launch]], job: tuple[Name, int]) -> Resources:
    name, capability = job
    return compile_launch(source()[name], capability)


def variant(launch: Launch) -> str:
    """Returns a text that is the same for launches that compile alike."""
    return repr((launch.kernel, specialise(launch), launch.options))


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compiles one launch ahead of time and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    options = {key: value for key, value in launch.options.items() if key not in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return parse(disassemble(compiled.asm["cubin"]), compiled.metadata.shared)


def specialise(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Derives a launch's compile-time signature as the just-in-time compiler does.

    An integer equal to 1 becomes a constant; an integer that is a multiple of 16 is marked as such, and so are
    pointers, since the allocator aligns tensors. The elements of a tuple are treated one by one.

    Returns:
        Type by argument name; constants and attributes by the position of the argument, and of the element in it.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...], constant: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(element, (*path, index), constant) for index, element in enumerate(value))
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return _type(value)

    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    signature = {
        parameter.name: kind(values[parameter.name], (index,), parameter.is_constexpr)
        for index, parameter in enumerate(launch.kernel.params)
    }
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def cuobjdump() -> str:
    """Returns the path of the disassembler that comes with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def disassemble(cubin: bytes) -> str:
    """Returns cuobjdump's resource line and listing of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(listing: str, shared: int) -> Resources:
    """Reads a listing of `disassemble`; `shared` is the dynamic shared memory that Triton asks for."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if usage is None:
        raise ValueError("cuobjdump printed no resource usage")
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in ("LDG", "STG", "LDGSTS")}
    local = 0
    for name, suffix in re.findall(r"\b(LDG|STG|LDGSTS|LDL|STL)((?:\.\w+)*)\s", listing):
        if name in counts:
            counts[name][_width(suffix)] += 1
        else:
            local += 1
    loads, stores, copies = (dict(sorted(count.items(), key=lambda item: int(item[0]))) for count in counts.values())
    mma = collections.Counter(re.findall(r"\b(UTC[A-Z]*MMA|[A-Z]G?MMA)\b", listing))
    return Resources(int(usage[1]), int(usage[2]), shared, local, loads, stores, copies, dict(sorted(mma.items())))


def _width(suffix: str) -> str:
    """Returns the width in bits that the suffix of a load or store names; plain ones move 32."""
    match = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", suffix)
    return (match[1] or match[2]) if match else "32"


def faults(resources: Resources, capability: int) -> list[str]:
    """Returns what no kernel may do, whatever the compiler version: spill, use the stack, ask for too much memory."""
    found = []
    if resources.stack or resources.local:
        found.append(f"{resources.stack} B of stack and {resources.local} local-memory instructions, expected none")
    if resources.shared > SHARED_LIMIT[capability]:
        found.append(f"{resources.shared} B of shared memory, the limit is {SHARED_LIMIT[capability]} B")
    return found


def as_json(table: Measured, compiler: str, version: str) -> str:
    """Formats a table with the compiler and version that it holds for, one line for each kernel and target."""
    lines = []
    for name, row in table.items():
        entries = ",\n".join(f'      "{target}": {json.dumps(asdict(entry))}' for target, entry in row.items())
        lines.append(f"    {json.dumps(name)}: {{\n{entries}\n    }}")
    body = ",\n".join(lines)
    return f'{{\n  "{compiler}": "{version}",\n  "kernels": {{\n{body}\n  }}\n}}\n'


def from_json(text: str, compiler: str) -> tuple[str, Measured]:
    """Reads what `as_json` wrote: the compiler's version and the table."""
    document = json.loads(text)
    table = {
        name: {target: Resources(**entry) for target, entry in row.items()} for name, row in document["kernels"].items()
    }
    return document[compiler], table
