"""Swin: the released networks' numbers, timm's, its windows, and what the trainer asks of it."""

from functools import lru_cache, partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.golden_models import fill_, image, summary
from vitrail.engine.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from vitrail.engine.models.swin import (
    PatchMerging,
    SwinBlock,
    SwinConfig,
    swin_base,
    swin_large,
    swin_small,
    swin_tiny,
)
from vitrail.engine.train.trainer import prepare_blocks
from vitrail.kernels import WindowAttention

UNCHANGED = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # for images that are normalised already
# 40 x 28 pixels are a map of 10 x 7, then 5 x 4: padded, shifted in the first stage alone, odd when it is merged.
SMALL = SwinConfig(image_size=(40, 28), width=16, depths=(2, 2), heads=(2, 4), window=4)


def small(dtype=torch.float64, seed=0, **changes):
    """A small network all of whose parameters matter: small weights leave attention flat."""
    torch.manual_seed(seed)
    model = SwinConfig(**{**vars(SMALL), **changes}).build(**UNCHANGED).to(dtype)
    fill_(model.state_dict())
    return model


def pixels(count, height=40, width=28):
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def golden(window):
    model = swin_tiny(window).build(**UNCHANGED).eval()
    fill_(model.state_dict())
    return model


# First four values, sum and L2 norm of the released Swin-T of EsViT in float32, filled by tests.support.golden_models.
GOLDEN = {
    (7, 224, "pooled"): (0.950056, -0.366386, -1.474692, -0.409907, 4.17879, 27.794595),
    (7, 224, "regions"): (0.967289, -0.122325, -1.580737, -0.429445, 204.76060, 198.194844),
    (7, 224, "blocks"): (2.815941, 1.056076, 1.272489, 2.161320, 15.28384, 81.393307),
    (7, 96, "pooled"): (1.259524, -0.305225, -1.940309, 0.663220, 3.72709, 25.723354),
    (7, 96, "regions"): (1.159455, -0.630306, -2.345404, 0.683243, 33.54380, 85.004358),
    (7, 96, "blocks"): (2.547990, 0.738682, -0.610371, 1.981456, 36.44527, 68.047778),
    (14, 224, "pooled"): (0.977271, -0.380074, -1.445318, -0.414865, 4.11666, 27.918825),
    (14, 224, "regions"): (1.018118, -0.122869, -1.583248, -0.441247, 201.71647, 198.205339),
    (14, 96, "pooled"): (0.777850, -0.233407, -0.137761, 0.251652, -0.15354, 24.514647),
    (14, 96, "regions"): (1.115962, -0.889135, -1.137266, 0.318679, -1.38188, 84.788500),
    (14, 96, "blocks"): (-0.905698, 1.643650, -1.483734, 2.556618, 48.31252, 57.081802),
}
SHAPES = {"pooled": (1, 768), "blocks": (1, 2304)}


