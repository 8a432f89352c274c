"""Images at a scale of their own, and positions that start from a table."""

from dataclasses import replace

import pytest
import torch

from vitrail.engine.models.pixels import standardised
from vitrail.engine.models.positions import sincos_positions
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.engine.models.vit import ViTConfig

ENCODERS = {
    "vit": ViTConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2),
    "swin": SwinConfig(image_size=32, width=16, depths=(1,), heads=(1,), window=4),
    "resnet": ResNetConfig(architecture="resnet18", image_size=32, cifar_stem=True),
}


def test_every_channel_of_every_image_has_the_same_mean_and_deviation():
    torch.manual_seed(0)
    images = torch.rand(3, 8, 10, 3) * torch.tensor([0.2, 0.5, 0.9]) + 0.05
    out = standardised(images)
    assert out.dtype == images.dtype
    torch.testing.assert_close(out.mean((1, 2)), torch.full((3, 3), 0.46), rtol=1e-5, atol=1e-5)
    std = images.std((1, 2))
    torch.testing.assert_close(out.std((1, 2)), 0.225 * std / (std + 0.016), rtol=1e-5, atol=1e-5)
    planes = standardised(images.permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(planes.permute(0, 2, 3, 1), out)
    bytes_ = (images * 255).round().to(torch.uint8)
    rounded = standardised(bytes_)
    assert rounded.dtype == torch.uint8
    expected = standardised(bytes_.float() / 255).clamp(0, 1)
    assert (rounded.float() / 255 - expected).abs().max() <= 0.51 / 255
    grey = torch.full((1, 4, 4, 3), 9, dtype=torch.uint8)
    assert standardised(grey).unique().tolist() == [117]  # nothing to see, and nothing to divide by


@pytest.mark.parametrize("name", ENCODERS)
def test_networks_do_not_see_the_light_of_an_image(name):
    torch.manual_seed(0)
    images = torch.rand(4, 32, 32, 3) * 0.4 + 0.3
    darker = images * torch.tensor([0.9, 0.6, 0.8]) + torch.tensor([0.0, 0.2, -0.1])
    moved = {}
    for pixels in ("image", "dataset"):
        torch.manual_seed(1)
        network = replace(ENCODERS[name], pixels=pixels).build().eval()
        with torch.no_grad():
            a, b = network.forward_features(images), network.forward_features(darker)
        moved[pixels] = ((a - b).norm() / a.norm()).item()
    # not quite nothing: the deviation that a channel is divided by has a least value
    assert moved["image"] < min(0.1, 0.3 * moved["dataset"]), moved


def test_learned_positions_may_start_from_the_table():
    config = replace(ENCODERS["vit"], positions="learned_sincos")
    vit = config.build()
    assert isinstance(vit.pos_embed, torch.nn.Parameter)
    assert torch.equal(vit.pos_embed, sincos_positions(32, (4, 4)))
    assert vit.forward_features(torch.zeros(1, 16, 24, 3, dtype=torch.uint8)).shape == (1, 32)
