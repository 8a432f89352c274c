"""Pictures of what a network looks at."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.golden_models import fill_, image
from tests.support.golden_models import summary as numbers
from vitrail.engine.data import DataConfig, open_source
from vitrail.engine.methods.dino import DINOConfig
from vitrail.engine.methods.esvit import EsViTConfig
from vitrail.engine.methods.mae import MAEConfig
from vitrail.engine.methods.simmim import SimMIMConfig
from vitrail.engine.methods.sit import SiTConfig
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.engine.models.vit import ViTConfig, dino_vit, vit_tiny
from vitrail.engine.show import summary
from vitrail.engine.show.attention import attention_maps, class_attention, draw_attention, mass_mask, received_attention
from vitrail.engine.show.matches import match_regions
from vitrail.engine.train.config import RunConfig, TrainConfig
from vitrail.engine.train.trainer import RunResult
from vitrail.kernels import WindowAttention

UNCHANGED = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TINY = dino_vit(ViTConfig(image_size=(16, 32), patch_size=8, width=24, depth=2, heads=3))
WINDOWED = SwinConfig(image_size=(40, 36), width=16, depths=(2, 2), heads=(2, 4), window=3)


def filled(config):
    model = config.build(**UNCHANGED).eval()
    fill_(model.state_dict())
    return model


def test_class_attention_of_the_released_dino():
    """First values, sum and L2 norm of the released ViT's last block in float32, 3 heads x 196 patches."""
    found = class_attention(filled(dino_vit(vit_tiny())), image(224))
    assert found.shape == (1, 3, 14, 14)
    expected = (0.006079, 0.003194, 0.003954, 0.003649, 2.97536, 0.138408)
    assert numbers(found) == pytest.approx(expected, rel=2e-5, abs=6e-7)


@pytest.mark.parametrize("size", [(16, 32), (24, 40)])
def test_class_attention_gives_the_class_token_its_output(size):
    """Attending to the values by these weights, and the rest to itself, is what the block does."""
    model = filled(TINY)
    images = torch.randn(2, 3, *size)
    maps = class_attention(model, images)
    assert maps.shape == (2, 3, size[0] // 8, size[1] // 8)
    seen = {}
    block = model.blocks[-1]
    block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.update(attended=inputs[0]))
    with torch.no_grad():
        model(images)
        values = block.project(seen["x"])[..., 48:].unflatten(-1, (3, 8))
    weights = torch.cat([1 - maps.sum((2, 3))[..., None], maps.flatten(2)], dim=-1)
    attended = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)
    torch.testing.assert_close(attended, seen["attended"][:, 0], rtol=1e-4, atol=1e-5)


def test_a_look_leaves_the_network_as_it_was():
    for config in (TINY, WINDOWED):
        model = filled(config)
        attention_maps(model, torch.randn(1, 3, *config.size))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters())


