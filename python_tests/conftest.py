"""Fixtures for every test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples every time, and no limit of time: a busy machine is not a failure.
settings.register_profile("bbfast", derandomize=True, deadline=None)
settings.load_profile("bbfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of this folder first: their tests start processes and take long, and at the end of the run one worker
    would be left with them while the other has nothing to do."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent != here)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or found in, the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """A test that builds a model or draws numbers without a seed of its own sees the same ones every time."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where it cannot be mounted, which takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
