"""Fingerprints of sources, and the commits that rows name."""

import subprocess
from pathlib import Path

import pytest
from bench import environment, results


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of two source files and what is no source."""
    contents = {
        "kernels/a.py": "a = 1\n",
        "engine/data/b.py": "b = 2\n",
        "kernels/table.json": "{}\n",
        "tests/test_a.py": "pass\n",
        "README.md": "text\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path.resolve())
    return tmp_path


def fingerprint() -> str:
    root = environment.ROOT
    return environment.digest((path.relative_to(root).as_posix(), path.read_bytes()) for path in environment._sources())


def git(tree: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=tree, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("kernels/a.py", "a = 2\n"),
        ("csrc/new.cu", ""),
        ("engine/data/b.py", None),
        ("benchmarks/harness/c.py", "c\n"),
        ("kernels/op/configs/h200.json", "{}"),
    ],
)
def test_the_fingerprint_changes_with_the_sources(tree, name, content):
    before = fingerprint()
    path = tree / name
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert fingerprint() != before


@pytest.mark.parametrize(
    "name",
    ["kernels/__pycache__/a.py", "kernels/table.json", "benchmarks/results/cpu/a.json", "tests/test_a.py", "README.md"],
)
def test_the_fingerprint_ignores_what_is_no_source(tree, name):
    before = fingerprint()
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("something else\n")
    assert fingerprint() == before


def test_the_fingerprint_knows_where_a_file_ends():
    one = environment.digest([("kernels/a.py", b"xy"), ("kernels/b.py", b"z")])
    assert one != environment.digest([("kernels/a.py", b"x"), ("kernels/b.py", b"yz")])
    assert one != environment.digest([("kernels/a.py", b"xykernels/b.pyz")])
    assert one != environment.digest([("kernels/a.py", b"xykernels/b.py\0z")])
    assert one == environment.digest([("kernels/b.py", b"z"), ("kernels/a.py", b"xy")])


def test_a_commit_has_the_fingerprint_of_its_files(tree):
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "one")
    first, before = git(tree, "rev-parse", "HEAD"), fingerprint()
    (tree / "kernels/a.py").write_text("a = 3\n")
    assert environment.digest_of(first) == before != fingerprint()
    git(tree, "commit", "--quiet", "--all", "--message", "two")
    assert environment.digest_of(git(tree, "rev-parse", "HEAD")) == fingerprint()
    assert environment.digest_of("0" * 40) is None


def test_a_history_holds_its_own_commits_only(tree):
    assert "no git history" in results.no_history()
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "one")
    first = git(tree, "rev-parse", "HEAD")
    git(tree, "commit", "--quiet", "--amend", "--message", "better")
    assert results.no_history() is None
    assert results.in_history(git(tree, "rev-parse", "HEAD"))
    assert not results.in_history(first)  # replaced: nobody who clones has it
    assert not results.in_history("HEAD")
    assert not results.in_history("unknown")


def test_a_shallow_clone_and_a_folder_of_another_repository_are_no_history(tree, monkeypatch):
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "one")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", "two")
    git(tree, "clone", "--quiet", "--depth", "1", tree.as_uri(), "shallow")
    monkeypatch.setattr(results, "ROOT", tree.resolve() / "shallow")
    assert "shallow clone" in results.no_history()
    monkeypatch.setattr(results, "ROOT", tree.resolve() / "kernels")
    assert "within another repository" in results.no_history()
