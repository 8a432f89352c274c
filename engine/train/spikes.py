"""Finding spikes in gradient norms and dips in accuracies, and telling both from noise."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# Standard deviations per median absolute deviation of a normal distribution.
MAD_TO_SIGMA = 1.4826
# Least standard deviation of a log-norm that is believed in: a tenth of a percent of the norm.
LEAST_SIGMA = 1e-3


@dataclass(frozen=True)
class Spike:
    """A norm far above those before it."""

    value: float
    """The norm."""
    median: float
    """Median of the norms in the window."""
    deviations: float
    """Robust standard deviations of the log-norm above the median's."""

    @property
    def ratio(self) -> float:
        """The norm in units of the median."""
        return self.value / self.median


class SpikeDetector:
    """Compares each norm with a window of those before it.

    Gradient norms are positive and their noise is a factor, so logarithms are compared: with their median, in units of
    their median absolute deviation. Neither is moved by a few outliers. A spike enters the window as the largest value
    that would have been none, so that a lasting change of level is learned, and a spike does not widen the window.
    """

    def __init__(self, *, window: int, history: int, deviations: float, ratio: float) -> None:
        self.history, self.deviations, self.ratio = history, deviations, ratio
        self._logs: deque[float] = deque(maxlen=window)

    def add(self, norm: float) -> Spike | None:
        """Take the next norm, finite, and judge it; zero, which has no logarithm, is passed over."""
        if norm <= 0.0:
            return None
        log = math.log(norm)
        spike = None
        if len(self._logs) >= self.history:
            middle = median(self._logs)
            sigma = max(MAD_TO_SIGMA * median(abs(value - middle) for value in self._logs), LEAST_SIGMA)
            limit = middle + max(self.deviations * sigma, math.log(self.ratio))
            if log > limit:
                spike = Spike(norm, math.exp(middle), (log - middle) / sigma)
                log = limit
        self._logs.append(log)
        return spike

    @property
    def state(self) -> list[float]:
        """The logarithms in the window, oldest first."""
        return list(self._logs)

    @state.setter
    def state(self, logs: Sequence[float]) -> None:
        self._logs.clear()
        self._logs.extend(logs)


def is_dip(accuracy: float, best: float, *, images: int, drop: float) -> bool:
    """Whether an accuracy is below the best one by more than `drop`, and by more than chance explains.

    Chance: the intervals of three binomial standard errors around both, shares of `images` images, do not touch. That
    asks for more than a single comparison would have to, because the best of many evaluations is a lucky one.
    """
    errors = [math.sqrt(share * (1 - share) / images) for share in (best, accuracy)]
    return best - accuracy > max(drop, 3 * sum(errors))
