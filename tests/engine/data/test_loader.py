import itertools

import pytest
import torch

from vitrail.engine.data import (
    CenterCrop,
    DataConfig,
    DataError,
    HorizontalFlip,
    RandomResizedCrop,
    Resize,
    View,
    build_loader,
    evaluation_batches,
    open_source,
)

WHOLE = View(name="whole", ops=(Resize(size=40), CenterCrop(size=32)))


@pytest.fixture
def source(images):
    return open_source(DataConfig(path=str(images)))


def take(source, views, steps, *, micro=16, accumulation=1, rank=0, world=1, start=0, seed=1, **options):
    """The batches of some steps."""
    loader = build_loader(
        source,
        views,
        micro_batch=micro,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=seed,
        device="cpu",
        config=DataConfig(**({"threads": 2} | options)),
        start_step=start,
    )
    batches = list(itertools.islice(loader, steps * accumulation))
    loader.close()
    return batches


def joined(batches):
    """Indices, labels and pixels of all batches, one after the other."""
    views = [torch.cat(view) for view in zip(*(b.views for b in batches), strict=True)]
    return [torch.cat([b.indices for b in batches]), torch.cat([b.labels for b in batches]), *views]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b), strict=True))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (4, 2)])
def test_global_batches_do_not_depend_on_the_split(source, view, world, accumulation):
    steps = 6  # of 4 in an epoch
    whole = take(source, [view], steps)
    micro = 16 // world // accumulation
    ranks = [
        take(source, [view], steps, micro=micro, accumulation=accumulation, rank=rank, world=world)
        for rank in range(world)
    ]
    in_order = [
        ranks[rank][step * accumulation + a]
        for step in range(steps)
        for a in range(accumulation)
        for rank in range(world)
    ]
    assert equal(whole, in_order)


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_resuming_at_any_step_equals_going_on(source, view, start):
    whole = take(source, [view], 11, micro=8, accumulation=2)
    rest = take(source, [view], 11 - start, micro=8, accumulation=2, start=start)
    assert equal(whole[2 * start :], rest)
    assert [(b.epoch, b.step, b.micro) for b in rest] == [(s // 4, s, a) for s in range(start, 11) for a in (0, 1)]


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_stream_does_not_depend_on_threads_and_prefetching(source, view, decoder):
    one = take(source, [view], 9, decoder=decoder, threads=1, prefetch=1)
    for threads, prefetch in ((3, 2), (7, 4)):
        assert equal(one, take(source, [view], 9, decoder=decoder, threads=threads, prefetch=prefetch))


def test_dali_and_pillow_give_the_same_stream(source, view):
    dali, pillow = (joined(take(source, [view], 5, decoder=decoder)) for decoder in ("cpu", "pillow"))
    assert torch.equal(dali[0], pillow[0])
    assert (dali[2].int() - pillow[2].int()).abs().float().mean() < 0.7  # resampling 0.35, decoding as much again


def test_epochs_have_other_orders_and_other_crops(source, view):
    first, second = joined(take(source, [view], 4)), joined(take(source, [view], 4, start=4))
    assert len(set(first[0].tolist())) == len(set(second[0].tolist())) == 64
    assert (first[0] == second[0]).float().mean() < 0.2
    shared = set(first[0].tolist()) & set(second[0].tolist())
    for index in shared:
        crops = [pixels[order == index][0] for order, _, pixels in (first, second)]
        assert not torch.equal(*crops)
    assert not torch.equal(first[0], joined(take(source, [view], 4, seed=2))[0])


def test_labels_are_those_of_the_samples(source, view):
    for batch in take(source, [view], 4):
        assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.views[0].shape == (16, 32, 32, 3)
        assert batch.views[0].dtype == torch.uint8


def test_unlabelled_images_have_no_labels(tmp_path, photo, encode, view):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encode(photo(number), "PNG"))
    (batch,) = take(open_source(DataConfig(path=str(tmp_path))), [view], 1, micro=8)
    assert batch.labels is None


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_views_of_a_sample_are_drawn_apart(source, view, decoder):
    small = View(name="small", ops=(RandomResizedCrop(size=(16, 24), scale=(0.05, 0.3)), HorizontalFlip()))
    several = take(source, [view, view, small], 2, decoder=decoder)
    alone = take(source, [view], 2, decoder=decoder)
    for a, b in zip(several, alone, strict=True):
        assert torch.equal(a.views[0], b.views[0])
        assert not any(torch.equal(one, other) for one, other in zip(a.views[0], a.views[1], strict=True))
        assert a.views[2].shape == (16, 16, 24, 3)


def test_batches_stay_as_they_were_handed_out(source, view):
    loader = build_loader(
        source, [view], micro_batch=16, accumulation=1, rank=0, world=1, seed=1, device="cpu", config=DataConfig()
    )
    kept, copies = [], []
    for batch in itertools.islice(loader, 30):
        kept.append(batch.views[0])
        copies.append(batch.views[0].clone())
    loader.close()
    del loader
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    kept[0].zero_()  # and are writable
    assert torch.equal(kept[1], copies[1])


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_evaluation_pass_has_every_sample_once(source, world, decoder):
    seen = []
    for rank in range(world):
        batches = evaluation_batches(
            source, WHOLE, batch=16, rank=rank, world=world, device="cpu", config=DataConfig(decoder=decoder)
        )
        of_rank = list(batches)
        assert len(of_rank) == len(batches)
        indices = torch.cat([batch.indices for batch in of_rank]).tolist()
        assert indices == sorted(indices)
        assert [len(batch.indices) for batch in of_rank[:-1]] == [16] * (len(of_rank) - 1)
        seen += [
            (i, label, pixels.sum())
            for b in of_rank
            for i, label, pixels in zip(b.indices, b.labels, b.views[0], strict=True)
        ]
        batches.close()
    seen.sort(key=lambda row: row[0])
    assert [int(index) for index, _, _ in seen] == list(range(70))
    assert [int(label) for _, label, _ in seen] == [source.label(index) for index in range(70)]
    assert len({int(total) for _, _, total in seen}) > 60  # different images, not one again and again


def test_evaluation_limit_takes_the_same_samples_of_all_classes(source):
    def chosen(world):
        passes = [
            evaluation_batches(source, WHOLE, batch=8, rank=rank, world=world, device="cpu", limit=20)
            for rank in range(world)
        ]
        batches = [batch for each in passes for batch in each]
        for each in passes:
            each.close()
        return joined(batches)

    alone, split = chosen(1), chosen(2)
    assert len(alone[0]) == 20
    assert set(alone[1].tolist()) == {0, 1, 2}
    assert set(split[0].tolist()) == set(alone[0].tolist())


def test_gpu_decoder_without_a_gpu(source, view):
    with pytest.raises(DataError, match=r"--data.decoder gpu was asked for but the batches are wanted on cpu"):
        take(source, [view], 1, decoder="gpu")


def test_more_than_one_pass_over_a_loader_starts_over(source, view):
    loader = build_loader(source, [view], micro_batch=16, accumulation=1, rank=0, world=1, seed=1, device="cpu")
    first, second = list(itertools.islice(loader, 3)), list(itertools.islice(loader, 3))
    loader.close()
    assert equal(first, second)
