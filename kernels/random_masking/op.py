"""Random masking: the op, its registration and the public function."""

from typing import Any

import torch

from .. import checks
from ..library import define
from ..registry import Implementation, Op, check_impl, register


def _bind(
    batch: int,
    length: int,
    keep: int,
    *,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, int]:
    """Checks the public arguments and draws the noise if there is none."""
    if min(batch, length) < 0:
        raise ValueError(f"batch and length must not be negative, got batch={batch} and length={length}")
    if not 0 <= keep <= length:
        raise ValueError(f"keep must be between 0 and length={length}, got {keep}")
    if noise is None:
        if device is None and generator is not None:
            device = generator.device
        return torch.rand(batch, length, generator=generator, device=device, dtype=torch.float32), keep
    if generator is not None:
        raise ValueError("noise and generator are both given, but a generator only draws noise; pass one of them")
    wanted = noise.device if device is None else torch.device(device)
    if wanted.type != noise.device.type or wanted.index not in (None, noise.device.index):
        raise ValueError(f"noise is on {noise.device} but device={device}; leave device out, or move the noise")
    checks.check_floating("noise", noise)
    checks.check_shape("noise", noise, (batch, length))
    return noise.detach(), keep


def _triton_reasons(noise: torch.Tensor, keep: int) -> list[str]:
    reasons = checks.triton_reasons(noise.device)
    allowed = (torch.float32, torch.float64)
    return reasons + checks.dtype_reasons(allowed, noise=noise.dtype) + checks.last_dim_reasons(noise=noise)


def _fake(noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length = noise.shape
    sizes = ((batch, keep), (batch, length - keep), (batch, length))
    keep_ids, mask_ids, restore = (noise.new_empty(size, dtype=torch.int64) for size in sizes)
    return keep_ids, mask_ids, restore


OP = register(
    Op(
        name="random_masking",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.random_masking.kernel",
                reasons={"forward": _triton_reasons},
                supports="float32 and float64 noise, any batch, length and keep",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.random_masking.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating noise, any stride, any device",
            ),
        ),
    )
)
_forward = define(OP, "forward", "Tensor noise, SymInt keep", "(Tensor, Tensor, Tensor)", _fake)


def random_masking(
    batch: int,
    length: int,
    keep: int,
    *,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses `keep` of `length` positions at random, independently for each sample.

    The positions are sorted by their noise, stably, so that equal values keep their order; the first `keep` stay.
    This is the random masking of MAE (He et al. 2022, arXiv 2111.06377) with one sort in place of two.

    Args:
        batch: Number of samples B.
        length: Number of positions L.
        keep: Number of positions to keep, 0 to L.
        generator: Draws the noise; its device is the default device of the result.
        noise: [B, L], floating: used in place of U[0, 1) fp32 draws. NaN sorts last.
        device: Where to draw the noise.
        impl: `auto`, `triton` or `reference`.

    Returns:
        Three int64 tensors: ids_keep [B, keep], the kept positions in noise order; ids_mask [B, L - keep], the
        others in noise order; ids_restore [B, L], with `cat([ids_keep, ids_mask], 1)[b, ids_restore[b, l]] == l`.

    Raises:
        TypeError: The noise is not floating.
        ValueError: A size is out of range, or the arguments contradict each other.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(batch, length, keep, generator=generator, noise=noise, device=device)
    result: tuple[Any, ...] = _forward(*arguments, impl)
    return result[0], result[1], result[2]
