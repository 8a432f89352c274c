"""Configuration, schedule, groups, command line: what decides a run before it starts."""

import sys
from dataclasses import replace

import pytest
import training
from torch import nn

from vitrail.engine.methods.mae import MAE
from vitrail.engine.train import ConfigError, OptimConfig, TrainConfig
from vitrail.engine.train.ds import deepspeed_config
from vitrail.engine.train.launch import parse
from vitrail.engine.train.schedules import cosine_with_warmup
from vitrail.recipes import mae_vitb, mae_vith, mae_vitl

# Fields of the optimiser and other values than their defaults; all change the numbers of a run.
DECISIVE = {
    "name": "lars",
    "schedule": "dino",
    "final_weight_decay": 0.4,
    "decay": "all",
    "momentum": 0.8,
    "trust_coefficient": 0.02,
    "lars_variant": "simclr",
    "clip": 1.0,
    "clip_per_tensor": True,
    "clip_per_part": True,
    "scaling": "root",
}


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.0), (1, 6e-5), (40, 2.4e-3), (50, 2.3989749e-3), (400, 1.2990952e-3), (799, 1.03e-8)],
)
def test_pretraining_learning_rate(epoch, expected):
    got = cosine_with_warmup(epoch, peak=2.4e-3, final=0.0, warmup=40, total=800)
    assert got == pytest.approx(expected, rel=5e-3 if epoch == 799 else 1e-7)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0.0), (0.5, 3e-5), (40, 2.4e-3), (150, 1.487178797e-3)])
def test_learning_rate_of_moco_v3_over_300_epochs(epoch, expected):
    got = cosine_with_warmup(epoch, peak=2.4e-3, final=0.0, warmup=40, total=300)
    assert got == pytest.approx(expected, rel=0, abs=5e-13)


def test_learning_rate_ends_at_its_floor_and_needs_no_warmup():
    assert cosine_with_warmup(0, peak=1.0, final=0.1, warmup=0, total=10) == 1.0
    assert cosine_with_warmup(10, peak=1.0, final=0.1, warmup=0, total=10) == pytest.approx(0.1)
    assert cosine_with_warmup(5, peak=1.0, final=0.1, warmup=0, total=10) == pytest.approx(0.55)


