"""Losses over the batch of all ranks, beside one process that has all of it.

As a script, run by torchrun, it goes through `CASES` on every rank and writes what rank 0 returns as JSON:
`rank_losses.py <result.json>`. Everything is float64; a linear encoder stands for the network.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_losses
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.kernels import clip_loss, info_nce_loss, nt_xent_loss

IMAGES, PIXELS, WIDTH = 5, 12, 16  # images for each rank

Tensor = torch.Tensor
Loss = Callable[..., Tensor]


class Network(nn.Module):
    """An encoder of two views, one of keys that is not trained, and the logarithm of a scale."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.encoder, self.momentum = (nn.Linear(PIXELS, WIDTH, dtype=torch.float64) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.momentum.requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, views: Tensor, loss: Loss) -> Tensor:
        """Returns the loss of views [2, images, pixels]; inside forward, so that DistributedDataParallel sees it."""
        return loss(self, *self.encoder(views), self.momentum(views[1]))


def nt_xent(group: Any = None, mean: bool = True, impl: Loss | None = None) -> Loss:
    function = impl or (dense_losses.nt_xent if group is None else ours(nt_xent_loss, group))
    return lambda net, z1, z2, keys: function(z1, z2, 0.3, mean=mean)


def info_nce(group: Any = None, mean: bool = True) -> Loss:
    function = dense_losses.info_nce if group is None else ours(info_nce_loss, group)
    return lambda net, z1, z2, keys: function(z1, keys, 0.2, mean=mean)


def clip(group: Any = None, mean: bool = True) -> Loss:
    function = dense_losses.clip if group is None else ours(clip_loss, group)
    return lambda net, z1, z2, keys: function(z1, z2, net.log_scale.exp(), mean=mean)


LOSSES = {"nt_xent": nt_xent, "info_nce": info_nce, "clip": clip}


def ours(function: Loss, group: Any) -> Loss:
    return lambda *args, mean: function(*args, group=group)


def views(size: int) -> Tensor:
    """The two views of the images of `size` ranks, rank by rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size * IMAGES, PIXELS, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, *images.shape, generator=generator, dtype=torch.float64)
    return images + noise


def share(everything: Tensor, rank: int) -> Tensor:
    return everything[:, rank * IMAGES : (rank + 1) * IMAGES]


def gradients(net: Network) -> Tensor:
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten() for gradient in found])


def differences(loss: Tensor, gradient: Tensor, expected_loss: Tensor, expected_gradient: Tensor) -> dict[str, float]:
    return {
        "loss": (loss - expected_loss).abs().item(),
        "gradient": (gradient - expected_gradient).abs().max().item(),
        "size": expected_gradient.abs().max().item(),
    }


def alone(loss: Loss, size: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one process with the images of `size` ranks, whose rows may weigh differently by rank."""
    net = Network()
    rows = net(views(size), loss)
    if weights is not None:
        each = weights.repeat_interleave(IMAGES)
        rows = rows * (torch.cat([each, each]) if len(rows) == 2 * len(each) else each)
    rows.mean().backward()
    return rows.mean().detach(), gradients(net)


