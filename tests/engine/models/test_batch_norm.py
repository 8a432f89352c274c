"""Batch normalisation against torch's, view by view, over ranks, and with statistics that wait."""

import copy
import pickle

import batch_norm_ranks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training import run_case

from vitrail.engine.models.batch_norm import (
    BatchNorm,
    batch_norms,
    defer_statistics,
    replace_batch_norm,
    settle_statistics,
)

WIDTH = 6


def pair(tail=(), *, dtype=torch.float32, affine=True, shift=True, groups=1, momentum=0.1):
    """Our layer and torch's with the same weights, away from their start."""
    kind = nn.BatchNorm2d if tail else nn.BatchNorm1d
    theirs = kind(WIDTH, affine=affine, momentum=momentum)
    ours = BatchNorm(WIDTH, affine=affine, shift=shift, groups=groups, momentum=momentum)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_()
            theirs.get_parameter(name).copy_(p)
    if affine and not shift:
        theirs.bias.requires_grad_(False)
    return (ours.double(), theirs.double()) if dtype == torch.float64 else (ours, theirs)


def compare(ours, theirs, views):
    """One call of ours, one of torch's for each view: the same outputs, gradients and buffers."""
    x = torch.cat(views).requires_grad_()
    out = ours(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out.dtype)
    out.backward(weights)
    parts = [view.clone().requires_grad_() for view in views]
    separate = [theirs(part) for part in parts]
    torch.autograd.backward(separate, weights.chunk(len(views)))
    # Each view is the same computation; what is accumulated over views may differ in the order of sums.
    assert out.dtype == x.dtype
    assert torch.equal(out, torch.cat(separate))
    assert torch.equal(x.grad, torch.cat([part.grad for part in parts]))
    for p, q in zip(ours.parameters(), [q for q in theirs.parameters() if q.requires_grad], strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def random_views(groups, rows, tail, dtype=torch.float32):
    """Views with means and deviations of their own."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, WIDTH, *tail)
    return [
        (1 - 2 * g + (1 + g) * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for g in range(groups)
    ]


@pytest.mark.parametrize(("affine", "shift"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tail", [(), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_one_call_is_a_call_of_torch_for_each_view(groups, tail, dtype, affine, shift):
    ours, theirs = pair(tail, dtype=dtype, affine=affine, shift=shift, groups=groups)
    compare(ours, theirs, random_views(groups, 4, tail, dtype))
    assert ours.num_batches_tracked.item() == groups


@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 5),
    tail=st.sampled_from([(), (1, 1), (1, 2), (4, 3)]),
    momentum=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(groups, rows, tail, momentum):
    ours, theirs = pair(tail, groups=groups, momentum=momentum)
    views = random_views(groups, rows, tail)
    if views[0].numel() == WIDTH:
        with pytest.raises(ValueError, match=f"got 1 in each of {groups} views"):
            ours(torch.cat(views))
        assert not ours.pending
    else:
        compare(ours, theirs, views)


def test_channels_last_is_kept():
    ours, theirs = pair((3, 2), groups=2)
    views = [view.contiguous(memory_format=torch.channels_last) for view in random_views(2, 4, (3, 2))]
    compare(ours, theirs, views)
    assert ours(torch.cat(views)).is_contiguous(memory_format=torch.channels_last)


def test_no_more_is_kept_than_torch_keeps():
    ours, theirs = pair((3, 2), groups=2)
    x = torch.cat(random_views(2, 4, (3, 2))).requires_grad_()
    kept, _ = batch_norm_ranks.saved(lambda: ours(x))
    of_torch, _ = batch_norm_ranks.saved(lambda: torch.cat([theirs(part) for part in x.chunk(2)]))
    assert kept.pop(x.untyped_storage().data_ptr()) == of_torch.pop(x.untyped_storage().data_ptr()) == x.nbytes
    # torch keeps its running statistics too; ours are fresh ones for each of the two views.
    assert sum(kept.values()) <= sum(of_torch.values()) + 2 * WIDTH * 4


def test_eval_uses_the_running_statistics_for_all_rows():
    ours, theirs = pair(groups=3)
    x = torch.randn(7, WIDTH)  # not a multiple of three
    for module in (ours, theirs):
        module.running_mean.copy_(torch.linspace(-1, 1, WIDTH))
        module.running_var.copy_(torch.linspace(0.5, 2, WIDTH))
        module.eval()
    before = copy.deepcopy(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x[:1]), theirs(x)[:1])
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_momentum_encoders_normalise_by_the_batch():
    ours, theirs = pair(groups=2)
    views = random_views(2, 4, ())
    with torch.no_grad():
        assert torch.equal(ours(torch.cat(views)), torch.cat([theirs(view) for view in views]))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_under_autocast_the_statistics_stay_float32():
    ours, _ = pair(groups=2)
    linear = nn.Linear(3, WIDTH, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(linear(torch.randn(8, 3)))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {b.dtype for b in (ours.running_mean, ours.running_var, ours.weight.grad, linear.weight.grad)} == {
        torch.float32
    }


@pytest.mark.parametrize("affine", [True, False])
def test_state_dicts_are_those_of_torch(affine):
    ours, theirs = pair(affine=affine)
    theirs(torch.randn(5, WIDTH))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    back = nn.BatchNorm1d(WIDTH, affine=affine)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(back.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert [*BatchNorm(3, shift=False).state_dict()][:2] == ["weight", "running_mean"]


class TestDeferred:
    """Running statistics that wait for the step."""

    def model(self):
        """Two layers with momenta of their own, one of which a pass visits twice, and torch's twin."""
        torch.manual_seed(0)
        ours = nn.Sequential(BatchNorm(WIDTH, groups=2, momentum=0.3), nn.Sequential(BatchNorm(WIDTH)))
        theirs = nn.Sequential(nn.BatchNorm1d(WIDTH, momentum=0.3), nn.Sequential(nn.BatchNorm1d(WIDTH)))
        return ours, theirs

    def run(self, model, x):
        """Both layers; the second one on each half by itself and on everything."""
        y = torch.cat([model[0](part) for part in x.chunk(2)]) if isinstance(model[0], nn.BatchNorm1d) else model[0](x)
        return model[1](torch.cat([model[1](part) for part in y.chunk(2)]))

    def test_applied(self):
        ours, theirs = self.model()
        assert defer_statistics(ours) == 2
        start = copy.deepcopy(ours.state_dict())
        for seed in range(2):  # two micro-batches of a step
            x = 1 + torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(self.run(ours, x), self.run(theirs, x))
        assert all(torch.equal(start[name], value) for name, value in ours.state_dict().items())
        settle_statistics(ours, applied=True)
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other)
        assert [layer.num_batches_tracked.item() for layer in batch_norms(ours)] == [4, 6]
        after = copy.deepcopy(ours.state_dict())
        settle_statistics(ours, applied=True)
        assert all(torch.equal(after[name], value) for name, value in ours.state_dict().items())

    def test_dropped(self):
        ours, _ = self.model()
        defer_statistics(ours)
        start = copy.deepcopy(ours.state_dict())
        self.run(ours, torch.full((8, WIDTH), torch.nan))
        settle_statistics(ours, applied=False)
        settle_statistics(ours, applied=True)
        assert all(torch.equal(start[name], value) for name, value in ours.state_dict().items())

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_do_not_carry_what_waits(self, duplicate):
        ours, _ = self.model()
        defer_statistics(ours)
        self.run(ours, torch.randn(8, WIDTH))
        twin = duplicate(ours)
        assert list(twin.state_dict()) == list(self.model()[1].state_dict())
        assert all(layer.deferred and not layer.pending for layer in batch_norms(twin))
        assert all(layer.pending for layer in batch_norms(ours))
        settle_statistics(twin, applied=True)
        assert twin[0].num_batches_tracked.item() == 0

    def test_what_waits_holds_no_graph(self):
        ours, _ = self.model()
        defer_statistics(ours)
        self.run(ours, torch.randn(8, WIDTH, requires_grad=True))
        assert not any(t.requires_grad for layer in batch_norms(ours) for pair in layer.pending for t in pair)


