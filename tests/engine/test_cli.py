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
