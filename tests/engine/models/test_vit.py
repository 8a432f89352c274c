"""The vision transformer, its positions and its attention."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.engine.models import attention
from vitrail.engine.models.attention import Attention, attend, attention_backend
from vitrail.engine.models.block import Block, DropPath, take_rows
from vitrail.engine.models.positions import sincos_positions
from vitrail.engine.models.vit import (
    VisionTransformer,
    ViTConfig,
    vit_base,
    vit_small,
    vit_tiny,
)


@pytest.mark.parametrize(
    ("width", "side", "total", "absolute"),
    [
        (768, 14, 69594.49385916878, 84118.4156846929),
        (1024, 14, 92849.19791831236, 112137.8061121279),
        (1280, 16, 149578.40575297287, 183831.01657527447),
        (512, 14, 46340.33310267379, 56094.48864550612),
        (512, 16, 59700.67847947851, 73568.81925584273),
    ],
)
def test_sincos_sums(width, side, total, absolute):
    table = sincos_positions(width, (side, side)).double()
    assert table.sum().item() == pytest.approx(total, rel=1e-7)
    assert table.abs().sum().item() == pytest.approx(absolute, rel=1e-7)
    assert table.square().sum().item() == pytest.approx(side * side * width / 2, rel=1e-7)


def test_sincos_entries_put_the_column_first():
    table = sincos_positions(768, (14, 14))[0, 1:].view(14, 14, 768)
    assert table[0, 1, [0, 1, 191, 192, 384, 576]].tolist() == pytest.approx(
        [0.841470985, 0.81525065, 0.000104914, 0.540302306, 0, 1], abs=1e-7
    )
    assert table[3, 5, [0, 192, 384, 576]].tolist() == pytest.approx(
        [-0.958924275, 0.283662185, 0.141120008, -0.989992497], abs=1e-7
    )


def test_sincos_non_square_grid_is_a_window_of_the_square_one():
    square = sincos_positions(64, (6, 6))[0, 1:].view(6, 6, 64)
    assert torch.equal(sincos_positions(64, (3, 6))[0, 1:].view(3, 6, 64), square[:3])
    assert torch.equal(sincos_positions(64, (6, 2))[0, 1:].view(6, 2, 64), square[:, :2])


def test_sincos_width_is_checked():
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        sincos_positions(30, (2, 2))


def plain_attention(q, k, v, heads):
    """scaled_dot_product_attention on `[B, N, D]` tensors."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 7), (1, 4)])
def test_cache_blocked_attention(monkeypatch, block_bytes, n, m):
    """Values against scaled_dot_product_attention, gradients by finite differences, for any block size."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    q, kv = (
        torch.randn(2, length, size, dtype=torch.float64, requires_grad=True) for length, size in ((n, 12), (m, 24))
    )
    out = attend(q, kv, heads=3, backend="math")
    torch.testing.assert_close(out, plain_attention(q, *kv.chunk(2, -1), 3), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, heads=3, backend="math"), (q, kv))


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packed_attention(backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    out = attend(qkv, heads=2, backend=backend)
    torch.testing.assert_close(out, plain_attention(*qkv.chunk(3, -1), 2), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: attend(t, heads=2, backend=backend), (qkv,))


def test_cache_blocked_attention_in_bf16_is_as_exact_as_plain_products():
    torch.manual_seed(0)
    qkv = torch.randn(4, 50, 3 * 96).bfloat16()
    truth = plain_attention(*qkv.double().chunk(3, -1), 3)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    plain = (((q * 32**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    error = (attend(qkv, heads=3, backend="math").double() - truth).abs().max()
    assert error <= 1.5 * (plain.double() - truth).abs().max()


def test_attention_keeps_no_probabilities():
    qkv = torch.randn(2, 64, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        attend(qkv, heads=2, backend="math")
    assert saved == [qkv.shape]


def test_backend_choice_gives_reasons():
    assert attention_backend("auto", torch.device("cpu"))[0] == "math"
    assert attention_backend("auto", torch.device("cuda"))[0] == "sdpa"
    with pytest.raises(RuntimeError, match="runs on CUDA only, the model is on cpu"):
        attention_backend("xformers", torch.device("cpu"))


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="width 30 is not divisible by 4 heads"):
        Attention(30, 4)


@pytest.mark.parametrize("given_projection", [False, True])
def test_block_rows_equal_the_whole_block(given_projection):
    torch.manual_seed(0)
    block = Block(16, 4).double()
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    rows = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    qkv = block.project(x) if given_projection else None
    torch.testing.assert_close(block(x, qkv, rows), take_rows(block(x), rows), rtol=1e-12, atol=1e-12)


def test_encoder_sees_only_the_patches_it_is_given():
    """Encoding a subset equals encoding an image whose other patches were never there, in any order."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    indices = torch.tensor([[3, 0, 9], [15, 4, 1]])
    tokens = model(images, indices)
    other = images.clone()
    other[0, :, 16:, 16:] = 7.0  # patches 10, 11, 14, 15 of image 0
    assert torch.equal(model(other, indices)[0], tokens[0])
    shuffled = model(images, indices.flip(1))
    torch.testing.assert_close(shuffled[:, 1:].flip(1), tokens[:, 1:], rtol=1e-10, atol=1e-12)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model(images, everything), model(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [vit_tiny(), vit_small(), vit_base()], ids=["tiny", "small", "base"])
def test_values_and_names_of_timm(config):
    """Same names, same numbers as timm's ViT with copied weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = {192: "tiny", 384: "small", 768: "base"}[config.width]
    theirs = timm.create_model(f"vit_{name}_patch16_224", num_classes=0, global_pool="").eval()
    ours = VisionTransformer(ViTConfig(**{**vars(config), "positions": "learned"}))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    images = (images - 0.5) / 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    raw = images * std[:, None, None] + mean[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(raw), theirs(images), rtol=1e-3, atol=1e-4)


def test_checkpointed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, width=32, depth=3, heads=4, drop_path=0.3)
    model = VisionTransformer(config).double().train()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        for block in model.blocks:
            block.recompute = recompute
        model.zero_grad()
        model(torch.ones(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(20_000, 1, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[:, 0, 0] == y[:, 0, 1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x


def test_drop_path_rises_linearly():
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, width=32, depth=5, heads=4, drop_path=0.4))
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones_and_keep_their_names():
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4))
    images, names = torch.randn(2, 3, 32, 32), list(model.state_dict())
    expected = model(images)
    for block in model.blocks:
        block.compile(fullgraph=True)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
