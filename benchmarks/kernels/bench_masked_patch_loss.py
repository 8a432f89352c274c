"""The masked-patch loss from uint8, forward and backward, against patchify, normalise and a mask over all patches."""

import pytest
import torch

from vitrail.kernels import masked_patch_loss, random_masking

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(pred: torch.Tensor, images: torch.Tensor, masked_indices: torch.Tensor, patch: int) -> torch.Tensor:
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(values, dtype=compute, device=images.device) for values in (MEAN, STD))
    pixels = (images.to(compute) / 255 - mean) / std
    target = pixels.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).transpose(2, 3).flatten(1, 2).flatten(2)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    rows = masked_indices[..., None].expand(-1, -1, target.shape[-1])
    everything = torch.zeros_like(target).scatter(1, rows, pred.to(compute))
    mask = target.new_zeros(target.shape[:2]).scatter(1, masked_indices, 1.0)
    return ((everything - target).square().mean(-1) * mask).sum() / mask.sum()


@pytest.mark.benchmark(group="masked_patch_loss")
@pytest.mark.parametrize("peer", ["vitrail", "eager"])
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("patch", [14, 16])
def test_masked_patch_loss(measure, device, batch, patch, passes, peer):
    length, width = (224 // patch) ** 2, 3 * patch * patch
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    _, masked_indices, _ = random_masking(batch, length, length // 4, device=device)
    pred = torch.randn(*masked_indices.shape, width, device=device).bfloat16().requires_grad_()

    def run(function, pred):
        loss = function(pred)
        return loss.detach() if passes == "forward" else torch.autograd.grad(loss, pred)[0]

    functions = {
        "vitrail": lambda pred: masked_patch_loss(pred, images, masked_indices, patch, mean=MEAN, std=STD),
        "eager": lambda pred: eager(pred, images, masked_indices, patch),
    }
    read = pred.numel() * (2 + 1)  # bf16 predictions, uint8 pixels
    bytes_moved = read if passes == "forward" else 2 * read + pred.numel() * 2
    truth = run(functions["eager"], pred.detach().double().requires_grad_())
    tolerance = 1e-5 if passes == "forward" else 2**-7
    measure(lambda: run(functions[peer], pred), truth=truth, bytes_moved=bytes_moved, tolerance=tolerance)
