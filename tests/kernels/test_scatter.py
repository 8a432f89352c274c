import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder_faults import Fault, check_noticed

from vitrail.kernels import scatter
from vitrail.kernels.scatter import scatter_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def skip_without_a_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def loop(rows: torch.Tensor, index: list[int], size: int) -> torch.Tensor:
    """Adds one row after the other."""
    out = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype)
    for row, place in zip(rows, index, strict=True):
        if place >= 0:
            out[place] += row
    return out


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(
    index=st.lists(st.integers(-2, 6), max_size=40),
    width=st.sampled_from([None, 1, 3, 17]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_of_integers_are_exact(device, index, width, dtype):
    shape = (len(index),) if width is None else (len(index), width)
    rows = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(len(index))).to(dtype)
    got = scatter_rows(rows.to(device), torch.tensor(index, dtype=torch.int64, device=device), 7)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), loop(rows, index, 7))


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_the_same_every_time(device):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 5, generator=generator) * torch.logspace(-6, 6, 20_000)[:, None]
    index = torch.randint(-1, 3, (20_000,), generator=generator)
    first = scatter_rows(rows.to(device), index.to(device), 3)
    assert all(torch.equal(scatter_rows(rows.to(device), index.to(device), 3), first) for _ in range(10))


def test_on_the_cpu_rows_are_added_in_their_order():
    rows = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    index = torch.arange(1000) % 3
    assert torch.equal(scatter_rows(rows, index, 3), loop(rows, index.tolist(), 3))


def test_it_stays_one_node_of_a_compiled_graph():
    """Taken apart, the accumulation would become atomic additions on a GPU."""
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    rows, index = torch.randn(8, 3), torch.tensor([0, 1, 1, -1, 4, 4, 4, 0])
    compiled = torch.compile(lambda a, b: scatter_rows(a, b, a.shape[0]), backend=backend, fullgraph=True)
    assert torch.equal(compiled(rows, index), scatter_rows(rows, index, 8))
    assert any("scatter_rows" in str(target) for target in targets)
    assert not any("index" in str(target) for target in targets)
    torch.library.opcheck(torch.ops.vitrail_internal.scatter_rows.default, (rows, index, 8))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("keeps what is to be dropped", scatter.__name__, "torch.where(index < 0, size, index)", "index % size"),
        Fault("keeps the last only", scatter.__name__, "out.index_add_", "out.index_copy_"),
        Fault("drops the first row", scatter.__name__, "index < 0", "index < 1"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    rows, index = torch.arange(10.0).view(5, 2) + 1, [0, 2, -1, 2, 1]

    def check() -> None:
        function = sys.modules[scatter.__name__]._scatter_rows
        assert torch.equal(function(rows, torch.tensor(index), 3), loop(rows, index, 3))

    # A second module of the same source may not define the op again.
    torch_library = torch.library.Library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "Library", lambda *_: torch_library(f"vitrail_{tmp_path.name}", "DEF"))
        patch.setattr(torch.library, "register_fake", lambda *_, **__: None)
        check_noticed(fault, tmp_path, check)
