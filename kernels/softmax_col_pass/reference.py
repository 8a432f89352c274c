"""The column pass in plain PyTorch, a chunk of rows at a time: the definition, and the CPU implementation."""

import torch

from ..passes import compute_dtype, logits_in_chunks
from ..symmetric import applies, col_pass


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: list[int],
) -> torch.Tensor:
    """Returns the sum over rows i of weight_i exp(logit_ij - lse_i) x_i, [M, dx]."""
    if x is None and applies(queries, keys, bias, exclude):
        result = col_pass(queries, lse, weight, scale, exclude)
        if result is not None:
            return result
    dtype = compute_dtype(queries)
    rows = (queries if x is None else x).to(dtype)
    # What the log-sum-exp of a row without a key is subtracted from must come out as probability 0.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    output = torch.zeros((keys.shape[0], rows.shape[1]), dtype=dtype, device=queries.device)
    for part, logits in logits_in_chunks(queries, keys, bias, scale, exclude):
        probabilities = logits.sub_(lse[part, None]).exp_()
        terms = rows[part] if weight is None else rows[part] * weight[part, None]
        output.addmm_(probabilities.T, terms)
    return output
