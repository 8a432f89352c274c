"""What names the patches: DALL-E's encoder against a restatement, and codebooks of patches."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from vitrail.engine.models.dall_e import DallEEncoder
from vitrail.engine.models.tokenizer import (
    DallETokenizer,
    DallETokenizerConfig,
    KMeansTokenizerConfig,
)


def narrow(dtype=torch.float64) -> DallEEncoder:
    """An encoder of the same structure with few channels and words, and random weights large enough to matter."""
    torch.manual_seed(0)
    encoder = DallEEncoder(8, 40).to(dtype)
    for name, value in encoder.state_dict().items():
        scale = 50 if "conv_4" in name else 1.5  # branches count for a 64th
        torch.nn.init.normal_(value, std=0.1 if name.endswith(".b") else scale * value[0].numel() ** -0.5)
    return encoder


def restated(state, pixels):
    """Logits `[B, vocabulary, H / 8, W / 8]` from the names of the weights alone."""

    def conv(x, name):
        w, b = state[f"blocks.{name}.w"], state[f"blocks.{name}.b"]
        k = w.shape[-1]
        columns = F.unfold(x, k, padding=k // 2)
        return (w.flatten(1) @ columns + b[:, None]).unflatten(2, x.shape[2:])

    x = conv(0.8 * pixels + 0.1, "input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"group_{group}.block_{block}"
            y = x
            for number in (1, 2, 3, 4):
                y = conv(y.clamp(min=0), f"{name}.res_path.conv_{number}")
            beside = conv(x, f"{name}.id_path") if f"blocks.{name}.id_path.w" in state else x
            x = beside + y / 64
        if group < 4:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    return conv(x.clamp(min=0), "output.conv")


def test_published_encoder():
    with torch.device("meta"):
        encoder = DallEEncoder()
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    expected = {"input": (256, 3, 7, 7), "output.conv": (8192, 2048, 1, 1)}
    inputs = 256
    for group in range(4):
        width = 256 * 2**group
        hidden = width // 4
        for block in (1, 2):
            name = f"group_{group + 1}.block_{block}"
            if inputs != width:
                expected[f"{name}.id_path"] = (width, inputs, 1, 1)
            expected[f"{name}.res_path.conv_1"] = (hidden, inputs, 3, 3)
            expected[f"{name}.res_path.conv_2"] = expected[f"{name}.res_path.conv_3"] = (hidden, hidden, 3, 3)
            expected[f"{name}.res_path.conv_4"] = (width, hidden, 1, 1)
            inputs = width
    weights = {f"blocks.{name}.w": shape for name, shape in expected.items()}
    assert shapes == weights | {f"blocks.{name}.b": shape[:1] for name, shape in expected.items()}
    assert len(shapes) == 74
    assert sum(value.numel() for value in encoder.buffers()) == 53_786_240
    assert not list(encoder.parameters())
    features, logits = encoder.flops(112, 112)
    assert (features + 196 * logits) / 2e9 == pytest.approx(26.06, abs=0.005)


def test_the_encoder_equals_its_restatement():
    encoder = narrow()
    pixels = torch.rand(2, 3, 24, 40, dtype=torch.float64)
    expected = restated(encoder.state_dict(), pixels)
    logits = encoder.logits(encoder.features(pixels).permute(0, 2, 3, 1))
    assert logits.std() > 0.1
    torch.testing.assert_close(logits.permute(0, 3, 1, 2), expected, rtol=1e-10, atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        vectors = encoder.features(pixels)
        features = counter.get_total_flops()
        encoder.logits(vectors.permute(0, 2, 3, 1).flatten(0, 2))
    each, last = encoder.flops(24, 40)
    assert features == 2 * each
    assert counter.get_total_flops() == 2 * (each + 15 * last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_are_the_largest_logits(dtype):
    """Of all patches, or of those asked for alone; a run's autocast changes nothing."""
    tokenizer = DallETokenizer(DallETokenizerConfig(), narrow(dtype))
    tokenizer.load_state_dict(tokenizer.state_dict())
    images, state = noise(3, size=(32, 48)), tokenizer.encoder.state_dict()
    pixels = images.permute(0, 3, 1, 2).to(dtype) / 255
    state["blocks.output.conv.b"] -= restated(state, pixels).mean((0, 2, 3))  # or one word would be everywhere
    expected = restated(state, pixels).argmax(1).flatten(1)
    names = tokenizer(images)
    assert names.dtype == torch.int64
    assert names.shape == (3, 24)
    assert names.unique().numel() > 5
    assert torch.equal(names, expected)
    rows, vectors = torch.tensor([71, 0, 5, 5, 30]), tokenizer.vectors(images)
    scores = tokenizer.scores(vectors[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(images, rows), expected.flatten()[rows])
        assert torch.equal(tokenizer.vectors(images), vectors)
        assert torch.equal(tokenizer.scores(vectors[0]), scores)


def test_weights_come_from_a_file(tmp_path):
    config = DallETokenizerConfig()
    assert (config.stride, config.vocabulary) == (8, 8192)
    (reason,) = config.missing()
    assert "interop.dall_e encoder.pkl" in reason
    with pytest.raises(RuntimeError, match="DallETokenizer knows no tokens yet"):
        DallETokenizer(config, narrow())(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no weights of DALL-E's encoder at None"):
        DallETokenizer(config, narrow()).prepare(lambda count: iter(()))
    path = tmp_path / "encoder.safetensors"
    config = DallETokenizerConfig(weights=path)
    assert config.missing()
    weights = narrow(torch.float32).state_dict()
    save_file(weights, path)
    assert not config.missing()
    tokenizer = DallETokenizer(config, DallEEncoder(8, 40))
    tokenizer.prepare(lambda count: iter(()))
    assert tokenizer.ready
    assert all(torch.equal(tokenizer.encoder.state_dict()[name], value) for name, value in weights.items())
    weights.pop("blocks.input.b")
    save_file(weights, path)
    with pytest.raises(ValueError, match="73 tensors of other names or shapes"):
        DallETokenizer(config, DallEEncoder(8, 40)).prepare(lambda count: iter(()))


PLAIN = KMeansTokenizerConfig(patch_size=4, codes=12, images=50, contrast=0.1)


def noise(count, seed=0, size=(16, 16)):
    """Coarse noise, uint8 `[count, H, W, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).float()
    return F.interpolate(coarse, size, mode="bilinear").round().byte().permute(0, 2, 3, 1).contiguous()


def fitted(config=PLAIN):
    tokenizer = config.build()
    asked = []

    def samples(count):
        asked.append(count)
        return iter(noise(count).split(20))

    tokenizer.prepare(samples)
    assert asked == [config.images]
    return tokenizer


def patches(images, contrast):
    """Normalised patches, cut out one by one: `[B, L, 48]` in the order (row, column, channel)."""
    B = len(images)
    cut = [images[:, y : y + 4, x : x + 4].reshape(B, -1) / 255 for y in range(0, 16, 4) for x in range(0, 16, 4)]
    values = torch.stack(cut, 1)
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().sum(-1, keepdim=True) / 47).sqrt().add(contrast)


def test_names_are_the_nearest_typical_patches():
    tokenizer, images = fitted(), noise(30, seed=1)
    names = tokenizer(images)
    expected = torch.cdist(patches(images, 0.1).double(), tokenizer.codebook.double()).argmin(-1)
    assert (names == expected).float().mean() > 0.999  # ties up to rounding
    assert names.unique().numel() == 12
    rows = torch.tensor([479, 3, 3, 0, 250])
    scores = tokenizer.scores(tokenizer.vectors(images)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(images, rows), names.flatten()[rows])
        assert torch.equal(tokenizer.scores(tokenizer.vectors(images)[0]), scores)


def test_typical_patches_are_better_than_random_ones_and_always_the_same():
    tokenizer = fitted()
    assert torch.equal(tokenizer.codebook, fitted().codebook)
    vectors = patches(noise(30, seed=1), 0.1).flatten(0, 1)
    error = torch.cdist(vectors, tokenizer.codebook).amin(1).square().mean()
    random = torch.cdist(vectors, patches(noise(12, seed=2), 0.1)[:, 5]).amin(1).square().mean()
    assert error < 0.8 * random


def test_light_changes_no_name():
    tokenizer = fitted()
    dark = noise(20, seed=3) // 2
    assert (tokenizer(dark) == tokenizer(dark + 100)).float().mean() > 0.99


def test_a_codebook_needs_patches_and_travels_with_the_state():
    tokenizer = PLAIN.build()
    with pytest.raises(RuntimeError, match="KMeansTokenizer knows no tokens yet"):
        tokenizer(noise(1))
    with pytest.raises(ValueError, match=r"4 patches cannot give 12 typical ones: raise tokenizer\.images"):
        KMeansTokenizerConfig(patch_size=16, codes=12, images=4).build().prepare(lambda count: iter([noise(count)]))
    tokenizer.load_state_dict(fitted().state_dict())
    assert torch.equal(tokenizer(noise(5)), fitted()(noise(5)))
    assert not PLAIN.missing()
    assert (PLAIN.stride, PLAIN.vocabulary) == (4, 12)
    assert not list(tokenizer.parameters())
