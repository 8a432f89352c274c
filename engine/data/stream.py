"""The path of every sample: slots in, decoded micro-batches out, in order, whatever the files are like."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from .reader import DecodeError, Reader, Sample, Slot

logger = logging.getLogger("vitrail.data")


class Decoder(Protocol):
    """Turns read samples into tensors."""

    def decode(self, batches: Iterator[Sequence[Sample]]) -> Iterator[list[Tensor]]:
        """Decode and augment, pulling batches ahead of what is yielded.

        Args:
            batches: Non-empty micro-batches; each is pulled once, in order.

        Yields:
            Per batch, in order, one uint8 tensor [b, height, width, 3] per view, as `Batch.views` describes them.

        Raises:
            DecodeError: In place of a batch with a sample that cannot be decoded. The iterator is then spent; the
                decoder is not.
        """

    def close(self) -> None:
        """Release threads and memory."""


class Stream:
    """Reads ahead, decodes, and replaces what cannot be decoded.

    A decoder fails for a whole batch and does not say which file was to blame. The samples in flight are then decoded
    one by one; the bad ones are recorded and their slots are filled again; and decoding starts over with the same
    batches. All other samples keep their places and their pixels.

    Args:
        reader: Fills slots.
        decoder: Decodes samples.
        threads: Threads for reading.
        prefetch: Batches read ahead of the decoder.
    """

    def __init__(self, reader: Reader, decoder: Decoder, *, threads: int, prefetch: int) -> None:
        self._reader = reader
        self._decoder = decoder
        self._threads = threads
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vitrail-read")

    def run(self, batches: Iterable[Sequence[Slot]]) -> Iterator[tuple[list[Sample], list[Tensor]]]:
        """Read and decode micro-batches in order.

        Args:
            batches: Slots of each micro-batch.

        Yields:
            The samples that were decoded (without those slots that have no usable candidate) and their views. A batch
            of which nothing is left is left out.
        """
        reading = self._read(iter(batches))
        flying: deque[list[Sample]] = deque()

        def pull() -> Iterator[list[Sample]]:
            yield from tuple(flying)
            for samples in reading:
                flying.append(samples)
                yield samples

        while True:
            try:
                for views in self._decoder.decode(pull()):
                    yield flying.popleft(), views
                return
            except DecodeError as error:
                repaired = self._repair(flying, error)
                flying.clear()
                flying.extend(repaired)

    def _read(self, batches: Iterator[Sequence[Slot]]) -> Iterator[list[Sample]]:
        """Read `prefetch` batches ahead. Batches without any usable sample are dropped."""
        ahead: deque[list[Future[list[Sample]]]] = deque()
        more = True
        while more or ahead:
            while more and len(ahead) <= self._prefetch:
                slots = next(batches, None)
                more = slots is not None
                if slots is not None:
                    share = -(-len(slots) // self._threads)
                    chunks = [slots[start : start + share] for start in range(0, len(slots), share)]
                    ahead.append([self._pool.submit(self._fill, chunk) for chunk in chunks])
            if ahead:
                samples = [sample for chunk in ahead.popleft() for sample in chunk.result()]
                if samples:
                    yield samples

    def _fill(self, slots: Sequence[Slot]) -> list[Sample]:
        return [sample for slot in slots if (sample := self._reader.fill(slot)) is not None]

    def _repair(self, flying: Iterable[list[Sample]], error: DecodeError) -> list[list[Sample]]:
        """Find the samples that cannot be decoded and fill their slots again.

        Raises:
            DecodeError: The original error, if each sample alone can be decoded: then it is no file's fault.
        """
        batches = [list(batch) for batch in flying]
        reasons = self._failures({sample.index: sample for batch in batches for sample in batch})
        if not reasons:
            raise error
        for index, reason in reasons.items():
            self._reader.reject(index, reason)
        repaired = (
            self._fill([sample.slot for sample in batch]) if any(sample.index in reasons for sample in batch) else batch
            for batch in batches
        )
        return [batch for batch in repaired if batch]

    def _failures(self, samples: dict[int, Sample]) -> dict[int, str]:
        """Reasons by index for those samples that cannot be decoded on their own."""
        reasons = {}
        remaining = deque(samples.values())
        while remaining:
            try:
                for _ in self._decoder.decode(iter([[sample] for sample in remaining])):
                    remaining.popleft()
            except DecodeError as error:
                reasons[remaining.popleft().index] = str(error)
        return reasons

    def close(self) -> None:
        """Stop reading and decoding."""
        self._pool.shutdown(cancel_futures=True)
        self._decoder.close()
