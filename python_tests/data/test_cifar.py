from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bbfast import datasets
from bbfast.data.datasets import cifar
from bbfast.errors import DatasetError


def batch(root: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = pickle.loads((root / "cifar-10-batches-py" / name).read_bytes())
    return loaded


def put(root: Path, name: str, entry: object) -> Path:
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(pickle.dumps(entry, protocol=2))
    return path


def test_order_is_that_of_the_batch_files(cifar10_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = datasets.load("cifar10", cifar10_root)
    assert pair.image_size == (3, 32, 32) and pair.class_names[3] == "name3" and pair.num_classes == 10
    assert (len(pair.train), len(pair.test)) == (20, 4)
    for number in range(5):
        expected = batch(cifar10_root, f"data_batch_{number + 1}")
        part = pair.train[4 * number : 4 * number + 4]
        assert part.labels.tolist() == expected["labels"]
        # Rows are planes: red, green, blue, each row by row.
        assert np.array_equal(part.images.numpy().reshape(4, 3072), expected["data"])
    assert pair.flip and pair.mean == (0.4914, 0.4822, 0.4465) and pair.std == (0.247, 0.243, 0.261)
    assert "cifar10 has 20 train images, 50000 were published" in caplog.text


def test_the_folder_itself_is_accepted_as_root(cifar10_root: Path) -> None:
    inner = datasets.load("cifar10", cifar10_root / "cifar-10-batches-py")
    assert inner.fingerprint == datasets.load("cifar10", str(cifar10_root)).fingerprint


def test_cifar100_takes_fine_labels(cifar100_root: Path) -> None:
    pair = datasets.load("cifar100", cifar100_root)
    assert pair.num_classes == 100 and pair.class_names[99] == "fine99" and not pair.flip
    assert pair.train.labels.tolist() == [99, 0, 5, 7, 0] and pair.test.labels.tolist() == [99, 0, 5, 7, 1]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_pickle_protocol_is_read(cifar10_root: Path, protocol: int) -> None:
    entry = batch(cifar10_root, "test_batch")
    path = cifar10_root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({**entry, "labels": np.array(entry["labels"])}, protocol=protocol))
    pair = datasets.load("cifar10", cifar10_root)
    assert np.array_equal(pair.test.images.numpy().reshape(4, 3072), entry["data"])
    assert pair.test.labels.tolist() == entry["labels"]


def test_without_names_classes_are_numbered(cifar10_root: Path) -> None:
    (cifar10_root / "cifar-10-batches-py" / "batches.meta").unlink()
    assert datasets.load("cifar10", cifar10_root).class_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_missing_batch_is_named(cifar10_root: Path, name: str) -> None:
    path = cifar10_root / "cifar-10-batches-py" / name
    path.unlink()
    with pytest.raises(DatasetError, match=f"{name} is missing.*download=True"):
        datasets.load("cifar10", cifar10_root)


def test_an_archive_that_is_not_unpacked_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"archive")
    with pytest.raises(DatasetError, match=r"cifar-10-python.tar.gz is not unpacked.*download=True.*without network"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_truncated_batch_is_an_error(cifar10_root: Path, keep: int) -> None:
    path = cifar10_root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"data_batch_2 is damaged.*download=True"):
        datasets.load("cifar10", cifar10_root)


def test_a_file_of_the_published_size_must_have_the_published_checksum(
    cifar10_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cifar10_root / "cifar-10-batches-py" / "data_batch_1"
    good = path.read_bytes()
    published = {**cifar.CIFAR10.published, "data_batch_1": (len(good), cifar._md5(path) or "")}
    monkeypatch.setattr(cifar.CIFAR10, "published", published)
    datasets.load("cifar10", cifar10_root)
    path.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
    with pytest.raises(DatasetError, match="data_batch_1 is damaged: its MD5 checksum is not"):
        datasets.load("cifar10", cifar10_root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((4, 3071), np.uint8)}, r"'data' is not a uint8 array \[N, 3072\]"),
        ({"data": np.zeros((4, 3072), np.float32)}, r"'data' is not a uint8 array"),
        ({"data": None}, r"'data' is not a uint8 array"),
        ({"labels": [0, 1, 2]}, "'labels' is not a list of 4 labels"),
        ({"labels": [0, 1, 2, 10]}, r"labels must lie in 0..9, got 0..10"),
        ({"labels": [0, 1, 2, -1]}, r"labels must lie in 0..9, got -1..2"),
        ({"labels": [0, 1, 2, 1.5]}, "'labels' does not hold whole numbers"),
    ],
)
def test_wrong_contents_are_named(cifar10_root: Path, change: dict[str, Any], message: str) -> None:
    put(cifar10_root, "data_batch_4", {**batch(cifar10_root, "data_batch_4"), **change})
    with pytest.raises(DatasetError, match=f"data_batch_4 is damaged: {message}"):
        datasets.load("cifar10", cifar10_root)


def test_files_that_are_no_dict_or_have_wrong_names(cifar10_root: Path) -> None:
    put(cifar10_root, "batches.meta", {"label_names": ["only one"]})
    with pytest.raises(DatasetError, match=r"batches.meta is damaged: 'label_names' is not a list of 10 names"):
        datasets.load("cifar10", cifar10_root)
    put(cifar10_root, "batches.meta", ["a", "list"])
    with pytest.raises(DatasetError, match=r"batches.meta is damaged: it holds a list"):
        datasets.load("cifar10", cifar10_root)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_tampered_file_is_run(cifar10_root: Path, tmp_path: Path) -> None:
    put(cifar10_root, "data_batch_5", {"data": Trap(tmp_path / "sprung"), "labels": []})
    with pytest.raises(DatasetError, match=r"data_batch_5 is damaged: UnpicklingError: it holds a (posix|nt).mkdir"):
        datasets.load("cifar10", cifar10_root)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def archive(cifar10_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive of ``cifar10_root``, made the published one; stands in an empty root."""
    root = tmp_path / "fresh"
    root.mkdir()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(cifar10_root / "cifar-10-batches-py", "cifar-10-batches-py")
    path = root / "cifar-10-python.tar.gz"
    path.write_bytes(data.getvalue())
    url = cifar.CIFAR10.archive.url
    monkeypatch.setattr(cifar.CIFAR10, "archive", cifar.Archive(url, cifar._md5(path) or ""))
    return path


def test_download_unpacks_an_archive_that_is_there(archive: Path, cifar10_root: Path) -> None:
    fetched = datasets.load("cifar10", archive.parent, download=True)
    assert torch.equal(fetched.train.images, datasets.load("cifar10", cifar10_root).train.images)


def test_a_truncated_archive_is_fetched_again(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    asked: list[str] = []

    def offline(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(request.full_url)
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"fetching .*cifar-10-python.tar.gz failed"):
        datasets.load("cifar10", archive.parent, download=True)
    assert asked


def test_a_broken_archive_with_the_right_checksum(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    monkeypatch.setattr(cifar.CIFAR10, "archive", cifar.Archive(cifar.CIFAR10.archive.url, cifar._md5(archive) or ""))
    with pytest.raises(DatasetError, match=r"failed \(EOFError"):
        datasets.load("cifar10", archive.parent, download=True)
