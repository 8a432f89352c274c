"""Losses over a process group are those of one process that has the whole batch."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import rank_losses
import torch
import torch.distributed as dist
from training import finish, start

from vitrail.kernels.groups import check_group, gather_rows, gather_upstream, rank_and_size

pytestmark = pytest.mark.launch
LOSSES = list(rank_losses.LOSSES)
RANKS = pytest.mark.parametrize("ranks", [2, 3])
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


@cache
def results(ranks: int) -> dict:
    """What every case gave on every rank; one start for all of them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        # The kernels run in the interpreter, GPU or none: ranks would share one.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        finish(start(rank_losses.__file__, str(path), ranks=ranks, env=environment), timeout=200)
        return json.loads(path.read_text())


def assert_close(outcomes: list[dict[str, float]]) -> None:
    for outcome in outcomes:
        assert outcome["loss"] <= 1e-13
        assert outcome["gradient"] <= 1e-14 * max(outcome["size"], 1)
        assert outcome["size"] > 1e-2  # not a comparison of zeros


@RANKS
@EVERY_LOSS
@pytest.mark.parametrize("averaging", ["ddp", "by hand"])
def test_averaged_gradients_are_those_of_the_whole_batch(averaging, name, ranks):
    assert_close(results(ranks)[f"{averaging} {name}"])


@RANKS
@EVERY_LOSS
def test_ranks_may_weigh_their_losses(name, ranks):
    """The upstream gradient of every rank's loss reaches the features of all ranks."""
    assert_close(results(ranks)[f"weighted {name}"])


@RANKS
@EVERY_LOSS
def test_losses_times_zero_have_no_gradient(name, ranks):
    assert all(outcome["gradient"] == 0 for outcome in results(ranks)[f"ignored {name}"])


@RANKS
@EVERY_LOSS
def test_a_group_of_some_ranks(name, ranks):
    members, others = results(ranks)[f"group {name}"][:2], results(ranks)[f"group {name}"][2:]
    assert_close(members)
    assert all("not a member of the given process group; pass a group that contains it" in other for other in others)


@RANKS
@EVERY_LOSS
def test_a_group_of_one_is_no_group(name, ranks):
    assert results(ranks)[f"single {name}"] == [True] * ranks


@RANKS
@EVERY_LOSS
def test_unequal_batches_are_an_error_on_every_rank(name, ranks):
    rows = 2 if name == "nt_xent" else 1
    counts = [rows * rank_losses.IMAGES] * (ranks - 1) + [rows * (rank_losses.IMAGES - 1)]
    for message in results(ranks)[f"unequal {name}"]:
        assert f"the ranks of the group pass {counts} rows" in message
        assert "drop_last=True" in message


@RANKS
@EVERY_LOSS
def test_compilation(name, ranks):
    assert_close(results(ranks)[f"compiled {name}"])


@RANKS
def test_equals_lightly_with_its_gather(ranks):
    pytest.importorskip("lightly")
    assert_close(results(ranks)["lightly"])


@RANKS
def test_a_gradient_scaler_does_not_overflow_float16(ranks):
    assert all(outcome["gradient"] < 1e-2 for outcome in results(ranks)["half precision"])


def test_without_a_group_nothing_is_gathered():
    rows = torch.ones(3, 2)
    assert gather_rows("rows", rows, None) is rows
    assert rank_and_size(None) == (0, 1)
    weight, factor = gather_upstream(torch.tensor(3.0), 2, None)
    assert weight is None
    assert factor == 3


def test_what_is_no_group():
    check_group(None)
    for value in (0, "WORLD", torch.ones(2)):
        with pytest.raises(TypeError, match=r"group must be a torch.distributed process group.*group.WORLD stands for"):
            check_group(value)
    with pytest.raises(ValueError, match="not a member of the given process group; pass a group that contains it"):
        check_group(dist.GroupMember.NON_GROUP_MEMBER)
