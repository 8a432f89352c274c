"""Gathering rows over a process group, for losses over the batch of all ranks.

The convention of every loss here that takes a `group`: each rank returns the mean over its *own* rows, and the gradient
that it gives its own rows is that of the *sum* of all ranks' losses, since every rank's loss depends on them. Averaging
parameter gradients over the ranks, as DistributedDataParallel and DeepSpeed do, then yields exactly the gradient of
the mean over all rows, as one process with the whole batch would compute it; so does averaging the reported losses.
"""

import torch
import torch.distributed as dist

NOT_A_MEMBER = "this process is not a member of the given process group; pass a group that contains it"


def rank_and_size(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """Returns this process's rank in the group and the group's size; without a group, 0 and 1.

    Raises:
        ValueError: This process is not in the group.
    """
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(NOT_A_MEMBER)
    return rank, dist.get_world_size(group)


def gather_rows(
    name: str, rows: torch.Tensor, group: "dist.ProcessGroup | None", *, equal: bool = False
) -> torch.Tensor:
    """Concatenates the rows of all ranks in rank order. No gradient flows through.

    Args:
        name: What the rows are called in an error.
        rows: [n, ...]; n, the dtype and the further sizes must be the same on every rank.
        group: The process group; None returns `rows` themselves.
        equal: Whether the ranks are known to hold equally many, from an earlier call.

    Returns:
        [size n, ...].

    Raises:
        ValueError: The ranks hold different numbers of rows. On a GPU that is a device-side assertion, since an
            exception would have to wait for the device.
    """
    _, size = rank_and_size(group)
    if size == 1:
        return rows
    if not equal:
        _check_equal_sizes(name, rows, group, size)
    gathered = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def _check_equal_sizes(name: str, rows: torch.Tensor, group: "dist.ProcessGroup | None", size: int) -> None:
    """Compares the local sizes before they are relied on: unequal ones would gather garbage, or wait for ever."""
    mine = torch.full((1,), rows.shape[0], dtype=torch.int64, device=rows.device)
    sizes = mine.new_empty(size)
    dist.all_gather_into_tensor(sizes, mine, group=group)
    expectation = "every rank must pass the same number; drop the last incomplete batch (drop_last=True)"
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = sizes.tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"the ranks of the group pass {counts} rows of {name}; {expectation}")
    else:
        torch._assert_async((sizes == mine).all(), f"the ranks pass different numbers of rows of {name}; {expectation}")


def gather_upstream(
    grad: torch.Tensor, rows: int, group: "dist.ProcessGroup | None"
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns what the rows of all ranks weigh in a sum over them, given the upstream gradient of each rank's loss.

    Args:
        grad: The gradient of this rank's loss, 0-d.
        rows: Number of this rank's rows.
        group: The process group; None for this process alone.

    Returns:
        The weights of the rows, at most 1 in size (None stands for 1), and the factor of the sum. A gradient scaler's
        factor of 65,536 would not fit into float16 with the rows.
    """
    if rank_and_size(group)[1] == 1:
        return None, grad
    grads = gather_rows("upstream gradients", grad.reshape(1), group, equal=True)
    largest = grads.abs().max()
    weight = grads / torch.where(largest == 0, 1.0, largest)
    return weight.repeat_interleave(rows), largest


def check_group(group: object) -> None:
    """Raises unless `group` is None or a process group of which this process is a member.

    Raises:
        TypeError: It is neither.
        ValueError: It is what `new_group` returns to a process outside the new group.
    """
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    if dist.is_available() and isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(NOT_A_MEMBER)
    raise TypeError(
        f"group must be a torch.distributed process group or None for this process alone, got {group!r}; "
        "torch.distributed.group.WORLD stands for all processes once they are initialised"
    )
