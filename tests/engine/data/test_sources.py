import io
import logging
import multiprocessing
import os
import tarfile

import pytest

from vitrail.engine.data import DataConfig, DataError, open_source
from vitrail.engine.data.cache import replacing
from vitrail.engine.data.files import open_folder
from vitrail.engine.data.tar import TarSource


def opened(path, split="train", **options):
    return open_source(DataConfig(path=str(path), **options), split)


def contents(source):
    return [(source.name(i), source.label(i), source.read(i)) for i in range(len(source))]


def touch(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


# Folders


def test_folder_of_classes(tmp_path):
    for name in ("b/2.JPEG", "a/deep/er/1.png", "a/0.jpg", "a/notes.txt", "a/._0.jpg", "empty/readme.md", ".git/x.jpg"):
        touch(tmp_path / name, name.encode())
    source = opened(tmp_path)
    assert contents(source) == [
        ("a/0.jpg", 0, b"a/0.jpg"),
        ("a/deep/er/1.png", 0, b"a/deep/er/1.png"),
        ("b/2.JPEG", 1, b"b/2.JPEG"),
    ]
    assert source.classes == ("a", "b")


def test_flat_folder_is_unlabelled(tmp_path):
    for name in ("1.webp", "0.bmp", "list.txt"):
        touch(tmp_path / name)
    source = opened(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["0.bmp", "1.webp"]
    assert source.classes is None
    assert source.label(0) is None


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path / "elsewhere/1.jpg")
    (tmp_path / "data/inside").mkdir(parents=True)
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/inside/part").symlink_to(tmp_path / "elsewhere")
    source = opened(tmp_path / "data")
    assert [source.name(i) for i in range(len(source))] == ["inside/part/1.jpg", "linked/1.jpg"]


def test_train_and_val_inside_or_beside(tmp_path):
    for name in ("train/a/1.jpg", "val/a/2.jpg", "other/3.jpg"):
        touch(tmp_path / name)
    assert opened(tmp_path).name(0) == opened(tmp_path / "train").name(0) == "a/1.jpg"
    assert opened(tmp_path, "val").name(0) == opened(tmp_path / "train", "val").name(0) == "a/2.jpg"
    assert opened(tmp_path, "val", val_path=str(tmp_path / "other")).name(0) == "3.jpg"
    assert opened(tmp_path / "other", "val") is None


def test_fingerprint_tells_listings_apart(tmp_path):
    prints = set()
    for change in ("a/0.jpg", "a/1.jpg", "b/0.jpg"):
        touch(tmp_path / change)
        prints.add(open_folder(tmp_path).fingerprint)
    assert len(prints) == 3
    os.rename(tmp_path, tmp_path.with_name("moved"))
    assert open_folder(tmp_path.with_name("moved")).fingerprint in prints


# Lists


def test_list_with_class_numbers_names_or_neither(tmp_path):
    for name in ("x/1.jpg", "x/2.jpg"):
        touch(tmp_path / name, name.encode())
    absolute = tmp_path / "x/2.jpg"

    (tmp_path / "numbers.txt").write_text(f"x/1.jpg\t3\n\n{absolute}\t0\n")
    source = opened(tmp_path / "numbers.txt")
    assert contents(source) == [("x/1.jpg", 3, b"x/1.jpg"), (str(absolute), 0, b"x/2.jpg")]
    assert source.classes == ("0", "1", "2", "3")

    (tmp_path / "names.tsv").write_text("x/1.jpg\tzebra\nx/2.jpg\tape\n")
    source = opened(tmp_path / "names.tsv")
    assert [source.label(0), source.label(1), source.classes] == [1, 0, ("ape", "zebra")]

    (tmp_path / "bare.lst").write_text("x/1.jpg\nx/2.jpg\n")
    assert opened(tmp_path / "bare.lst").classes is None


# Shards

SHARD = {
    "a/1.jpg": b"one",
    "a/1.cls": b"2",
    "a/1.json": b"{}",
    "a/2.mask.png": b"mask",
    "a/2.cls": b"0\n",
    "a/2.png": b"two",
}


def test_shards_hold_keys_with_labels(tmp_path):
    long = "d" * 120
    write_tar(tmp_path / "0.tar", SHARD)
    write_tar(tmp_path / "1.tar", {f"{long}.cls": b"1", f"{long}.JPEG": b"three"})
    expected = [("0.tar/a/1.jpg", 2, b"one"), ("0.tar/a/2.png", 0, b"two"), (f"1.tar/{long}.JPEG", 1, b"three")]
    for path in (tmp_path, tmp_path / "*.tar"):
        source = opened(path)
        assert contents(source) == expected
        assert source.classes == ("0", "1", "2")
    assert contents(opened(tmp_path / "1.tar")) == expected[2:]
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    assert opened(tmp_path).classes == ("cat", "dog", "emu")


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.engine.data.tar._KEEP_OPEN", 1)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {"1.jpg": str(number).encode()})
    source = opened(tmp_path)
    before = len(os.listdir("/dev/fd"))
    assert [data for _, _, data in contents(source)] == [b"0", b"1", b"2"]
    assert len(os.listdir("/dev/fd")) == before


def test_index_is_reused_and_made_anew_when_a_shard_changes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitrail.data")
    shard = write_tar(tmp_path / "0.tar", SHARD)
    opened(tmp_path)
    assert "indexing 1 tar shards" in caplog.text
    assert len(list(tmp_path.glob(".vitrail-index-*.npz"))) == 1

    caplog.clear()
    first = opened(tmp_path)
    assert not caplog.records

    stat = shard.stat()
    write_tar(shard, {"a/3.jpg": b"six", "a/3.cls": b"1"} | SHARD)
    second = opened(tmp_path)
    assert [len(first), len(second)] == [2, 3]
    assert second.read(0) == b"six"
    assert first.fingerprint != second.fingerprint

    write_tar(shard, {name: data.upper() for name, data in SHARD.items()})  # the size of the first again
    assert shard.stat().st_size == stat.st_size
    assert opened(tmp_path).fingerprint == first.fingerprint  # names, sizes and labels are as they were
    caplog.clear()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    opened(tmp_path)
    assert "indexing" in caplog.text

    write_tar(tmp_path / "1.tar", SHARD)
    assert len(opened(tmp_path)) == 4


def test_damaged_index_is_made_anew(tmp_path):
    write_tar(tmp_path / "0.tar", SHARD)
    opened(tmp_path)
    (index,) = tmp_path.glob(".vitrail-index-*.npz")
    index.write_bytes(index.read_bytes()[:100])
    assert len(opened(tmp_path)) == 2
    index.write_bytes(b"")
    assert len(opened(tmp_path)) == 2


def test_index_of_read_only_shards_is_kept_in_the_cache(tmp_path, monkeypatch, caplog):
    write_tar(tmp_path / "data/0.tar", SHARD)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))

    def refuse(path):
        if path.parent == tmp_path / "data":
            raise PermissionError(13, "Permission denied", str(path))
        return replacing(path)

    monkeypatch.setattr("vitrail.engine.data.tar.replacing", refuse)
    opened(tmp_path / "data")
    assert not list((tmp_path / "data").glob(".vitrail-index-*"))
    caplog.set_level(logging.INFO, "vitrail.data")
    assert len(opened(tmp_path / "data")) == 2
    assert not caplog.records


