"""The `vitrail` command."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitrail.engine import cli
from vitrail.engine.data import DataConfig
from vitrail.engine.methods.dino import DINOConfig
from vitrail.engine.methods.esvit import EsViTConfig
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.show.run import open_run
from vitrail.engine.train.config import RunConfig, TrainConfig


@pytest.fixture
def images(tmp_path):
    """Two classes of three images each."""
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 30), (i * 80, 0, 0)).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def vitrail(monkeypatch, capfd):
    """Runs the command in this process; returns its exit status and everything that it wrote."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vitrail", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        return status, "".join(capfd.readouterr())

    return run


def test_doctor_names_versions_implementations_and_reasons(vitrail):
    status, text = vitrail("doctor")
    assert status == 0
    for word in ("deepspeed", "nvidia-dali-cuda130", "masked_patch_gather", "reference", "triton", "attention"):
        assert word in text


def test_doctor_names_the_options_of_training(vitrail):
    _, text = vitrail("doctor")
    flags = ("--method.freeze-patch-embed", "--train.grad-cache", "--guard.spike")
    for flag in (*flags, *(f"--optim.{name}" for name in ("decay all", "final-weight-decay", "schedule dino"))):
        assert flag in text
    assert "warn | rollback | stop" in text


def test_doctor_says_whose_optimiser_runs_and_why_the_others_do_not(vitrail):
    """Tables wrap their cells, so the words of a column are put together again."""
    _, text = vitrail("doctor")
    start = text.index("optim.name")
    lines = [line.split("│")[1:-1] for line in text[start:].splitlines() if line.startswith("│")]
    cells, state = [], ""
    for name, stage, implementation, words in ([cell.strip() for cell in line] for line in lines if len(line) == 4):
        if implementation:
            cells.append((name or cells[-1][0], stage or cells[-1][1], implementation))
            state += f"\n{cells[-1]}"
        state += f" {words}"
    for told in (
        "('adamw', '0', 'vitrail') active",
        "('adamw', '0', 'torch') with --optim.implementation torch",
        "('adamw', '1, 2, 3', 'torch') active",
        "('adamw', '1, 2, 3', 'vitrail') its gain is the teacher's update in the same pass",
        "('lars', '0', 'vitrail') active",
        "('adamw', '0', 'deepspeed') with --optim.implementation deepspeed",
        "('lars', '0', 'torch') PyTorch has no LARS",
        "('lamb', '0', 'deepspeed') DeepSpeed's FusedLamb runs on CUDA devices, not on the CPU",
        "('lamb', '1, 2, 3', 'vitrail') LAMB's trust ratios, one for each parameter, would be wrong on flat ZeRO "
        "shards; pass --train.zero-stage 0",
    ):
        assert f"\n{told}" in state, state


def test_pack_then_check(vitrail, images, tmp_path):
    status, text = vitrail("data", "pack", images, tmp_path / "shards")
    assert (status, "6 images" in text) == (0, True)
    assert list((tmp_path / "shards").glob("*.tar"))
    status, text = vitrail("data", "check", tmp_path / "shards")
    assert status == 0
    assert "6 samples" in text
    assert "2 classes" in text


def test_check_names_a_broken_file_and_fails(vitrail, images):
    (images / "cat" / "1.png").write_bytes(b"no image")
    status, text = vitrail("data", "check", images)
    assert status == 1
    assert "1.png" in text


def test_mistakes_are_one_line_and_status_2(vitrail, tmp_path):
    status, text = vitrail("data", "check", tmp_path / "missing")
    assert status == 2
    assert text.strip().splitlines()[-1].startswith("error: ")
    status, text = vitrail("dcotor")
    assert status == 2


def test_help_tells_of_every_command(vitrail):
    status, text = vitrail("--help")
    assert status == 0
    for command in ("doctor", "data check", "data pack", "show attention", "show matches"):
        assert command in text


