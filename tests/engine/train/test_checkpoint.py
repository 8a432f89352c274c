"""What a checkpoint refuses, and how it is written."""

import json
from dataclasses import replace

import pytest
import torch
import training
from safetensors.torch import save_file

from vitrail.engine.train import ConfigError
from vitrail.engine.train.checkpoint import checkpoints, load_weights, restore


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def saved(tmp_path):
    """The description of a checkpoint that two ranks wrote under ZeRO-1."""
    config = training.tiny_config(tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    description = {
        "step": 3,
        "skipped": 0,
        "world": 2,
        "zero_stage": 1,
        "implementation": "torch",
        "fingerprint": config.fingerprint("data"),
        "dataset": "data",
        "config": config.as_dict(),
    }
    (folder / "state.json").write_text(json.dumps(description))
    return config, folder


def test_another_configuration_is_refused_by_name(alone, saved):
    config, folder = saved
    other = replace(config, optim=replace(config.optim, weight_decay=0.3), train=replace(config.train, seed=5))
    with pytest.raises(ConfigError) as refusal:
        restore(folder, None, other, dataset="data")
    message = str(refusal.value)
    assert "optim.weight_decay: 0.05 then, 0.3 now" in message
    assert "train.seed: 0 then, 5 now" in message
    assert "\n" not in message


def test_other_images_are_refused(alone, saved):
    config, folder = saved
    with pytest.raises(ConfigError, match="other training images"):
        restore(folder, None, config, dataset="other data")


def test_another_number_of_ranks_stage_or_implementation_is_refused(alone, saved):
    config, folder = saved
    with pytest.raises(ConfigError, match=r"ranks = 2, this run has 1.*train\.init_from"):
        restore(folder, None, config, dataset="data")
    description = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(description | {"world": 1}))
    with pytest.raises(ConfigError, match=r"train\.zero_stage = 1, this run has 2"):
        restore(folder, None, replace(config, train=replace(config.train, zero_stage=2)), dataset="data")
    other = replace(config, optim=replace(config.optim, implementation="deepspeed"))
    with pytest.raises(ConfigError, match=r"optim\.implementation = torch, this run has deepspeed"):
        restore(folder, None, other, dataset="data")


def test_only_complete_checkpoints_count(tmp_path):
    root = tmp_path / "checkpoints"
    for name, complete in (("step_00000010", True), ("step_00000009", True), (".partial-step_00000011", True),
                           ("step_00000012", False)):  # fmt: skip
        (root / name).mkdir(parents=True)
        if complete:
            (root / name / "state.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_weights_must_fit_exactly(tmp_path):
    model = torch.nn.Linear(3, 2)
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, file)
    load_weights(model, tmp_path)
    assert torch.equal(model.weight, torch.ones(2, 3))
    save_file({"weight": torch.ones(2, 4), "surplus": torch.zeros(2)}, file)
    with pytest.raises(ConfigError) as refusal:
        load_weights(model, file)
    for part in ("missing: ['bias']", "not in the model: ['surplus']", "weight (2, 4) instead of (2, 3)"):
        assert part in str(refusal.value)
    with pytest.raises(ConfigError, match="no weights at"):
        load_weights(model, tmp_path / "other")
