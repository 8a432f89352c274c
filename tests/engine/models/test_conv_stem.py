"""The convolutional stem of MoCo v3 against a plain stack of torch's layers."""

import pytest
import torch
from torch import nn

from vitrail.engine.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from vitrail.engine.models.batch_norm import batch_norms
from vitrail.engine.models.conv_stem import ConvStem, stem_flops, stem_widths


def plain_stem(widths):
    """The same layers, all of torch's."""
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, before, 1))


def images(count, height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def normalised(pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize(
    ("size", "patch", "dim", "widths"),
    [
        ((48, 32), 16, 24, [3, 6, 12, 24]),
        ((16, 24), 4, 16, [8, 16]),
        ((8, 8), 2, 5, [5]),
    ],
)
def test_equals_a_plain_stack(size, patch, dim, widths):
    """Tokens, gradients and running statistics of two views, which torch's layers see one after the other."""
    torch.manual_seed(0)
    theirs = plain_stem(widths)
    ours = ConvStem(image_size=size, patch_size=patch, embed_dim=dim)
    ours.proj.load_state_dict(theirs.state_dict())
    for layer in batch_norms(ours):
        layer.groups = 2
    pixels = images(6, *size)
    pixels[3:] //= 3
    tokens = ours(pixels)
    maps = torch.cat([theirs(view) for view in normalised(pixels).chunk(2)])
    assert tokens.shape == (6, size[0] // patch * (size[1] // patch), dim)
    for row in range(size[0] // patch):
        for column in range(size[1] // patch):
            token = tokens[:, row * (size[1] // patch) + column]
            torch.testing.assert_close(token, maps[:, :, row, column], rtol=1e-4, atol=1e-5)
    tokens.square().sum().backward()
    maps.square().sum().backward()
    for (name, p), q in zip(ours.proj.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 2e-4 * q.grad.norm(), name
    for mine, other in zip(ours.proj.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_keys_and_shapes_are_the_official_ones():
    stem = ConvStem(image_size=224, patch_size=16, embed_dim=384)
    statistics = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {f"proj.{i}.weight" for i in (0, 3, 6, 9)} | {"proj.12.weight", "proj.12.bias"}
    expected |= {f"proj.{i}.{name}" for i in (1, 4, 7, 10) for name in statistics}
    state = stem.state_dict()
    assert state.keys() == expected
    shapes = {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight") and t.dim() == 4}
    assert shapes == {
        "proj.0.weight": (48, 3, 3, 3),
        "proj.3.weight": (96, 48, 3, 3),
        "proj.6.weight": (192, 96, 3, 3),
        "proj.9.weight": (384, 192, 3, 3),
        "proj.12.weight": (384, 384, 1, 1),
    }
    assert (stem.patch_size, stem.image_size) == (16, (224, 224))


def test_initialisation_is_that_of_torch_convolutions():
    torch.manual_seed(0)
    stem = ConvStem(image_size=32, patch_size=4, embed_dim=64)
    torch.manual_seed(0)
    plain = plain_stem([32, 64])
    assert all(torch.equal(p, q) for p, q in zip(stem.proj.parameters(), plain.parameters(), strict=True))


def test_layouts_of_the_input():
    stem = ConvStem(image_size=(8, 12), patch_size=4, embed_dim=8, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    pixels = images(2, 8, 12)
    tokens = stem(pixels)
    torch.testing.assert_close(stem(pixels.permute(0, 3, 1, 2).contiguous()), tokens)
    torch.testing.assert_close(stem(pixels.float() / 255), tokens)
    maps = stem.proj((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(tokens, maps.flatten(2).transpose(1, 2))
    assert tokens.is_contiguous()


def test_under_autocast_tokens_are_bf16():
    stem = ConvStem(image_size=16, patch_size=4, embed_dim=8)
    pixels = images(4, 16, 16)
    expected = stem(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = stem(pixels)
    assert tokens.dtype == torch.bfloat16
    assert (tokens - expected).norm() < 0.03 * expected.norm()
    assert {b.dtype for b in stem.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("size", "patch", "dim"), [((32, 48), 16, 24), ((8, 8), 4, 16)])
def test_flops(size, patch, dim):
    stem, total = ConvStem(image_size=size, patch_size=patch, embed_dim=dim), 0

    def count(module, args, out):
        nonlocal total
        total += 2 * module.weight[0].numel() * out.numel()

    for layer in stem.proj:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    stem.eval()(images(1, *size))
    assert stem_flops(size, patch, dim) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 12, "image_size": 24}, "patch_size must be a power of two, got 12"),
        ({"patch_size": 1}, "patch_size must be a power of two, got 1"),
        ({"embed_dim": 28}, "embed_dim must be a multiple of 8 for the 4 stages of a convolutional stem, got 28"),
        ({"image_size": (32, 40)}, r"image_size \(32, 40\) is not a multiple of patch_size 16"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ConvStem(**{"image_size": 32, "patch_size": 16, "embed_dim": 24} | change)


def test_other_sizes_are_refused():
    stem = ConvStem(image_size=16, patch_size=4, embed_dim=8)
    with pytest.raises(ValueError, match=r"images are of size \(16, 12\), but this stem was built for \(16, 16\)"):
        stem(images(2, 16, 12))
    assert stem_widths(4, 8) == [4, 8]
