from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bbfast import datasets
from bbfast.data import cache as caching
from bbfast.data.datasets.npz import Npz


@pytest.fixture
def file(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one whenever the file is decoded."""
    done: list[Path] = []
    decode = Npz.decode

    def counted(self: Npz, root: Path, options: object) -> caching.Decoded:
        done.append(root)
        return decode(self, root, options)  # type: ignore[arg-type]

    monkeypatch.setattr(Npz, "decode", counted)
    return done


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "datasets").iterdir()) if (cache / "datasets").is_dir() else []


def test_decoded_once_whatever_does_not_change_pixels(file: Path, decodings: list[Path], cache: Path) -> None:
    first = datasets.load("npz", file)
    again = datasets.load("npz", file, normalize="cifar10", flip=True, padding=2)
    assert len(decodings) == 1 and len(entries(cache)) == 1
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.test.labels, again.test.labels)
    assert first.fingerprint == again.fingerprint and first.class_names == again.class_names
    assert again.mean == (0.4914, 0.4822, 0.4465) and again.flip and again.padding == 2


def test_one_entry_however_the_place_is_written(
    file: Path, decodings: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.load("npz", file)
    monkeypatch.chdir(file.parent)
    datasets.load("npz", file.name)
    (tmp_path / "link").symlink_to(file.parent, target_is_directory=True)
    datasets.load("npz", tmp_path / "link" / file.name)
    assert len(decodings) == 1 and len(entries(cache)) == 1


def test_options_that_change_pixels_have_their_own_entry(file: Path, decodings: list[Path], cache: Path) -> None:
    assert datasets.load("npz", file, size=4).image_size == (3, 4, 4)
    assert datasets.load("npz", file).image_size == (3, 8, 9)
    assert datasets.load("npz", file, size=4).image_size == (3, 4, 4)
    assert len(decodings) == 2 and len(entries(cache)) == 2


def test_a_changed_source_replaces_the_entry(
    file: Path, decodings: list[Path], cache: Path, arrays: dict[str, np.ndarray]
) -> None:
    before = datasets.load("npz", file)
    arrays["train_labels"] = arrays["train_labels"][::-1].copy()
    np.savez(file, **arrays)
    os.utime(file, ns=(1, 1))
    after = datasets.load("npz", file)
    assert len(decodings) == 2 and len(entries(cache)) == 1
    assert torch.equal(after.train.labels, before.train.labels.flip(0)) and after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_entry_is_noticed_and_made_again(
    file: Path, decodings: list[Path], cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = datasets.load("npz", file).fingerprint
    tensors = next(entries(cache)[0].glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    if damage == "truncate":
        tensors.write_bytes(data[:-7])
    elif damage == "flip":
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "remove":
        tensors.unlink()
    else:
        (tensors.parent / "manifest.json").unlink()
    after = datasets.load("npz", file)
    assert after.fingerprint == before and len(decodings) == 2
    if damage != "manifest":
        assert "damaged" in caplog.text
    assert datasets.load("npz", file).fingerprint == before and len(decodings) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache folder should be")
    with caplog.at_level(logging.WARNING):
        pair = datasets.load("npz", file, cache=str(blocked))
    assert len(pair.train) == 6 and len(pair.fingerprint) == 64
    assert "cannot be cached" in caplog.text and "BBFAST_CACHE" in caplog.text


def test_where_the_cache_is(file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.load("npz", file, cache=False)
    assert entries(cache) == []
    datasets.load("npz", file, cache=tmp_path / "mine")
    assert entries(cache) == [] and len(entries(tmp_path / "mine")) == 1
    assert caching.cache_root() == cache
    monkeypatch.delenv("BBFAST_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caching.cache_root() == tmp_path / "bbfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caching.cache_root(True) == Path.home() / ".cache" / "bbfast"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert caching.cache_root() == Path.home() / "Library" / "Caches" / "bbfast"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert caching.cache_root() == tmp_path / "bbfast" / "Cache"


def test_writing_to_a_loaded_set_leaves_the_cache_as_it_was(file: Path) -> None:
    pair = datasets.load("npz", file)
    before = pair.train.images.clone()
    pair.train.images.zero_()
    assert torch.equal(datasets.load("npz", file).train.images, before)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads the memory map of Linux")
def test_images_are_memory_mapped(file: Path, cache: Path) -> None:
    pair = datasets.load("npz", file)
    assert len(pair.train)
    assert str(entries(cache)[0]) in Path("/proc/self/smaps").read_text()


def test_two_writers_of_the_same_entry(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)
    decode = Npz.decode

    def wait_for_the_other(self: Npz, root: Path, options: object) -> caching.Decoded:
        together.wait(timeout=60)
        return decode(self, root, options)  # type: ignore[arg-type]

    monkeypatch.setattr(Npz, "decode", wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        pairs = list(pool.map(lambda _: datasets.load("npz", file), range(2)))
    assert pairs[0].fingerprint == pairs[1].fingerprint
    assert torch.equal(pairs[0].train.images, pairs[1].train.images)
    assert len(list((cache / "datasets").iterdir())) == 1
    monkeypatch.setattr(Npz, "decode", decode)
    assert datasets.load("npz", file).fingerprint == pairs[0].fingerprint