@pytest.mark.parametrize(("window", "size"), [(7, 224), (7, 96), (14, 224), (14, 96)])
def test_numbers_of_the_released_network(window, size):
    """Crops of 96 pixels go through the network of 224: its windows are padded, and shift where a map is one window."""
    model = golden(window)
    with torch.no_grad():
        outputs = dict(zip(("pooled", "regions"), model.forward_regions(image(size)), strict=True))
        outputs["blocks"] = model.forward_last_blocks(image(size), 4)
    assert outputs["regions"].shape == (1, (size // 32) ** 2, 768)
    for name, output in outputs.items():
        if (window, size, name) in GOLDEN:
            (*first, total, norm), (*first_there, total_there, norm_there) = summary(output), GOLDEN[window, size, name]
            assert first == pytest.approx(first_there, abs=3e-6), name
            assert total == pytest.approx(total_there, abs=1e-6 * norm + 5e-6), (
                name
            )  # a sum cancels; 5 digits are given
            assert norm == pytest.approx(norm_there, rel=1e-6), name
        assert output.shape == SHAPES.get(name, output.shape)


@pytest.mark.parametrize(
    ("config", "parameters", "features"),
    [
        (swin_tiny(7), 27_519_354, 768),
        (swin_tiny(14), 27_569_754, 768),
        (swin_small(7), 48_837_258, 768),
        (swin_small(14), 48_968_298, 768),
        (swin_base(7), 86_743_224, 1024),
        (swin_base(14), 86_917_944, 1024),
        (swin_large(7), 194_995_476, 1536),
        (swin_large(14), 195_257_556, 1536),
    ],
)
def test_sizes_of_the_released_networks(config, parameters, features):
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.width == config.feature_width == model.norm.normalized_shape[0] == features


def test_keys_and_layouts_of_the_released_network():
    shapes = {name: tuple(tensor.shape) for name, tensor in golden(14).state_dict().items()}
    expected = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,)}
    for name, width in (("patch_embed.norm", 96), ("norm", 768)):
        expected |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    stages = [(96, 2, 3, 14), (192, 2, 6, 14), (384, 6, 12, 14), (768, 2, 24, 7)]
    for s, (width, depth, heads, window) in enumerate(stages):
        for b in range(depth):
            layer = f"layers.{s}.blocks.{b}"
            expected[f"{layer}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                expected |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
            for name in ("norm1", "norm2"):
                expected |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
        if s < 3:
            down = f"layers.{s}.downsample"
            expected |= {f"{down}.norm.weight": (4 * width,), f"{down}.norm.bias": (4 * width,)}
            expected[f"{down}.reduction.weight"] = (2 * width, 4 * width)
    assert shapes == expected
    assert len(shapes) == 171


def windows(config):
    with torch.device("meta"):
        layers = config.build().layers
    return [[(block.attn.window_size, block.attn.shift) for block in stage.blocks[:2]] for stage in layers]


def test_windows_follow_the_configured_size():
    assert windows(swin_tiny(7)) == [[(7, 0), (7, 3)]] * 3 + [[(7, 0), (7, 0)]]
    assert windows(swin_tiny(14)) == [[(14, 0), (14, 7)]] * 2 + [[(14, 0), (14, 0)], [(7, 0), (7, 0)]]
    assert windows(swin_tiny(7, image_size=96)) == [[(7, 0), (7, 3)]] * 2 + [[(6, 0), (6, 0)], [(3, 0), (3, 0)]]
    assert windows(SMALL) == [[(4, 0), (4, 2)], [(3, 0), (3, 0)]]


def test_drop_path_rises_linearly_through_the_stages():
    model = small(drop_path=0.3)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, SwinBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initialisation():
    torch.manual_seed(0)
    state = SwinConfig(image_size=64, width=64, depths=(2, 2), heads=(2, 4), window=8).build().state_dict()
    for name, value in state.items():
        if name.startswith("patch_embed.proj"):  # PyTorch's default: uniform within 1 / sqrt(fan-in)
            assert value.abs().max() <= 48**-0.5
        elif value.dim() == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (value == float("norm" in name and name.endswith("weight"))).all(), name


def timm_names(names, stages):
    """timm's names of our parameters: the step down begins a stage there, and ends one here."""
    for name in names:
        for s in range(stages):
            if name.startswith(f"layers.{s}.downsample"):
                name = name.replace(f"layers.{s}", f"layers.{s + 1}")
                break
        yield name


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 64, "depths": (2, 2, 2), "heads": (2, 4, 8)},  # 16, 8 and 4 tokens wide, the last one window
        {"image_size": (64, 96), "depths": (2, 3), "heads": (2, 4)},
        # Padding: timm pads a map after it has been rolled, the released networks before. Without a shift, 9 tokens
        # are padded to 12 and merged to 5.
        {"image_size": 36, "depths": (1, 1), "heads": (2, 4)},
    ],
    ids=["square", "wide", "padded"],
)
def test_values_and_gradients_of_timm(changes):
    swin = pytest.importorskip("timm.models.swin_transformer")
    ours = small(**changes)
    config = ours.config
    theirs = swin.SwinTransformer(
        img_size=config.size,
        window_size=4,
        embed_dim=16,
        depths=config.depths,
        num_heads=config.heads,
        num_classes=0,
        drop_path_rate=0.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()
    names = list(timm_names(ours.state_dict(), len(config.depths)))
    theirs.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)))
    images = pixels(2, *config.size)
    pooled, tokens = ours.forward_regions(images)
    expected = theirs.forward_features(images)  # [B, H, W, D]
    torch.testing.assert_close(tokens, expected.flatten(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pooled, theirs(images), rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(tokens)
    (tokens * weights).sum().backward()
    (expected.flatten(1, 2) * weights).sum().backward()
    other = dict(theirs.named_parameters())
    names = timm_names(dict(ours.named_parameters()), len(config.depths))
    for name, parameter in zip(names, ours.parameters(), strict=True):
        assert other[name].grad.norm() > 1e-3, name
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_merging_puts_the_rows_of_a_column_first_and_pads_odd_maps():
    merging = PatchMerging(2).double()
    seen = []
    merging.norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.arange(30, dtype=torch.float64).view(1, 3, 5, 2)
    assert merging(x).shape == (1, 2, 3, 4)
    (merged,) = seen
    assert merged[0, 0, 1].tolist() == [*x[0, 0, 2], *x[0, 1, 2], *x[0, 0, 3], *x[0, 1, 3]]
    assert merged[0, 0, 2].tolist() == [*x[0, 0, 4], *x[0, 1, 4], 0, 0, 0, 0]
    assert merged[0, 1, 0].tolist() == [*x[0, 2, 0], 0, 0, *x[0, 2, 1], 0, 0]


def test_the_last_blocks_are_those_that_ran_last():
    model = small(depths=(2, 3), heads=(2, 4))
    outputs = []
    for module in model.modules():
        if isinstance(module, SwinBlock):
            module.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        got = {count: model.forward_last_blocks(pixels(2), count) for count in (1, 3, 4, 5)}
        features = model.forward_features(pixels(2))
        means = [x.mean(dim=(1, 2)) for x in outputs[:2]] + [model.norm(x).mean(dim=(1, 2)) for x in outputs[2:5]]
    for count, value in got.items():
        torch.testing.assert_close(value, torch.cat(means[-count:], dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], features, rtol=1e-12, atol=1e-12)
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"between 1 and 5, the number of blocks, got {count}"):
            model.forward_last_blocks(pixels(1), count)


def test_regions_are_row_by_row():
    """Only the windows that a changed corner touches change: one block without a shift, windows of one token."""
    model = small(depths=(1,), heads=(2,), window=1)
    images = pixels(1)
    other = images.clone()
    other[..., 4:8, 8:12] += 1  # row 1, column 2 of 7 columns
    with torch.no_grad():
        (_, before), (pooled, after) = model.forward_regions(images), model.forward_regions(other)
    assert (before != after).any(dim=2)[0].nonzero().flatten().tolist() == [9]
    torch.testing.assert_close(pooled, after.mean(dim=1))


def test_layouts_of_the_input():
    model = small(torch.float32).eval()
    raw = SMALL.build().eval()
    raw.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (2, 40, 28, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        expected = model(((images / 255 - mean) / std).permute(0, 3, 1, 2))
        torch.testing.assert_close(raw(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(raw(images.permute(0, 3, 1, 2)), expected, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_run_again_and_give_the_same_gradients():
    model, images = small(drop_path=0.5), pixels(4)
    calls, gradients = [], []
    for module in model.modules():
        if isinstance(module, SwinBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        prepare_blocks(model, recompute=recompute, compiled=False)
        torch.manual_seed(1)
        calls.clear()
        model.zero_grad()
        pooled, tokens = model.forward_regions(images)
        (pooled.square().sum() + tokens.square().sum()).backward()
        assert len(calls) == (8 if recompute else 4)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones_for_two_sizes_of_crop():
    model, images = small(torch.float32), [pixels(2).float(), pixels(2, 24, 24).float()]
    expected = [model(crops) for crops in images]
    block = model.layers[0].blocks[1]  # shifted and padded
    block.compile(fullgraph=True)
    for crops, wanted in zip(images, expected, strict=True):
        torch.testing.assert_close(model(crops), wanted, rtol=1e-4, atol=1e-5)
    model(images[0]).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_under_autocast_products_are_bf16_and_the_residual_stream_is_float32():
    model = small(torch.float32)
    images = pixels(2).float()
    expected = model(images)
    seen = {"projected": set(), "attended": set(), "stream": set()}

    def note(kind):
        return lambda module, args, out: seen[kind].add((out[0] if isinstance(out, tuple) else out).dtype)

    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.qkv.register_forward_hook(note("projected"))
            module.register_forward_hook(note("attended"))
        elif isinstance(module, SwinBlock | PatchMerging) or module is model.patch_embed:
            module.register_forward_hook(note("stream"))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images)
    assert seen == {"projected": {torch.bfloat16}, "attended": {torch.bfloat16}, "stream": {torch.float32}}
    assert (got.float() - expected).norm() < 0.03 * expected.norm()


def test_parameters_are_read_by_their_own_module_alone():
    """As under ZeRO-3, which lets the parameters of a module exist while that module runs, and no longer."""
    model = small()
    images = pixels(2)
    expected = model(images)
    values = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = values[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.full_like(values[parameter], torch.nan)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("config", "at_224", "at_96"),
    [
        (swin_tiny(7), 4.49, 0.825),
        (swin_tiny(14), 4.89, 0.898),
        (swin_small(7), 8.74, 1.605),
        (swin_small(14), 9.40, 1.73),
        (swin_base(7), 15.43, 2.83),
        (swin_base(14), 16.3, 3.00),
    ],
)
def test_published_operations(config, at_224, at_96):
    """Multiply-accumulates in 1e9, as the literature gives them to two or three digits."""
    assert config.flops / 2e9 == pytest.approx(at_224, rel=2e-3)
    assert config.flops_at((96, 96)) / 2e9 == pytest.approx(at_96, rel=3e-3)


def test_operations_are_those_of_the_products_that_run():
    """Of the linear layers by counting; attention, an operator that PyTorch does not count, by its definition."""
    model = small()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels(1))
    attention = 2 * 2 * (2 * 10 * 7 * 16 * 16 + 2 * 5 * 4 * 9 * 32)
    assert SMALL.flops == counter.get_total_flops() + attention


def test_the_demo_is_small():
    demo = swin_tiny().demo()
    assert windows(demo) == [[(4, 0), (4, 2)], [(4, 0), (4, 0)]]
    assert demo.build()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, demo.feature_width)
    assert demo.flops < 0.02 * swin_tiny().flops


def test_the_patch_projection_can_be_frozen():
    model = small()
    projection = [model.get_parameter("patch_embed.proj.weight"), model.get_parameter("patch_embed.proj.bias")]
    assert [id(p) for p in model.first_layer()] == [id(p) for p in projection]
    model.freeze_patch_embed()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (40, 30)}, "image size 40x30 is not divisible by the patch size 4"),
        ({"heads": (2,)}, r"depths \(2, 2\) and heads \(2,\) must have one entry for each stage"),
        ({"heads": (2, 5)}, "stage 2 is 32 wide, which 5 heads do not divide"),
        ({"image_size": 4}, "nothing is left of images of 4x4 in stage 2"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        SwinConfig(**{**vars(SMALL), **changes}).build()
