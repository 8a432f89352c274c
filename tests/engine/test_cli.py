"""The `vitrail` command."""

import sys

import pytest
from PIL import Image

from vitrail.engine import cli


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
    for flag in ("--method.freeze-patch-embed", "--train.grad-cache", "--optim.decay all", "--guard.spike"):
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
    for command in ("doctor", "data check", "data pack"):
        assert command in text
