import pytest
import torch
from torch import nn

from vitrail.kernels import MaskedPatchEmbed, WindowAttention, random_masking, window_attention

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convolve(module: MaskedPatchEmbed, images: torch.Tensor) -> torch.Tensor:
    """The usual patch embedding: a convolution with the module's own parameters, on normalised images."""
    pixels = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    scale = 255 if images.dtype == torch.uint8 else 1
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    parameters = (module.proj.weight, module.proj.bias)
    out = nn.functional.conv2d((pixels.double() / scale - mean) / std, *parameters, stride=module.patch_size)
    return out.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("patch", [2, 7, 14])
def test_equals_a_convolution_on_normalised_images(patch, dtype, layout):
    torch.manual_seed(patch)
    images = torch.randint(0, 256, (3, 3 * patch, 2 * patch, 3), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images.double() / 255
    images = images if layout == "hwc" else images.permute(0, 3, 1, 2).contiguous()
    module = MaskedPatchEmbed(None, patch, 10, mean=MEAN, std=STD).double()
    every = module(images)
    torch.testing.assert_close(every, convolve(module, images))
    keep, _, _ = random_masking(3, 6, 2)
    torch.testing.assert_close(module(images, keep), every.take_along_dim(keep[..., None], 1))


def test_gradients_equal_those_of_the_convolution():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    module = MaskedPatchEmbed(None, 4, 5, mean=MEAN, std=STD).double()
    got = torch.autograd.grad(module(images).square().sum(), list(module.parameters()))
    expected = torch.autograd.grad(convolve(module, images).square().sum(), list(module.parameters()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_state_dict_is_interchangeable_with_a_convolution():
    module = MaskedPatchEmbed(224, 16, 32)
    convolution = nn.Conv2d(3, 32, 16, 16)
    assert list(module.state_dict()) == ["proj.weight", "proj.bias"]
    module.proj.load_state_dict(convolution.state_dict())
    assert torch.equal(module.state_dict()["proj.weight"], convolution.weight)


def test_rows_are_padded_to_sixteen_bytes():
    assert MaskedPatchEmbed(patch_size=14).columns == 592
    assert MaskedPatchEmbed(patch_size=16).columns == 768


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_follows_autocast_and_the_parameters(dtype):
    images = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    module = MaskedPatchEmbed(None, 8, 4)
    with torch.autocast("cpu", dtype):
        assert module(images).dtype == dtype
    assert module(images).dtype == torch.float32
    assert module.to(dtype)(images).dtype == dtype


def test_compiles_as_one_graph():
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    module = MaskedPatchEmbed(None, 8, 4, mean=MEAN, std=STD)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), module(images))
    compiled(images).sum().backward()
    assert module.proj.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 1}, "in_chans must be 3, got 1"),
        ({"image_size": 30}, r"image_size \(30, 30\) is not a multiple of patch_size=16"),
        ({"mean": MEAN}, "mean is given without std"),
    ],
)
def test_construction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedPatchEmbed(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images are of size \(16, 32\), but this module was built for \(32, 32\)"):
        MaskedPatchEmbed(32, 16, 4)(torch.zeros(1, 16, 32, 3))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_window_attention_is_the_op_between_projections(qkv_bias):
    """On a map that is padded, whose padded tokens hold the bias."""
    torch.manual_seed(0)
    module = WindowAttention(8, 2, window_size=4, shift=1, qkv_bias=qkv_bias).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    canvas = nn.functional.pad(x, (0, 0, 0, 1, 0, 3))  # zeros ahead of the projection
    product = nn.functional.linear(canvas, module.qkv.weight, module.qkv.bias)
    options = {"window_size": 4, "shift": 1, "num_heads": 2}
    expected = module.proj(window_attention(product, module.relative_position_bias_table, **options)[:, :5, :7])
    got = module(x)
    torch.testing.assert_close(got, expected)
    parameters = list(module.parameters())
    for one, other in zip(
        *(torch.autograd.grad(out.square().sum(), parameters) for out in (got, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_window_attention_has_the_names_of_published_states():
    names = ["relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    module = WindowAttention(96, 3)
    assert list(module.state_dict()) == names
    assert module.relative_position_bias_table.shape == (169, 3)
    assert 0.01 < module.relative_position_bias_table.std() < 0.03


def test_window_attention_compiles_as_one_graph_and_follows_autocast():
    module, x = WindowAttention(32, 2, 4, 2), torch.randn(2, 7, 7, 32)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "dim=96 is not divisible by num_heads=5"),
        ({"num_heads": 3, "shift": 7}, "shift must be between 0 and window_size - 1 = 6, got 7"),
    ],
)
def test_window_attention_construction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(96, **options)
