"""The nearest rows of a bank, against the dense product and topk."""

from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, measures

from vitrail.kernels.knn_topk import knn_topk

Tensor = torch.Tensor
K, WIDTH = 20, 384


def inputs(queries: int, rows: int, device: torch.device) -> dict[str, Tensor]:
    query, bank = (F.normalize(torch.randn(count, WIDTH, device=device), dim=1) for count in (queries, rows))
    return {"query": query, "bank": bank}


def eager(query: Tensor, bank: Tensor) -> Tensor:
    return (query @ bank.T).topk(K, dim=1).values


def ours(query: Tensor, bank: Tensor) -> Tensor:
    # The rows are left out: among so many, two similarities are as near as rounding, and float64 orders them otherwise.
    return knn_topk(query, bank, K)[0]


def case(queries: int, rows: int) -> Case:
    return Case(
        op="knn_topk",
        name=f"bank {rows} k{K}",
        shape={"queries": queries, "rows": rows, "width": WIDTH, "k": K},
        dtype=torch.float32,
        inputs=partial(inputs, queries, rows),
        truth=eager,
        implementations={"vitrail": lambda: ours, "eager": lambda: eager},
        bytes={"forward": (queries + rows) * WIDTH * 4 + queries * K * (4 + 8)},
        flops={"forward": 2.0 * queries * rows * WIDTH},
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(16, 2000) if sizes.dry else case(1024, 50_000)]


test_knn_topk = measures(cases)
