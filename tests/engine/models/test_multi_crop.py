import pytest
import torch

from vitrail.engine.models.multi_crop import group_views


def crops(*sizes, batch=2):
    """One tensor of its own per size, with values that tell all pixels apart."""
    start, views = 0, []
    for size in sizes:
        count = batch * size * size * 3
        views.append(torch.arange(start, start + count).view(batch, size, size, 3))
        start += count
    return views


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_runs_of_equal_size_become_batches_in_order():
    views = crops(6, 6, 4, 4, 4, 6)
    groups = group_views(views)
    assert [n for _, n in groups] == [2, 3, 1]
    for (images, n), run in zip(groups, (views[:2], views[2:5], views[5:]), strict=True):
        assert torch.equal(images, torch.cat(run))
        assert len(images) == 2 * n
    assert groups[2][0] is views[5]
    assert not same_memory(groups[0][0], views[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_neighbours_in_memory_are_not_copied(dtype):
    large = torch.randint(0, 256, (2, 3, 6, 6, 3)).to(dtype)
    small = torch.randint(0, 256, (5, 3, 4, 4, 3)).to(dtype)[1:]  # not at the start of its memory
    groups = group_views([*large, *small])
    assert [n for _, n in groups] == [2, 4]
    for (images, _), tensor in zip(groups, (large, small), strict=True):
        assert images.data_ptr() == tensor.data_ptr()
        assert torch.equal(images, tensor.flatten(0, 1))


def apart(tensor):
    return [tensor[0], tensor[2]]  # one left out between them


def backwards(tensor):
    return [tensor[1], tensor[0]]


def overlapping(tensor):
    return [tensor[0], tensor[0]]


def half_of_each(tensor):
    return [tensor[0][:1], tensor[1][:1]]


def transposed(tensor):
    return [view.transpose(1, 2) for view in tensor]


@pytest.mark.parametrize("choose", [apart, backwards, overlapping, half_of_each, transposed])
def test_what_shares_memory_otherwise_is_concatenated(choose):
    views = choose(torch.arange(3 * 2 * 4 * 4 * 3).view(3, 2, 4, 4, 3))
    ((images, n),) = group_views(views)
    assert n == len(views)
    assert torch.equal(images, torch.cat(views))
    assert not same_memory(images, views[0])


def test_gradients_reach_every_view():
    images = torch.randn(3, 2, 4, 4, 3, requires_grad=True)
    ((joined, _),) = group_views(list(images))
    joined.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


def test_no_views_make_no_batches():
    assert group_views([]) == []
