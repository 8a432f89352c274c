"""Residual networks as backbones against torchvision's own modules."""

import sys

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision")

from vitrail.engine.models.backbone import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from vitrail.engine.models.batch_norm import batch_norms, defer_statistics, settle_statistics  # noqa: E402
from vitrail.engine.models.resnet import ResNetConfig  # noqa: E402

SIDE = 64


def images(count, side=SIDE, seed=0):
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def normalised(pixels):
    """What torchvision's transforms make of uint8 `[B, H, W, 3]`, in float64."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std


def twins(architecture="resnet18", *, dtype=torch.float32, **options):
    """Ours and torchvision's without a classifier, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, architecture)()
    theirs.fc = nn.Identity()
    ours = ResNetConfig(architecture=architecture).build(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_keys_and_shapes_are_those_of_torchvision(architecture):
    ours, theirs = twins(architecture)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in other.items()}
    assert ours.width == ours.config.feature_width == (512 if architecture == "resnet18" else 2048)
    assert len(batch_norms(ours)) == (20 if architecture == "resnet18" else 53)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())


def test_resnet50_equals_torchvision():
    ours, theirs = twins("resnet50", dtype=torch.float64)
    pixels = images(2)
    with torch.no_grad():
        for mode in (True, False):
            got, expected = ours.train(mode).forward_features(pixels), theirs.train(mode)(normalised(pixels))
            assert got.shape == (2, 2048)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_regions_are_the_last_map_row_by_row():
    ours, theirs = twins(dtype=torch.float64)
    maps = []
    theirs.layer4.register_forward_hook(lambda module, args, out: maps.append(out))
    pixels = images(2, 96)[:, :64]  # a map of 2 x 3
    with torch.no_grad():
        pooled, regions = ours.eval().forward_regions(pixels)
        expected = theirs.eval()(normalised(pixels))
    assert regions.shape == (2, 6, 512)
    torch.testing.assert_close(pooled, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(regions[:, 4], maps[0][:, :, 1, 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(regions.mean(dim=1), pooled, rtol=1e-9, atol=1e-9)


def test_two_views_in_one_pass_are_two_passes_of_torchvision():
    """Features, gradients and running statistics in training."""
    ours, theirs = twins(groups=2, dtype=torch.float64)
    first, second = images(3), images(3, seed=1) // 2  # the second one is darker
    weights = torch.randn(6, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = ours.forward_features(torch.cat([first, second]))
    out.backward(weights)
    expected = torch.cat([theirs(normalised(view)) for view in (first, second)])
    expected.backward(weights)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert (p.grad - q.grad).norm() < 1e-9 * q.grad.norm(), name
    theirs_state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(value, theirs_state[name], rtol=1e-9, atol=1e-9)
    alone, _ = twins(groups=1, dtype=torch.float64)
    assert (alone.forward_features(torch.cat([first, second])) - out).abs().max() > 0.1


def test_statistics_can_wait():
    ours, _ = twins(groups=2, sync=False)
    assert defer_statistics(ours) == 20
    ours.forward_features(images(4, 32))
    assert ours.get_buffer("bn1.num_batches_tracked").item() == 0
    settle_statistics(ours, applied=True)
    assert {layer.num_batches_tracked.item() for layer in batch_norms(ours)} == {2}
    assert not any(layer.sync for layer in batch_norms(ours))


def test_under_autocast_features_are_bf16():
    ours, _ = twins()
    pixels = images(4, 32)
    expected = ours.eval().forward_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours.forward_features(pixels)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.03 * expected.norm()


def test_layouts_of_the_input():
    ours, _ = twins()
    ours.eval()
    pixels = images(2, 32)
    expected = ours.forward_features(pixels)
    torch.testing.assert_close(ours.forward_features(pixels.permute(0, 3, 1, 2).contiguous()), expected)
    torch.testing.assert_close(ours.forward_features(pixels.float() / 255), expected, rtol=1e-4, atol=1e-5)
    assert ours.pixels(pixels).is_contiguous(memory_format=torch.channels_last)
    other = ResNetConfig(architecture="resnet18").build(mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(other.pixels(pixels), pixels.permute(0, 3, 1, 2).float() * (4 / 255) - 2)


@pytest.mark.parametrize(("architecture", "norm"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_initialised_branches(architecture, norm):
    zero = ResNetConfig(architecture=architecture, zero_init_residual=True).build()
    plain = ResNetConfig(architecture=architecture).build()
    assert zero.get_parameter(f"layer3.1.{norm}.weight").abs().max() == 0
    assert plain.get_parameter(f"layer3.1.{norm}.weight").min() == 1
    assert zero.get_parameter("layer3.1.bn1.weight").min() == 1


def test_cifar_stem():
    torch.manual_seed(0)
    ours = ResNetConfig(architecture="resnet18", image_size=32, cifar_stem=True).build()
    sizes = []
    ours.get_submodule("layer1").register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape)))
    assert ours.forward_features(images(2, 32)).shape == (2, 512)
    assert sizes == [(2, 64, 32, 32)]
    weight = ours.get_parameter("conv1.weight")
    assert weight.shape == (64, 3, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert list(ours.state_dict()) == list(ResNetConfig(architecture="resnet18").build().state_dict())


def counted(model, side):
    """Two operations per multiply-accumulate of every convolution that a forward pass applies."""
    total = 0

    def count(module, args, out):
        nonlocal total
        per_output = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        total += 2 * per_output * out.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(images(1, side))
    return total


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(),
        ResNetConfig(architecture="resnet18", image_size=72),
        ResNetConfig(architecture="resnet18", image_size=32, cifar_stem=True),
        ResNetConfig().demo(),
    ],
    ids=["resnet50", "resnet18", "cifar", "demo"],
)
def test_flops(config):
    assert config.flops == counted(config.build(), config.size[0])


def test_flops_of_the_published_size():
    # 4.09 GMACs in torchvision's table of weights, 2.05 M of them in the classifier.
    assert ResNetConfig().flops / 2 + 2048 * 1000 == pytest.approx(4.09e9, rel=1e-3)


def test_counting_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert ResNetConfig(architecture="resnet18", image_size=40).flops > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_residual_network_says_of_itself():
    ours, _ = twins()
    assert [tuple(p.shape) for p in ours.first_layer()] == [(64, 3, 7, 7)]
    with pytest.raises(ValueError, match="resnet18 has no patch projection"):
        ours.freeze_patch_embed()
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\] or \[B, 3, H, W\], got \[2, 32, 32, 4\]"):
        ours(torch.zeros(2, 32, 32, 4))


def test_missing_torchvision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match="pip install torchvision"):
        ResNetConfig().build()
