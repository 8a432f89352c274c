"""`python -m vitrail.kernels`: the environment and the support matrix.

`resources` shows what compiled kernels use, `tune` measures launch configurations on this GPU.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import cubins, extension, report, resources, tuner
from .checks import interpreting, triton_installed, triton_reasons
from .tuning import PACKAGE


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vitrail.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("resources", help="compile every kernel ahead of time and show what it uses")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--write", action="store_true", help=f"rewrite {resources.TABLE.name} and {cubins.TABLE.name}")
    output.add_argument("--json", action="store_true", help="print Triton's table as JSON")
    command = commands.add_parser("tune", help="measure launch configurations on this GPU, for later launches to use")
    command.add_argument("ops", nargs="*", metavar="op", help="what to tune; everything by default")
    command.add_argument("--dry", action="store_true", help="only compile the candidates and list them; needs no GPU")
    command.add_argument("--output", type=Path, default=PACKAGE, metavar="FOLDER", help="instead of the package's own")
    arguments = parser.parse_args()

    if arguments.command is None:
        Console().print(report.environment(), report.flags(), report.support(), report.configurations())
        return 0
    if arguments.command == "tune":
        return _tune(tuple(arguments.ops), arguments.dry, arguments.output)
    if interpreting():
        parser.error("TRITON_INTERPRET is set, and interpreted kernels do not compile; unset it")
    return _resources(arguments.json, arguments.write)


def _resources(as_json: bool, write: bool) -> int:
    """Shows, prints or rewrites what the kernels use, Triton's and those of the extension; fails if one has a fault."""
    import triton

    table = resources.measure()
    tables = [(table, "triton", triton.__version__, resources.TABLE)]
    if as_json:
        sys.stdout.write(resources.as_json(*tables[0][:3]))
    elif (why := extension.missing()) is not None:
        sys.stderr.write(f"only Triton's kernels: {why}\n")
    else:
        tables.append((cubins.measure(), "toolkit", extension.facts().get("toolkit", "unknown"), cubins.TABLE))
    for table, compiler, version, path in tables:
        if write:
            path.write_text(resources.as_json(table, compiler, version))
        elif not as_json:
            Console().print(_table(table, f"compiled with {compiler} {version}"))
    used = [(entry, int(cc)) for table, *_ in tables for row in table.values() for cc, entry in row.items()]
    return 1 if any(resources.faults(entry, cc) for entry, cc in used) else 0


def _tune(ops: tuple[str, ...], dry: bool, output: Path) -> int:
    """Tunes the named ops, or all; says in one line, with exit status 2, why that is not possible."""
    reasons = [] if triton_installed() else ["triton is not installed; pip install triton"]
    if not reasons and not dry:
        if torch.cuda.is_available():
            reasons = triton_reasons(torch.device("cuda", torch.cuda.current_device()))
        else:
            reasons = ["it measures on a CUDA GPU, and there is none here; --dry compiles the candidates without one"]
    if not reasons and interpreting():
        reasons = ["TRITON_INTERPRET is set, and interpreted kernels do not compile; unset it"]
    known = () if reasons else tuple(tuner.kernel_modules())
    if not reasons and not set(ops) <= set(known):
        reasons = [f"there is nothing to tune in {', '.join(sorted(set(ops) - set(known)))}; try {', '.join(known)}"]
    if reasons:
        sys.stderr.write(f"tune: {reasons[0]}\n")
        return 2
    if dry:
        return _dry(ops or known)
    try:
        for op in ops or known:
            _measure(op, output)
    except OSError as error:
        sys.stderr.write(f"tune: {error}; --output names another folder\n")
        return 2
    if output != PACKAGE:
        Console().print(f"VITRAIL_CONFIGS={output.resolve()} makes launches read these files")
    return 0


def _measure(op: str, output: Path) -> None:
    """Tunes one op and writes its file, telling of each measurement as it is made."""
    console, device = Console(highlight=False), torch.device("cuda", torch.cuda.current_device())
    path = tuner.prepare(output, op, device)  # a folder that cannot be written is noticed before the measuring
    entries = []
    for result in tuner.tune(op, device):
        entry = result.entry
        config = ", ".join(f"{name} {value}" for name, value in entry.config.items())
        console.print(
            f"{entry.kernel}, {result.case}: {entry.us:.1f} µs with {config}; default {entry.default_us:.1f} µs"
        )
        for reason in result.refused:
            console.print(f"  refused {reason}", markup=False)
        entries.append(entry)
    tuner.write(path, device, entries)
    console.print(f"wrote {path}")


def _dry(ops: tuple[str, ...]) -> int:
    """Prints every candidate with what it uses when compiled; fails if a default has a fault."""
    table = Table("kernel", "candidate", "registers", "shared", "refused", title="candidates, compiled for cc 9.0")
    modules, failed, previous = tuner.kernel_modules(), False, None
    for (op, kernel, number), variants in tuner.compile_candidates(ops).items():
        tunable = next(tunable for tunable in modules[op].TUNABLES if tunable.kernel == kernel)
        config = tunable.candidates[number]
        is_default = config == tunable.default
        faults = [fault for used in variants for fault in resources.faults(used, tuner.DRY_CAPABILITY)]
        failed |= is_default and bool(faults)
        described = ", ".join(f"{name} {value}" for name, value in config.items()) + (" (default)" * is_default)
        numbers = (str(max(used.registers for used in variants)), str(max(used.shared for used in variants)))
        table.add_row(kernel if kernel != previous else "", described, *numbers, "; ".join(sorted(set(faults))))
        previous = kernel
    Console().print(table)
    return 1 if failed else 0


def _table(measured: resources.Measured, title: str) -> Table:
    table = Table("kernel", "cc", "registers", "shared", "loads", "stores", "copies", "mma", "faults", title=title)
    for name, row in measured.items():
        for index, (target, entry) in enumerate(row.items()):
            widths = [
                ", ".join(f"{count}x{width}" for width, count in counts.items())
                for counts in (entry.loads, entry.stores, entry.copies)
            ]
            mma = ", ".join(f"{count} {instruction}" for instruction, count in entry.mma.items())
            faults = "; ".join(resources.faults(entry, int(target)))
            capability = f"{int(target) // 10}.{int(target) % 10}"
            numbers = (str(entry.registers), str(entry.shared))
            table.add_row("" if index else name, capability, *numbers, *widths, mma, faults)
    return table


if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
