"""BEiT against golden numbers, against transformers, and in the trainer."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import beit_runs
import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from vitrail.engine.data import DataError, View
from vitrail.engine.data.order import sample_rng
from vitrail.engine.data.pillow import PillowDecoder, execute
from vitrail.engine.data.reader import Sample, Slot
from vitrail.engine.data.views import streams
from vitrail.engine.interop.beit import from_hf, from_official, to_official
from vitrail.engine.interop.mae import load_exactly
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.beit import BEiT, BEiTConfig
from vitrail.engine.models.tokenizer import DallETokenizerConfig, KMeansTokenizerConfig
from vitrail.engine.models.vit import ViTConfig, beit_vit, vit_base, vit_large
from vitrail.engine.train.config import ConfigError
from vitrail.engine.train.launch import check_method
from vitrail.engine.train.param_groups import parameter_groups
from vitrail.recipes import beit_vitb16

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # images of these tests are normalised already


def tiny(**changes) -> BEiTConfig:
    encoder = beit_vit(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4))
    tokenizer = KMeansTokenizerConfig(patch_size=8, codes=64)
    return replace(BEiTConfig(encoder=encoder, tokenizer=tokenizer, mask_count=6, least_area=2, **IDENTITY), **changes)


def load_official(model: BEiT, state) -> None:
    """Load what a release holds, and leave the tokenizer as it is."""
    tokenizer = {name: value for name, value in model.state_dict().items() if name.startswith("tokenizer.")}
    load_exactly(model, from_official(state) | tokenizer)


def schedule(**changes) -> Schedule:
    return Schedule(
        **{"step": 3, "total_steps": 9, "epoch": 0.5, "seed": 1, "first_row": 0, "global_rows": 8} | changes
    )


def taught(config: BEiTConfig) -> BEiT:
    """A float64 model whose tokenizer has seen some noise."""
    torch.manual_seed(0)
    model = config.build()
    noise = torch.randint(0, 256, (32, *config.token_size, 3), dtype=torch.uint8)
    model.prepare(lambda view, count: iter([noise]))
    return model.double()


def test_golden_loss_and_gradients():
    """As the released network computes them in float64, filled by a closed formula."""
    model = tiny().build().double()
    state = to_official({name: value.clone() for name, value in model.state_dict().items()})
    golden.fill_(state)
    load_official(model, state)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, [1, 2, 5, 6, 9]] = hidden[1, [0, 4, 8, 12, 13, 14]] = True
    masks = model.listed(hidden)
    n, place = masks.rows // 16, masks.rows % 16
    logits = model.predict(golden.images(2, 32), masks)
    loss = model.loss(logits, (31 * n + 17 * place + 5) % 64, masks.real)
    loss.backward()
    assert masks.rows.tolist() == [1, 2, 5, 6, 9, 16, 20, 24, 28, 29, 30, 0]
    assert masks.real.tolist() == [1.0] * 11 + [0.0]
    assert logits[:11].sum().item() == pytest.approx(-16.908065236265593, rel=1e-12)
    assert logits[0, :3].tolist() == pytest.approx([0.4325407249, -0.3687238352, -0.9889984486], abs=1e-9)
    assert loss.item() == pytest.approx(4.524402246374807, rel=1e-12)
    assert golden.gradient_norm(model) == pytest.approx(1.8852374855055154, rel=1e-12)


def test_loss_and_gradients_equal_transformers():
    from transformers import BeitConfig, BeitForMaskedImageModeling

    torch.manual_seed(0)
    theirs = BeitForMaskedImageModeling(
        BeitConfig(
            vocab_size=64,
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            layer_norm_eps=1e-6,
            drop_path_rate=0.0,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            use_mean_pooling=True,
        )
    )
    theirs.train().double()
    for name, parameter in theirs.named_parameters():  # tokens and tables start at zero, which hides much
        if name.endswith(("token", "table", "bias")):
            torch.nn.init.normal_(parameter)
    model = tiny(encoder=replace(tiny().encoder, depth=3)).build().double()
    state = {name: value for name, value in theirs.state_dict().items() if "relative_position_index" not in name}
    load_exactly(model, from_hf(state) | {"tokenizer.codebook": model.tokenizer.codebook})
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    masks = model.masks(schedule().uniform(5, 192, torch.device("cpu")))
    labels = torch.randint(0, 64, (int(masks.real.sum()),))
    expected = theirs(images, bool_masked_pos=masks.hidden, labels=labels).loss
    names = F.pad(labels, (0, len(masks.rows) - len(labels)))
    loss = model.loss(model.predict(images, masks), names, masks.real)
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    mine = dict(model.named_parameters())
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(mine[name].grad, gradient, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_published_sizes():
    for encoder, kept, head in ((vit_base(), 85_666_128, 6_299_648), (vit_large(), 303_137_216, 8_396_800)):
        with torch.device("meta"):
            model = BEiTConfig(encoder=beit_vit(encoder)).build()
        assert sum(p.numel() for p in model.encoder.parameters()) == kept
        assert sum(p.numel() for p in model.lm_head.parameters()) == head
        assert sum(p.numel() for p in model.parameters()) == kept + head  # the tokenizer is not trained


def test_initialisation():
    """Normal with a deviation of 0.02 cut off at one deviation, no bias: the layer over the vocabulary too."""
    torch.manual_seed(0)
    model = tiny(tokenizer=KMeansTokenizerConfig(patch_size=8, codes=512)).build()
    weight = model.lm_head.weight
    assert 0.0199 < weight.abs().max() <= 0.02
    assert weight.std().item() == pytest.approx(0.01079, rel=0.03)
    assert not model.lm_head.bias.any()


def test_masks_of_the_published_size():
    """At most 75 of 196 patches, mostly exactly as many, and in the mean what the released code hides."""
    with torch.device("meta"):
        model = BEiTConfig().build()
    masks = model.masks(schedule(global_rows=1000).uniform(1000, 192, torch.device("cpu")))
    counts = masks.hidden.sum(1)
    assert masks.hidden.shape == (1000, 196)
    assert masks.rows.shape == masks.real.shape == (75_000,)
    assert counts.max() == 75
    assert counts.min() >= 60
    assert counts.float().mean().item() == pytest.approx(74.49, abs=0.15)
    assert (counts == 75).float().mean().item() == pytest.approx(0.675, abs=0.06)
    listed = torch.zeros(196_000, dtype=torch.bool)
    listed[masks.rows[masks.real > 0]] = True
    assert torch.equal(listed.view(1000, 196), masks.hidden)
    assert masks.real.sum() == counts.sum()


@pytest.mark.parametrize("side", [8, 4])  # of the tokenizer's patches; 4: it has a view of its own
def test_the_loss_is_the_mean_over_hidden_patches_of_what_the_tokenizer_says(side):
    tokenizer = KMeansTokenizerConfig(patch_size=side, codes=64)
    model = taught(tiny(tokenizer=tokenizer, mask_count=10, least_area=9))
    views = [torch.randint(0, 256, (8, *view.size, 3), dtype=torch.uint8) for view in model.views()]
    images = views[0]
    assert [view.shape[1] for view in views] == ([32] if side == 8 else [32, 16])
    loss, metrics = model(SimpleNamespace(views=views), schedule())
    masks = model.masks(schedule().uniform(8, 192, images.device))
    assert masks.hidden.sum(1).float().std() > 0  # not all images hide as many
    names = model.tokenizer(views[-1])[masks.hidden]
    logits = model.lm_head(model.encoder(images, None, False, masks.hidden)[:, 1:][masks.hidden])
    assert loss.item() == pytest.approx(F.cross_entropy(logits, names).item(), rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == names).double().mean().item(), rel=1e-6)
    assert metrics["masked"].item() == pytest.approx(masks.hidden.double().mean().item())
    assert model.chance_loss(8) == math.log(64)


def test_hidden_pixels_reach_the_names_alone():
    model = taught(tiny())
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    masks = model.masks(schedule().uniform(8, 192, images.device))
    other = images.view(8, 4, 8, 4, 8, 3).transpose(2, 3).flatten(1, 2).clone()
    other[masks.hidden] = 255 - other[masks.hidden]
    other = other.view(8, 4, 4, 8, 8, 3).transpose(2, 3).reshape(images.shape)
    real = masks.real > 0
    assert torch.equal(model.predict(images, masks)[real], model.predict(other, masks)[real])
    assert not torch.equal(model.tokenizer(images, masks.rows)[real], model.tokenizer(other, masks.rows)[real])


def test_masks_depend_on_the_place_in_the_global_batch_only():
    model = taught(tiny(least_area=1))  # every image then hides six patches
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)

    def loss(first: int, count: int, **changes) -> float:
        views = [images[first : first + count]]
        return model(SimpleNamespace(views=views), schedule(first_row=first, **changes))[0].item()

    whole = loss(0, 8)
    assert (loss(0, 4) + loss(4, 4)) / 2 == pytest.approx(whole, rel=1e-12)
    assert sum(loss(i, 2) for i in range(0, 8, 2)) / 4 == pytest.approx(whole, rel=1e-12)
    assert loss(0, 8, step=4) != pytest.approx(whole, rel=1e-6)


def test_views_are_one_box_in_two_sizes():
    with torch.device("meta"):
        views = BEiTConfig().build().views()
    assert [view.size for view in views] == [(224, 224), (112, 112)]
    assert [view.ops[0].interpolation for view in views] == ["bicubic", "lanczos"]
    assert streams(views) == [0, 0]
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 / 400, y * 255 / 300, 127 + 100 * np.sin(x / 20) * np.cos(y / 20)], -1).astype(np.uint8)
    flips = 0
    for position in range(8):
        drawn = [
            view.draw(sample_rng(0, 0, position, s), (300, 400)) for s, view in zip(streams(views), views, strict=True)
        ]
        for ours, theirs in zip(*drawn, strict=True):
            assert np.array_equal(ours, theirs)
        flips += int(drawn[0][1][0])
        large, small = (execute(v, Image.fromarray(pixels), p) for v, p in zip(views, drawn, strict=True))
        halved = large.reshape(112, 2, 112, 2, 3).mean((1, 3))
        assert np.abs(halved - small).mean() < 2  # grey levels; another box differs by dozens
    assert 0 < flips < 8
    assert [view.size for view in tiny().build().views()] == [(32, 32)]  # one view where both sizes are equal
    with pytest.raises(DataError, match="'b' takes the random numbers of 'x', and there are only 'a', 'b'"):
        streams([replace(views[0], name="a"), View(name="b", ops=views[0].ops, like="x")])


def test_dali_and_pillow_cut_the_same_box():
    """Up to what the rounding between the passes of a resize changes; what the edge reaches left out."""
    from vitrail.engine.data.dali import DaliDecoder

    config = tiny(tokenizer=KMeansTokenizerConfig(patch_size=4, codes=64), jitter=(0.0, 0.0, 0.0))
    views = config.build().views()
    assert [view.size for view in views] == [(32, 32), (16, 16)]
    samples = []
    for position in range(6):
        coarse = np.random.default_rng(position).integers(0, 256, (9, 12, 3), np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(coarse).resize((150, 110), Image.Resampling.BICUBIC).save(encoded, "PNG")
        params = [v.draw(sample_rng(0, 0, position, s), (110, 150)) for s, v in zip(streams(views), views, strict=True)]
        samples.append(Sample(Slot(0, position, tuple), position, encoded.getvalue(), params))
    dali = DaliDecoder(views, batch=6, device=torch.device("cpu"), on_gpu=False, threads=1, prefetch=1)
    pillow = PillowDecoder(views, device=torch.device("cpu"), threads=1, prefetch=1)
    (ours,), (theirs,) = (list(decoder.decode(iter([samples]))) for decoder in (dali, pillow))
    pillow.close()
    for one, other in zip(ours, theirs, strict=True):
        difference = (one.int() - other.int()).abs()[:, 3:-3, 3:-3]
        assert difference.max() <= 2  # grey levels
        assert difference.float().mean() < 0.35


def test_flops_are_those_that_a_step_runs():
    # So many names that naming counts.
    tokenizer = KMeansTokenizerConfig(patch_size=4, codes=512)
    model = taught(tiny(encoder=replace(tiny().encoder, width=64), tokenizer=tokenizer)).float()
    views = [torch.randint(0, 256, (16, side, side, 3), dtype=torch.uint8) for side in (32, 16)]
    with FlopCounterMode(display=False) as counter:
        model(SimpleNamespace(views=views), schedule(global_rows=16))[0].backward()
    unneeded = 2 * 16 * 16 * 192 * 64  # the patch projection has no input gradient
    assert counter.get_total_flops() == pytest.approx(model.flops(16) - unneeded, rel=0.01)


def test_features_are_the_mean_of_the_patches():
    torch.manual_seed(0)
    model = tiny().build().eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.features(images), model.encoder(images)[:, 1:].mean(1))
    assert model.backbone() is model.encoder


def test_decay_is_the_released_codes():
    run = replace(beit_vitb16.recipe(), method=tiny())
    model = run.method.build()
    spared, decayed = parameter_groups(model, run)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    kept = {names[id(p)] for p in decayed["params"]}
    assert "encoder.cls_token" not in kept
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table", "lm_head.weight"} <= kept
    assert not any(name.endswith(("bias", "gamma", "norm.weight")) for name in kept)
    positions = tiny(encoder=replace(tiny().encoder, positions="learned", layer_scale=0.0)).build()
    assert {id(p) for p in positions.undecayed()} == {id(positions.encoder.cls_token), id(positions.encoder.pos_embed)}


def test_what_does_not_fit_is_refused():
    for change, message in (
        ({"mask_count": 17}, "mask_count must be from 1 to the 16 patches of an image, got 17"),
        ({"mask_count": 0}, "mask_count must be from 1"),
        ({"encoder": replace(tiny().encoder, mask_token=False)}, "mask_token=True"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**change).build()
    with pytest.raises(ConfigError, match=r"no weights of DALL-E's encoder at None: .*--method.tokenizer.weights"):
        check_method(beit_vitb16.recipe())
    check_method(beit_vitb16.recipe(tokenizer=KMeansTokenizerConfig()))
    assert isinstance(beit_vitb16.recipe().method.tokenizer, DallETokenizerConfig)


class Runs:
    """Reports and final weights on some ranks."""

    def __init__(self, folder, ranks):
        self.reports = training.run_case("runs", folder, ranks=ranks, script=beit_runs.__file__)
        self.weights = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.launch
@pytest.mark.slow
def test_runs_in_every_way_are_one(tmp_path_factory):
    """Parts of a batch, two ranks, every stage, recomputed activations, interruptions: losses and weights."""
    one, two = (Runs(tmp_path_factory.mktemp(f"{ranks}"), ranks) for ranks in (1, 2))
    reference, weights = one.reports["plain"], one.weights["plain"]
    assert len(reference["loss"]) == beit_runs.STEPS
    assert reference["loss"][-1] < reference["loss"][0]
    assert 0 < max(reference["accuracy"]) < 1
    assert weights["tokenizer.codebook"].abs().max() > 0
    assert "encoder.rel_pos_bias.index" not in weights
    torch.manual_seed(0)  # the runs' seed
    start = beit_runs.METHOD.build().state_dict()
    assert weights.keys() == start.keys()
    assert one.reports.pop("opened")
    for runs, ranks in ((one, 1), (two, 2)):
        for name, report in runs.reports.items():
            for figure in ("loss", "gradient_norm", "accuracy"):
                assert report[figure] == pytest.approx(reference[figure], rel=1e-5), (ranks, name, figure)
            for key, value in runs.weights[name].items():
                moved = (weights[key] - start[key]).norm()
                assert moved > 0, key
                assert (value - weights[key]).norm() <= 1e-4 * moved, (ranks, name, key)
        assert any("continuing at step 2" in event for event in runs.reports["parts"]["events"])