def test_replacing_keeps_parameters_and_buffers():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
    model = nn.Sequential(inner, nn.Flatten(), nn.BatchNorm1d(16, affine=False), nn.LayerNorm(16)).eval()
    x = torch.randn(6, 3, 2, 2)
    parameters, buffers, keys = list(model.parameters()), list(model.buffers()), list(model.state_dict())
    before = model(x)
    assert replace_batch_norm(model, groups=3, sync=False) == 2
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [id(b) for b in model.buffers()] == [id(b) for b in buffers]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    options = [(b.width, b.eps, b.momentum, b.groups, b.sync, b.training) for b in batch_norms(model)]
    assert options == [(4, 1e-3, 0.2, 3, False, False), (16, 1e-5, 0.1, 3, False, False)]
    assert replace_batch_norm(model, groups=1, sync=True) == 0


@pytest.mark.parametrize("option", [{"momentum": None}, {"track_running_stats": False}])
def test_layers_without_our_kind_of_statistics_are_not_replaced(option):
    with pytest.raises(ValueError, match="track_running_stats=True and a number as momentum"):
        replace_batch_norm(nn.Sequential(nn.BatchNorm1d(3, **option)), groups=1, sync=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, WIDTH), "a batch of 5 rows cannot be split into 2 views"),
        ((2, WIDTH), "got 1 in each of 2 views"),
        ((0, WIDTH), "got 0 in each of 2 views"),
        ((4, WIDTH + 1), r"takes \[N, 6\] or \[N, 6, H, W\], got \(4, 7\)"),
        ((4, WIDTH, 3), r"got \(4, 6, 3\)"),
    ],
)
def test_what_cannot_be_normalised_is_refused(shape, message):
    layer = BatchNorm(WIDTH, groups=2)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    assert not layer.pending


