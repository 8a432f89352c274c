"""The masked autoencoder against golden numbers, against transformers' ViTMAE and against its own textbook form."""

from dataclasses import replace
from types import SimpleNamespace

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.engine.interop.mae import from_hf, from_official, load_exactly, to_official
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import ViTConfig, vit_base, vit_huge, vit_large

# Images of these tests are normalised already.
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def tiny(**changes) -> MAEConfig:
    encoder = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)
    return replace(
        MAEConfig(encoder=encoder, decoder_width=16, decoder_depth=2, decoder_heads=2, **IDENTITY), **changes
    )


def golden_mae(**changes) -> MAE:
    """A float64 model with the golden fill, which is defined over the official names."""
    model = MAE(tiny(**changes)).double()
    state = to_official({k: v.clone() for k, v in model.state_dict().items()})
    golden.fill_(state, skip=("pos_embed", "decoder_pos_embed"))
    load_exactly(model, from_official(state))
    return model


GOLDEN = {  # loss, global gradient norm, gradient norms of class token, mask token, patch weight
    False: (0.5331080519606616, 0.1834328559159937, 0.00033207716825621, 0.029474282912431, 0.0025466079317376),
    True: (1.013034768769652, 0.20378860627127, 0.00032107440449549, 0.028685930194257, 0.0024819174240522),
}


@pytest.mark.parametrize("norm_pix", [False, True])
def test_golden_losses_and_gradients(norm_pix):
    model = golden_mae(norm_pix=norm_pix)
    images, masks = golden.images(2, 32), model.masks(golden.noise(2, 16))
    loss = model.loss(images, masks)
    loss.backward()
    got = (
        loss.item(),
        golden.gradient_norm(model),
        model.encoder.cls_token.grad.norm().item(),
        model.decoder.mask_token.grad.norm().item(),
        model.encoder.patch_embed.proj.weight.grad.norm().item(),
    )
    assert got == pytest.approx(GOLDEN[norm_pix], rel=1e-9, abs=1e-12)


def test_golden_masks_and_predictions():
    model = golden_mae()
    masks = model.masks(golden.noise(2, 16))
    hidden = (masks.restore >= model.visible).int()
    assert ["".join(map(str, row.tolist())) for row in hidden] == ["0111011110111101", "1111011100111011"]
    pred = model.decoder(model.encoder(golden.images(2, 32), masks.keep), masks.keep, masks.restore)
    assert pred.sum().item() == pytest.approx(9.525379406916635, rel=1e-9)
    assert pred[0, 0, :3].tolist() == pytest.approx([0.2204399473, 0.2238269154, 0.1978655381], abs=1e-9)


def textbook_loss(model: MAE, images: Tensor, noise: Tensor) -> Tensor:
    """MAE as the paper describes it: embed everything, gather, un-shuffle, decode everything, weigh by the mask."""
    config, B, L = model.config, images.shape[0], noise.shape[1]
    p, visible = config.encoder.patch_size, model.visible
    proj = model.encoder.patch_embed.proj
    tokens = (
        F.conv2d(images, proj.weight, proj.bias, stride=p).flatten(2).transpose(1, 2) + model.encoder.pos_embed[:, 1:]
    )
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    kept = tokens.gather(1, shuffle[:, :visible, None].expand(-1, -1, tokens.shape[2]))
    x = torch.cat([(model.encoder.cls_token + model.encoder.pos_embed[:, :1]).expand(B, -1, -1), kept], dim=1)
    for block in model.encoder.blocks:
        x = block(x)
    y = model.decoder.embed(model.encoder.norm(x))
    fill = model.decoder.mask_token.expand(B, L - visible, -1)
    full = torch.cat([y[:, 1:], fill], dim=1).gather(1, restore[:, :, None].expand(-1, -1, y.shape[2]))
    y = torch.cat([y[:, :1], full], dim=1) + model.decoder.pos_embed
    for block in model.decoder.blocks:
        y = block(y)
    pred = model.decoder.pred(model.decoder.norm(y))[:, 1:, : 3 * p * p]
    h, w = images.shape[2] // p, images.shape[3] // p
    target = images.reshape(B, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(B, L, 3 * p * p)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = (restore >= visible).to(pred.dtype)
    return (((pred - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("size", "patch"), [((32, 32), 8), ((28, 56), 14), ((48, 24), 8)])
def test_optimised_decoder_equals_the_textbook(depth, recompute, size, patch):
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=size, patch_size=patch, width=32, depth=2, heads=4, positions="learned")
    model = MAE(tiny(encoder=encoder, decoder_depth=depth)).double()
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.recompute = recompute
    images, noise = torch.randn(3, 3, *size, dtype=torch.float64), torch.rand(3, model.encoder.length)
    results = []
    for loss in (model.loss(images, model.masks(noise)), textbook_loss(model, images, noise)):
        model.zero_grad()
        loss.backward()
        results.append((loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    (ours, gradients), (theirs, expected) = results
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_loss_and_gradients_equal_transformers():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3}
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            **sizes,
            num_attention_heads=3,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=128,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    ).train()
    encoder = ViTConfig(image_size=64, patch_size=16, width=48, depth=3, heads=3)
    ours = MAE(tiny(encoder=encoder, decoder_width=32, decoder_heads=4))
    load_exactly(ours, from_hf(theirs.state_dict()))
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 16)
    expected = theirs(images, noise=noise).loss
    loss = ours.loss(images, ours.masks(noise))
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = from_hf({k: p.grad for k, p in theirs.named_parameters() if p.requires_grad})
    mine = dict(ours.named_parameters())
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name].grad, gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("encoder", "trainable", "decoder", "frozen"),
    [
        (vit_base(), 111_655_680, 26_008_320, 111_907_840),
        (vit_large(), 329_239_296, 26_139_392, 329_541_888),
        (vit_huge(), 656_613_964, 26_178_124, 657_074_508),
    ],
    ids=["base", "large", "huge"],
)
def test_parameter_counts(encoder, trainable, decoder, frozen):
    with torch.device("meta"):
        model = MAE(MAEConfig(encoder=encoder))
    count = sum(p.numel() for p in model.parameters())
    assert count == trainable
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert count + sum(b.numel() for b in model.buffers()) == frozen
    assert len(to_official(model.state_dict())) == len(model.state_dict())


