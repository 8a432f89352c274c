"""Batch normalisation of several views at once, over all ranks, with running statistics that can wait for the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) of `[N, C]` or `[N, C, H, W]`, with the state dict of torch's.

    The batch may hold several views, one after the other: the first N / groups rows are the first. Each is normalised
    with its own mean and variance, as if the views had come in calls of their own, and moves the running statistics
    once, in order. Over several ranks the statistics are those of the whole batch; all views travel in one message.
    torch's SyncBatchNorm takes one view at a time and does not run on a CPU.

    Statistics, parameters and buffers are float32 whatever the input is; the output has the input's dtype.

    Args:
        width: channels C.
        affine: scale by a trained `weight`, starting at 1, and shift by a trained `bias`, starting at 0.
        shift: False leaves the bias away, as SimCLR's last layer does (arXiv 2002.05709, released code).
        eps: added to the variance under the root.
        momentum: share of the new statistics in the running ones.
        groups: views in a training batch. With running statistics (in eval mode) all rows are treated alike.
        sync: take the statistics over all ranks of the default process group, where there are several. Every rank
            then has to take part in every forward and backward pass; their batches may differ in size. Gradients of
            `weight` and `bias` are this rank's share, for DDP or DeepSpeed to average.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        width: int,
        *,
        affine: bool = True,
        shift: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        groups: int = 1,
        sync: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.momentum, self.groups, self.sync = width, eps, momentum, groups, sync
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and shift else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # Whether running statistics wait for `settle_statistics`; those that wait: mean and variance, each [groups, C].
        self.deferred = False
        self.pending: list[tuple[Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what waits belongs to this module's step alone."""
        return {**self.__dict__, "pending": []}

    def extra_repr(self) -> str:
        """Width and options."""
        return (
            f"{self.width}, affine={self.weight is not None}, shift={self.bias is not None}, eps={self.eps}, "
            f"momentum={self.momentum}, groups={self.groups}, sync={self.sync}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, C]` or `[N, C, H, W]`.

        Raises:
            ValueError: the channels are not `width`; in training, N is not a multiple of `groups` or a view has one
                value per channel.
        """
        if x.dim() not in (2, 4) or x.shape[1] != self.width:
            raise ValueError(
                f"BatchNorm({self.width}) takes [N, {self.width}] or [N, {self.width}, H, W], got {tuple(x.shape)}: "
                "check the width of the layer before it"
            )
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        world = dist.get_world_size() if self.sync and dist.is_available() and dist.is_initialized() else 1
        self._check_rows(x, alone=world == 1)
        if world == 1:
            out, mean, var = self._alone(x)
        else:
            out, mean, var = _SyncedBatchNorm.apply(
                x, self.weight, self.bias, self.groups, self.eps, self.running_mean.dtype
            )
        self.pending.append((mean, var))
        if not self.deferred:
            settle_statistics(self, applied=True)
        return out

    def _check_rows(self, x: Tensor, *, alone: bool) -> None:
        if x.shape[0] % self.groups:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be split into {self.groups} views: "
                "concatenate views of equal size, or set `groups`"
            )
        values = x.numel() // (self.width * self.groups)
        if values < (2 if alone else 1):
            raise ValueError(
                f"training needs more than one value per channel, got {values} in each of {self.groups} views of an "
                f"input {tuple(x.shape)}: enlarge the micro-batch, or call eval()"
            )

    def _alone(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and mean and unbiased variance `[groups, C]`, of this process's batch."""
        # With momentum 1, what torch writes as running statistics are those of the batch.
        mean, var = self.running_mean.new_zeros(2, self.groups, self.width)
        parts = [
            F.batch_norm(part, mean[g], var[g], self.weight, self.bias, True, 1.0, self.eps)
            for g, part in enumerate(x.chunk(self.groups))
        ]
        return (torch.cat(parts) if self.groups > 1 else parts[0]), mean, var


class _SyncedBatchNorm(torch.autograd.Function):
    """Normalise by the statistics of all ranks: one message forward, one backward, whatever the number of views."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = x.chunk(groups)
        mean, var, count = _of_all_ranks(*_statistics(parts, dtype))
        out = [F.batch_norm(p, mean[g], var[g], weight, bias, False, 0.0, eps) for g, p in enumerate(parts)]
        ctx.groups, ctx.has_bias = groups, bias is not None
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        unbiased = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return (torch.cat(out) if groups > 1 else out[0]), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        parts, grads = x.chunk(ctx.groups), _laid_out_as(x, grad).chunk(ctx.groups)
        sums = torch.stack([_gradient_sums(d, p, mean[g]) for g, (d, p) in enumerate(zip(grads, parts, strict=True))])
        # The parameters' gradients are of this rank's rows: what is trained on several ranks averages them anyway.
        d_weight = (sums[:, 1] * invstd).sum(0) if weight is not None else None
        d_bias = sums[:, 0].sum(0) if ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None, None
        dist.all_reduce(sums)
        d_x = [
            _input_gradient(d, p, mean[g], invstd[g], weight, sums[g], count[g])
            for g, (d, p) in enumerate(zip(grads, parts, strict=True))
        ]
        return (torch.cat(d_x) if ctx.groups > 1 else d_x[0]), d_weight, d_bias, None, None, None


def _statistics(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance `[groups, C]` of this rank's rows, and the values per channel in a view."""
    # torch accumulates in, and returns, the dtype of the running statistics that it is given.
    unused = parts[0].new_zeros(2, parts[0].shape[1], dtype=dtype)
    found = [torch.batch_norm_update_stats(part, unused[0], unused[1], 0.0) for part in parts]
    mean, var = (torch.stack(each) for each in zip(*found, strict=True))
    return mean, var, parts[0].numel() // parts[0].shape[1]


def _of_all_ranks(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Combine all ranks' statistics.

    Sums of squares would cancel where the mean is large against the deviation: the ranks' squared deviations are added
    to those of their means instead (Chan, Golub and LeVeque, 1979).

    Returns:
        Mean and biased variance `[groups, C]`, and the values per channel `[groups, 1]`, of all ranks' rows.
    """
    mine = torch.stack([mean, var, torch.full_like(mean, count)])
    everyone = mine.new_empty(dist.get_world_size() * 3, *mean.shape)
    dist.all_gather_into_tensor(everyone, mine)
    means, variances, counts = everyone.unflatten(0, (-1, 3)).unbind(1)
    total = counts.sum(0)
    shares = counts / total
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, total[:, :1]


def _laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """A gradient dense in the memory order of the input, as torch's kernels want it."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    """`[C]` in a shape that broadcasts against `[N, C, ...]`."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Sums of `grad` and of `grad * (x - mean)` over all but the channels, `[2, C]` in the dtype of the mean."""
    if x.is_cuda:
        sum_grad, sum_product, *_ = torch.batch_norm_backward_reduce(
            grad, x, mean, torch.ones_like(mean), None, True, False, False
        )
        return torch.stack([sum_grad, sum_product])
    rows = [0, *range(2, x.dim())]
    centred = x - _along_channels(mean, x)
    return torch.stack([grad.to(mean.dtype).sum(rows), (grad * centred).sum(rows)])


def _input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Gradient of one view's rows from the sums and the count of all ranks, in the input's dtype."""
    if x.is_cuda:
        return torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sums[0], sums[1], count.to(torch.int32))
    grad_mean, slope = sums[0] / count, sums[1] / count * invstd.square()
    centred = x - _along_channels(mean, x)
    result = grad - _along_channels(grad_mean, x) - centred * _along_channels(slope, x)
    scale = invstd if weight is None else invstd * weight
    return (result * _along_channels(scale, x)).to(x.dtype)


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of a module, itself included."""
    return [part for part in module.modules() if isinstance(part, BatchNorm)]


def defer_statistics(module: nn.Module) -> int:
    """Make the running statistics of a module wait for `settle_statistics`; returns the number of layers.

    A step that is not applied, because its gradient was not finite, must not leave its statistics behind.
    """
    layers = batch_norms(module)
    for layer in layers:
        layer.deferred = True
    return len(layers)


@torch.no_grad()
def settle_statistics(module: nn.Module, applied: bool) -> None:
    """Move the running statistics by what the training passes since the last call saw, or forget it.

    Args:
        module: all BatchNorm layers in it are settled together, in few launches.
        applied: whether the step that the passes belong to was applied.
    """
    layers = [layer for layer in batch_norms(module) if layer.pending]
    waiting = [[views for pair in layer.pending for views in zip(*pair, strict=True)] for layer in layers]
    for layer in layers:
        layer.pending = []
    if not applied:
        return
    for turn in range(max(map(len, waiting), default=0)):
        moved = [(layer, *seen[turn]) for layer, seen in zip(layers, waiting, strict=True) if turn < len(seen)]
        running = [layer.running_mean for layer, *_ in moved] + [layer.running_var for layer, *_ in moved]
        found = [mean for _, mean, _ in moved] + [var for *_, var in moved]
        torch._foreach_lerp_(running, found, [layer.momentum for layer, *_ in moved] * 2)
        torch._foreach_add_([layer.num_batches_tracked for layer, *_ in moved], 1)


def replace_batch_norm(module: nn.Module, *, groups: int, sync: bool) -> int:
    """Exchange every nn.BatchNorm1d and nn.BatchNorm2d below a module for ours, parameters and buffers kept.

    Returns:
        How many were exchanged.

    Raises:
        ValueError: a layer has no running statistics, or averages them over all batches (momentum None).
    """
    count = 0
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(parent, name, _taken_over(layer, groups=groups, sync=sync))
                count += 1
    return count


def _taken_over(layer: nn.BatchNorm1d | nn.BatchNorm2d, *, groups: int, sync: bool) -> BatchNorm:
    """Our layer around the parameters and buffers of torch's."""
    if layer.momentum is None or layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"{layer} cannot be exchanged for vitrail's: build it with track_running_stats=True and a number as "
            "momentum"
        )
    ours = BatchNorm(
        layer.num_features, affine=layer.affine, eps=layer.eps, momentum=layer.momentum, groups=groups, sync=sync
    )
    ours.weight, ours.bias = layer.weight, layer.bias
    ours.running_mean, ours.running_var = layer.running_mean, layer.running_var
    assert layer.num_batches_tracked is not None
    ours.num_batches_tracked = layer.num_batches_tracked
    return ours.train(layer.training)
