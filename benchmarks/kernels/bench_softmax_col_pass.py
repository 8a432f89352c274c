"""The column pass of a softmax over inner products, against the matrix of probabilities."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import softmax_col_pass, softmax_row_pass

Tensor = torch.Tensor
SCALE = 10.0  # of cosines: a temperature of 0.1


@dataclass(frozen=True)
class Matrix:
    """The logits of one pass."""

    name: str
    rows: int
    keys: int
    width: int = 256

    @property
    def shape(self) -> dict[str, int | float | str]:
        return {"rows": self.rows, "keys": self.keys, "width": self.width}


def matrices(sizes: Sizes) -> tuple[Matrix, Matrix]:
    """A batch against the batches of 8 ranks, and regions against the prototypes of a DINO head; less on a CPU."""
    if sizes.dry:
        return Matrix("contrastive", 32, 80, 32), Matrix("prototypes", 16, 96, 32)
    if sizes.batch == 16:
        return Matrix("contrastive", 1024, 8192), Matrix("prototypes", 512, 16384)
    return Matrix("contrastive", 4096, 32768), Matrix("prototypes", 6272, 65536)


def inputs(matrix: Matrix, device: torch.device) -> dict[str, Tensor]:
    queries, keys = (
        F.normalize(torch.randn(rows, matrix.width, device=device), dim=1).bfloat16()
        for rows in (matrix.rows, matrix.keys)
    )
    lse, _ = softmax_row_pass(queries, keys, scale=SCALE, output=False)
    return {"queries": queries, "keys": keys, "lse": lse}


def eager(queries: Tensor, keys: Tensor, lse: Tensor) -> Tensor:
    logits = queries @ keys.T
    logits = SCALE * (logits if logits.dtype == torch.float64 else logits.float())
    return (logits - lse[:, None]).exp().to(queries.dtype).T @ queries


def ours(queries: Tensor, keys: Tensor, lse: Tensor) -> Tensor:
    return softmax_col_pass(queries, keys, lse, scale=SCALE)


def case(matrix: Matrix) -> Case:
    rows, keys, width = matrix.rows, matrix.keys, matrix.width
    return Case(
        op="softmax_col_pass",
        name=matrix.name,
        shape=matrix.shape,
        dtype=torch.bfloat16,
        inputs=partial(inputs, matrix),
        truth=eager,
        implementations={"vitrail": lambda: ours, "eager": lambda: eager, "compiled": compiled(eager)},
        bytes={"forward": 2 * width * (rows + keys) + 4 * rows + 4 * keys * width},
        flops={"forward": 4.0 * rows * keys * width},
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(matrix) for matrix in matrices(sizes)]


test_softmax_col_pass = measures(cases)
