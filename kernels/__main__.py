"""`python -m vitrail.kernels`: the environment and the support matrix; `resources`: what compiled kernels use."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from . import report, resources
from .checks import interpreting


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vitrail.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("resources", help="compile every kernel ahead of time and show what it uses")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--write", action="store_true", help=f"rewrite {resources.TABLE.name}")
    output.add_argument("--json", action="store_true", help="print the table as JSON")
    arguments = parser.parse_args()

    if arguments.command is None:
        Console().print(report.environment(), report.flags(), report.support())
        return 0
    if interpreting():
        parser.error("TRITON_INTERPRET is set, and interpreted kernels do not compile; unset it")
    table = resources.measure()
    if arguments.json:
        sys.stdout.write(resources.as_json(table))
    elif arguments.write:
        resources.TABLE.write_text(resources.as_json(table))
    else:
        Console().print(_table(table))
    found = [fault for row in table.values() for cc, entry in row.items() for fault in resources.faults(entry, int(cc))]
    return 1 if found else 0


def _table(measured: dict[str, dict[str, resources.Resources]]) -> Table:
    table = Table("kernel", "cc", "registers", "shared", "loads", "stores", "faults", title="compiled kernels")
    for name, row in measured.items():
        for index, (target, entry) in enumerate(row.items()):
            widths = [
                ", ".join(f"{count}x{width}" for width, count in counts.items())
                for counts in (entry.loads, entry.stores)
            ]
            faults = "; ".join(resources.faults(entry, int(target)))
            capability = f"{int(target) // 10}.{int(target) % 10}"
            numbers = (str(entry.registers), str(entry.shared))
            table.add_row("" if index else name, capability, *numbers, *widths, faults)
    return table


if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