def write_run(folder, method, steps=(3,)):
    """What a run on the demo images leaves behind."""
    config = RunConfig(method=method, data=DataConfig(source="demo", threads=1), train=TrainConfig(output=folder))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    for step in steps:
        torch.manual_seed(step)
        weights = method.build().state_dict()
        checkpoint = folder / "checkpoints" / f"step_{step:08}"
        checkpoint.mkdir(parents=True)
        save_file({name: tensor.clone() for name, tensor in weights.items()}, checkpoint / "model.safetensors")
        (checkpoint / "state.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of DINO and EsViT."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
    for name, config in (("dino", DINOConfig()), ("esvit", EsViTConfig())):
        write_run(folder / name, replace(config.demo(), **small), steps=(3, 12))
    return folder


def test_a_run_is_opened_with_its_newest_weights(runs):
    run = open_run(runs / "esvit", torch.device("cpu"))
    written = load_file(runs / "esvit" / "checkpoints" / "step_00000012" / "model.safetensors")
    assert (run.step, run.precision, run.data.source) == (12, "bf16", "demo")
    assert run.method.state_dict().keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in run.method.state_dict().items())


def test_attention_of_a_run(vitrail, runs, tmp_path):
    status, text = vitrail("show", "attention", runs / "dino", "--images", 3)
    assert (status, "Attention at step 12" in text) == (0, True), text
    assert str(runs / "dino" / "attention.png") in text
    width, height = Image.open(runs / "dino" / "attention.png").size
    status, _ = vitrail("show", "attention", runs / "dino", "--images", 6, "--size", 50, "--output", tmp_path / "new")
    assert status == 0
    more = Image.open(tmp_path / "new" / "attention.png").size
    assert more[0] == width  # four heads
    assert more[1] > 1.5 * height
    assert vitrail("show", "attention", runs / "esvit", "--images", 2)[0] == 0
    assert Image.open(runs / "esvit" / "attention.png").size[0] == width


def test_matches_of_a_run(vitrail, runs, tmp_path):
    status, text = vitrail("show", "matches", runs / "esvit", "--images", 50)
    assert status == 0, text
    assert "50 images, 4 x 4 regions" in text
    assert "6.2 %" in text  # chance
    assert Image.open(runs / "esvit" / "matches.png").size[0] > 500
    again = vitrail("show", "matches", runs / "esvit", "--images", 50, "--batch", 7, "--output", tmp_path)
    assert again == (0, text.replace(str(runs / "esvit"), str(tmp_path)))


def test_other_images_are_shown(vitrail, runs, images, tmp_path):
    options = ("--output", tmp_path, "--data.path", images, "--data.threads", 1)
    status, text = vitrail("show", "matches", runs / "dino", *options)
    assert (status, "6 images, 4 x 4 regions" in text) == (0, True), text
    status, text = vitrail("show", "matches", runs / "dino", "--data.path", tmp_path / "missing")
    assert (status, "missing does not exist" in text) == (2, True)


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("missing", (), "missing holds no run, there is no config.json in it: pass the train.output of a recipe"),
        ("young", (), "young has no checkpoint yet: wait for the first one, every train.save_every epochs"),
        ("other", (), "is not a configuration that this version knows: method is of the class 'Other'; expected one"),
        ("fixed", ("--size", "48"), "a fixed table for images of 32x32 pixels, not 48x48: leave the size out"),
        ("blind", (), "ResNet has no attention to show: expected a ViT or a Swin transformer"),
        ("fixed", ("--images", "0"), "0 images were asked for; expected at least one"),
    ],
)
def test_runs_that_cannot_be_shown_are_one_line_and_status_2(vitrail, tmp_path, folder, options, message):
    method = DINOConfig().demo()
    method.prototypes, method.hidden = 8, 8
    encoders = {
        "fixed": replace(method.encoder, positions="sincos"),
        "blind": ResNetConfig(architecture="resnet18", image_size=32),
    }
    if folder != "missing":
        write_run(
            tmp_path / folder,
            replace(method, encoder=encoders.get(folder, method.encoder)),
            steps=() if folder == "young" else (3,),
        )
    if folder == "other":
        plain = json.loads((tmp_path / "other" / "config.json").read_text())
        plain["method"]["name"] = "Other"
        (tmp_path / "other" / "config.json").write_text(json.dumps(plain))
    status, text = vitrail("show", "attention", tmp_path / folder, *options)
    line = text.strip().splitlines()[-1]
    assert status == 2
    assert "error: " in line
    assert message in line
