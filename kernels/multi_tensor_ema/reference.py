"""Moving average with PyTorch's foreach ops."""

import torch

from ..multi_tensor import check_lists, skipped


def forward(
    teacher: list[torch.Tensor],
    student: list[torch.Tensor],
    shadow: list[torch.Tensor],
    momentum: torch.Tensor,
    found_inf: torch.Tensor | None,
) -> None:
    """Updates the teachers, and the shadows if there are any.

    Reads `momentum` and `found_inf` on the host.

    Args:
        teacher: Floating tensors.
        student: As many of the same shapes, any floating dtype.
        shadow: Likewise, or an empty list.
        momentum: float64, one element.
        found_inf: One number, or None; unless it is 0, nothing changes.
    """
    check_lists(teacher=teacher, student=student, **({"shadow": shadow} if shadow else {}))
    if skipped(found_inf):
        return
    values = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    torch._foreach_lerp_(teacher, values, 1.0 - momentum.item())
    if shadow:
        torch._foreach_copy_(shadow, teacher)