def averaged(loss: Loss, group: Any, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same of the ranks of a group, averaged by hand."""
    net, size = Network(), dist.get_world_size(group)
    result = factor * net(share(views(size), dist.get_rank(group)), loss)
    result.backward()
    both = torch.cat([result.detach()[None], gradients(net)])
    dist.all_reduce(both, group=group)
    return both[0] / size, both[1:] / size


def under_ddp(name: str) -> dict[str, float]:
    """Real DistributedDataParallel and the whole world."""
    make, size = LOSSES[name], dist.get_world_size()
    net = DistributedDataParallel(Network(), find_unused_parameters=name != "clip")
    loss = net(share(views(size), dist.get_rank()), make(dist.group.WORLD))
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return differences(mean / size, gradients(net.module), *alone(make(), size))


def by_hand(name: str) -> dict[str, float]:
    make = LOSSES[name]
    return differences(*averaged(make(dist.group.WORLD), dist.group.WORLD), *alone(make(), dist.get_world_size()))


def weighted(name: str) -> dict[str, float]:
    """Every rank multiplies its loss by a factor of its own, one of them by 0."""
    make, size, rank = LOSSES[name], dist.get_world_size(), dist.get_rank()
    weights = torch.arange(size, dtype=torch.float64) * 3
    got = averaged(make(dist.group.WORLD), dist.group.WORLD, weights[rank].item())
    return differences(*got, *alone(make(mean=False), size, weights))


def ignored(name: str) -> dict[str, float]:
    """Every rank multiplies its loss by 0."""
    _, gradient = averaged(LOSSES[name](dist.group.WORLD), dist.group.WORLD, 0.0)
    return {"loss": 0.0, "gradient": gradient.abs().max().item(), "size": 1.0}


def of_lightly() -> dict[str, float]:
    """`lightly`'s loss with its gather beside ours, under the same averaging."""
    from lightly.loss import NTXentLoss

    theirs = NTXentLoss(0.3, gather_distributed=True)
    world = dist.group.WORLD
    expected = averaged(nt_xent(world, impl=lambda z1, z2, temperature, mean: theirs(z1, z2)), world)
    return differences(*averaged(nt_xent(world), world), *expected)


def in_a_group(name: str, group: Any) -> dict[str, float] | str:
    """The first two ranks in a group of their own; what the others are told when they call a loss with it."""
    make = LOSSES[name]
    if dist.get_rank() < 2:
        return differences(*averaged(make(group), group), *alone(make(), 2))
    try:
        Network()(views(1), make(group))
    except ValueError as error:
        return str(error)
    return ""


def on_its_own(name: str, group: Any) -> bool:
    """Whether a group of this process alone is bit for bit no group."""
    function = {"nt_xent": nt_xent_loss, "info_nce": info_nce_loss, "clip": clip_loss}[name]
    results = []
    for chosen in (group, None):
        z = views(1).requires_grad_()
        loss = function(*z, 2.0, group=chosen)
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    return all(map(torch.equal, *results))


def unequal(name: str) -> str:
    """What every rank is told when the last has one image less."""
    last = dist.get_rank() == dist.get_world_size() - 1
    images = share(views(dist.get_world_size()), dist.get_rank())[:, last:]
    try:
        Network()(images, LOSSES[name](dist.group.WORLD))
    except ValueError as error:
        return str(error)
    return ""


def in_half_precision() -> dict[str, float]:
    """The triton kernels on float16 features under a gradient scaler's factor, which float16 cannot hold with rows."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, size * 4, 16, generator=generator).half()
    wide = z.float().requires_grad_()
    dense_losses.nt_xent(*wide, 0.3, low=torch.float16).backward()
    mine = z[:, rank * 4 : (rank + 1) * 4].float().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = nt_xent_loss(*mine, 0.3, group=dist.group.WORLD, impl="triton")
    (65536.0 * loss).backward()
    assert mine.grad is not None
    assert wide.grad is not None
    expected = wide.grad[:, rank * 4 : (rank + 1) * 4]
    # Parameters' gradients are averaged over the ranks, features' are not.
    error = (mine.grad / 65536 / size - expected).norm() / expected.norm()
    return {"gradient": error.item()}


def compiled(name: str) -> dict[str, float]:
    """With a group under torch.compile, as one graph."""
    make = LOSSES[name]
    loss = make(dist.group.WORLD)
    fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = averaged(fast, dist.group.WORLD)
    return differences(*got, *averaged(loss, dist.group.WORLD))


def everything() -> dict[str, Any]:
    """All cases, by name; of those that differ by rank, the results of all ranks."""
    size, rank = dist.get_world_size(), dist.get_rank()
    pair = dist.new_group([0, 1])
    single = [dist.new_group([index]) for index in range(size)][rank]
    cases: dict[str, Callable[[], Any]] = {"half precision": in_half_precision}
    if importlib.util.find_spec("lightly") is not None:
        cases["lightly"] = of_lightly
    for name in LOSSES:
        cases |= {
            f"ddp {name}": lambda name=name: under_ddp(name),
            f"by hand {name}": lambda name=name: by_hand(name),
            f"weighted {name}": lambda name=name: weighted(name),
            f"ignored {name}": lambda name=name: ignored(name),
            f"group {name}": lambda name=name: in_a_group(name, pair),
            f"single {name}": lambda name=name: on_its_own(name, single),
            f"unequal {name}": lambda name=name: unequal(name),
            f"compiled {name}": lambda name=name: compiled(name),
        }
    report: dict[str, Any] = {}
    for case, run in cases.items():
        results: list[Any] = [None] * size
        dist.all_gather_object(results, run())
        report[case] = results
    return report


if __name__ == "__main__":
    dist.init_process_group("gloo")
    outcome = everything()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(outcome))
    dist.destroy_process_group()
