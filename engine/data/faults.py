"""What can be wrong with data: one error for the user, one ledger for files that cannot be used."""

import logging
import threading
from collections.abc import Mapping

logger = logging.getLogger("vitrail.data")

# Below this many bad files a stream is only stopped where they are most of the data set: a handful proves nothing.
_FEW = 8


class DataError(Exception):
    """The data cannot be used as asked. The message is one line: the value, what was expected, the remedy."""


class BadFiles:
    """Files that could not be read or decoded, by sample index. Safe to use from several threads.

    Each file is logged once. A stream that is mostly bad is stopped: its samples would be the same few images again
    and again, which looks like training and is none.

    Args:
        total: Number of samples of the source.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._indices: set[int] = set()
        self._reasons: dict[str, str] = {}
        self._read = 0
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    @property
    def reasons(self) -> Mapping[str, str]:
        """File name to reason, in order of discovery."""
        return dict(self._reasons)

    def count_read(self) -> None:
        """Record that one more file has been read."""
        with self._lock:
            self._read += 1

    def add(self, index: int, name: str, reason: str) -> None:
        """Record and log a file that cannot be used.

        Args:
            index: Sample index in the source.
            name: What the source calls it.
            reason: Why it cannot be used, in one line.

        Raises:
            DataError: If more than half of the data set, or of what has been read, is bad.
        """
        with self._lock:
            if index in self._indices:
                return
            self._indices.add(index)
            self._reasons[name] = reason
            bad = len(self._indices)
            read = max(self._read, bad)
        logger.warning("skipping %s: %s", name, reason)
        if 2 * bad > self._total or (bad >= _FEW and 2 * bad > read):
            raise DataError(
                f"{bad} of the first {read} files cannot be decoded (the last: {name}: {reason}); "
                "expected most of them to be images: look through them with `vitrail data check`"
            )
