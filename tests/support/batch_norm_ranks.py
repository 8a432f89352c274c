"""Batch normalisation over launched ranks against one process with the whole batch.

As a script, run by torchrun on three ranks: `batch_norm_ranks.py all <result.json> <scratch folder>`. The last rank
leaves after its cases, and the other two run them again as a pair.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.engine.models.batch_norm import BatchNorm, settle_statistics


@dataclass(frozen=True)
class Case:
    """A layer, its input, and how many rows of each view the ranks hold."""

    rows: tuple[int, ...]
    tail: tuple[int, ...] = ()
    groups: int = 1
    affine: bool = True
    shift: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    offset: float = 1.0
    scale: float = 1.0


WIDTH = 5
CASES = {
    "equal": Case((4, 4, 4)),
    "unequal": Case((4, 1, 2)),
    "single rows": Case((1, 2, 1), groups=2),
    "two views": Case((3, 3, 3), groups=2),
    "three views, unequal": Case((2, 3, 1), groups=3),
    "images": Case((2, 2, 2), (3, 2), groups=2),
    "channels last": Case((2, 1, 2), (3, 2), groups=2, channels_last=True),
    "bf16": Case((4, 4, 4), (2, 2), dtype=torch.bfloat16),
    "plain bf16": Case((4, 4, 4), groups=2, affine=False, dtype=torch.bfloat16),
    "fp64": Case((4, 2, 1), groups=2, dtype=torch.float64),
    "not affine": Case((4, 2, 3), groups=2, affine=False),
    "no shift": Case((4, 2, 3), groups=2, shift=False),
    "far from zero": Case((9, 5, 7), offset=300.0, scale=0.01),
}


def layer(case: Case, *, sync: bool) -> BatchNorm:
    """The case's layer with weights away from their start, in the input's dtype where that is the wider one."""
    built = BatchNorm(WIDTH, affine=case.affine, shift=case.shift, groups=case.groups, sync=sync)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.linspace(-0.4, 0.5, WIDTH))
    return built.double() if case.dtype == torch.float64 else built


def whole_batch(case: Case, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The views of all ranks and the weights that the loss gives to their outputs, `[rows, C, ...]` each."""
    generator = torch.Generator().manual_seed(3)
    shape = (sum(case.rows[:size]), WIDTH, *case.tail)
    views, weights = [], []
    for view in range(case.groups):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        views.append((case.offset + view + case.scale * (1 + view) * values).to(case.dtype))
        weights.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype))
    return views, weights


def share(case: Case, views: list[Tensor], rank: int) -> Tensor:
    """A rank's rows of all views, the views one after the other."""
    start = sum(case.rows[:rank])
    mine = torch.cat([view[start : start + case.rows[rank]] for view in views])
    return mine.contiguous(memory_format=torch.channels_last) if case.channels_last else mine


