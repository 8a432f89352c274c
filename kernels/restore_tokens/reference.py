"""Token restoring in plain PyTorch."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def positions(ids_restore: torch.Tensor) -> torch.Tensor:
    """Returns the inverse permutation of each row: the position of every slot of the shuffle. [B, L] int64."""
    natural = torch.arange(ids_restore.shape[1], device=ids_restore.device).expand_as(ids_restore)
    return torch.empty_like(ids_restore).scatter_(1, ids_restore, natural)


def forward(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    num_prefix: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Puts visible tokens back in their places among mask tokens and adds the positions.

    Args:
        visible: [B, P + V, D], prefix tokens first.
        ids_restore: [B, L] int64; each row is a permutation.
        mask_token: [D], or [L, D] for one token per position.
        pos_embed: [P + L, D], or None.
        num_prefix: Number of prefix tokens P.
        dtype: Of the result.

    Returns:
        [B, P + L, D].
    """
    batch, length = ids_restore.shape
    num_visible = visible.shape[1] - num_prefix
    out = visible.new_empty((batch, num_prefix + length, visible.shape[2]), dtype=compute_dtype(dtype))
    out[:, :num_prefix] = visible[:, :num_prefix]
    out[:, num_prefix:] = mask_token
    samples = torch.arange(batch, device=visible.device)[:, None]
    out[samples, num_prefix + positions(ids_restore)[:, :num_visible]] = visible[:, num_prefix:].to(out.dtype)
    if pos_embed is not None:
        out += pos_embed
    return out.to(dtype)


def backward(
    grad: torch.Tensor,
    ids_restore: torch.Tensor,
    num_visible: int,
    num_prefix: int,
    visible_dtype: torch.dtype | None,
    mask_dtype: torch.dtype | None,
    per_position: bool,
    pos_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients that are asked for.

    Args:
        grad: [B, P + L, D], any strides.
        ids_restore: [B, L] int64.
        num_visible: Number of visible tokens V.
        num_prefix: Number of prefix tokens P.
        visible_dtype: Of the gradient of `visible`; None: not wanted.
        mask_dtype: Of the gradient of `mask_token`; None: not wanted.
        per_position: Whether the mask token is [L, D].
        pos_dtype: Of the gradient of `pos_embed`; None: not wanted.

    Returns:
        The gradients of visible, mask_token and pos_embed; an empty tensor for one that is not wanted.
    """
    # Three tensors, not one three times: the outputs of an op must not share memory.
    grad_visible, grad_mask, grad_pos = (grad.new_empty(0) for _ in range(3))
    compute = compute_dtype(grad.dtype)
    if visible_dtype is not None:
        samples = torch.arange(grad.shape[0], device=grad.device)[:, None]
        rows = grad[samples, num_prefix + positions(ids_restore)[:, :num_visible]]
        grad_visible = torch.cat([grad[:, :num_prefix], rows], dim=1).to(visible_dtype)
    if mask_dtype is not None:
        masked = grad[:, num_prefix:].masked_fill((ids_restore < num_visible)[..., None], 0)
        grad_mask = masked.sum(0 if per_position else (0, 1), dtype=compute).to(mask_dtype)
    if pos_dtype is not None:
        grad_pos = grad.sum(0, dtype=compute).to(pos_dtype)
    return grad_visible, grad_mask, grad_pos
