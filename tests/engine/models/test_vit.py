"""The vision transformer, its positions and its attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vitrail.engine.models.attention import Attention, RelativePositionBias, attend, attention_backend
from vitrail.engine.models.block import Block, DropPath, mlp_hidden, take_rows
from vitrail.engine.models.packing import Packing, pack
from vitrail.engine.models.positions import sincos_positions
from vitrail.engine.models.vit import (
    VisionTransformer,
    ViTConfig,
    beit_vit,
    dinov2_vit,
    vit_base,
    vit_giant,
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


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packed_attention(backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    out = attend(qkv, heads=2, backend=backend)
    torch.testing.assert_close(out, plain_attention(*qkv.chunk(3, -1), 2), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: attend(t, heads=2, backend=backend), (qkv,))


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


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_rows_of_any_images_equal_the_whole_block(rate):
    """Values and gradients, other numbers of rows in each image, branches of the same images left out."""
    torch.manual_seed(0)
    block = Block(16, 4, drop_path=rate, layer_scale=0.5).double()
    leaves = [torch.randn(5, 9, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    leaves[1].data.copy_(leaves[0])
    rows = torch.tensor([40, 3, 0, 1, 2, 27, 44, 12])
    results = []
    for x, picked in zip(leaves, (rows, None), strict=True):
        torch.manual_seed(1)
        out = block(x, rows=picked)
        results.append(out if picked is not None else out.flatten(0, 1)[rows])
        results[-1].square().sum().backward()
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-10, atol=1e-10)
    projected = block.eval()(leaves[0], block.project(leaves[0]), rows)
    torch.testing.assert_close(projected, block(leaves[0]).flatten(0, 1)[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_encoder_returns_the_rows_it_is_asked_for(positions):
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, positions=positions)).double()
    images, rows = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 17, 34, 5, 50])
    for block in model.blocks:
        block.recompute = True
    expected = model(images).flatten(0, 1)[rows]
    torch.testing.assert_close(model(images, rows=rows), expected, rtol=1e-12, atol=1e-12)


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


# --- what BEiT, SimMIM, iBOT and DINOv2 add -----------------------------------------------------------------------

SMALL = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)


def pixels(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (1, 3)])
def test_attention_with_a_bias(n, m):
    """Values against scaled_dot_product_attention, all gradients by finite differences."""
    torch.manual_seed(0)
    shapes = ((3, n, 12), (3, m, 24), (3, n, m))
    q, kv, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    heads_first = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=bias[None]).transpose(1, 2).flatten(2)
    for backend in ("math", "sdpa"):
        out = attend(q, kv, heads=3, backend=backend, bias=bias)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: attend(*t[:2], heads=3, backend="math", bias=t[2]), (q, kv, bias))


def test_what_takes_no_bias_says_so():
    qkv, bias = torch.randn(1, 8, 24), torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match="images packed into one sequence cannot take a relative-position bias"):
        attend(qkv, heads=2, packing=Packing(((2, 4),)), bias=bias)
    with pytest.raises(ValueError, match="relative-position bias"):
        VisionTransformer(replace(SMALL, positions="relative"))([torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="relative positions need all patches"):
        VisionTransformer(replace(SMALL, positions="relative"))(torch.randn(1, 3, 32, 32), torch.tensor([[0, 1]]))


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_relative_positions(grid):
    """A row of the table for each offset, and the last three for what involves the class token (BEiT)."""
    relative = RelativePositionBias(grid, 2)
    table = relative.relative_position_bias_table
    rows, columns = grid
    assert table.shape == ((2 * rows - 1) * (2 * columns - 1) + 3, 2)
    assert not table.any()
    torch.nn.init.normal_(table)
    bias = relative()
    assert bias.shape == (2, 1 + rows * columns, 1 + rows * columns)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, right = i // columns - j // columns, i % columns - j % columns
            row = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
            assert torch.equal(bias[:, 1 + i, 1 + j], table[row])
    assert torch.equal(bias[:, 0, 1:], table[-3, :, None].expand(-1, rows * columns))
    assert torch.equal(bias[:, 1:, 0], table[-2, :, None].expand(-1, rows * columns))
    assert torch.equal(bias[:, 0, 0], table[-1])


def beit_like(**changes):
    """A small BEiT whose table is not zero."""
    torch.manual_seed(0)
    model = VisionTransformer(beit_vit(replace(SMALL, **changes))).double()
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    return model


def test_the_pooled_class_token_has_its_row_of_the_bias():
    model, images = beit_like(), pixels(2, 3, 32, 32)
    torch.testing.assert_close(model(images, None, True), model(images)[:, 0], rtol=1e-12, atol=1e-12)
    plain = model(images)
    torch.nn.init.zeros_(model.rel_pos_bias.relative_position_bias_table)
    assert (model(images) - plain).abs().max() > 1e-4


def test_class_attention_with_a_bias():
    """What the pictures show, against attention written out."""
    from vitrail.engine.show.attention import class_attention

    model, images = beit_like(), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    model = model.float()
    bias, last = model.rel_pos_bias(), model.blocks[1]
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1)
    x = last.norm1(model.blocks[0](x, bias=bias))
    weight = last.attn.qkv.weight.chunk(3)
    query = (F.linear(x[:, :1], weight[0], last.attn.qkv.q_bias)).unflatten(-1, (4, 8)).transpose(1, 2)
    key = F.linear(x, weight[1]).unflatten(-1, (4, 8)).transpose(1, 2)
    expected = (query @ key.transpose(-2, -1) / 8**0.5 + bias[:, :1]).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(class_attention(model, images).flatten(2), expected, rtol=1e-4, atol=1e-6)


def test_keys_without_a_bias():
    """Names of the official BEiT code's parameters; a bias that all keys share changes nothing but rounding."""
    torch.manual_seed(0)
    without, usual = Attention(16, 4, key_bias=False).double(), Attention(16, 4).double()
    assert set(without.state_dict()) == {"qkv.weight", "qkv.q_bias", "qkv.v_bias", "proj.weight", "proj.bias"}
    assert not without.qkv.q_bias.any()
    torch.nn.init.normal_(without.qkv.q_bias)
    torch.nn.init.normal_(without.qkv.v_bias)
    state = {k: v for k, v in without.state_dict().items() if "_bias" not in k}
    bias = torch.cat([without.qkv.q_bias, pixels(16), without.qkv.v_bias])
    usual.load_state_dict(state | {"qkv.bias": bias})
    x = pixels(2, 5, 16)
    torch.testing.assert_close(without(without.qkv(x)), usual(usual.qkv(x)), rtol=1e-12, atol=1e-12)
    whole = without.qkv(x)
    torch.testing.assert_close(without.qkv(x, "q"), whole[..., :16], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(without.qkv(x, "kv"), whole[..., 16:], rtol=1e-12, atol=1e-12)


def test_layer_scale_weighs_both_branches():
    torch.manual_seed(0)
    block = Block(16, 4, layer_scale=0.5).double()
    assert {k for k in block.state_dict() if "ls" in k} == {"ls1.gamma", "ls2.gamma"}
    assert block.ls1.gamma.tolist() == block.ls2.gamma.tolist() == [0.5] * 16
    torch.nn.init.normal_(block.ls1.gamma)
    torch.nn.init.normal_(block.ls2.gamma)
    x = pixels(2, 5, 16)
    y = x + block.ls1.gamma * block.attn(block.project(x))
    y = y + block.ls2.gamma * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)
    assert not any("ls" in k for k in Block(16, 4).state_dict())


