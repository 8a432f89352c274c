"""Demos of the recipes, and the demo that is ruined on purpose."""

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.engine.show import summary
from vitrail.engine.show.instability import compare
from vitrail.engine.show.pictures import draw_grid
from vitrail.engine.train import ds, trainer
from vitrail.engine.train.config import ConfigError
from vitrail.engine.train.demo import provoke, shrink
from vitrail.engine.train.grad_cache import check_comparisons
from vitrail.engine.train.launch import _train, check_method, parse
from vitrail.engine.train.optimizers import choose

RECIPES = sorted(path.stem for path in Path(__file__).parents[2].glob("recipes/*_*.py") if "__" not in path.stem)


def recipe(name):
    return importlib.import_module(f"vitrail.recipes.{name}").recipe()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_built_and_run_on_enough_gpus(name):
    config = recipe(name)
    choose(config)
    with torch.device("meta"):
        method = config.method.build()
    world = config.train.batch_size // config.train.micro_batch
    assert config.accumulation(world) == 1
    check_comparisons(method, config, world)
    assert config.train.output.name == name
    assert method.flops(1) > 1e9
    sizes = [view.size for view in method.views() if view.like is None]
    crops = getattr(config.method, "local_crops", 0)
    assert sizes[: len(sizes) - crops] == [config.method.encoder.size] * (len(sizes) - crops)
    side = 98 if getattr(config.method.encoder, "patch_size", 16) == 14 else 96  # patches tile it
    assert sizes[len(sizes) - crops :] == [(side, side)] * crops


@pytest.mark.parametrize("name", RECIPES)
def test_demos_keep_the_method_and_take_its_settings(name):
    config = recipe(name)
    demo, run = shrink(config), config.method.demo_run()
    check_method(demo)
    assert type(demo.method) is type(config.method)
    assert (demo.optim.name, demo.optim.lr, demo.train.batch_size) == (config.optim.name, run.lr, run.batch_size)
    assert demo.accumulation(1) == 1
    assert demo.data.source == "demo"
    assert demo.method.build().views()[0].size == (32, 32)
    assert (
        getattr(demo.method, "region_epoch", 0) == 0
    )  # regions are compared from the start, however late they were to


def test_the_rivals_of_esvit_differ_in_the_region_loss_alone():
    method = shrink(recipe("esvit_swint_w7")).method
    both, alone = (method.demo_rivals()[name] for name in ("views and regions", "views alone"))
    assert {field.name for field in fields(both) if getattr(both, field.name) != getattr(alone, field.name)} == {
        "region_loss"
    }
    assert both.region_loss
    assert both.flip == 0.5
    assert both.encoder == method.encoder
    assert not alone.demo_rivals()


@pytest.mark.parametrize("finished", [True, False])
def test_rivals_are_trained_in_folders_of_their_own(monkeypatch, tmp_path, finished):
    """They accumulate as the demo does, which methods that compare images have to be told, and train half as long."""
    config, _ = parse(
        importlib.import_module("vitrail.recipes.esvit_swint_w7").recipe,
        ["--demo", "--train.micro-batch", "32", "--train.epochs", "4", "--train.output", str(tmp_path)],
    )
    trained, reports = [], []

    class Trainer:
        def __init__(self, config, **place):
            check_comparisons(config.method.build(), config, place["world"])
            self.config = config

        def run(self):
            trained.append(self.config)
            return SimpleNamespace(finished=finished or len(trained) < 3, method=self.config.method)

    monkeypatch.setattr(ds, "start_processes", lambda: (0, 1, torch.device("cpu")))
    monkeypatch.setattr(trainer, "Trainer", Trainer)
    monkeypatch.setattr(summary, "summarise", lambda result, config, **given: reports.append((config, given["rivals"])))
    _train(config, None, SimpleNamespace(), demo=True)
    demo, *others = trained
    rivals = config.method.demo_rivals()
    assert demo is config
    assert [other.method for other in others] == list(rivals.values())
    assert {other.train.output for other in others} == {tmp_path / name.replace(" ", "-") for name in rivals}
    assert {(other.train.epochs, other.accumulation(1)) for other in others} == {(2.0, 4)}
    assert reports == ([(config, rivals)] if finished else [])


