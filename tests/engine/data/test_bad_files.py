import itertools
import logging

import numpy as np
import pytest
import torch

from vitrail.engine.data import (
    CenterCrop,
    DataConfig,
    DataError,
    Resize,
    View,
    build_loader,
    evaluation_batches,
    open_source,
)
from vitrail.engine.data.order import permutation

COUNT, BATCH, SEED = 48, 8, 4
WHOLE = View(name="whole", ops=(Resize(size=40), CenterCrop(size=32)))


def damage(folder, good, encode, photo):
    """Spoil some files, each in its own way; returns their numbers."""
    jpeg = good.read_bytes()
    progressive = encode(photo(9), progressive=True)
    png = encode(photo(9), "PNG")
    ways = {
        "empty": b"",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "JPEG without its end": jpeg[:-200],
        "JPEG header alone": jpeg[:640],
        "half a progressive JPEG": progressive[: len(progressive) // 2],
        "half a PNG": png[: len(png) // 2],
        "half a WebP": encode(photo(9), "WEBP")[:400],
        "noise": np.random.default_rng(0).bytes(3000),
        "text": b"<html>404 Not Found</html>",
    }
    # Three of them in one batch of the first epoch, the others anywhere.
    order = permutation(COUNT, SEED, 0)
    numbers = [*order[[17, 20, 22]], *order[[1, 9, 30, 33, 40, 47]]]
    for number, data in zip(numbers, ways.values(), strict=True):
        (folder / f"{number:03d}.jpg").write_bytes(data)
    return set(map(int, numbers))


@pytest.fixture
def folders(tmp_path, photo, encode):
    """The same images twice, healthy and with damage, and the numbers of the damaged ones."""
    for name in ("healthy", "damaged"):
        (tmp_path / name).mkdir()
        for number in range(COUNT):
            (tmp_path / name / f"{number:03d}.jpg").write_bytes(encode(photo(number)))
    bad = damage(tmp_path / "damaged", tmp_path / "healthy" / "003.jpg", encode, photo)
    return tmp_path / "healthy", tmp_path / "damaged", bad


def stream(folder, view, batches, decoder, *, start=0, micro=BATCH, rank=0, world=1, prefetch=2):
    loader = build_loader(
        open_source(DataConfig(path=str(folder))),
        [view],
        micro_batch=micro,
        accumulation=1,
        rank=rank,
        world=world,
        seed=SEED,
        device="cpu",
        config=DataConfig(decoder=decoder, threads=2, prefetch=prefetch),
        start_step=start,
    )
    out = list(itertools.islice(loader, batches))
    bad = dict(loader.bad_files)
    loader.close()
    return torch.cat([b.indices for b in out]), torch.cat([b.views[0] for b in out]), bad


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_bad_files_are_named_and_replaced_and_nothing_else_changes(folders, view, decoder, caplog):
    healthy, damaged, bad = folders
    expected, pixels, none = stream(healthy, view, 12, decoder)
    with caplog.at_level(logging.WARNING, "vitrail.data"):
        indices, got, named = stream(damaged, view, 12, decoder)
    assert not none
    assert set(named) == {f"{number:03d}.jpg" for number in bad}
    assert all(named.values())
    assert len(caplog.records) == len(bad)  # each logged once

    replaced = torch.tensor([int(index) in bad for index in expected])
    assert 9 <= replaced.sum() <= 18
    assert torch.equal(indices[~replaced], expected[~replaced])
    assert torch.equal(got[~replaced], pixels[~replaced])
    assert not bad & set(indices.tolist())


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_substitutes_are_the_next_good_samples_half_an_epoch_on(folders, view, decoder):
    _, damaged, bad = folders
    indices, _, _ = stream(damaged, view, 6, decoder)
    order = permutation(COUNT, SEED, 0).tolist()
    for position, (index, wanted) in enumerate(zip(indices.tolist(), order, strict=True)):
        if wanted in bad:
            wanted = next(i for i in (order * 3)[position + COUNT // 2 :] if i not in bad)
        assert index == wanted


@pytest.mark.parametrize("prefetch", [1, 3])
def test_repaired_stream_is_the_same_for_any_split_and_start(folders, view, prefetch):
    _, damaged, _ = folders
    indices, pixels, _ = stream(damaged, view, 12, "cpu")
    later, later_pixels, _ = stream(damaged, view, 7, "cpu", start=5, prefetch=prefetch)
    assert torch.equal(indices[5 * BATCH :], later)
    assert torch.equal(pixels[5 * BATCH :], later_pixels)
    ranks = [stream(damaged, view, 12, "cpu", micro=4, rank=r, world=2, prefetch=prefetch) for r in (0, 1)]
    assert torch.equal(indices.view(12, 2, 4), torch.stack([i.view(12, 4) for i, _, _ in ranks], 1))
    assert torch.equal(
        pixels.view(12, 2, 4, 32, 32, 3), torch.stack([p.view(12, 4, 32, 32, 3) for _, p, _ in ranks], 1)
    )


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_evaluation_skips_bad_files(folders, decoder):
    healthy, damaged, bad = folders

    def run(folder):
        source = open_source(DataConfig(path=str(folder)))
        config = DataConfig(decoder=decoder)
        batches = evaluation_batches(source, WHOLE, batch=5, rank=0, world=1, device="cpu", config=config)
        out = {int(i): pixels for b in batches for i, pixels in zip(b.indices, b.views[0], strict=True)}
        batches.close()
        return out, batches.bad_files

    (all_images, _), (good_images, named) = run(healthy), run(damaged)
    assert set(good_images) == set(range(COUNT)) - bad
    assert len(named) == len(bad)
    for index, pixels in good_images.items():
        assert torch.equal(pixels, all_images[index])


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
@pytest.mark.parametrize("kind", [b"", b"no image at all", "half"])
def test_mostly_bad_data_stops_the_run(folders, view, decoder, kind):
    healthy, _, _ = folders
    for number in range(COUNT - 10):
        path = healthy / f"{number:03d}.jpg"
        path.write_bytes(path.read_bytes()[:700] if kind == "half" else kind)
    with pytest.raises(DataError, match=r"of the first \d+ files cannot be decoded .* `vitrail data check`"):
        stream(healthy, view, 40, decoder)


def test_unreadable_file_is_a_bad_file(folders, view):
    healthy, _, _ = folders
    source = open_source(DataConfig(path=str(healthy)))
    (healthy / "007.jpg").unlink()  # after the folder was listed
    batches = evaluation_batches(source, WHOLE, batch=48, rank=0, world=1, device="cpu")
    assert sum(len(batch.indices) for batch in batches) == COUNT - 1
    assert "No such file" in batches.bad_files["007.jpg"]
    batches.close()


def test_failure_that_is_no_files_fault_is_raised(view, folders, monkeypatch):
    from vitrail.engine.data.dali import DaliDecoder
    from vitrail.engine.data.reader import DecodeError

    def decode(self, batches):
        if len(next(batches)) > 1:
            raise DecodeError("out of memory")
        yield []
        yield from ([] for _ in batches)

    monkeypatch.setattr(DaliDecoder, "decode", decode)
    with pytest.raises(DecodeError, match="out of memory"):
        stream(folders[0], view, 1, "cpu")
