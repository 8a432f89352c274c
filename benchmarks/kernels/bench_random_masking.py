"""Random masking against two argsorts: 256 positions, 64 kept."""

import pytest
import torch

from vitrail.kernels import random_masking

LENGTH, KEEP = 256, 64


def two_argsorts(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shuffle = torch.argsort(noise, dim=1, stable=True)
    return shuffle[:, :KEEP], shuffle[:, KEEP:], torch.argsort(shuffle, dim=1)


@pytest.mark.benchmark(group="random_masking")
@pytest.mark.parametrize("peer", ["vitrail", "eager"])
def test_random_masking(measure, device, batch, peer):
    noise = torch.rand(batch, LENGTH, device=device)
    calls = {
        "vitrail": lambda: random_masking(batch, LENGTH, KEEP, noise=noise),
        "eager": lambda: two_argsorts(noise),
    }
    bytes_moved = noise.numel() * (4 + 2 * 8)  # noise in; every position in one of two lists, and in the inverse
    measure(calls[peer], truth=two_argsorts(noise.double()), bytes_moved=bytes_moved, tolerance=0.0)
