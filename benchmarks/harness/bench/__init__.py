"""The benchmark harness: cases as data, rows as results, one way from one to the other.

A file `bench_*.py` says what is measured; here is how. `benchmarks/README.md` tells how to add a case.
"""

from .case import Case, Sizes, compiled
from .plugin import measures

__all__ = ["Case", "Sizes", "compiled", "measures"]