# --- several ranks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of all cases on three ranks and on two, by number of ranks."""
    return run_case("all", tmp_path_factory.mktemp("ranks"), ranks=3, script=batch_norm_ranks.__file__)


TOLERANCES = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 6e-3}


@pytest.mark.launch
@pytest.mark.parametrize("size", ["2", "3"])
@pytest.mark.parametrize("case", batch_norm_ranks.CASES)
def test_ranks_equal_the_whole_batch(ranks, size, case):
    described = batch_norm_ranks.CASES[case]
    tolerance = TOLERANCES[described.dtype]
    if case == "far from zero":  # one rounding of a mean of 300 is 0.002 of a deviation of 0.01
        tolerance = 1e-2
    assert len(ranks[size][case]) == int(size)
    for report in ranks[size][case]:
        assert report.pop("messages") == 2
        assert report.pop("alike")
        parameters = set(["weight"] * described.affine + ["bias"] * (described.affine and described.shift))
        assert report.keys() == {"out", "grad", "mean", "var"} | parameters
        assert max(report.values()) < tolerance, report


@pytest.mark.launch
@pytest.mark.parametrize("size", ["2", "3"])
def test_gradients_that_ranks_average(ranks, size):
    for report in ranks[size]["ddp"]:
        assert report.keys() == {"0.weight", "1.weight", "1.bias", "3.weight"}
        assert max(report.values()) < 5e-6, report


@pytest.mark.launch
@pytest.mark.parametrize("size", ["2", "3"])
def test_ranks_that_stay_alone_or_wait(ranks, size):
    assert ranks[size]["local"] == [True] * int(size)
    for report in ranks[size]["deferred"]:
        assert report["before"] == report["tracked"] == 0
        assert max(report["mean"], report["var"]) < 1e-6, report


def test_a_frozen_layer_passes_gradients_on():
    ours, theirs = pair(groups=2)
    ours.requires_grad_(False)
    x = torch.cat(random_views(2, 4, ())).requires_grad_()
    ours(x).square().sum().backward()
    expected = torch.cat([F.batch_norm(v, None, None, ours.weight, ours.bias, True) for v in x.chunk(2)])
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(x.grad, grad)
    assert ours.weight.grad is None
    assert theirs.weight.requires_grad
