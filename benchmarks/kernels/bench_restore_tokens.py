"""Token restoring, forward and backward, against repeat, concatenate, gather and add: MAE's ViT-H/14 decoder."""

import pytest
import torch

from vitrail.kernels import random_masking, restore_tokens

LENGTH, KEEP, WIDTH = 256, 64, 512


def eager(
    visible: torch.Tensor, ids_restore: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor
) -> torch.Tensor:
    fillers = mask_token.expand(len(visible), LENGTH - KEEP, -1)
    shuffled = torch.cat([visible[:, 1:], fillers], dim=1)
    restored = shuffled.gather(1, ids_restore[..., None].expand(-1, -1, WIDTH))
    return torch.cat([visible[:, :1], restored], dim=1) + pos_embed


@pytest.mark.benchmark(group="restore_tokens")
@pytest.mark.parametrize("peer", ["vitrail", "eager"])
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
def test_restore_tokens(measure, device, batch, passes, peer):
    _, _, ids_restore = random_masking(batch, LENGTH, KEEP, device=device)
    shapes = ((batch, 1 + KEEP, WIDTH), (WIDTH,), (1 + LENGTH, WIDTH))
    inputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]
    grad = torch.randn(batch, 1 + LENGTH, WIDTH, device=device).bfloat16()

    def run(function, visible, mask_token, pos_embed):
        out = function(visible, ids_restore, mask_token, pos_embed)
        if passes == "forward":
            return out.detach()
        return torch.autograd.grad(out, (visible, mask_token, pos_embed), grad.to(out))

    tokens = batch * (1 + KEEP + 1 + LENGTH) * WIDTH * 2 + ids_restore.numel() * 8  # bf16 tokens, int64 ranks
    bytes_moved = tokens * (1 if passes == "forward" else 2)
    truth = run(eager, *(value.detach().double().requires_grad_() for value in inputs))
    function = {"vitrail": restore_tokens, "eager": eager}[peer]
    measure(lambda: run(function, *inputs), truth=truth, bytes_moved=bytes_moved, tolerance=2**-6)
