"""Clipping of gradients by their norms, all together or each tensor for itself."""

import torch

from ..multi_tensor import Tensors
from ..multi_tensor_scale import multi_tensor_scale_
from .op import Norms, multi_tensor_norm

EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ and the official DINO code do


def clip_scales(norms: Norms, max_norm: float, *, per_tensor: bool = False) -> torch.Tensor:
    """Returns what gradients are multiplied by: min(1, max_norm / (norm + 1e-6)), or 1 for a norm that is not finite.

    Args:
        norms: Of the gradients.
        max_norm: Limit of the norm, positive.
        per_tensor: Limit the norm of each tensor, as DINO does, instead of that of all together.

    Returns:
        float32 [T] or [].

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}; leave clipping out instead")
    norm = norms.norms if per_tensor else norms.total
    return torch.where(norm.isfinite(), (max_norm / (norm + EPS)).clamp(max=1.0), 1.0)


@torch.no_grad()
def multi_tensor_clip_(grads: Tensors, max_norm: float, *, per_tensor: bool = False, impl: str = "auto") -> Norms:
    """Scales gradients down to a norm of at most `max_norm`, in place and without waiting for the device.

    Tensors that are within the limit are not written. The fused optimisers take the limit as an argument and save
    reading and writing the gradients.

    Args:
        grads: Gradients, float32 and bfloat16 in any mixture.
        max_norm: The limit, positive.
        per_tensor: Limit each tensor for itself (the official DINO and EsViT code), not all together
            (`torch.nn.utils.clip_grad_norm_`).
        impl: `auto`, `cuda` or `reference`.

    Returns:
        The norms before clipping. Where they are not finite, nothing was scaled and `found_inf` says so.

    Raises:
        ValueError: `max_norm` is not positive.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    norms = multi_tensor_norm(grads, impl=impl)
    multi_tensor_scale_(grads, clip_scales(norms, max_norm, per_tensor=per_tensor), impl=impl)
    return norms
