import copy

import pytest
import torch
from torch import nn

from vitrail.engine.interop.timm_swin import patch_timm_swin

SwinTransformer = pytest.importorskip("timm.models.swin_transformer").SwinTransformer


def swin(size: int | tuple[int, int], window: int = 4, **options: object) -> nn.Module:
    torch.manual_seed(0)
    depths, heads = (2, 2), (1, 2)
    options = {"drop_path_rate": 0.0, **options}
    model = SwinTransformer(
        img_size=size, embed_dim=16, depths=depths, num_heads=heads, window_size=window, num_classes=5, **options
    )
    for name, value in model.named_parameters():
        if name.endswith(("bias", "bias_table")):  # zeros, and nearly zeros, would hide what becomes of them
            nn.init.normal_(value)
    return model.double()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64, {}),  # windows fit
        (56, {}),  # stages of 14 and 7: padded, with and without a shift
        ((40, 72), {}),  # no square
        (32, {}),  # the second stage is one window and has no shift
        (24, {"window": 7, "always_partition": True}),  # smaller than the window, shifted all the same
        (56, {"qkv_bias": False}),
        (56, {"strict_img_size": False, "seen": 72}),  # its masks are made for another size
    ],
)
def test_values_and_gradients_stay(size, options):
    options = dict(options)
    seen = options.pop("seen", size)
    model = swin(size, **options)
    if seen != size:
        for block in model.modules():
            if hasattr(block, "dynamic_mask"):
                block.dynamic_mask = True
    patched = copy.deepcopy(model)
    state = list(patched.state_dict())
    assert patch_timm_swin(patched) == 4
    assert list(patched.state_dict()) == state
    shape = (seen, seen) if isinstance(seen, int) else seen
    images = torch.randn(2, 3, *shape, dtype=torch.float64)
    results = []
    for each in (model, patched, copy.deepcopy(patched)):
        out = each(images)
        gradients = torch.autograd.grad(out.square().sum(), list(each.parameters()))
        results.append([out, *gradients])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_float32_and_autocast():
    model = swin(56).float()
    patched = copy.deepcopy(model)
    patch_timm_swin(patched)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(patched(images), model(images), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = patched(images), model(images)
    assert got.dtype == expected.dtype
    assert (got - expected).float().norm() < 0.05 * expected.float().norm()


def test_what_cannot_be_replaced():
    with pytest.raises(ValueError, match="no block of Linear can be replaced: it holds no SwinTransformerBlock"):
        patch_timm_swin(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0: attn_drop=0\.1, but there is no dropout"):
        patch_timm_swin(swin(32, attn_drop_rate=0.1))
    model = swin((64, 16))  # maps of 16 x 4 and 8 x 2
    with pytest.warns(UserWarning, match=r"left as they are: .*window \(4, 4\) and shift \(2, 0\) must be square"):
        assert patch_timm_swin(model) == 1
