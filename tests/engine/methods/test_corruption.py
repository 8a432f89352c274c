"""Corrupted views against rectangles placed one after the other, and against what a plain sampler places on average."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.engine.methods import corruption
from vitrail.engine.methods.corruption import CHOICES, Corruption, corrupt, draw_blocks, gaussian
from vitrail.engine.methods.sit import corrupted_l1

IMAGES = 5
SIZE = 32, 48


def normalise(images):
    return (images.double() / (255 if images.dtype == torch.uint8 else 1) - 0.4) / 0.3


def pictures(images: int = 2 * IMAGES, size: tuple[int, int] = SIZE, dtype=torch.uint8):
    drawn = torch.randint(0, 256, (images, *size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


def draws(config, rows: int = 2 * IMAGES, seed: int = 0):
    return torch.rand(rows, config.columns, generator=torch.Generator().manual_seed(seed))


def one_by_one(images, noise, config, batch):
    """What `corrupt` is to return: rectangle after rectangle, until enough is covered; numbers as they are in noise."""
    noise, clean = noise.numpy(), images.numpy()
    result, masks = normalise(images).numpy(), np.zeros(images.shape[:3], bool)
    a, (height, width) = config.align, images.shape[1:3]
    for i, (choices, row) in enumerate(zip(noise[:, :CHOICES], noise[:, CHOICES:], strict=True)):
        replaced = choices[0] < config.replaced
        most = config.replace if replaced else config.drop
        least = (min(0.5, most) + choices[1] * (most - min(0.5, most))) * height * width
        fill = "replace" if replaced else config.fills[int(choices[2] * np.float32(len(config.fills)))]
        donor = i // batch * batch + int(choices[3] * np.float32(batch))
        target = normalise(torch.from_numpy(clean[i])).numpy()
        for u in row.reshape(config.blocks, -1):
            y, x = (int(v * np.float32(side - a)) // a * a for v, side in zip(u, (height, width), strict=False))
            sides = []
            for v, start, side in zip(u[2:], (y, x), (height, width), strict=False):
                longest = int(0.3 * side)
                length = min(a + int(v * np.float32(longest - a)), side - start)
                sides.append(int(np.round(length / a)) * a)  # half to even
            h, w = sides
            where = slice(y, y + h), slice(x, x + w)
            if fill == "copy":
                fy, fx = (
                    a * int(v * np.float32((side - s) // a + 1))
                    for v, side, s in zip(u[4:], (height, width), (h, w), strict=True)
                )
                target[where] = normalise(torch.from_numpy(clean[i, fy : fy + h, fx : fx + w])).numpy()
            elif fill == "replace":
                target[where] = normalise(torch.from_numpy(clean[donor][where])).numpy()
            else:
                target[where] = 0 if fill == "zeros" else np.nan
            masks[i][where] = True
            if masks[i].sum() >= least:
                break
        result[i] = target
    return result, masks


CONFIGS = {
    "any place": Corruption(),
    "patches": Corruption(align=8),
    "mostly hidden": Corruption(drop=0.7, replaced=0.2, align=2),
    "replaced": Corruption(replaced=1.0, align=4),
    "copied": Corruption(fills=("copy",), replaced=0.0),
    "all kinds": Corruption(fills=("copy", "noise", "zeros"), replaced=0.25, align=4),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_rectangles_are_those_placed_one_by_one(name, dtype):
    config = CONFIGS[name]
    for seed in range(3):
        images, noise = pictures(dtype=dtype), draws(config, seed=seed)
        found = corrupt(images, noise, config, normalise, batch=IMAGES, dtype=torch.float64)
        expected, mask = one_by_one(images, noise, config, IMAGES)
        np.testing.assert_array_equal(found.mask.numpy(), mask)
        drawn = np.isnan(expected)
        assert drawn.any() == ("noise" in config.fills)
        np.testing.assert_array_equal(found.images.numpy()[~drawn], expected[~drawn])
        assert not drawn.any() or 0.8 < found.images.numpy()[drawn].std() < 1.2


# Rectangles needed and share covered, means of 20,000 images of 224 pixels, placed one by one by numpy.
PLAIN = {
    (0.5, 1): (40.148, 0.51070),
    (0.5, 16): (22.715, 0.51134),
    (0.3, 1): (20.504, 0.31359),
    (0.3, 16): (11.869, 0.31540),
}


@pytest.mark.parametrize(("share", "align"), PLAIN)
def test_as_many_rectangles_as_a_plain_sampler_needs(share, align):
    config = Corruption(drop=share, align=align, replaced=0.0)
    counts, covered = [], []
    for seed in range(5 if align == 1 else 20):
        noise = draws(config, rows=100, seed=seed)
        blocks = draw_blocks(noise[:, CHOICES:].unflatten(1, (config.blocks, -1)), (224, 224), align)
        rows, columns = blocks.spans((224 // align,) * 2)
        needed = corruption._needed(rows, columns, torch.full((100,), share))
        counts.append(needed.sum(1).double())
        covered.append((corruption._covers(rows * needed[..., None], columns) > 0).double().mean((1, 2)))
    for values, expected in zip((torch.cat(counts), torch.cat(covered)), PLAIN[share, align], strict=True):
        # The sampler's mean is uncertain too.
        error = values.std().item() * math.sqrt(1 / len(values) + 1 / 20_000)
        assert values.mean().item() == pytest.approx(expected, abs=4 * error)
    assert torch.cat(covered).min() >= share
    assert torch.cat(counts).max() < 0.7 * config.blocks


def test_half_of_the_views_are_replaced_and_fills_alternate():
    config = Corruption(fills=("zeros", "copy"), align=8)
    images = pictures(2000, size=(32, 32))
    images[images == 102] = 0  # which is exactly the mean
    found = corrupt(images, draws(config, rows=2000), config, normalise, batch=1000, dtype=torch.float32)
    zeroed = (found.images == 0).flatten(1).any(1).double()
    assert zeroed.mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))
    shares = found.mask.float().mean((1, 2))
    replaced = shares < 0.5
    assert replaced.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
    assert not zeroed[replaced].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_hidden_is_exactly_zero(dtype):
    config, images = Corruption(replaced=0.0), pictures()
    found = corrupt(images, draws(config), config, normalise, batch=IMAGES, dtype=dtype)
    assert found.images.dtype == dtype
    assert not found.images[found.mask].any()
    torch.testing.assert_close(found.images[~found.mask], normalise(images).to(dtype)[~found.mask], rtol=0, atol=0)


def test_an_image_is_corrupted_alike_in_any_batch():
    """But for whose pieces it gets, which are those of its own micro-batch."""
    config = CONFIGS["all kinds"]
    images, noise = pictures(), draws(config)
    whole = corrupt(images, noise, config, normalise, batch=IMAGES, dtype=torch.float64)
    part = corrupt(images[3:5], noise[3:5], config, normalise, batch=2, dtype=torch.float64)
    assert torch.equal(part.mask, whole.mask[3:5])
    kept = noise[3:5, 0] >= config.replaced
    assert kept.any()
    assert torch.equal(part.images[kept], whole.images[3:5][kept])


def test_noise_is_normal_and_its_own_for_each_image():
    count = 50_000
    drawn = gaussian(torch.tensor([0.0, 0.5, 0.5 + 2**-24, 0.99999994]), count).double()
    error = 1 / math.sqrt(count)
    for values in drawn:
        assert values.mean().item() == pytest.approx(0, abs=4 * error)
        assert values.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2) * error)
        assert values.pow(4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96) * error)
        assert (values[1:] * values[:-1]).mean().item() == pytest.approx(0, abs=4 * error)
    between = drawn @ drawn.T / count
    assert (between - between.diag().diag()).abs().max() < 4.5 * error
    assert torch.equal(gaussian(torch.tensor([0.5]), 7), drawn[1:2, :7].float())


class NothingIsRead(TorchDispatchMode):
    """Refuses what waits for a GPU: reading a number, and results whose size depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    config, images = CONFIGS["all kinds"], pictures()
    noise, pred = draws(config), torch.rand(2 * IMAGES, 24, 192, requires_grad=True)
    with NothingIsRead():
        found = corrupt(images, noise, config, normalise, batch=IMAGES, dtype=torch.float32)
        corrupted_l1(pred, images, found.mask, normalise).backward()
    with NothingIsRead(), pytest.raises(AssertionError, match=r"nonzero|index"):
        images[found.mask]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"align": 16}, r"align is 16.*the side 32.*pass a smaller one"),
        ({"align": 5}, r"align is 5.*divide the side 32"),
        ({"drop": 1.0}, r"strictly between 0 and 1.*1.0, 0.3"),
        ({"replaced": 1.5}, r"be a probability.*1.5"),
        ({"fills": ()}, "name each of zeros, noise, copy once"),
        ({"fills": ("zeros", "zeros")}, "once"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Corruption(**change).check((32, 32))
