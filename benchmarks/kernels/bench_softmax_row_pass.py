"""The row pass of a softmax over inner products, against the matrix of logits and against attention with one head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import softmax_row_pass

Tensor = torch.Tensor
SCALE = 10.0  # of cosines: a temperature of 0.1, within what `bounded` promises


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


def inputs(matrix: Matrix, apart: bool, device: torch.device) -> dict[str, Tensor]:
    names = {"queries": matrix.rows, "keys": matrix.keys} | ({"values": matrix.keys} if apart else {})
    return {
        name: F.normalize(torch.randn(rows, matrix.width, device=device), dim=1).bfloat16()
        for name, rows in names.items()
    }


def statistics(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exps and the logits in the dtype that they are formed in."""
    logits = queries @ keys.T
    logits = SCALE * (logits if logits.dtype == torch.float64 else logits.float())
    return logits.logsumexp(1), logits


def eager(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    lse, logits = statistics(queries, keys)
    return lse, (logits - lse[:, None]).exp().to(keys.dtype) @ keys


def eager_lse(queries: Tensor, keys: Tensor) -> Tensor:
    return statistics(queries, keys)[0]


def eager_values(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    _, logits = statistics(queries, keys)
    return logits.softmax(1).to(values.dtype) @ values


def ours(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_row_pass(queries, keys, scale=SCALE, bounded=True)


def ours_lse(queries: Tensor, keys: Tensor) -> Tensor:
    return softmax_row_pass(queries, keys, scale=SCALE, bounded=True, output=False)[0]


def ours_values(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return softmax_row_pass(queries, keys, values, scale=SCALE, bounded=True)[1]


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    heads = (tensor[None, None] for tensor in (queries, keys, values))
    return F.scaled_dot_product_attention(*heads, scale=SCALE)[0, 0]


def case(
    matrix: Matrix,
    name: str,
    ours: Callable[..., object],
    eager: Callable[..., object],
    *,
    apart: bool = False,
    output: bool = True,
) -> Case:
    rows, keys, width = matrix.rows, matrix.keys, matrix.width
    implementations = {"vitrail": lambda: ours, "eager": lambda: eager, "compiled": compiled(eager)}
    if apart:
        implementations["SDPA"] = lambda: attention
    read = 2 * width * (rows + keys * (1 + apart))
    return Case(
        op="softmax_row_pass",
        name=f"{matrix.name} {name}",
        shape=matrix.shape,
        dtype=torch.bfloat16,
        inputs=partial(inputs, matrix, apart),
        truth=eager,
        implementations=implementations,
        bytes={"forward": read + 4 * rows * ((not apart) + width * output)},
        flops={"forward": 2.0 * (1 + output) * rows * keys * width},
    )


def cases(sizes: Sizes) -> list[Case]:
    contrastive, prototypes = matrices(sizes)
    return [
        case(contrastive, "lse and output", ours, eager),
        case(contrastive, "output of values", ours_values, eager_values, apart=True),
        case(prototypes, "lse", ours_lse, eager_lse, output=False),
    ]


test_softmax_row_pass = measures(cases)
