"""The moving average of the teacher's logits, from its features."""

import torch
import torch.distributed as dist

from .. import checks
from ..groups import check_group, rank_and_size
from ..passes import compute_dtype
from .weight import prototype_weight


@torch.no_grad()
def update_center_(
    center: torch.Tensor,
    teacher: torch.Tensor,
    prototypes: torch.Tensor | torch.nn.Module,
    momentum: float = 0.9,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Moves the centre towards the mean of the teacher's logits, in place.

    Logits are linear in the features, so their mean over a batch is the mean feature times the prototypes: one
    matrix-vector product, and d + 1 numbers to reduce over ranks in place of K. Call it after the loss of the step, and
    only if the step was applied: DINO's loss uses the centre of the steps before (Caron et al. 2021, arXiv 2104.14294).

    Args:
        center: [K] float32, changed to `momentum center + (1 - momentum) mean`.
        teacher: [Q, d] teacher features of this rank; ranks may hold different numbers of rows.
        prototypes: [K, d], or the linear layer without bias that holds them.
        momentum: Share of the old centre.
        group: Process group over whose rows the mean is taken; None for this process alone.

    Returns:
        `center`.

    Raises:
        TypeError: A dtype or the group does not fit.
        ValueError: Shapes or devices do not fit, there is no teacher row, or the momentum is not in [0, 1].
    """
    weight = prototype_weight("prototypes", prototypes)
    checks.check_floating("teacher", teacher)
    checks.check_shape("teacher", teacher, ("Q", weight.shape[1]))
    checks.check_shape("center", center, (weight.shape[0],))
    checks.check_same_device(center=center, teacher=teacher, prototypes=weight)
    check_group(group)
    if teacher.shape[0] == 0:
        raise ValueError("teacher has no row: the mean of no logits is undefined; skip the empty batch")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
    dtype = compute_dtype(teacher)
    total = torch.cat([teacher.to(dtype).sum(0), teacher.new_full((1,), teacher.shape[0], dtype=dtype)])
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(total, group=group)
    with torch.autocast(center.device.type, enabled=False):  # which would round the mean
        mean = weight.to(dtype) @ (total[:-1] / total[-1])
    return center.lerp_(mean.to(center.dtype), 1 - momentum)