def _open_and_report(path, cache, barrier, queue):
    os.environ["VITRAIL_CACHE"] = cache
    barrier.wait(timeout=60)
    queue.put(TarSource([path]).fingerprint)


def test_concurrent_ranks_agree_on_the_index(tmp_path):
    path = write_tar(tmp_path / "0.tar", {f"{i}.jpg": b"x" for i in range(2000)})
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    arguments = (path, str(tmp_path / "cache"), barrier, queue)
    processes = [context.Process(target=_open_and_report, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    prints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert prints == {TarSource([path]).fingerprint}
    assert not list(tmp_path.glob("*.tmp"))


# What the user reads when something is wrong


def no_images(root):
    touch(root / "a/readme.txt")


def mixed(root):
    touch(root / "1.jpg")
    touch(root / "a/2.jpg")


def lines(text):
    return lambda root: touch(root / "list.txt", text)


def shard(members):
    return lambda root: write_tar(root / "0.tar", members)


WRONG = {
    "missing": (lambda root: None, "nowhere", {}, "nowhere does not exist; expected a folder, .tar shards or"),
    "empty folder": (
        lambda root: None,
        "",
        {},
        r"has no images; expected \.jpg .* or in one sub-folder per class, or \.tar",
    ),
    "no images": (no_images, "", {}, "has no images; expected"),
    "mixed": (mixed, "", {}, r"holds images \(1.jpg, ...\) beside sub-folders of images \(a, ...\); expected one sub"),
    "strange file": (
        lambda root: touch(root / "x.zip"),
        "x.zip",
        {},
        "x.zip is a file; expected a folder, a .tar, or a list",
    ),
    "folder as tar": (
        mixed,
        "",
        {"source": "tar"},
        "has no .tar shards; expected some: write them with `vitrail data pack`",
    ),
    "folder as list": (mixed, "", {"source": "list"}, "cannot be read as a list .* expected UTF-8 lines"),
    "empty list": (lines(b"\n \n"), "list.txt", {}, "list.txt lists no images; expected lines of path<tab>label"),
    "binary list": (lines(b"\xff\xfe\x00"), "list.txt", {}, "list.txt cannot be read as a list .* expected UTF-8"),
    "part of a list": (
        lines(b"a.jpg\t1\nb.jpg\n"),
        "list.txt",
        {},
        "list.txt:2 has 1 tab-separated fields; expected path<tab>",
    ),
    "wide list": (lines(b"a.jpg\t1\t2\n"), "list.txt", {}, "list.txt:1 has 3 tab-separated fields"),
    "no tar": (
        lambda root: touch(root / "0.tar", b"x" * 2000),
        "",
        {},
        "0.tar cannot be read as a tar file .* uncompressed, whole",
    ),
    "tar without images": (
        shard({"a.txt": b"x"}),
        "",
        {},
        "have no images; expected members such as key.jpg and key.cls",
    ),
    "class name": (
        shard({"a.jpg": b"x", "a.cls": b"cat"}),
        "",
        {},
        "0.tar has a .cls file that is no class number .*'cat'",
    ),
    "label missing": (
        shard({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x"}),
        "",
        {},
        "0.tar has no label for b; expected a .cls",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_one_clear_line(case, tmp_path):
    prepare, name, options, message = WRONG[case]
    prepare(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / name, **options)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_truncated_shard(tmp_path):
    path = write_tar(tmp_path / "0.tar", {f"{i}.jpg": b"x" * 3000 for i in range(9)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"0.tar cannot be read as a tar file \(unexpected end of data\)"):
        opened(tmp_path)


def test_some_shards_without_labels(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"1"})
    write_tar(tmp_path / "1.tar", {"b.jpg": b"x"})
    with pytest.raises(DataError, match=r"some shards in .* have labels and some have none"):
        opened(tmp_path)


def test_too_few_class_names(tmp_path):
    write_tar(tmp_path / "0.tar", SHARD)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="names 2 classes but a shard has class 2; expected a line for each of the 3"):
        opened(tmp_path)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # rather than the folder's mode, which root ignores
    with pytest.raises(DataError, match=r"cannot be listed \(Permission denied\); expected a readable folder"):
        open_folder(tmp_path)


def test_no_path():
    with pytest.raises(DataError, match=r"no data was named; expected --data.path .* or --data.source demo"):
        open_source(DataConfig())


@pytest.mark.parametrize(("field", "value"), [("threads", -1), ("prefetch", 0), ("replay_batches", 0)])
def test_configuration_out_of_range(field, value):
    with pytest.raises(DataError, match=f"--data.{field} is {value}; expected at least"):
        DataConfig(**{field: value})
