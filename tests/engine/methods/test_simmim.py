"""SimMIM against golden numbers, against transformers' models and against its own dense form."""

from dataclasses import replace
from types import SimpleNamespace

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.engine.interop.mae import load_exactly
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.simmim import Masks, SimMIM, SimMIMConfig
from vitrail.engine.models.pixels import standardised
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.models.swin import SwinConfig, swin_large
from vitrail.engine.models.vit import ViTConfig, beit_vit, vit_base
from vitrail.engine.train.param_groups import parameter_groups
from vitrail.engine.train.schedules import learning_rate
from vitrail.recipes import simmim_swinb, simmim_vitb16

# Images of these tests are normalised already.
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PLAIN_VIT = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)
VIT = SimMIMConfig(encoder=beit_vit(PLAIN_VIT), mask_size=16, **IDENTITY)
SMALL_SWIN = SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 4), window=3, mask_token=True, norm_eps=1e-5)
SWIN = SimMIMConfig(encoder=SMALL_SWIN, mask_size=8, **IDENTITY)
TINY = {"vit": VIT, "swin": SWIN}
FULL = {"vit": simmim_vitb16.recipe().method, "swin": simmim_swinb.recipe().method}


def on_meta(config: SimMIMConfig) -> SimMIM:
    with torch.device("meta"):
        return config.build()


def official(name: str) -> str:
    """What the released code calls a parameter of the ViT."""
    return (
        name.replace(".ls1.gamma", ".gamma_1")
        .replace(".ls2.gamma", ".gamma_2")
        .replace("attn.qkv.q_bias", "attn.q_bias")
        .replace("attn.qkv.v_bias", "attn.v_bias")
    )


def cells(*rows: str) -> Tensor:
    """Masks of 2 x 2 squares, each a string in reading order, to bool `[B, 16]` for 4 x 4 tokens."""
    hidden = torch.tensor([[c == "x" for c in row] for row in rows]).view(len(rows), 2, 2)
    return hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def test_golden_loss_and_gradients():
    model = VIT.build().double()
    state = {official(k): v.clone() for k, v in model.state_dict().items()}
    golden.fill_(state)
    model.load_state_dict({k: state[official(k)] for k in model.state_dict()})
    hidden, images = cells("x..x", "xxx."), golden.images(2, 32)
    # The two images hide different numbers of tokens: the loss of both is put together from those of each.
    pixels = [64 * row.sum().item() for row in hidden]
    losses = [
        model.loss(images[i : i + 1], Masks(row[None], row.nonzero().T)) * (count + 1e-5)
        for i, (row, count) in enumerate(zip(hidden, pixels, strict=True))
    ]
    loss = sum(losses) / (sum(pixels) + 1e-5)
    loss.backward()
    got = (
        loss.item(),
        golden.gradient_norm(model),
        model.encoder.mask_token.grad.norm().item(),
        model.encoder.rel_pos_bias.relative_position_bias_table.grad.norm().item(),
    )
    wanted = (0.8666838797069, 0.37783202165022794, 0.19563595491210656, 0.00019095127407888735)
    assert got == pytest.approx(wanted, rel=1e-12)


