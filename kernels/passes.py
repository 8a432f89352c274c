"""What the two softmax passes share: the checks of their arguments and the chunks of their reference."""

from collections.abc import Iterator, Sequence

import torch

from . import checks

MAX_EXCLUDED = 2
MAX_BOUNDED_LOGIT = 60.0  # e^60 summed over a billion keys is still finite in float32
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of logits at a time: what a cache holds, and what fills a GPU


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Returns float64 where any of the tensors is, else float32: the dtype of statistics and results."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def check_rows(name: str, tensor: torch.Tensor, width: int | None = None, like: torch.Tensor | None = None) -> None:
    """Raises TypeError or ValueError unless `tensor` is a floating matrix, of this width and of the dtype of `like`."""
    checks.check_floating(name, tensor)
    checks.check_shape(name, tensor, ("rows", "width" if width is None else width))
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must be of the dtype of queries, {like.dtype}, got {tensor.dtype}; convert one of them"
        )


def check_no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError if a gradient is expected to flow through a pass, which has none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op} has no gradient, but {name} requires one; call it inside an autograd.Function or under "
                "torch.no_grad(), and pass on the gradient that its README derives"
            )


def check_exclude(exclude: Sequence[int]) -> list[int]:
    """Returns the excluded diagonals as a list; raises unless they are at most two integers."""
    if len(exclude) > MAX_EXCLUDED or not all(isinstance(offset, int) for offset in exclude):
        raise ValueError(f"exclude must hold at most {MAX_EXCLUDED} integer offsets, got {tuple(exclude)}")
    return list(exclude)


def as_scale(scale: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns the factor of the logits as a 0-d tensor on the device of `like`, in the dtype of the statistics."""
    dtype = compute_dtype(like)
    if isinstance(scale, torch.Tensor):
        checks.check_shape("scale", scale, ())
        checks.check_same_device(queries=like, scale=scale)
        return scale.detach().to(dtype)
    return torch.full((), scale, dtype=dtype, device=like.device)


def check_problem(
    queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None, **others: torch.Tensor | None
) -> None:
    """Raises unless queries [N, d], keys [M, d] and bias [M] fit each other; `others` must share their device."""
    check_rows("queries", queries)
    check_rows("keys", keys, queries.shape[1], queries)
    if bias is not None:
        checks.check_floating("bias", bias)
        checks.check_shape("bias", bias, (keys.shape[0],))
    checks.check_same_device(queries=queries, keys=keys, bias=bias, **others)


def logits_in_chunks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: Sequence[int],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the logits of successive rows, computed into one buffer that the caller may overwrite.

    Yields:
        The rows, and `scale q·k + bias` [rows, M] in the dtype of the statistics, -inf where excluded.
    """
    dtype = compute_dtype(queries)
    count = keys.shape[0]
    budget = CHUNK_BYTES.get(queries.device.type, CHUNK_BYTES["cuda"])
    rows = max(budget // max(count * dtype.itemsize, 1), 16)
    # The buffer is no larger than the problem.
    buffer = torch.empty((min(rows, queries.shape[0]), count), dtype=dtype, device=queries.device)
    transposed = keys.to(dtype).T
    for start in range(0, queries.shape[0], rows):
        part = slice(start, min(start + rows, queries.shape[0]))
        logits = buffer[: part.stop - start]
        torch.mm(queries[part].to(dtype) * scale, transposed, out=logits)
        if bias is not None:
            logits += bias
        for offset in exclude:
            if -logits.shape[0] < start + offset < count:
                logits.diagonal(start + offset).fill_(-torch.inf)
        yield part, logits
