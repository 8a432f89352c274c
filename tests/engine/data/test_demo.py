import hashlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.engine.data import CenterCrop, DataConfig, View, evaluation_batches, open_source
from vitrail.engine.data.demo import make_demo

DEMO = DataConfig(source="demo")


def digest(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.tar")}


def test_demo_is_the_same_every_time(session_cache, tmp_path):
    open_source(DEMO)
    make_demo(tmp_path / "again")
    (made,) = session_cache.glob("demo-v*/")
    assert digest(made) == digest(tmp_path / "again")
    assert len(digest(made)) == 2


@pytest.mark.parametrize(("split", "count"), [("train", 12_000), ("val", 2_000)])
def test_demo_is_balanced_and_small(split, count):
    source = open_source(DEMO, split)
    assert len(source) == count
    assert source.classes == tuple("0123456789")
    labels = np.array([source.label(i) for i in range(count)])
    assert (np.bincount(labels) == count // 10).all()
    assert (np.bincount(labels[: count // 10], minlength=10) > count // 200).all()  # in no order
    assert np.mean([len(source.read(i)) for i in range(100)]) < 2500


def test_splits_show_different_handwriting(monkeypatch):
    from vitrail.engine.data import demo

    drawn = {"train": set(), "val": set()}
    compose = demo.compose

    def spy(rng, digit, photographs):
        drawn[current].add(digit.tobytes())
        return compose(rng, digit, photographs)

    def write(members, folder, *, classes):
        nonlocal current
        current = folder.name
        return sum(1 for _ in members)

    current = ""
    monkeypatch.setattr(demo, "compose", spy)
    monkeypatch.setattr(demo, "write_shards", write)
    monkeypatch.setattr(demo, "_COUNTS", {"train": 3000, "val": 1000})
    monkeypatch.setattr(demo, "replacing_folder", nullcontext)
    demo.make_demo(Path("unused"))
    assert not drawn["train"] & drawn["val"]
    assert len(drawn["train"]) > 1000
    assert len(drawn["val"]) > 250


def test_demo_is_neither_trivial_nor_hopeless():
    """Least squares on raw pixels reads most digits: that is what a probe of learned features has to beat."""

    def pixels(split, limit):
        source = open_source(DEMO, split)
        view = View(name="whole", ops=(CenterCrop(size=32),))
        batches = evaluation_batches(source, view, batch=500, rank=0, world=1, device="cpu", limit=limit)
        views, labels = zip(*((batch.views[0], batch.labels) for batch in batches), strict=True)
        batches.close()
        x = torch.cat(views).float().mean(-1).flatten(1) / 255  # grey, [N, 1024]
        return torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat(labels)

    (x, y), (test_x, test_y) = pixels("train", 12_000), pixels("val", 2_000)
    targets = torch.nn.functional.one_hot(y, 10).float()
    weights = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ targets)
    accuracy = ((test_x @ weights).argmax(1) == test_y).float().mean().item()
    assert 0.7 < accuracy < 0.95