def test_swiglu():
    """Hidden widths and names of DINOv2's ViT-g."""
    assert [mlp_hidden(width, 4.0, "swiglu") for width in (1536, 1024, 384, 32)] == [4096, 2736, 1024, 88]
    assert mlp_hidden(1536, 4.0, "gelu") == 6144
    with torch.device("meta"):
        state = VisionTransformer(replace(vit_giant(), depth=1)).state_dict()
    shapes = {k.removeprefix("blocks.0.mlp."): tuple(v.shape) for k, v in state.items() if "mlp" in k}
    wanted = {"w12.weight": (8192, 1536), "w12.bias": (8192,), "w3.weight": (1536, 4096), "w3.bias": (1536,)}
    assert shapes == wanted
    torch.manual_seed(0)
    mlp, x = Block(16, 4, mlp="swiglu").double().mlp, pixels(3, 16)
    a, b = (x @ mlp.w12.weight.T + mlp.w12.bias).split(48, dim=1)
    expected = (a * a.sigmoid() * b) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
def test_masked_patches_keep_their_place_and_hide_their_content(positions):
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, positions=positions, mask_token=True)).double()
    torch.nn.init.normal_(model.mask_token)
    images, masked = pixels(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    masked[0, [1, 6]], masked[1, 15] = True, True
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = model(images, masked=masked)
    model(images)
    table = 0 if model.pos_embed is None else model.pos_embed[:, 1:]
    expected = torch.where(masked[..., None], model.mask_token + table, seen[1][:, 1:])
    torch.testing.assert_close(seen[0][:, 1:], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    other = images.clone()
    other[0, :, :8, 8:16] = 7.0  # patch 1
    assert torch.equal(model(other, masked=masked), hidden)
    assert not torch.equal(model(other), model(images))
    first, regions = model.forward_regions(images, masked)
    assert torch.equal(torch.cat([first[:, None], regions], dim=1), hidden)


def test_masks_need_a_mask_token():
    with pytest.raises(ValueError, match="mask_token=True"):
        VisionTransformer(SMALL)(torch.randn(1, 3, 32, 32), masked=torch.ones(1, 16, dtype=torch.bool))


def test_several_groups_of_images_equal_separate_calls():
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, positions="learned", mask_token=True)).double()
    torch.nn.init.normal_(model.mask_token)
    groups, masks = [pixels(2, 3, 32, 32), pixels(3, 3, 16, 24)], [torch.rand(2, 16) < 0.5, None]
    for given in (None, masks):
        found = model(groups, masked=given)
        for tokens, images, masked in zip(found, groups, given or (None, None), strict=True):
            torch.testing.assert_close(tokens, model(images, masked=masked), rtol=1e-10, atol=1e-12)
    pooled = model(groups, None, True, masks)
    torch.testing.assert_close(pooled, torch.cat([tokens[:, 0] for tokens in found]), rtol=1e-10, atol=1e-12)


