import numpy as np
import pytest

from vitrail.engine.data import DataError
from vitrail.engine.data.order import Order, candidates, permutation, sample_rng

SPLITS = [(1, 1, 16), (1, 16, 1), (2, 1, 8), (2, 4, 2), (4, 2, 2), (16, 1, 1)]  # world, accumulation, micro-batch


def order(world=1, accumulation=1, micro=16, *, rank=0, length=100, seed=3):
    return Order(length=length, micro_batch=micro, accumulation=accumulation, rank=rank, world=world, seed=seed)


def test_permutation_holds_every_sample_once_and_changes_with_seed_and_epoch():
    orders = [permutation(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for each in orders:
        assert sorted(each) == list(range(1000))
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02  # one in a thousand places agrees by chance


def test_order_is_pinned():
    # A run that is resumed after an upgrade must go on with the same order.
    assert permutation(10, 0, 0).tolist() == PINNED[0]
    assert permutation(10, 7, 3).tolist() == PINNED[1]
    assert sample_rng(7, 3, 5, 1).random(2).tolist() == PINNED[2]


def test_draws_differ_between_positions_views_epochs_and_seeds():
    places = [(s, e, p, v) for s in range(3) for e in range(3) for p in range(20) for v in range(3)]
    drawn = np.stack([sample_rng(*place).random(8) for place in places]).reshape(-1)
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize(("world", "accumulation", "micro"), SPLITS)
@pytest.mark.parametrize("step", [0, 5, 6, 17])
def test_global_batch_is_the_same_for_every_split(world, accumulation, micro, step):
    positions = [
        position
        for a in range(accumulation)
        for rank in range(world)
        for position in order(world, accumulation, micro, rank=rank).positions(step, a)
    ]
    start = step % 6 * 16  # 100 samples make 6 steps of 16
    assert positions == list(range(start, start + 16))


def test_epochs_drop_what_fills_no_batch():
    assert order(length=100).steps_per_epoch == 6
    assert [order(length=100).epoch(step) for step in (0, 5, 6, 11, 12)] == [0, 0, 1, 1, 2]


def test_candidates_begin_with_the_sample_itself_and_leave_none_out():
    each = permutation(21, 3, 2)
    for position in (0, 13, 20):
        found = list(candidates(each, position))
        assert found[0] == each[position]
        assert found[1] == each[(position + 10) % 21]
        assert set(found) == set(range(21))


def test_too_few_samples():
    with pytest.raises(
        DataError, match=r"the data set has 15 samples; expected at least .* of 16 \(4 .* 2 .* 2 ranks\)"
    ):
        order(2, 2, 4, length=15)


PINNED = (
    [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
    [0, 2, 7, 6, 4, 1, 8, 9, 5, 3],
    [0.26066781171342823, 0.8143825520108655],
)
