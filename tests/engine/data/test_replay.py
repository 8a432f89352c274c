import itertools
import subprocess
import sys
import textwrap

import torch

from vitrail.engine.data import DataConfig, build_loader, open_source


def take(config, view, count, *, accumulation=2, start=0, seed=1, micro=8):
    loader = build_loader(
        open_source(config),
        [view, view],
        micro_batch=micro,
        accumulation=accumulation,
        rank=0,
        world=1,
        seed=seed,
        device="cpu",
        config=config,
        start_step=start,
    )
    batches = list(itertools.islice(loader, count))
    return loader, batches


def test_replay_cycles_the_first_batches(images, view):
    config = DataConfig(path=str(images), source="replay", replay_batches=3)
    loader, batches = take(config, view, 10, start=2)
    plain = DataConfig(path=str(images), decoder="pillow")
    _, fresh = take(plain, view, 3, start=2)
    for number, batch in enumerate(batches):
        first = fresh[number % 3]
        assert torch.equal(batch.views[0], first.views[0])
        assert torch.equal(batch.views[1], first.views[1])
        assert torch.equal(batch.labels, first.labels)
        assert batch.views[0].data_ptr() == batches[number % 3].views[0].data_ptr()  # held, not copied
        assert (batch.epoch, batch.step, batch.micro) == ((2 + number // 2) // 4, 2 + number // 2, number % 2)
    assert loader.steps_per_epoch == 70 // 16


def test_replay_without_images_is_seeded_noise_and_says_so(view, caplog):
    caplog.set_level("INFO", "vitrail.data")
    config = DataConfig(source="replay", replay_batches=2)
    _, one = take(config, view, 2)
    assert "synthetic" in caplog.text
    _, two = take(config, view, 2)
    _, other = take(config, view, 2, seed=5)
    assert torch.equal(one[0].views[0], two[0].views[0])
    assert not torch.equal(one[0].views[0], one[1].views[0])
    assert not torch.equal(one[0].views[0], other[0].views[0])
    assert one[0].labels is None
    assert one[0].views[0].float().std() > 20


def test_replay_names_the_bad_files_among_what_it_holds(tmp_path, write, view):
    write(tmp_path, 32)
    (tmp_path / "class0/003.jpg").write_bytes(b"")
    loader, batches = take(DataConfig(path=str(tmp_path), source="replay", replay_batches=4), view, 8)
    assert list(loader.bad_files) == ["class0/003.jpg"]
    assert 1 not in {index for batch in batches for index in batch.indices.tolist()}  # the second of class0


def test_replay_has_no_validation_split(tmp_path):
    (tmp_path / "val").mkdir()
    assert open_source(DataConfig(path=str(tmp_path), source="replay"), "val") is None


def run(script, tmp_path):
    environment = {"VITRAIL_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


WITHOUT_DALI = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("nvidia.dali"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Block())
    from vitrail.engine.data import *
    view = View(name="v", ops=(RandomResizedCrop(size=32), HorizontalFlip()))

    def first(config):
        loader = build_loader(open_source(config), [view], micro_batch=4, accumulation=1, rank=0, world=1, seed=0,
                              device="cpu", config=config)
        return next(iter(loader)).views[0].shape

"""


def test_everything_but_dali_works_without_dali(images, tmp_path):
    script = f"""
    print(first(DataConfig(source="replay")))
    print(first(DataConfig(path={str(images)!r}, decoder="pillow")))
    from vitrail.engine.data import pack
    print(pack.pack(open_source(DataConfig(path={str(images)!r})), {str(tmp_path / "packed")!r}))
    """
    done = run(WITHOUT_DALI + script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["torch.Size([4, 32, 32, 3])"] * 2 + ["70"]


def test_decoding_without_dali_says_what_to_do(images, tmp_path):
    done = run(WITHOUT_DALI + f"    first(DataConfig(path={str(images)!r}))", tmp_path)
    assert "DataError: DALI cannot be imported" in done.stderr
    assert "or decode with Pillow: --data.decoder pillow" in done.stderr


def test_data_imports_neither_dali_nor_the_rest_of_the_engine(tmp_path):
    script = """
    import sys
    import vitrail.engine.data
    loaded = [m for m in sys.modules if m.startswith(("nvidia.dali", "deepspeed", "sklearn"))]
    loaded += [m for m in sys.modules if m.startswith("vitrail.") and not m.startswith("vitrail.engine.data")]
    print(loaded)
    """
    done = run(script, tmp_path)
    assert done.stdout.strip() == "['vitrail.engine']", done.stdout + done.stderr