@pytest.mark.demo
@pytest.mark.launch
@pytest.mark.slow
def test_the_demo_of_esvit_learns_digits_and_finds_regions_again(tmp_path):
    """What it says it shows: nearest neighbours beyond the untrained network's, and what the region loss is for."""
    script = Path(__file__).parents[2] / "recipes" / "esvit_swint_w7.py"
    subprocess.run([sys.executable, script, "--demo", "--train.output", tmp_path / "run"], check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    knn = {name: row["knn"] for name, row in found["accuracy"].items()}
    assert knn["trained network"] >= knn["untrained network"] + 0.15
    regions = {name: numbers["accuracy"] for name, numbers in found["correspondence"].items()}
    assert regions["views and regions"] >= max(regions["views alone"], regions["untrained network"]) + 0.03


def test_a_method_that_cannot_be_built_is_refused():
    config = recipe("mocov3_r50")
    config.method.freeze_patch_embed = True
    with pytest.raises(ConfigError, match=r"MoCoV3Config cannot be built.*pass --method.no-freeze-patch-embed"):
        check_method(config)


def test_what_is_provoked():
    demo = shrink(recipe("mocov3_vitb"))
    runs = provoke(demo)
    frozen = [run.method.freeze_patch_embed for run in runs.values()]
    assert frozen == [True, True, False]
    rates = [run.optim.lr for run in runs.values()]
    assert rates == [demo.peak_lr, 15 * demo.peak_lr, 15 * demo.peak_lr]
    assert len({run.train.output for run in runs.values()}) == 3
    assert all(run.accumulation(1) == 1 and not run.train.resume for run in runs.values())
    for name in ("mae_vitb", "mocov2_r50"):
        with pytest.raises(ConfigError, match=r"try it with recipes/mocov3_vitb.py"):
            provoke(shrink(recipe(name)))
    with pytest.raises(ConfigError, match="pass --demo as well"):
        parse(lambda: recipe("mocov3_vitb"), ["--provoke", "--data.path", "x"])


def test_runs_are_compared(tmp_path):
    def write(name, norms, curve, alarms):
        (tmp_path / name).mkdir()
        lines = [
            {"kind": "train", "step": i, "first_layer_gradient_norm": n, "gradient_norm": n}
            for i, n in enumerate(norms)
        ]
        lines += [{"kind": "evaluation", "step": 10 * i, "knn": k} for i, k in enumerate(curve)]
        lines += [{"kind": "event", "step": s, "alarm": a, "action": "warn", "message": ""} for s, a in alarms]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / name

    calm = write("calm", [1.0] * 30, [0.2, 0.3, 0.4], [])
    wild = write("wild", [1.0] * 20 + [90.0] * 10, [0.2, 0.3, 0.1], [(20, "spike"), (20, "dip"), (21, "spike")])
    found = compare({"frozen": calm, "trained": wild}, tmp_path)
    assert found == json.loads((tmp_path / "instability.json").read_text())
    assert found["frozen"] == {"alarms": {}, "first_alarm": None, "best": 0.4, "last": 0.4}
    assert found["trained"] == {"alarms": {"dip": 1, "spike": 2}, "first_alarm": 20, "best": 0.3, "last": 0.1}
    assert Image.open(tmp_path / "instability.png").size[0] > 500


def test_grids_frame_what_is_marked(tmp_path):
    grey = np.full((8, 8, 3), 128, np.uint8)
    rows = {"image": [grey] * 3, "nearest": [grey] * 3}
    draw_grid(rows, tmp_path / "plain.png")
    draw_grid(rows, tmp_path / "marked.png", marked={"nearest": [False, True, False]})
    plain, marked = (
        np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in ("plain", "marked")
    )

    def reds(picture):
        return ((picture[..., 0] - picture[..., 1]) > 80).sum()

    assert reds(plain) == 0
    assert reds(marked) > 50