def subset_block(rate):
    torch.manual_seed(0)
    return Block(16, 4, layer_scale=0.5, drop_path=rate, drop_by="subset").double().train()


@pytest.mark.parametrize(("images", "rate", "kept"), [(8, 0.5, 4), (7, 0.3, 4), (2, 0.9, 1), (5, 0.1, 5)])
def test_branches_are_computed_for_a_share_of_the_images(images, rate, kept):
    """DINOv2's stochastic depth: rounded down, at least one; rates of at most 0.1 drop image by image."""
    block, x = subset_block(rate), pixels(images, 6, 16)
    given = []
    for part in (block.attn.qkv, block.mlp):
        part.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].shape[0]))
    block(x)
    assert given == [kept, kept]
    block.eval()(x)
    assert given[2:] == [images, images]


def test_dropping_by_subset_keeps_the_expectation():
    block, x = subset_block(0.5), pixels(6, 5, 16)
    branch = block.ls1(block.attn(block.project(x)))
    chosen = torch.zeros(6)
    for _ in range(60):
        y = block._on_subset(x, None, lambda x, _: block.attn(block.project(x)), 1)
        computed = (y != x).flatten(1).any(1)
        assert computed.sum() == 3
        expected = torch.where(computed[:, None, None], x + 2 * branch, x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        chosen += computed
    assert chosen.sub(30).abs().max() < 16  # four standard deviations


def test_dropping_by_subset_among_packed_images():
    """Each group drops its share and is scaled by it, as if it were alone."""
    block, groups = subset_block(0.5), [pixels(4, 6, 16), pixels(3, 2, 16)]
    x, packing = pack(groups)
    given = []
    block.mlp.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].shape[1]))
    block(x, packing=packing)
    assert given == [2 * 6 + 1 * 2]

    def attention_branch(x, part):
        return block.attn(block.project(x), packing=part)

    found = packing.unpack(block._on_subset(x, packing, attention_branch, 1))
    for y, images, kept in zip(found, groups, (2, 1), strict=True):
        computed = (y != images).flatten(1).any(1)
        assert computed.sum() == kept
        branch = block.ls1(block.attn(block.project(images))) * len(images) / kept
        expected = torch.where(computed[:, None, None], images + branch, images)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_subsets_are_the_same(packed):
    torch.manual_seed(0)
    config = replace(dinov2_vit(SMALL), drop_path=0.5, layer_scale=0.5)
    model = VisionTransformer(config).double().train()
    images = [pixels(4, 3, 32, 32), pixels(4, 3, 16, 16)] if packed else pixels(6, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        for block in model.blocks:
            block.recompute = recompute
        model.zero_grad()
        out = model(images)
        sum(tokens.square().sum() for tokens in (out if packed else [out])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert [block.drop_path.rate for block in model.blocks] == [0.5, 0.5]