def test_forward_masks_depend_on_the_place_in_the_global_batch_only():
    model = MAE(tiny()).double()
    images = golden.images(8, 32)
    common = {"step": 3, "total_steps": 10, "epoch": 0.5, "seed": 1, "global_rows": 8}

    def loss(first: int, count: int) -> float:
        batch = SimpleNamespace(views=[images[first : first + count]])
        return model(batch, Schedule(first_row=first, **common))[0].item()

    whole = loss(0, 8)
    assert (loss(0, 4) + loss(4, 4)) / 2 == pytest.approx(whole, rel=1e-12)
    assert sum(loss(i, 2) for i in range(0, 8, 2)) / 4 == pytest.approx(whole, rel=1e-12)
    other = model(SimpleNamespace(views=[images]), Schedule(first_row=0, **(common | {"step": 4})))[0].item()
    assert other != pytest.approx(whole, rel=1e-6)


def test_uint8_images_equal_normalised_floats():
    torch.manual_seed(0)
    config = tiny(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = MAE(config)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    normalised = ((pixels / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(0, 3, 1, 2)
    plain = MAE(tiny())
    plain.load_state_dict(model.state_dict())
    noise = torch.rand(2, 16)
    loss = model.loss(pixels, model.masks(noise))
    assert loss.item() == pytest.approx(plain.loss(normalised.contiguous(), plain.masks(noise)).item(), rel=1e-5)


def test_reconstruction_keeps_what_was_visible_and_paints_in_the_patch_statistics():
    torch.manual_seed(0)
    model = MAE(tiny(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    noise = torch.rand(2, 16)
    result = model.reconstruct(images, noise)
    hidden = (model.masks(noise).restore >= model.visible).view(2, 4, 4)
    hidden = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for picture in (result.masked, result.painted):
        assert torch.equal(picture[~hidden], images[~hidden])
    assert (result.masked[hidden] == 128).all()
    assert not torch.equal(result.painted[hidden], images[hidden])


def test_flops_count_the_work_that_is_done():
    """The closed form against torch's own counter of matrix products, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    encoder = ViTConfig(image_size=64, patch_size=8, width=64, depth=3, heads=4)
    model = MAE(tiny(encoder=encoder, decoder_width=32, decoder_depth=3))
    images, noise = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8), torch.rand(16, 64)
    with FlopCounterMode(display=False) as counter:
        model.loss(images, model.masks(noise)).backward()
    # The patch projection has no input gradient, and the table of masked tokens is counted once per batch.
    assert counter.get_total_flops() == pytest.approx(model.flops(16), rel=0.02)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5])
def test_mask_ratio_is_checked(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        MAE(tiny(mask_ratio=ratio))


def test_image_size_is_checked():
    with pytest.raises(ValueError, match="225x225 is not divisible by the patch size 16"):
        MAE(MAEConfig(encoder=vit_base(image_size=225)))
