"""Clipping of each parameter's gradient, or of each part's, to a norm of its own, on ZeRO's flat shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from vitrail.kernels import multi_tensor_norm, multi_tensor_scale_
from vitrail.kernels.multi_tensor_norm.clip import EPS, clip_scales

from .param_groups import PART


class Pieces(NamedTuple):
    """What this rank's shard of a group holds of the group's parameters."""

    places: list[tuple[int, int]]
    """Start and length of each piece in the shard."""
    owners: Tensor
    """int64: the number of each piece's parameter in the group."""
    parameters: int
    """How many the group has."""


class ShardClipping:
    """Clips as `FusedOptimizer` does in stage 0, in stages 1 to 3, where a gradient lies in pieces on several ranks.

    Just before the optimiser steps a shard, the squared norms of its pieces are added up over the ranks, in one message
    of a float64 per parameter, and the pieces are scaled in place. Nothing is read on the host.
    """

    def __init__(self, engine: DeepSpeedEngine, limit: float) -> None:
        """Watch the optimiser of an engine in stage 1, 2 or 3, whose own clipping is off."""
        self.limit = limit
        find = _pieces_of_stage_3 if engine.zero_optimization_stage() == 3 else _pieces
        self.pieces = {id(shard): pieces for shard, pieces in find(engine.optimizer)}
        engine.optimizer.optimizer.register_step_pre_hook(self._clip)

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for shard in group["params"]:
                if shard.grad is not None:
                    self._clip_shard(shard.grad, self.pieces[id(shard)])

    def _clip_shard(self, gradient: Tensor, pieces: Pieces) -> None:
        parts = [gradient.narrow(0, start, length) for start, length in pieces.places]
        norms = multi_tensor_norm(parts)
        squares = torch.zeros(pieces.parameters, dtype=torch.float64, device=gradient.device)
        squares[pieces.owners] = norms.norms.to(squares).square()
        torch.distributed.all_reduce(squares)
        whole = norms._replace(norms=squares.sqrt().float())
        multi_tensor_scale_(parts, clip_scales(whole, self.limit, per_tensor=True)[pieces.owners])


class PartClipping:
    """Clips each part of `Method.clip_groups` by its own norm, in stages 1 to 3, where shards are stepped one by one.

    Every shard belongs to one part. DeepSpeed has the norm of each shard's group over all ranks before it steps the
    first: these are listened to, and each shard is scaled in place just before its step. Nothing is read on the host.
    """

    def __init__(self, engine: DeepSpeedEngine, limit: float) -> None:
        """Watch the optimiser of an engine in stage 1, 2 or 3, whose own clipping is off."""
        self.limit = limit
        outer = engine.optimizer
        groups = outer.optimizer.param_groups
        if engine.zero_optimization_stage() == 3:
            self.shards = outer.fp32_partitioned_groups_flat
            of = [outer.sub_group_to_group_id[number] for number in range(len(self.shards))]
        else:
            self.shards = outer.single_partition_of_fp32_groups
            of = list(range(len(self.shards)))
        self.parts = [groups[number].get(PART, 0) for number in of]
        self.numbers = {id(shard): number for number, shard in enumerate(self.shards)}
        self.norms: list[Tensor] = []
        self.plain = outer.get_grad_norm_direct
        outer.get_grad_norm_direct = self._listen
        outer.optimizer.register_step_pre_hook(self._clip)

    def _listen(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm of a group, all of which DeepSpeed asks for in order at every step."""
        if len(self.norms) == len(self.parts):
            self.norms = []
        norm: Tensor = self.plain(*args, **kwargs)
        self.norms.append(norm)
        return norm

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for shard in group["params"]:
                if shard.grad is not None:
                    part = self.parts[self.numbers[id(shard)]]
                    norms = [norm for norm, other in zip(self.norms, self.parts, strict=True) if other == part]
                    norm = torch.linalg.vector_norm(torch.stack(norms))
                    shard.grad.mul_((self.limit / (norm + EPS)).clamp(max=1.0))


def _pieces(optimizer: Any) -> Iterator[tuple[Tensor, Pieces]]:
    """The shards of stages 1 and 2, in which a parameter may begin or end within."""
    for shard, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        addresses = [parameter._hp_mapping and parameter._hp_mapping.hp_fragment_address for parameter in parameters]
        yield shard, _found(shard, parameters, [address and (address.start, address.numel) for address in addresses])


def _pieces_of_stage_3(optimizer: Any) -> Iterator[tuple[Tensor, Pieces]]:
    """The shards of stage 3, which hold a piece of every parameter, the last rank's filled up with zeros."""
    for shard, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        positions = [optimizer.grad_position[optimizer.get_param_id(parameter)] for parameter in parameters]
        yield shard, _found(shard, parameters, [(start, length) for _, start, length in positions])


def _found(shard: Tensor, parameters: Sequence[nn.Parameter], places: Sequence[tuple[int, int] | None]) -> Pieces:
    owners = [number for number, place in enumerate(places) if place is not None]
    numbers = torch.tensor(owners, dtype=torch.int64, device=shard.device)
    return Pieces([place for place in places if place is not None], numbers, len(parameters))
