"""The commit that records name: of a repository, of a work tree of one, of a build, or none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import bbfast
from bbfast import _version

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    _version.commit.cache_clear()
    yield
    _version.commit.cache_clear()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree that the library seems to run from."""
    root = tmp_path / "tree"
    for folder in ("bbfast", "csrc", ".git/refs/heads"):
        (root / folder).mkdir(parents=True)
    (root / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    monkeypatch.setattr(_version, "_PACKAGE", root / "bbfast")
    return root


def test_a_clone_has_loose_or_packed_references(tree: Path) -> None:
    (tree / ".git" / "packed-refs").write_text(f"# pack-refs with: peeled\n{SECOND} refs/heads/main\n^{FIRST}\n")
    assert _version.commit() == SECOND
    _version.commit.cache_clear()
    (tree / ".git" / "refs" / "heads" / "main").write_text(f"{FIRST}\n")
    assert _version.commit() == FIRST, "a loose reference is newer than a packed one"


def test_a_detached_head_and_a_work_tree(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / ".git" / "HEAD").write_text(f"{SECOND}\n")
    assert _version.commit() == SECOND
    _version.commit.cache_clear()
    other, own = tmp_path / "other", tree / ".git" / "worktrees" / "other"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/topic\n")
    (own / "commondir").write_text("../..\n")
    (tree / ".git" / "refs" / "heads" / "topic").write_text(f"{FIRST}\n")
    (other / "csrc").mkdir(parents=True)
    (other / ".git").write_text(f"gitdir: {own}\n")
    monkeypatch.setattr(_version, "_PACKAGE", other / "bbfast")
    assert _version.commit() == FIRST


@pytest.mark.parametrize("head", ["ref: refs/heads/unborn\n", "nonsense", ""])
def test_what_cannot_be_told_is_empty(tree: Path, head: str) -> None:
    (tree / ".git" / "HEAD").write_text(head)
    assert _version.commit() == ""


def test_an_installed_package_knows_what_it_was_built_from(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository that surrounds site-packages is somebody else's."""
    (tree / "csrc").rmdir()
    (tree / ".git" / "HEAD").write_text(FIRST)
    monkeypatch.setitem(sys.modules, "bbfast._C", None)
    monkeypatch.delattr(bbfast, "_C", raising=False)  # an earlier test may have imported it
    assert _version.commit() == ""
    _version.commit.cache_clear()
    native = SimpleNamespace(build_info=lambda: {"commit": SECOND})
    monkeypatch.setitem(sys.modules, "bbfast._C", native)
    monkeypatch.setattr(bbfast, "_C", native, raising=False)
    assert _version.commit() == SECOND


def test_git_says_the_same() -> None:
    root = Path(bbfast.__file__).resolve().parents[1]
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        pytest.skip("bbfast does not run from a clone")
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert _version.commit() == said.stdout.strip()
