"""The compiled kernels, without a GPU: spills, shared memory, and the committed table of what they use."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from vitrail.kernels import resources
from vitrail.kernels.launch import Launch, launches_of
from vitrail.kernels.resources import Resources

pytest.importorskip("triton")

SPILLING = Resources(registers=255, stack=16, shared=0, local=4)
LISTING = """
 Function kernel:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:588 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0100*/   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/        LDG.E.U8.CONSTANT R4, desc[UR4][R2.64] ;
        /*0120*/        LDG.E R4, desc[UR4][R2.64] ;
        /*0130*/        STG.E.64 desc[UR4][R2.64], R4 ;
        /*0140*/        LDGSTS.E.128 [R1], desc[UR4][R2.64] ;
        /*0150*/        STL.64 [R1], R4 ;
        /*0160*/        HGMMA.64x128x16.F32.BF16 R152, gdesc[UR8], RZ, !UPT ;
        /*0170*/        HGMMA.64x128x16.F32.BF16 R152, gdesc[UR12], R152, gsb0 ;
        /*0180*/        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR5], tmem[UR8], idesc[UR9] ;
        /*0190*/        HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
"""

INSTRUCTIONS = {"HGMMA": 2, "HMMA": 1, "UTCHMMA": 1}


@pytest.fixture(scope="module")
def measured():
    """Compiles everything in a process without the interpreter, which this one may be running under."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "vitrail.kernels", "resources", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return resources.from_json(result.stdout, "triton")


@pytest.mark.slow
def test_no_kernel_spills_or_asks_for_too_much_shared_memory(measured):
    _, table = measured
    found = {
        (name, target): faults
        for name, row in table.items()
        for target, entry in row.items()
        if (faults := resources.faults(entry, int(target)))
    }
    assert len(table) >= 40
    assert not found


@pytest.mark.slow
def test_resources_are_those_committed(measured):
    version, table = measured
    committed_version, committed = resources.from_json(resources.TABLE.read_text(), "triton")
    assert table.keys() == committed.keys(), "run python -m vitrail.kernels resources --write"
    if version != committed_version:
        pytest.skip(f"the table is for Triton {committed_version}, and other versions allot other registers")
    changed = [name for name, row in table.items() if row != committed[name]]
    assert not changed, f"{changed} changed; if meant, run python -m vitrail.kernels resources --write"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "load", "store"),
    [
        ("masked_patch_gather/uint8 HWC P16/gather_kernel", 64, 128),  # 8 pixels of a lane, and 8 bf16 values
        ("masked_patch_gather/uint8 HWC P14/gather_kernel", 16, 128),  # rows of 42 bytes begin at even addresses
        ("masked_patch_loss/uint8 HWC P16/loss_kernel", 64, None),
        ("masked_patch_loss/uint8 HWC P16/loss_backward_kernel", 32, 128),  # 32: the upstream scalar
        ("restore_tokens/bf16 with fp32 positions D512/restore_kernel", 64, 128),  # 64: the ranks
        ("restore_tokens/bf16 with fp32 positions D512/restore_backward_kernel", 64, 128),
    ],
)
def test_loads_and_stores_are_as_wide_as_the_layout_allows(measured, kernel, load, store):
    for entry in measured[1][kernel].values():
        assert min(map(int, entry.loads)) == load
        assert store is None or min(map(int, entry.stores)) == store


@pytest.mark.slow
@pytest.mark.parametrize("op", ["row", "col"])
@pytest.mark.parametrize("call", ["bf16 D256", "bf16 D64", "bf16 D512", "fp16 D96", "tf32 D256"])
def test_the_softmax_passes_multiply_on_tensor_cores(measured, op, call):
    row = measured[1][f"softmax_{op}_pass/{call}/{op}_pass_kernel"]
    assert row["80"].mma.keys() == {"HMMA"}
    assert row["90"].mma.keys() == {"HGMMA"}
    assert row["100"].mma.keys() == {"UTCHMMA"}


@pytest.mark.slow
@pytest.mark.parametrize("call", ["w7 shifted", "w8 shifted", "w7 D64", "w14 shifted", "w14 shifted and padded"])
def test_windowed_attention_multiplies_on_tensor_cores(measured, call):
    rows = {name: row for name, row in measured[1].items() if name.startswith(f"window_attention/bf16 {call}/")}
    sums = ("/table_backward_kernel", "/sum_partials_kernel")
    kernels = [row for name, row in rows.items() if not name.endswith(sums)]
    assert len(kernels) >= 2
    for target, instruction in (("80", "HMMA"), ("90", "HGMMA"), ("100", "UTCHMMA")):
        assert all(instruction in row[target].mma for row in kernels if target in row)


@pytest.mark.slow
def test_tiles_fit_consumer_gpus(measured):
    """Those of the capabilities 8.6, 8.9 and 12.0, which launch what is compiled for 8.0 here."""
    ops = ("softmax", "window_attention")
    passes = {name: row["80"].shared for name, row in measured[1].items() if name.startswith(ops) and "80" in row}
    assert passes
    assert max(passes.values()) <= 101_376, passes


def test_launches_are_recorded_for_a_target():
    module = importlib.import_module("vitrail.kernels.softmax_row_pass.kernel")
    passes = module.representative_calls()["bf16 D256"](device="meta")
    first = {target: launches_of(module, passes, target)[0].options for target in resources.CAPABILITIES}
    assert {target: options["BLOCK_KEYS"] for target, options in first.items()} == {80: 64, 90: 128, 100: 64}


def test_faults_of_a_bad_kernel_are_found():
    assert resources.faults(SPILLING, 90) == ["16 B of stack and 4 local-memory instructions, expected none"]
    assert resources.faults(Resources(32, 0, 200_000, 0), 80) == ["200000 B of shared memory, the limit is 166912 B"]
    assert resources.faults(Resources(32, 0, 200_000, 0), 90) == []


def test_a_listing_is_read_by_width_and_spills_are_counted():
    expected = Resources(40, 0, 1024, 1, {"8": 1, "32": 1, "128": 1}, {"64": 1}, {"128": 1}, INSTRUCTIONS)
    assert resources.parse(LISTING, 1024) == expected


def test_the_table_survives_writing_and_reading():
    table = {"op/call/kernel": {"90": SPILLING}}
    assert resources.from_json(resources.as_json(table, "triton", "3.9"), "triton") == ("3.9", table)


def test_signatures_are_specialised_as_the_just_in_time_compiler_does():
    class Parameter:
        def __init__(self, name: str, is_constexpr: bool = False) -> None:
            self.name, self.is_constexpr = name, is_constexpr

    class Kernel:
        params = (*map(Parameter, ("x", "count", "strides", "far", "scale")), Parameter("BLOCK", True))
        arg_names = tuple(parameter.name for parameter in params)

    x = torch.empty(1, dtype=torch.bfloat16, device="meta")
    launch = Launch(Kernel, (1,), (x, 7, (48, 3, 1), 2**40, 1.0), {"BLOCK": 64, "num_warps": 4})
    signature, constants, attributes = resources.specialise(launch)
    assert list(signature.values()) == ["*bf16", "i32", ("i32", "i32", "constexpr"), "i64", "fp32", "constexpr"]
    assert constants == {(2, 2): 1, (5,): 64}
    assert list(attributes) == [(0,), (2, 0), (3,)]