def textbook_loss(model: SimMIM, images: Tensor, hidden: Tensor) -> Tensor:
    """As the paper describes it: predict the whole image, weigh every pixel by the mask."""
    config = model.config
    (rows, columns), side = config.grid, config.region
    tokens = model.encoder.forward_regions(images, hidden)[1]
    maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    head = model.decoder[0]
    painted = F.pixel_shuffle(F.conv2d(maps, head.weight, head.bias), side)
    weight = hidden.view(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3).to(images.dtype)
    return ((images - painted).abs() * weight).sum() / (weight.sum() + 1e-5) / 3


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("kind", TINY)
def test_hidden_regions_alone_give_the_loss_of_whole_images(kind, size):
    torch.manual_seed(0)
    config = TINY[kind]
    model = replace(config, encoder=replace(config.encoder, image_size=size)).build().double()
    images, masks = torch.randn(3, 3, *size, dtype=torch.float64), model.masks(torch.rand(3, model.cells))
    results = []
    for loss in (model.loss(images, masks), textbook_loss(model, images, masks.hidden)):
        model.zero_grad()
        loss.backward()
        results.append((loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    (ours, gradients), (theirs, expected) = results
    assert ours == pytest.approx(theirs, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14, msg=name)


NAMES = (
    ("vit.embeddings.position_embeddings", "encoder.pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("swin.embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("swin.embeddings.norm.", "encoder.patch_embed.norm."),
    ("vit.embeddings.", "encoder."),
    ("swin.embeddings.", "encoder."),
    ("vit.layers.", "encoder.blocks."),
    ("swin.encoder.layers.", "encoder.layers."),
    ("vit.layernorm.", "encoder.norm."),
    ("swin.layernorm.", "encoder.norm."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.relative_position_bias.", ".attn."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.", ".attn."),
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names and layouts to ours: queries, keys and values are one matrix."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        found[name] = value
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return found


def hf_pair(kind: str) -> tuple[torch.nn.Module, SimMIM]:
    import transformers

    if kind == "vit":
        sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 128}
        more = {"num_hidden_layers": 2, "num_attention_heads": 4, "encoder_stride": 8, "layer_norm_eps": 1e-6}
        theirs = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**sizes, **more))
        encoder = replace(PLAIN_VIT, positions="learned", mask_token=True)
        return theirs, replace(VIT, encoder=encoder).build()
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    more = {"window_size": 4, "encoder_stride": 8, "drop_path_rate": 0.0}
    theirs = transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**sizes, **more))
    return theirs, replace(SWIN, encoder=replace(SMALL_SWIN, image_size=64, window=4), mask_size=16).build()


