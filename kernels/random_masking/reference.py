"""Random masking in plain PyTorch: one stable sort, and a scatter for its inverse."""

import torch


def forward(noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits each row's positions by the order of its noise.

    Args:
        noise: [B, L], floating. The positions of the smallest values are kept. Equal values keep their order.
        keep: Number of positions to keep, 0 to L.

    Returns:
        int64 ids_keep [B, keep] and ids_mask [B, L - keep], both in noise order, and ids_restore [B, L]: where
        each position went in their concatenation.
    """
    shuffle = torch.sort(noise, dim=1, stable=True).indices
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(shuffle)
    restore = torch.empty_like(shuffle).scatter_(1, shuffle, ranks)
    return shuffle[:, :keep].contiguous(), shuffle[:, keep:].contiguous(), restore
