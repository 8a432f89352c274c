"""Nearest-neighbour classification of frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels import knn_topk

from ..data import DataConfig, Source
from .features import Features, evaluation_mode, evaluation_view, extract
from .rank import rankme

RANK_ROWS = 4096  # features whose rank is measured

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..train.config import EvaluateConfig


@torch.no_grad()
def knn_predict(
    queries: Tensor, bank: Features, *, neighbours: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Weighted vote of the nearest features by cosine similarity (Wu et al., arXiv 1805.01978; DINO's protocol).

    A neighbour of similarity s votes with weight `exp(s / temperature)`.

    Args:
        queries: `[Q, D]`, not necessarily normalised.
        bank: labelled features.
        neighbours: voters per query, at most the size of the bank.
        temperature: of the weights.
        chunk: queries at a time, which bounds the memory.

    Returns:
        Predicted classes int64 `[Q]`.
    """
    neighbours = min(neighbours, len(bank.vectors))
    classes = int(bank.labels.max()) + 1
    keys = F.normalize(bank.vectors, dim=1)
    found = knn_topk(F.normalize(queries, dim=1), keys, neighbours, chunk=chunk)
    predictions = []
    for similarity, nearest in zip(*(part.split(chunk) for part in found), strict=True):
        votes = similarity.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, bank.labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(bank: Features, queries: Features, *, neighbours: int = 20, temperature: float = 0.07) -> float:
    """Share of the queries that `knn_predict` gets right, 0 to 1."""
    predicted = knn_predict(queries.vectors, bank, neighbours=neighbours, temperature=temperature)
    return (predicted == queries.labels).float().mean().item()


def evenly(vectors: Tensor, rows: int) -> Tensor:
    """At most so many rows, evenly spaced: a bank sorted by class stays mixed."""
    if len(vectors) <= rows:
        return vectors
    return vectors[torch.arange(rows, device=vectors.device) * len(vectors) // rows]


class OnlineKNN:
    """Accuracy of a method in training on a held-out split. Calling it is collective."""

    def __init__(
        self,
        config: EvaluateConfig,
        train: Source,
        val: Source,
        data: DataConfig,
        *,
        precision: str,
        rank: int,
        world: int,
    ) -> None:
        self.config, self.train, self.val, self.data = config, train, val, data
        self.precision, self.rank, self.world = precision, rank, world

    def __call__(self, method: Method) -> dict[str, float]:
        """Return `{"knn": accuracy, 0 to 1, "rankme": effective rank of the bank}`."""
        view = evaluation_view(method.views()[0].size)
        device = next(method.parameters()).device
        with evaluation_mode(method, self.precision):
            bank, queries = (
                extract(
                    method.features,
                    source,
                    view,
                    self.data,
                    batch=max(1, self.config.batch // self.world),
                    device=device,
                    limit=limit,
                    rank=self.rank,
                    world=self.world,
                )
                for source, limit in ((self.train, self.config.bank), (self.val, None))
            )
        accuracy = knn_accuracy(
            bank,
            queries,
            neighbours=self.config.neighbours,
            temperature=self.config.temperature,
        )
        return {"knn": accuracy, "rankme": rankme(evenly(bank.vectors, RANK_ROWS))}