@pytest.mark.parametrize("kind", TINY)
def test_loss_and_gradients_equal_transformers(kind):
    torch.manual_seed(0)
    theirs, ours = (model.double().train() for model in hf_pair(kind))
    with torch.no_grad():
        for p in theirs.parameters():  # tokens and tables that start at zero would hide mistakes
            p.add_(torch.randn_like(p), alpha=0.05)
    load_exactly(ours, from_hf(theirs.state_dict()))
    side = ours.config.encoder.image_size
    images, masks = torch.randn(3, 3, side, side, dtype=torch.float64), ours.masks(torch.rand(3, ours.cells))
    patches = ours.config.region // ours.config.encoder.patch_size  # of Swin's input in a region
    hidden = masks.hidden.view(3, *ours.config.grid).repeat_interleave(patches, 1).repeat_interleave(patches, 2)
    expected = theirs(images, bool_masked_pos=hidden.flatten(1)).loss
    # They count pixels in float32, which the epsilon is too small for.
    loss = ours.loss(images, masks) * (1 + 1e-5 / (masks.hidden.sum().item() * ours.config.region**2))
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = from_hf({k: p.grad for k, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    ("config", "encoder", "total"),
    [
        (FULL["vit"], 85_666_128, 86_256_720),
        (FULL["swin"], 86_725_304, 89_874_104),
        (SimMIMConfig(encoder=replace(swin_large(12, 192), mask_token=True)), 195_159_540, 199_881_204),
    ],
    ids=["vit-b", "swin-b", "swin-l"],
)
def test_parameter_counts(config, encoder, total):
    model = on_meta(config)
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == total


def test_parameters_of_the_vit_are_those_of_the_released_checkpoint():
    """Its 190 keys without the buffer of indices."""
    shapes = {official(k): tuple(v.shape) for k, v in on_meta(FULL["vit"]).state_dict().items()}
    assert len(shapes) == 189
    wanted = {
        "encoder.cls_token": (1, 1, 768),
        "encoder.mask_token": (1, 1, 768),
        "encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "encoder.rel_pos_bias.relative_position_bias_table": (732, 12),
        "encoder.blocks.11.gamma_1": (768,),
        "encoder.blocks.11.attn.q_bias": (768,),
        "encoder.blocks.11.attn.v_bias": (768,),
        "encoder.blocks.11.attn.qkv.weight": (2304, 768),
        "decoder.0.weight": (768, 768, 1, 1),
        "decoder.0.bias": (768,),
    }
    assert {k: shapes[k] for k in wanted} == wanted


@pytest.mark.parametrize(("kind", "hidden", "side"), [("vit", 120, 2), ("swin", 22, 1)])
def test_masks_are_squares_of_32_pixels_in_the_published_number(kind, hidden, side):
    model = on_meta(FULL[kind])
    masks = model.masks(torch.rand(5, model.cells, generator=torch.Generator().manual_seed(0)))
    rows, columns = model.config.grid
    squares = masks.hidden.view(5, rows // side, side, columns // side, side)
    assert torch.equal(squares.any(4).any(2), squares.all(4).all(2))
    assert masks.hidden.sum(1).tolist() == [hidden] * 5
    assert len({tuple(row) for row in masks.hidden.tolist()}) == 5
    assert [row.nonzero()[:, 0].tolist() for row in masks.hidden] == masks.places.tolist()
    assert masks.places.is_contiguous()


def uncut(weight: Tensor) -> bool:
    return weight.detach().std().item() == pytest.approx(0.02, rel=0.1) and weight.abs().max().item() > 0.045


def test_initialisation_of_the_vit():
    torch.manual_seed(0)
    encoder = replace(beit_vit(vit_base(image_size=32)), width=128, depth=3, heads=2)
    model = SimMIMConfig(encoder=encoder).build()
    weights = {k: p.detach() for k, p in model.encoder.named_parameters() if p.dim() > 1}
    table = weights.pop("rel_pos_bias.relative_position_bias_table")
    assert not table.any()
    for name, weight in weights.items():
        ends = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        scale = (2 * (int(name.split(".")[1]) + 1)) ** -0.5 if ends else 1.0
        spread = 0.15 if "token" in name else 0.02  # of 128 numbers
        assert weight.std().item() == pytest.approx(0.01079 * scale, rel=spread), name
        assert weight.abs().max().item() <= 0.02 * scale * (1 + 1e-6), name
    for name, p in model.encoder.named_parameters():
        if p.dim() == 1:
            start = 0.1 if "gamma" in name else float("norm" in name and name.endswith("weight"))
            assert torch.equal(p, torch.full_like(p, start)), name
    assert model.decoder[0].bias.abs().max().item() > 0.9 * 128**-0.5  # PyTorch's default


def test_initialisation_of_swin():
    torch.manual_seed(0)
    model = replace(SWIN, encoder=replace(SMALL_SWIN, width=512, depths=(1, 1), heads=(64, 64))).build()
    encoder = model.encoder
    block = encoder.layers[0].blocks[0]
    assert uncut(encoder.mask_token)
    assert uncut(block.attn.relative_position_bias_table)
    assert uncut(block.mlp.fc1.weight)
    assert uncut(encoder.layers[0].downsample.reduction.weight)
    assert encoder.patch_embed.proj.weight.abs().max().item() == pytest.approx(48**-0.5, rel=0.01)
    assert not block.attn.qkv.bias.any()
    assert encoder.norm.eps == block.norm1.eps == 1e-5


@pytest.mark.parametrize("kind", TINY)
def test_what_is_hidden_is_not_seen(kind):
    torch.manual_seed(0)
    model = TINY[kind].build().double()
    images, masks = torch.randn(2, 3, 32, 32, dtype=torch.float64), model.masks(torch.rand(2, model.cells))
    (rows, columns), side = model.config.grid, model.config.region
    pixels = masks.hidden.view(2, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
    other = torch.where(pixels, torch.randn_like(images), images)
    assert torch.equal(model.predict(images, masks), model.predict(other, masks))
    assert model.loss(images, masks) != model.loss(other, masks)
    seen = torch.where(pixels, images, images + 1)
    assert not torch.allclose(model.predict(images, masks), model.predict(seen, masks))


def test_forward_masks_depend_on_the_place_in_the_global_batch_only():
    torch.manual_seed(0)
    model, images = VIT.build().double(), golden.images(8, 32)
    common = {"step": 3, "total_steps": 10, "epoch": 0.5, "seed": 1, "global_rows": 8}

    def loss(first: int, count: int) -> float:
        batch = SimpleNamespace(views=[images[first : first + count]])
        return model(batch, Schedule(first_row=first, **common))[0].item()

    whole = loss(0, 8)
    assert (loss(0, 4) + loss(4, 4)) / 2 == pytest.approx(whole, rel=1e-7)  # epsilon is added to each count
    assert sum(loss(i, 2) for i in range(0, 8, 2)) / 4 == pytest.approx(whole, rel=1e-7)
    other = model(SimpleNamespace(views=[images]), Schedule(first_row=0, **(common | {"step": 4})))[0].item()
    assert other != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", TINY)
def test_uint8_images_equal_normalised_floats(kind):
    torch.manual_seed(0)
    config = replace(TINY[kind], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model, plain = config.build(), TINY[kind].build()
    plain.load_state_dict(model.state_dict())
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    normalised = ((pixels / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(0, 3, 1, 2)
    masks = model.masks(torch.rand(2, model.cells))
    loss = model.loss(pixels, masks)
    assert loss.item() == pytest.approx(plain.loss(normalised.contiguous(), masks).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # pixels and differences stay in float32
        assert model.loss(pixels, masks).item() == pytest.approx(loss.item(), rel=5e-3)
        assert model.loss(pixels, masks).dtype == torch.float32


@pytest.mark.parametrize("kind", TINY)
def test_pixels_are_guessed_in_the_light_in_which_they_are_seen(kind):
    torch.manual_seed(0)
    config = TINY[kind]
    model = replace(config, encoder=replace(config.encoder, pixels="image")).build().double()
    plain = config.build().double()
    plain.load_state_dict(model.state_dict())
    images, noise = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, model.cells)
    expected = plain.loss(standardised(images), plain.masks(noise))
    assert model.loss(images, model.masks(noise)).item() == pytest.approx(expected.item(), rel=1e-12)
    seen = torch.randint(0, 100, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(model.float().reconstruct(seen, noise).image, standardised(seen))


@pytest.mark.parametrize("kind", TINY)
def test_features_are_the_mean_of_the_regions(kind):
    torch.manual_seed(0)
    model = TINY[kind].build().eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.encoder(images)[:, 1:] if kind == "vit" else model.encoder(images, True)[1]
    torch.testing.assert_close(model.features(images), tokens.mean(1))
    assert model.features(images).shape == (2, model.config.encoder.feature_width)
    assert model.backbone() is model.encoder
    assert model.first_layer() == list(model.encoder.patch_embed.proj.parameters())


@pytest.mark.parametrize("kind", TINY)
def test_reconstruction_keeps_what_was_visible_and_paints_the_rest(kind):
    torch.manual_seed(0)
    config = replace(TINY[kind], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = config.build()
    images, noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), torch.rand(2, model.cells)
    result, masks = model.reconstruct(images, noise), model.masks(noise)
    (rows, columns), side = config.grid, config.region
    hidden = masks.hidden.view(2, rows, columns).repeat_interleave(side, 1).repeat_interleave(side, 2)
    for picture in (result.masked, result.painted):
        assert torch.equal(picture[~hidden], images[~hidden])
    assert (result.masked[hidden] == 128).all()
    # The loss of what was painted, read off the picture: rounded to 8 bits and clipped, else the same.
    error = (result.painted[hidden].float() - images[hidden].float()).abs() / 255 / torch.tensor(config.std)
    assert error.mean().item() == pytest.approx(model.loss(images, masks).item(), rel=0.01)


@pytest.mark.parametrize("kind", TINY)
def test_flops_count_the_work_that_is_done(kind):
    """The closed form against torch's own counter of matrix products, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    config = TINY[kind]
    wide = {"width": 64, "depth": 3} if kind == "vit" else {"width": 48, "window": 4}
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    counted, said = [], []
    for ratio in (0.3, 1.0):
        model = replace(config, encoder=replace(config.encoder, **wide), mask_ratio=ratio).build()
        with FlopCounterMode(display=False) as counter:
            model.loss(images, model.masks(torch.rand(4, model.cells))).backward()
        counted.append(counter.get_total_flops())
        said.append(model.flops(4))
    # Nobody needs the gradient of the pixels, and attention computes its scores again.
    assert counted == pytest.approx(said, rel=0.06)
    assert counted[1] - counted[0] == said[1] - said[0] > 0  # what the decoder does for regions that are hidden


def groups_of(config) -> tuple[set[str], set[str]]:
    """Names of matrices and tokens that are not decayed, and of those that are, without linear layers."""
    method = on_meta(config.method)
    names = {p: k for k, p in method.named_parameters() if p.dim() > 1}
    kept, decayed = ({names[p] for p in group["params"] if p in names} for group in parameter_groups(method, config))
    return kept, {name for name in decayed if "token" in name or "table" in name}


def test_decay_follows_the_released_code():
    """Which spares tables of relative positions in neither: the keyword that was to do so for Swin never matches."""
    kept, decayed = groups_of(simmim_vitb16.recipe())
    assert kept == {"encoder.cls_token"}
    assert decayed == {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table"}
    kept, decayed = groups_of(simmim_swinb.recipe())
    assert kept == {"encoder.mask_token"}
    assert len(decayed) == 24
    learned = replace(VIT, encoder=replace(PLAIN_VIT, positions="learned", mask_token=True)).build()
    assert learned.undecayed() == [learned.encoder.cls_token, learned.encoder.pos_embed]


@pytest.mark.parametrize("recipe", [simmim_vitb16.recipe, simmim_swinb.recipe], ids=["vit", "swin"])
def test_recipes_follow_the_released_code(recipe):
    config, steps = recipe(), 625
    rates = {0: 2e-6, 5: 2.01e-4, 10: 4e-4, 699: 4e-4, 700: 4e-5, 799: 4e-5}
    for epoch, rate in rates.items():
        found = learning_rate(config, epoch * steps, steps_per_epoch=steps, total_steps=800 * steps)
        assert found == pytest.approx(rate, rel=1e-9), epoch
    (view,) = on_meta(config.method).views()
    crop, flip = view.ops
    assert (crop.size, crop.scale, crop.ratio, crop.interpolation, flip.p) == (
        config.method.encoder.size,
        (0.67, 1.0),
        (3 / 4, 4 / 3),
        "bilinear",
        0.5,
    )
    assert config.method.encoder.drop_path == (0.1 if recipe is simmim_vitb16.recipe else 0.0)
    assert (config.optim.clip, config.optim.betas, config.optim.weight_decay) == (5.0, (0.9, 0.999), 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": PLAIN_VIT}, "mask_token=True"),
        ({"encoder": ResNetConfig(image_size=64)}, "mask_token=True"),
        ({"mask_ratio": 0.0}, r"mask_ratio must lie above 0 and be at most 1, got 0\.0"),
        ({"mask_ratio": 1.1}, "mask_ratio"),
        ({"mask_size": 20}, "mask_size 20 is not a multiple of 8"),
        ({"mask_size": 24}, "cells of 3 x 3 tokens do not tile a grid of 4 x 4"),
    ],
)
def test_configurations_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        on_meta(replace(VIT, **change))