def dense_received(attention, qkv, bias):
    """Column means of shifted window attention on a padded map, token by token."""
    (height, width, _), w, shift, heads = qkv.shape, attention.window_size, attention.shift, attention.num_heads
    rows, columns = -(-height // w) * w, -(-width // w) * w
    padded = bias.expand(rows, columns, -1).clone()
    padded[:height, :width] = qkv
    query, key, _ = padded.unflatten(-1, (3, heads, -1)).flatten(0, 1).unbind(1)
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = (row - shift) % rows, (column - shift) % columns
    part = torch.stack([down // w, right // w, (row < shift).long(), (column < shift).long()], dim=1)
    apart = (part[:, None] != part[None]).any(-1)
    offsets = [down[:, None] - down + w - 1, right[:, None] - right + w - 1]
    table = attention.relative_position_bias_table
    index = (offsets[0] * (2 * w - 1) + offsets[1]).clamp(0, len(table) - 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * query.shape[-1] ** -0.5 + table[index].permute(2, 0, 1)
    weights = scores.masked_fill(apart, -torch.inf).softmax(-1).unflatten(1, (rows, columns))[:, :height, :width]
    return weights.flatten(1, 2).mean(1).unflatten(-1, (rows, columns))[:, :height, :width]


def test_received_attention_is_the_mean_over_the_queries():
    model, images = filled(WINDOWED), torch.randn(2, 3, 40, 36)
    found = received_attention(model, images)
    attention = model.layers[-1].blocks[-1].attn
    assert (attention.shift, found.shape) == (1, (2, 4, 5, 5))  # shifted, padded to 6 x 6
    seen = []
    attention.qkv.register_forward_hook(lambda _, __, projected: seen.append(projected))
    with torch.no_grad():
        model(images)
        qkv, bias = seen[0]
        expected = torch.stack([dense_received(attention, part, bias) for part in qkv])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found.sum((2, 3)) < 1).all()
    whole = received_attention(filled(replace(WINDOWED, image_size=32, window=4)), torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(whole.sum((2, 3)), torch.ones(1, 4))


def test_a_table_that_is_there_only_while_its_module_runs_is_read_in_time():
    """As ZeRO-3 takes parameters apart again after each module."""
    model, images = filled(WINDOWED), torch.randn(1, 3, 40, 36)
    expected = received_attention(model, images)

    def release(module, inputs, output):
        module.relative_position_bias_table.set_(torch.empty(0))

    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(received_attention(model, images), expected)


def test_maps_are_float32_under_autocast_and_without_gradient():
    for config in (TINY, WINDOWED):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            maps = attention_maps(filled(config), torch.randn(1, 3, *config.size))
        assert maps.dtype == torch.float32
        assert not maps.requires_grad


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"ResNet has no attention to show: expected a ViT or a Swin transformer"):
        attention_maps(ResNetConfig(architecture="resnet18", image_size=32).build(), torch.zeros(1, 3, 32, 32))


def test_masks_hold_the_mass_with_the_fewest_cells():
    maps = torch.tensor([[[4.0, 1.0], [2.0, 3.0]], [[0.0, 97.0], [1.0, 2.0]]])
    assert mass_mask(maps).tolist() == [[[True, False], [False, True]], [[False, True], [False, False]]]
    assert mass_mask(maps, 0.75).tolist()[0] == [[True, False], [True, True]]
    assert mass_mask(maps, 1.0).tolist() == [[[True, True], [True, True]], [[False, True], [True, True]]]
    maps = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.6, 0.95):
        mask = mass_mask(maps, share)
        masses = maps.sum((2, 3))
        kept = (maps * mask).sum((2, 3))
        least = torch.where(mask, maps, torch.inf).amin((2, 3))
        assert (kept >= share * masses).all()
        assert (kept - least < share * masses).all()
        assert (torch.where(mask, 0, maps).amax((2, 3)) <= least).all()
    with pytest.raises(ValueError, match=r"share is 60; expected a share of the mass, above 0 and at most 1"):
        mass_mask(maps, 60)


def test_the_picture_outlines_the_mask(tmp_path):
    def drawn(maps, **options):
        """Size of the picture, and the pixels of the outline's colour."""
        draw_attention(torch.zeros(2, 24, 48, 3, dtype=torch.uint8), maps, tmp_path / "a.png", **options)
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        return pixels.shape[:2], (abs(pixels - (0, 191, 255)).max(-1) < 60).sum()

    maps = torch.full((2, 3, 3, 6), 0.01)
    maps[:, :, 1, 2:4] = 1.0
    (height, width), outlined = drawn(maps)
    assert width > 2 * height
    assert outlined > 6 * 80
    assert drawn(maps, share=0.999)[1] > 6 * 80  # around all cells, at the border of the map
    assert drawn(torch.rand(2, 30, 3, 6))[0][1] < 14 * width / 4  # heads beyond the twelfth are left out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of twelve images of noise."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "ab"[i % 2] / f"{i}.png")
    return DataConfig(path=str(folder), threads=1)


PICTURES = {
    "mae": {"reconstructions.png", "attention.png"},
    "simmim": {"reconstructions.png", "attention.png"},
    "dino": {"views.png", "neighbours.png", "attention.png"},
    "sit": {"views.png", "neighbours.png", "attention.png", "reconstructions.png"},
    "esvit": {"views.png", "neighbours.png", "matches.png", "correspondence.png"},
}


KINDS = {"mae": MAEConfig, "simmim": SimMIMConfig, "dino": DINOConfig, "esvit": EsViTConfig, "sit": SiTConfig}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_report_of_a_demo_has_what_its_method_has(name, kind, images, tmp_path, capsys, monkeypatch):
    for constant in ("PICTURES", "LOOKS", "COLUMNS"):  # every panel of a figure takes a while
        monkeypatch.setattr(summary, constant, 2)
    method = kind().demo()
    config = RunConfig(method=method, data=images, train=TrainConfig(output=tmp_path))
    trained = RunResult(method.build(), 8, 8, 1.0)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}')
    source, device = open_source(images), torch.device("cpu")
    rivals = {rival: other.build() for rival, other in method.demo_rivals().items()}
    rows = summary.summarise(trained, config, train=source, val=source, rank=0, world=1, device=device, rivals=rivals)
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES[name] | {"curves.png"}
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["accuracy"] == rows
    assert ("correspondence" in found) == (name == "esvit")
    told = capsys.readouterr().out
    assert ("regions" in told) == ("chance" in told) == (name == "esvit")
    if name == "esvit":
        assert set(found["correspondence"]) == {"untrained network", "trained network", *rivals} <= set(rows)
        numbers = found["correspondence"]["trained network"]
        precise = match_regions(trained.method, source, images, precision="bf16", batch=3, device=device)
        assert (numbers["chance"], numbers["images"]) == (1 / 16, 24)
        assert numbers["accuracy"] == pytest.approx(precise.accuracy, abs=0.05)
        assert found["correspondence"]["untrained network"]["distance"] > 0
