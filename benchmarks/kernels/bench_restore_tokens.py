"""Token restoring, against repeat, concatenate, gather and add: the input of MAE's decoder."""

from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, compiled, measures
from bench.images import GRIDS, Grid

from vitrail.kernels import random_masking, restore_tokens

Tensor = torch.Tensor
WIDTH = 512  # of every MAE decoder


def inputs(grid: Grid, batch: int, device: torch.device) -> dict[str, Tensor]:
    ids_keep, _, ids_restore = random_masking(batch, grid.length, grid.keep, device=device)
    sizes = {
        "visible": (batch, 1 + grid.keep, WIDTH),
        "mask_token": (WIDTH,),
        "pos_embed": (1 + grid.length, WIDTH),
    }
    drawn = {name: torch.randn(size, device=device).bfloat16() for name, size in sizes.items()}
    return {**drawn, "ids_restore": ids_restore, "ids_keep": ids_keep}


def ours(visible: Tensor, ids_restore: Tensor, ids_keep: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    return restore_tokens(visible, ids_restore, mask_token, pos_embed)


def eager(visible: Tensor, ids_restore: Tensor, ids_keep: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    hidden = ids_restore.shape[1] - visible.shape[1] + 1
    shuffled = torch.cat([visible[:, 1:], mask_token.expand(len(visible), hidden, -1)], dim=1)
    restored = shuffled.gather(1, ids_restore[..., None].expand(-1, -1, visible.shape[-1]))
    return torch.cat([visible[:, :1], restored], dim=1) + pos_embed


def lightly() -> Any:
    from lightly.models.utils import repeat_token, set_at_index

    def restore(
        visible: Tensor, ids_restore: Tensor, ids_keep: Tensor, mask_token: Tensor, pos_embed: Tensor
    ) -> Tensor:
        # Its indices count the class token, which is always kept.
        kept = torch.nn.functional.pad(ids_keep + 1, (1, 0))
        tokens = repeat_token(mask_token.view(1, 1, -1), (len(visible), ids_restore.shape[1] + 1))
        return set_at_index(tokens, kept, visible) + pos_embed

    return restore


def case(grid: Grid, batch: int) -> Case:
    # bf16 tokens in and out, the position table, int64 ranks
    tokens = (batch * (1 + grid.keep + 1 + grid.length) + 1 + grid.length) * WIDTH * 2
    once = tokens + batch * grid.length * 8
    return Case(
        op="restore_tokens",
        name=grid.name,
        shape={**grid.shape(batch), "width": WIDTH},
        dtype=torch.bfloat16,
        inputs=partial(inputs, grid, batch),
        truth=eager,
        implementations={
            "vitrail": lambda: ours,
            "eager": lambda: eager,
            "compiled": compiled(eager),
            "lightly": lightly,
        },
        bytes={"forward": once, "forward+backward": 2 * once},
        flops={},
        differentiable=("visible", "mask_token", "pos_embed"),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(grid, sizes.batch) for grid in GRIDS]


test_restore_tokens = measures(cases)
