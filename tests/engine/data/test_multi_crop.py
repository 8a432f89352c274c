"""Many crops of an image: the same pixels as each crop alone, whoever decodes, wherever the run starts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitrail.engine.data import CenterCrop, DataConfig, RandomResizedCrop, Resize, View, build_loader, open_source
from vitrail.engine.data.batch import apart, by_size
from vitrail.engine.data.chains import byol_views, dino_views, moco_v2_views, moco_v3_views, simclr_views
from vitrail.engine.data.dali import DaliDecoder, stages
from vitrail.engine.data.order import permutation, sample_rng
from vitrail.engine.data.pillow import PillowDecoder
from vitrail.engine.data.reader import Sample, Slot, image_size
from vitrail.engine.models.multi_crop import group_views

CPU = torch.device("cpu")
CROPS = dino_views(32, 16)
SEED = 3
# The same operations in other orders, other settings, twice in a view, and sizes that take turns.
MIXED = [
    *moco_v3_views(24),
    *byol_views((16, 20)),
    View(name="evaluation", ops=(Resize(size=40), CenterCrop(size=24))),
    *simclr_views(24),
    View(name="twice", ops=(Resize(size=50), CenterCrop(size=40), Resize(size=30), CenterCrop(size=24))),
    View(name="bilinear", ops=(Resize(size=50), CenterCrop(size=40), Resize(size=30, interpolation="bilinear"),
                               CenterCrop(size=24))),
    *dino_views(16, (16, 20), locals=2),
    View(name="crop", ops=(RandomResizedCrop(size=24),)),
    *moco_v2_views(16),
]  # fmt: skip


def ops_of(views, number, sequence):
    return [views[number].ops[stage.places[number]] for stage in sequence if number in stage.places]


@pytest.mark.parametrize("views", [CROPS, MIXED, MIXED[::-1], CROPS[:1]])
def test_one_sequence_has_the_operations_of_every_view_in_their_order(views):
    sequence = stages(views)
    for number, view in enumerate(views):
        assert ops_of(views, number, sequence) == list(view.ops[1:])
    for stage in sequence:
        for number, place in stage.places.items():
            op = views[number].ops[place]
            assert type(op) is type(stage.op)
            for setting in ("interpolation", "threshold", "size"):
                assert getattr(op, setting, None) == getattr(stage.op, setting, None)


def test_crops_share_their_operations():
    assert [len(stage.places) for stage in stages(CROPS)] == [10, 10, 10, 10, 1]  # but for the solarisation
    assert [len(stage.places) for stage in stages(moco_v3_views(24))] == [2, 2, 2, 1, 2]  # which the flip waits for


@pytest.fixture(scope="module")
def encoded(images):
    return [path.read_bytes() for path in sorted(images.glob("*/*.jpg"))[:12]]


def decoder(kind, views, batch):
    if kind == "pillow":
        return PillowDecoder(views, device=CPU, threads=2, prefetch=1)
    return DaliDecoder(views, batch=batch, device=CPU, on_gpu=False, threads=2, prefetch=1)


def decoded(kind, views, samples):
    made = decoder(kind, views, max(map(len, samples)))
    batches = list(made.decode(iter(samples)))
    made.close()
    return batches


@pytest.mark.parametrize("kind", ["cpu", "pillow"])
def test_views_together_are_the_views_alone(kind, encoded):
    slot = Slot(0, 0, tuple)
    rng = np.random.default_rng(0)
    samples = [Sample(slot, i, e, [v.draw(rng, image_size(e)) for v in MIXED]) for i, e in enumerate(encoded)]
    batches = [samples[:7], samples[7:], samples[:1]]  # of several sizes
    together = decoded(kind, MIXED, batches)
    assert [[tuple(view.shape[:3]) for view in views] for views in together] == [
        [(len(batch), *view.size) for view in MIXED] for batch in batches
    ]
    for number, view in enumerate(MIXED):
        one = [[replace(sample, params=[sample.params[number]]) for sample in batch] for batch in batches]
        for views, (alone,) in zip(together, decoded(kind, [view], one), strict=True):
            assert torch.equal(views[number], alone), view.name


def take(folder, kind, steps, *, micro=8, accumulation=1, rank=0, world=1, start=0, **options):
    config = DataConfig(path=str(folder), **({"decoder": kind, "threads": 2} | options))
    loader = build_loader(
        open_source(config),
        CROPS,
        micro_batch=micro,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=SEED,
        device="cpu",
        config=config,
        start_step=start,
    )
    batches = list(itertools.islice(loader, steps * accumulation))
    bad = dict(loader.bad_files)
    loader.close()
    return batches, bad


def joined(batches):
    views = [torch.cat(view) for view in zip(*(batch.views for batch in batches), strict=True)]
    return [torch.cat([batch.indices for batch in batches]), *views]


def same(batches, others):
    return all(torch.equal(a, b) for a, b in zip(joined(batches), joined(others), strict=True))


@pytest.fixture(scope="module")
def whole(images):
    """Ten steps of eight samples, by decoder."""
    return {kind: take(images, kind, 10)[0] for kind in ("cpu", "pillow")}


@pytest.mark.parametrize("kind", ["cpu", "pillow"])
def test_crops_do_not_depend_on_ranks_threads_or_the_start(kind, images, whole):
    ranks = [take(images, kind, 10, micro=2, accumulation=2, rank=rank, world=2)[0] for rank in range(2)]
    split = [ranks[rank][2 * step + a] for step in range(10) for a in range(2) for rank in range(2)]
    assert same(whole[kind], split)
    assert same(whole[kind][7:], take(images, kind, 3, start=7, threads=5, prefetch=3)[0])


@pytest.mark.parametrize("kind", ["cpu", "pillow"])
def test_crops_are_drawn_apart(kind, whole):
    _, *views = joined(whole[kind])
    assert [view.shape[1:] for view in views] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 8
    for one, other in itertools.chain(itertools.combinations(views[:2], 2), itertools.combinations(views[2:], 2)):
        assert (one != other).flatten(1).any(1).all()


@pytest.mark.parametrize("kind", ["cpu", "pillow"])
def test_crops_of_equal_size_are_one_batch_without_a_copy(kind, whole):
    for batch in whole[kind]:
        groups = group_views(batch.views)
        assert [(tuple(images.shape), n) for images, n in groups] == [((16, 32, 32, 3), 2), ((64, 16, 16, 3), 8)]
        for (images, _), first in zip(groups, (batch.views[0], batch.views[2]), strict=True):
            assert images.data_ptr() == first.data_ptr()


def test_dali_and_pillow_give_the_same_crops(whole):
    (order, *dali), (other, *pillow) = joined(whole["cpu"]), joined(whole["pillow"])
    assert torch.equal(order, other)
    for a, b in zip(dali, pillow, strict=True):
        assert (a.int() - b.int()).abs().float().mean() < 1.5  # decoding, resampling, colours and blur; see the parity


@pytest.mark.parametrize("kind", ["cpu", "pillow"])
def test_bad_file_is_replaced_in_every_view(kind, images, whole, tmp_path):
    names = [path.relative_to(images) for path in sorted(images.glob("*/*.jpg"))]
    bad = permutation(len(names), SEED, 0)[[10, 13]].tolist()  # both of the second step
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = (images / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2] if number in bad else data)
    batches, named = take(tmp_path, kind, 8)
    assert set(named) == {str(names[number]) for number in bad}
    got, expected = joined(batches), joined(whole[kind][:8])
    replaced = torch.isin(expected[0], torch.tensor(bad))
    assert replaced.nonzero().flatten().tolist() == [10, 13]
    assert not torch.isin(got[0], torch.tensor(bad)).any()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[~replaced], b[~replaced])
    for position in (10, 13):
        size = image_size((tmp_path / names[got[0][position]]).read_bytes())
        params = [view.draw(sample_rng(SEED, 0, position, n), size) for n, view in enumerate(CROPS)]
        data = (tmp_path / names[got[0][position]]).read_bytes()
        (views,) = decoded(kind, CROPS, [[Sample(Slot(0, position, tuple), 0, data, params)]])
        assert all(torch.equal(view[0], a[position]) for view, a in zip(views, got[1:], strict=True))


def test_replayed_crops_are_held_not_copied(images, whole):
    batches, _ = take(images, "auto", 5, source="replay", replay_batches=2)
    assert same(batches[:2], whole["pillow"][:2])
    for number, batch in enumerate(batches):
        assert [v.data_ptr() for v in batch.views] == [v.data_ptr() for v in batches[number % 2].views]


def test_auto_on_a_cpu_takes_pillow_for_colours_and_says_so(images, whole, caplog):
    with caplog.at_level("INFO", "vitrail.data"):
        batches, _ = take(images, "auto", 1)
    assert same(batches, whole["pillow"][:1])
    assert not same(batches, whole["cpu"][:1])
    assert [record.message.partition(",")[0] for record in caplog.records] == ["decoding with Pillow"]


def test_views_of_a_size_are_taken_apart_in_order():
    views = [View(name="v", ops=(RandomResizedCrop(size=size),)) for size in (4, 2, 4, 3, 2)]
    numbers = by_size(views)
    assert numbers == [[0, 2], [1, 4], [3]]
    of_view = [torch.full((2, *view.size, 3), number) for number, view in enumerate(views)]
    images = [torch.cat([of_view[number] for number in of_size]) for of_size in numbers]
    assert all(torch.equal(a, b) for a, b in zip(apart(images, numbers), of_view, strict=True))
