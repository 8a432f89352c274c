import hashlib

import pytest

from vitrail.engine.data import DataConfig, DataError, open_source
from vitrail.engine.data.pack import check, pack


def opened(path):
    return open_source(DataConfig(path=str(path)))


def digest(folder):
    files = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".txt"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_round_trip(images, tmp_path):
    source = opened(images)
    calls = []
    assert pack(source, tmp_path / "packed", shard_bytes=100_000, progress=lambda *a: calls.append(a)) == 70
    packed = opened(tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.tar"))) > 2
    assert packed.classes == source.classes
    for i in range(70):
        assert packed.read(i) == source.read(i)
        assert packed.label(i) == source.label(i)
        assert packed.name(i).endswith(source.name(i))
    assert calls == [(i, 70) for i in range(1, 71)]


def test_the_same_images_give_the_same_bytes(images, tmp_path):
    for name in ("one", "two"):
        pack(opened(images), tmp_path / name, shard_bytes=100_000)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_packing_shards_again_and_unlabelled_images(tmp_path, photo, encode):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photo(number)))
    pack(opened(tmp_path), tmp_path / "shards")
    (tmp_path / "again").mkdir()
    pack(opened(tmp_path / "shards"), tmp_path / "again")
    again = opened(tmp_path / "again")
    assert again.classes is None
    assert [again.read(i) for i in range(5)] == [(tmp_path / f"{i}.jpg").read_bytes() for i in range(5)]


def test_names_with_dots_keep_their_images_and_labels(tmp_path, photo, encode):
    names = ("a/x.1.jpg", "a/x_1.jpg", "a/x_1.png", "b.c/x.1.jpg")
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encode(photo(number)))
    source = opened(tmp_path / "in")
    pack(source, tmp_path / "out")
    packed = opened(tmp_path / "out")
    assert [(packed.read(i), packed.label(i)) for i in range(4)] == [
        (source.read(i), source.label(i)) for i in range(4)
    ]


def test_interrupted_packing_leaves_nothing_behind(images, tmp_path):
    def stop(done, total):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(opened(images), tmp_path / "packed", progress=stop)
    assert not list(tmp_path.iterdir())


def test_packing_into_a_folder_in_use(images, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="exists; expected a new or empty folder to pack into"):
        pack(opened(images), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_check_counts_everything(tmp_path, write, photo, encode):
    write(tmp_path, 9)
    (tmp_path / "class0/big.jpg").write_bytes(encode(photo(0, 400, 300)))
    (tmp_path / "class1/empty.jpg").write_bytes(b"")
    good = (tmp_path / "class2/002.jpg").read_bytes()
    (tmp_path / "class2/half.jpg").write_bytes(good[: len(good) // 2])
    seen = []
    report = check(opened(tmp_path), threads=2, progress=lambda *a: seen.append(a))
    assert report.samples == 12
    assert report.classes == {"class0": 4, "class1": 4, "class2": 4}
    assert report.shorter_sides == {"32-63": 9, "256-383": 1}
    assert list(report.bad) == ["class1/empty.jpg", "class2/half.jpg"]
    assert report.bad["class1/empty.jpg"] == "the file is empty"
    assert "truncated" in report.bad["class2/half.jpg"]
    assert report.encoded_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.jpg"))
    assert seen[-1] == (12, 12)
    text = str(report)
    assert "12 samples" in text
    assert "3 classes with 4 to 4 samples" in text
    assert "2 files cannot be decoded:" in text
    assert "class1/empty.jpg: the file is empty" in text
