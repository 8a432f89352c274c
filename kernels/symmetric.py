"""Both passes of a matrix of features with itself, on the CPU: half of the symmetric logits are computed.

The other half is the same numbers transposed. Of the four matrix products of a loss like NT-Xent, forward and backward,
one is saved, and half of the exponentials.
"""

from collections.abc import Iterator

import torch

from .passes import CHUNK_BYTES, compute_dtype

MAX_SPREAD = 20.0  # of half the log-sum-exps: e^20 times what underflows is still nothing


def applies(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None, exclude: list[int]) -> bool:
    """Whether rows and keys are one matrix on the CPU, with nothing that would make its logits asymmetric."""
    same = queries is keys or (
        queries.data_ptr() == keys.data_ptr()
        and queries.shape == keys.shape
        and queries.stride() == keys.stride()
        and queries.numel() > 0
    )
    return same and queries.device.type == "cpu" and bias is None and exclude in ([], [0])


def _upper(features: torch.Tensor, scale: torch.Tensor, exclude: list[int]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields successive rows, from start to stop, of the logits from column `start` on, in one buffer."""
    count = features.shape[0]
    size = max(CHUNK_BYTES["cpu"] // (count * features.dtype.itemsize), 16)
    buffer = torch.empty(min(size, count) * count, dtype=features.dtype)
    for start in range(0, count, size):
        stop = min(start + size, count)
        logits = buffer[: (stop - start) * (count - start)].view(stop - start, count - start)
        torch.mm(features[start:stop] * scale, features[start:].T, out=logits)
        if exclude:
            logits.diagonal().fill_(-torch.inf)
        yield start, stop, logits


def row_pass(
    features: torch.Tensor, scale: torch.Tensor, exclude: list[int], need_output: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row pass of features with themselves as keys and values, for bounded logits: no maximum is subtracted."""
    features = features.to(compute_dtype(features))
    total = features.new_zeros(features.shape[0])
    output = features.new_zeros((features.shape[0] if need_output else 0, features.shape[1]))
    for start, stop, logits in _upper(features, scale, exclude):
        weights = logits.exp_()
        right = weights[:, stop - start :]
        total[start:stop] += weights.sum(1)
        total[stop:] += right.sum(0)
        if need_output:
            output[start:stop].addmm_(weights, features[start:])
            output[stop:].addmm_(right.T, features[start:stop])
    if need_output:
        output /= torch.where(total == 0, 1.0, total)[:, None]
    return total.log(), output


def col_pass(
    features: torch.Tensor,
    lse: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: list[int],
) -> torch.Tensor | None:
    """The column pass of features with themselves; None where log-sum-exps are too far apart for float32.

    With h = lse / 2, exp(s_ij - h_i - h_j) is symmetric and at most 1, as s_ij is at most lse_i and at most lse_j; the
    probability exp(s_ij - lse_i) is that times exp(h_j - h_i).
    """
    features = features.to(compute_dtype(features))
    half = lse.to(features.dtype) / 2
    low, high = torch.aminmax(half)
    if not high - low <= MAX_SPREAD:  # so also where one is infinite or NaN
        return None
    half_way = (low + high) / 2
    factor = (half_way - half).exp()
    terms = features * (factor if weight is None else factor * weight)[:, None]
    output = torch.zeros_like(features)
    for start, stop, logits in _upper(features, scale, exclude):
        shared = logits.sub_(half[start:stop, None]).sub_(half[start:]).exp_()
        output[start:stop].addmm_(shared, terms[start:])
        output[stop:].addmm_(shared[:, stop - start :].T, terms[start:stop])
    return output.mul_((half - half_way).exp_()[:, None])