def test_global_batch_is_checked(tmp_path):
    config = training.tiny_config(tmp_path, batch_size=48, micro_batch=8)
    assert [config.accumulation(world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"batch_size 48 is not a multiple of train.micro_batch 8 x 4 ranks"):
        config.accumulation(4)
    explicit = replace(config, train=replace(config.train, accumulation=3))
    assert explicit.accumulation(2) == 3
    with pytest.raises(ConfigError, match=r"48 is not train.micro_batch 8 x train.accumulation 3 x 1 ranks = 24"):
        explicit.accumulation(1)


def test_peak_learning_rate_scales_with_the_batch(tmp_path):
    config = mae_vith.recipe()
    assert config.peak_lr == pytest.approx(2.4e-3)
    assert replace(config, train=replace(config.train, batch_size=1024)).peak_lr == pytest.approx(6e-4)
    assert replace(config, optim=OptimConfig(lr=1e-3)).peak_lr == 1e-3


def test_fingerprint_ignores_what_changes_no_number(tmp_path):
    config = training.tiny_config(tmp_path)
    same = replace(config, train=replace(config.train, output=tmp_path / "b", log_every=7, micro_batch=4, zero_stage=3))
    assert config.fingerprint("x") == same.fingerprint("x")
    same = replace(config, optim=replace(config.optim, implementation="torch"))
    assert config.fingerprint("x") == same.fingerprint("x")
    others = [
        replace(config, train=replace(config.train, seed=1)),
        replace(config, optim=replace(config.optim, lr=1e-4)),
        *(replace(config, optim=replace(config.optim, **{name: value})) for name, value in DECISIVE.items()),
        replace(config, method=replace(config.method, mask_ratio=0.5)),
    ]
    assert len({c.fingerprint("x") for c in [config, *others]} | {config.fingerprint("y")}) == 5 + len(DECISIVE)


@pytest.mark.parametrize(
    ("recipe", "width", "patch", "epochs"),
    [(mae_vith, 1280, 14, 1600), (mae_vitl, 1024, 16, 1600), (mae_vitb, 768, 16, 1600)],
    ids=["h", "l", "b"],
)
def test_recipes_hold_the_published_settings(recipe, width, patch, epochs):
    config = recipe.recipe()
    method, train, optim = config.method, config.train, config.optim
    assert (method.encoder.width, method.encoder.patch_size, method.encoder.image_size) == (width, patch, 224)
    assert (method.mask_ratio, method.norm_pix, method.crop_scale) == (0.75, True, (0.2, 1.0))
    assert (method.decoder_width, method.decoder_depth, method.decoder_heads) == (512, 8, 16)
    assert (train.epochs, train.batch_size, train.zero_stage) == (epochs, 4096, 1)
    assert (optim.base_lr, optim.warmup_epochs, optim.weight_decay, optim.betas) == (1.5e-4, 40, 0.05, (0.9, 0.95))


def test_flags_override_fields_and_the_launcher_is_ignored():
    flags = [
        "--local_rank=1",
        "--data.path",
        "/x",
        "--optim.lr",
        "1e-4",
        "--method.encoder.depth",
        "2",
        "--train.compile",
    ]
    config, demo = parse(mae_vith.recipe, flags)
    assert not demo
    assert (config.data.path, config.optim.lr, config.method.encoder.depth) == ("/x", 1e-4, 2)
    assert config.train.compile
    assert config.method.encoder.width == 1280


def test_demo_shrinks_any_recipe_and_flags_still_count():
    for recipe in (mae_vith, mae_vitl, mae_vitb):
        config, demo = parse(recipe.recipe, ["--demo", "--train.seed", "3"])
        assert demo
        assert config.data.source == "demo"
        assert (config.train.seed, config.method.encoder.size) == (3, (32, 32))
        assert config.method.mask_ratio == recipe.recipe().method.mask_ratio


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_demo_has_the_same_batch_on_any_number_of_ranks(monkeypatch, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config, _ = parse(mae_vith.recipe, ["--demo"])
    assert config.train.batch_size == 128
    assert config.accumulation(ranks) == 1


def test_unknown_flag_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mae_vith.py"])
    with pytest.raises(SystemExit) as stop:
        parse(mae_vith.recipe, ["--data.path", "/x", "--optim.lrr", "1"])
    assert stop.value.code == 2
    assert "--optim.lr" in "".join(capsys.readouterr()).replace("--optim.lrr", "")


def test_no_data_is_said_in_one_line():
    with pytest.raises(ConfigError, match=r"pass --data\.path .* or try the recipe with --demo"):
        parse(mae_vith.recipe, [])


def test_deepspeed_configuration(tmp_path):
    config = deepspeed_config(training.tiny_config(tmp_path, zero_stage=2, reduce_dtype="bf16"), world=2)
    assert config["train_batch_size"] == 16
    assert config["gradient_accumulation_steps"] == 1
    assert config["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False}
    autocast = config["torch_autocast"]
    assert (autocast["enabled"], autocast["dtype"]) == (True, "bfloat16")
    for name in autocast["lower_precision_safe_modules"]:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(__import__(module, fromlist=[kind]), kind), nn.Module)
    assert deepspeed_config(training.tiny_config(tmp_path, precision="fp32"), 1)["torch_autocast"]["enabled"] is False


def test_every_linear_class_of_the_model_is_named_for_bf16_reduction(tmp_path):
    """DeepSpeed compares classes exactly: a subclass that is not listed would silently reduce in fp32."""
    named = deepspeed_config(training.tiny_config(tmp_path, reduce_dtype="bf16"), 1)["torch_autocast"]
    model = MAE(training.tiny_config(tmp_path).method)
    used = {
        f"{type(m).__module__}.{type(m).__name__}"
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and next(m.parameters(recurse=False), None) is not None
    }
    aliases = {"torch.nn.modules.linear.Linear": "torch.nn.Linear"}
    assert {aliases.get(name, name) for name in used} <= set(named["lower_precision_safe_modules"])


def test_every_field_is_documented():
    """Flags show these lines as their help."""
    import ast
    import inspect

    from vitrail.engine.data import config as data_config
    from vitrail.engine.methods import mae
    from vitrail.engine.models import vit
    from vitrail.engine.train import config as train_config

    undocumented = []
    for module in (data_config, mae, vit, train_config):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    if isinstance(field, ast.AnnAssign) and not documented:
                        undocumented.append(f"{node.name}.{ast.unparse(field.target)}")
    assert undocumented == []


def test_defaults_are_the_safe_ones():
    train = TrainConfig()
    assert (train.zero_stage, train.precision, train.reduce_dtype, train.resume) == (1, "bf16", "fp32", True)
