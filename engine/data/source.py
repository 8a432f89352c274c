"""Where encoded images come from: anything that can be asked for the bytes of sample i.

A source knows nothing of order, batches or decoding.
"""

from typing import Protocol


class Source(Protocol):
    """Encoded images with optional labels. Reading is safe from several threads."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, or None for unlabelled data."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what the source lists: two runs saw the same data set if and only if it agrees."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError where it cannot be read."""

    def label(self, index: int) -> int | None:
        """Class number, or None for unlabelled data."""

    def name(self, index: int) -> str:
        """What to call the sample in messages."""
