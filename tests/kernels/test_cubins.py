"""The machine code of the compiled extension, without a GPU: spills, widths of loads, and the committed table."""

import re

import pytest
from lists import without_extension

from vitrail.kernels import cubins, extension, resources
from vitrail.kernels.resources import Resources

pytest.importorskip("triton")

LISTING = """
Fatbin elf code:
================
arch = sm_90
 Function _ZN7vitrail12visit_kernelINS_3EmaIfJEEEEEvT_:
  REG:48 STACK:0 SHARED:32 LOCAL:0 CONSTANT[0]:32280 TEXTURE:0 SURFACE:0 SAMPLER:0
\tcode for sm_90
\t\tFunction : _ZN7vitrail12visit_kernelINS_3EmaIfJEEEEEvT_
        /*0100*/   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0150*/   STL.64 [R1], R4 ;
Fatbin elf code:
================
arch = sm_80
 Function _ZN7vitrail12visit_kernelINS_3EmaIfJEEEEEvT_:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:32280 TEXTURE:0 SURFACE:0 SAMPLER:0
\tcode for sm_80
\t\tFunction : _ZN7vitrail12visit_kernelINS_3EmaIfJEEEEEvT_
        /*0130*/   STG.E.64 desc[UR4][R2.64], R4 ;
"""


@pytest.fixture(scope="module")
def measured():
    return cubins.measure()


def test_a_listing_is_read_by_kernel_and_architecture():
    table = cubins.read(LISTING)
    assert table == {
        "visit_kernel<Ema<float>>": {
            "90": Resources(48, 0, 32, 1, {"128": 1}, {}),
            "80": Resources(40, 8, 0, 0, {}, {"64": 1}),
        }
    }
    assert resources.faults(table["visit_kernel<Ema<float>>"]["80"], 80)
    assert resources.faults(table["visit_kernel<Ema<float>>"]["90"], 90)


@without_extension
def test_no_kernel_spills(measured):
    found = {
        (name, target): faults
        for name, row in measured.items()
        for target, entry in row.items()
        if (faults := resources.faults(entry, int(target)))
    }
    assert len(measured) >= 60
    assert not found


@without_extension
def test_every_kernel_is_there_for_every_architecture(measured):
    assert {tuple(sorted(row, key=int)) for row in measured.values()} == {("80", "90", "100")}


@without_extension
def test_resources_are_those_committed(measured):
    toolkit, committed = resources.from_json(cubins.TABLE.read_text(), "toolkit")
    assert measured.keys() == committed.keys(), "run python -m vitrail.kernels resources --write"
    if extension.facts()["toolkit"] != toolkit:
        pytest.skip(f"the table is for CUDA {toolkit}, and other toolkits allot other registers")
    changed = [name for name, row in measured.items() if row != committed[name]]
    assert not changed, f"{changed} changed; if meant, run python -m vitrail.kernels resources --write"


def streams(name: str) -> tuple[list[str], list[str]]:
    """The element types that an operation over lists reads and writes, from the kernel's name."""
    operation, arguments = re.fullmatch(r"visit_kernel<(\w+)<(.*)>>", name).groups()
    words = arguments.split(", ")
    types = [word for word in words if word in ("float", "bf16")]
    param, grad, *rest = [*types, ""]
    if operation == "AdamWEma":  # the optional streams are the teacher, which is read as well, and copies
        optional, teacher = types[2:], words[2] == "true"
        read = [param, grad, "float", "float", *optional[:teacher]]
        return read, [param, "float", "float", *optional]
    return {
        "Scale": (types, types),
        "SumOfSquares": (types, []),
        "Ema": (["float", types[0]], ["float", *types[1:]]),
        "LarsNorms": (types, []),
        "Lars": ([*types, "float"], [param, "float"]),
        "LambMoments": ([*types, *rest[:1]], [*rest[:1]] * 2),
        "LambWeights": ([*types, types[-1]], [param]),
    }[operation]


@without_extension
def test_lists_are_loaded_and_stored_by_16_bytes(measured):
    """Two instructions for the 8 fp32 elements of a thread, one for 8 of bf16; besides, narrow ones for the ends.

    The compiler may have unrolled the loop.
    """
    kernels = [name for name in measured if name.startswith("visit_kernel<")]
    assert len(kernels) > 50
    for name in kernels:
        read, written = (sum(2 if kind == "float" else 1 for kind in kinds) for kinds in streams(name))
        for target, entry in measured[name].items():
            rounds, rest = divmod(entry.loads.get("128", 0), read)
            assert rounds >= 1, f"{name} on {target}: {entry.loads}"
            assert rest == 0, f"{name} on {target}: {entry.loads}"
            assert entry.stores.get("128", 0) == rounds * written, f"{name} on {target}: {entry.stores}"


@without_extension
def test_the_gather_copies_windows_of_16_bytes(measured):
    """Pixels reach shared memory 16 bytes at a time; the only other load is that of the index."""
    kernels = [name for name in measured if name.startswith("gather_kernel<")]
    assert len(kernels) >= 24
    for name in kernels:
        for target, entry in measured[name].items():
            assert entry.copies.keys() == {"128"}, f"{name} on {target}: {entry.copies}"
            assert entry.loads.keys() == {"64"}, f"{name} on {target}: {entry.loads}"
            if name.endswith("true>"):  # rows that are a multiple of 16 bytes
                assert entry.stores.get("128", 0) > 0, f"{name} on {target}: {entry.stores}"