def expected(case: Case, size: int) -> dict[str, Tensor]:
    """What torch computes in float64 from the whole batch, view by view; the parameters' gradients are sums."""
    views, weights = whole_batch(case, size)
    ours = layer(case, sync=False).double()
    bias = ours.weight if ours.bias is None else ours.bias
    outs, grads = [], []
    for view, weight in zip(views, weights, strict=True):
        x = view.double().requires_grad_()
        out = F.batch_norm(
            x, ours.running_mean, ours.running_var, ours.weight, ours.bias, True, ours.momentum, ours.eps
        )
        (out * weight.double()).sum().backward()
        assert x.grad is not None
        outs.append(out.detach())
        grads.append(x.grad)
    result = {"mean": ours.running_mean, "var": ours.running_var}
    rank = dist.get_rank()
    result |= {"out": share(case, outs, rank), "grad": share(case, grads, rank)}
    if bias is not None:
        result |= {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    return result


def run(case: Case, size: int) -> dict[str, float]:
    """Largest differences from `expected`, over the largest value, and the messages of a pass each way."""
    views, weights = whole_batch(case, size)
    ours, rank = layer(case, sync=True), dist.get_rank()
    x = share(case, views, rank).requires_grad_()
    with mock.patch.object(dist, "all_gather_into_tensor", side_effect=dist.all_gather_into_tensor) as forward:
        kept, out = saved(lambda: ours(x))
    assert kept.pop(x.untyped_storage().data_ptr()) == x.nbytes
    # Beside the input only vectors: for each view mean, deviation and count, and one for the weight.
    assert sum(kept.values()) <= (3 * case.groups + 1) * ours.running_mean.nbytes
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as backward:
        (out * share(case, weights, rank)).sum().backward()
    assert x.grad is not None
    assert out.dtype == x.grad.dtype == case.dtype
    assert out.stride() == x.stride() == x.grad.stride()
    got = {"out": out.detach(), "grad": x.grad, "mean": ours.running_mean, "var": ours.running_var}
    for name, p in ours.named_parameters():
        assert p.grad is not None
        got[name] = p.grad.clone()
        dist.all_reduce(got[name])
    wanted = expected(case, size)
    assert got.keys() == wanted.keys()
    report = {
        name: ((got[name].double() - value).abs().max() / value.abs().max()).item() for name, value in wanted.items()
    }
    assert ours.num_batches_tracked.item() == case.groups
    return report | {"messages": forward.call_count + backward.call_count, "alike": alike(ours.running_var)}


def saved(forward: Callable[[], Tensor]) -> tuple[dict[int, int], Tensor]:
    """Bytes of the storages that a forward pass keeps for its backward pass, by address, and its result."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = forward()
    return kept, out


def alike(t: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    everyone = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, t)
    return all(torch.equal(t, other) for other in everyone)


def under_ddp(size: int) -> dict[str, float]:
    """A head whose gradients DDP averages, on both views in one call, against one process in two calls."""

    def head(sync: bool, groups: int) -> nn.Sequential:
        torch.manual_seed(0)
        hidden, last = (BatchNorm(c, affine=c == 8, groups=groups, sync=sync) for c in (8, 4))
        return nn.Sequential(
            nn.Linear(3, 8, bias=False), hidden, nn.ReLU(inplace=True), nn.Linear(8, 4, bias=False), last
        )

    images = torch.randn(2, 4 * size, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.randn(2, 4 * size, 4, generator=torch.Generator().manual_seed(2))
    plain, rank = head(False, 1), dist.get_rank()
    F.mse_loss(torch.cat([plain(view) for view in images]), targets.flatten(0, 1)).backward()
    spread = head(True, 2)
    mine = slice(4 * rank, 4 * rank + 4)
    averaging = DistributedDataParallel(spread)  # kept until the end: it averages as long as it lives
    F.mse_loss(averaging(images[:, mine].flatten(0, 1)), targets[:, mine].flatten(0, 1)).backward()
    return {
        name: ((p.grad - q.grad).abs().max() / q.grad.abs().max()).item()
        for (name, p), q in zip(spread.named_parameters(), plain.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    }


def local() -> bool:
    """Whether sync=False looks at this rank's rows alone and sends nothing."""
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    with mock.patch.object(dist, "all_gather_into_tensor", side_effect=AssertionError):
        out = BatchNorm(WIDTH, sync=False)(x)
    return torch.allclose(out, nn.BatchNorm1d(WIDTH)(x), atol=1e-6)


def deferred(size: int) -> dict[str, float]:
    """Two passes without gradients whose statistics settle late, and one that is dropped."""
    case = Case((2, 1, 3), groups=2)
    views, _ = whole_batch(case, size)
    ours, plain = layer(case, sync=True), nn.BatchNorm1d(WIDTH)
    ours.deferred = True
    with torch.no_grad():
        for _ in range(2):
            ours(share(case, views, dist.get_rank()))
            [plain(view) for view in views]
        still = ours.running_mean.abs().max().item()
        settle_statistics(ours, applied=True)
        ours(share(case, views, dist.get_rank()))
        settle_statistics(ours, applied=False)
    return {
        "before": still,
        "mean": (ours.running_mean - plain.running_mean).abs().max().item(),
        "var": (ours.running_var - plain.running_var).abs().max().item(),
        "tracked": ours.num_batches_tracked.item() - plain.num_batches_tracked.item(),
    }


def everything() -> dict[str, list[object]]:
    """All cases, by name, the results of all ranks."""
    size = dist.get_world_size()
    cases = {name: lambda case=case: run(case, size) for name, case in CASES.items()}
    cases |= {"ddp": lambda: under_ddp(size), "local": local, "deferred": lambda: deferred(size)}
    report: dict[str, list[object]] = {}
    for name, call in cases.items():
        report[name] = [None] * size
        dist.all_gather_object(report[name], call())
    return report


if __name__ == "__main__":
    _, result_path, scratch = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, outcome = dist.get_rank(), {"3": everything()}
    gc.collect()  # DistributedDataParallel's cycles hold the group, which must be gone before its threads are
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/pair", rank=rank, world_size=2)
        outcome["2"] = everything()
        dist.destroy_process_group()
    if rank == 0:
        Path(result_path).write_text(json.dumps(outcome))
