"""The row pass in plain PyTorch, a chunk of rows at a time: the definition, and the CPU implementation."""

import torch

from ..passes import compute_dtype, logits_in_chunks
from ..symmetric import applies, row_pass


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: list[int],
    bounded: bool,
    need_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-sum-exp [N] of the logits, and softmax(logits) times the values [N, dv], or [0, dv] unneeded."""
    if bounded and values is None and applies(queries, keys, bias, exclude):
        return row_pass(queries, scale, exclude, need_output)
    dtype = compute_dtype(queries)
    rows = queries.shape[0]
    values = (keys if values is None else values).to(dtype)
    lse = torch.empty(rows, dtype=dtype, device=queries.device)
    output = torch.empty((rows if need_output else 0, values.shape[1]), dtype=dtype, device=queries.device)
    for part, logits in logits_in_chunks(queries, keys, bias, scale, exclude):
        if bounded or logits.shape[1] == 0:
            total = logits.exp_().sum(1)
            lse[part] = total.log()
        else:
            # A row without a key has no largest logit; 0 stands in, and its sum is 0.
            peak = logits.amax(1).nan_to_num_(neginf=0.0, nan=torch.nan, posinf=torch.inf)
            total = logits.sub_(peak[:, None]).exp_().sum(1)
            lse[part] = total.log() + peak
        if need_output:
            torch.mm(logits, values, out=output[part])
            output[part] /= torch.where(total == 0, 1.0, total)[:, None]
    return lse, output
