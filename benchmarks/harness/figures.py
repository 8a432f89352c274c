"""Write the README's figures, the page of all figures and the charts from the rows in `benchmarks/results`.

    python benchmarks/harness/figures.py            # writes what has changed
    python benchmarks/harness/figures.py --check    # says what would change, and exits 1 if anything would

Nobody writes a figure by hand: the part of README.md between the markers, docs/benchmarks.md and
docs/images/benchmarks are made here, and a test holds them to the rows.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import charts, report
from bench.environment import ROOT, digest_of
from bench.page import page
from bench.results import Machine, in_history, no_history, read_machines, untraceable

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class Difference:
    """A file that is not what the rows make it."""

    path: Path
    why: str
    content: Callable[[], bytes] | None
    """Makes it right; None where it has to go."""


def splice(text: str, section: str) -> str:
    """A text with the part between the markers replaced.

    Raises:
        ValueError: The markers are not there, once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END}, once and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{section}\n{text[text.index(END) :]}"


def differences(root: Path, machines: Sequence[Machine]) -> list[Difference]:
    """What under `root` is not as the rows make it."""
    drawn = {machine.name: charts.drawn(machine) for machine in machines}
    readme = (root / "README.md").read_text()
    texts = {
        root / "README.md": splice(readme, report.section(machines, drawn)),
        root / report.PAGE: page(machines, drawn),
    }
    found = [
        Difference(path, _first_line(path, text), text.encode)
        for path, text in texts.items()
        if not path.exists() or path.read_text() != text
    ]
    return found + _pictures(root / "docs" / report.PICTURES, machines, drawn)


def _first_line(path: Path, text: str) -> str:
    """The first line that differs."""
    old = path.read_text().splitlines() if path.exists() else []
    new = text.splitlines()
    for number, (was, becomes) in enumerate(zip(old, new, strict=False), 1):
        if was != becomes:
            return f"line {number} is\n    {was}\n  and would be\n    {becomes}"
    return f"has {len(old)} lines and would have {len(new)}"


def _pictures(folder: Path, machines: Sequence[Machine], drawn: Mapping[str, list[str]]) -> list[Difference]:
    wanted = {folder / one.name / f"{name}.png": (name, one) for one in machines for name in drawn[one.name]}
    found = [
        Difference(path, "is not drawn from these rows", partial(charts.png, name, machine))
        for path, (name, machine) in wanted.items()
        if not charts.is_current(path, name, machine)
    ]
    left = [path for path in sorted(folder.rglob("*.png")) if path not in wanted]
    return found + [Difference(path, "has no rows", None) for path in left]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="another copy of README.md, docs/ and benchmarks/results/"
    )
    options = parser.parse_args(arguments)
    machines = read_machines(options.root / "benchmarks" / "results")
    found = differences(options.root, machines)
    for one in found:
        print(f"{one.path.relative_to(options.root)} {one.why}")
        if options.check:
            continue
        if one.content is None:
            one.path.unlink()
        else:
            content = one.content()
            one.path.parent.mkdir(parents=True, exist_ok=True)
            one.path.write_bytes(content)
    for fault in [] if no_history() else untraceable(machines, in_history, digest_of):
        print(f"warning: {fault}", file=sys.stderr)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
