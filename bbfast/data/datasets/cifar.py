"""CIFAR-10 and CIFAR-100 in the folders that torchvision makes (``cifar-10-batches-py``, ``cifar-100-python``)."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bbfast.data.cache import Decoded
from bbfast.data.datasets._base import Archive, Dataset, DatasetInfo, DownloadOptions, fetch_archive, register
from bbfast.errors import DatasetError

__all__ = ["CIFAR10", "CIFAR100"]

_log = logging.getLogger(__name__)

_PAPER = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009"


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    # The functions behind pickled arrays live in modules whose names differ between versions of numpy.
    array: Any = np.zeros(1)
    makers = {"multiarray": array.__reduce__()[0], "numeric": array.__reduce_ex__(5)[0]}
    return {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
        **{(f"numpy.{core}.{module}", f.__name__): f for core in ("core", "_core") for module, f in makers.items()},
    }


class _Unpickler(pickle.Unpickler):
    """Reads what CIFAR's files hold (arrays, lists, text) and nothing else: no code of a tampered file is ever run."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _allowed()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no file of CIFAR does") from None


class _CIFAR(Dataset):
    Options = DownloadOptions
    folder: ClassVar[str]
    archive: ClassVar[Archive]
    train_files: ClassVar[tuple[str, ...]]
    test_file: ClassVar[str]
    meta_file: ClassVar[str]
    label_key: ClassVar[str]
    names_key: ClassVar[str]
    published: ClassVar[dict[str, tuple[int, str]]]
    """Size in bytes and MD5 of the published files."""

    def fetch(self, root: Path) -> None:
        """Download with torchvision's downloader unless every file is there and as published."""
        folder = self._folder(root)
        if not all(_md5(folder / name) == md5 for name, (_, md5) in self.published.items()):
            fetch_archive(self.name, [self.archive], root)

    def sources(self, root: Path, options: DownloadOptions) -> list[Path]:
        """The batch files, and the file with the class names if there is one."""
        folder = self._folder(root)
        files = [folder / name for name in (*self.train_files, self.test_file)]
        for path in files:
            if not path.is_file():
                if (root / self.archive.name).is_file():
                    raise DatasetError(
                        f"data set {self.name!r}: {path} is missing, {root / self.archive.name} is not unpacked; "
                        f"{self.remedy(root)}: an intact archive is unpacked without network"
                    )
                raise self.missing(path, root)
        meta = folder / self.meta_file
        return [*files, meta] if meta.is_file() else files

    def decode(self, root: Path, options: DownloadOptions) -> Decoded:
        """Read the batches in file order (attacks.md 0.1)."""
        folder = self._folder(root)
        names = self._class_names(folder / self.meta_file, root)
        parts = [self._batch(folder / name, len(names), root) for name in self.train_files]
        train_images, train_labels = (torch.cat(rows) for rows in zip(*parts, strict=True))
        test_images, test_labels = self._batch(folder / self.test_file, len(names), root)
        return Decoded(train_images, train_labels, test_images, test_labels, names)

    def _folder(self, root: Path) -> Path:
        return root if (root / self.test_file).is_file() else root / self.folder

    def _batch(self, path: Path, num_classes: int, root: Path) -> tuple[Tensor, Tensor]:
        entry = self._unpickle(path, root)
        pixels, labels = entry.get("data"), entry.get(self.label_key)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise self.damaged(path, "'data' is not a uint8 array [N, 3072]", root)
        if not isinstance(labels, list | np.ndarray) or len(labels) != len(pixels):
            raise self.damaged(path, f"{self.label_key!r} is not a list of {len(pixels)} labels", root)
        try:
            numbers = torch.from_numpy(np.asarray(labels).astype(np.int64, casting="same_kind"))
        except TypeError as error:
            raise self.damaged(path, f"{self.label_key!r} does not hold whole numbers: {error}", root) from error
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes:
            found = f"{int(numbers.min())}..{int(numbers.max())}"
            raise self.damaged(path, f"labels must lie in 0..{num_classes - 1}, got {found}", root)
        return torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 3, 32, 32), numbers

    def _class_names(self, path: Path, root: Path) -> tuple[str, ...]:
        count = self.info.num_classes or 0
        if not path.is_file():
            _log.warning("%s is missing; the classes of %s are named by their numbers", path, self.name)
            return tuple(map(str, range(count)))
        names = self._unpickle(path, root).get(self.names_key)
        if not isinstance(names, list) or len(names) != count:
            raise self.damaged(path, f"{self.names_key!r} is not a list of {count} names", root)
        return tuple(map(str, names))

    def _unpickle(self, path: Path, root: Path) -> dict[str, Any]:
        size, md5 = self.published[path.name]
        if _md5(path) != md5:
            # The published size with another content is a damaged copy; another size is somebody's own subset, or a
            # truncated file, which does not unpickle.
            if path.stat().st_size == size:
                raise self.damaged(path, f"its MD5 checksum is not {md5}", root)
            _log.warning("%s is not the published file (its MD5 checksum is not %s)", path, md5)
        try:
            with path.open("rb") as file:
                entry = _Unpickler(file, encoding="latin1").load()
        except OSError as error:
            raise DatasetError(f"data set {self.name!r}: {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise self.damaged(path, f"{type(error).__name__}: {error}", root) from error
        if not isinstance(entry, dict):
            raise self.damaged(path, f"it holds a {type(entry).__name__} instead of a dict", root)
        return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in entry.items()}


@register("cifar10")
class CIFAR10(_CIFAR):
    """CIFAR-10: order of the five batch files, then the test batch."""

    info = DatasetInfo(
        title="CIFAR-10",
        year=2009,
        paper=_PAPER,
        summary="Colour photographs of 10 kinds of things, 32x32.",
        layout="the folder that holds cifar-10-batches-py as torchvision unpacks it",
        num_classes=10,
        image_size=(3, 32, 32),
        train=50_000,
        test=10_000,
    )
    normalize = "cifar10"
    flip = True
    folder = "cifar-10-batches-py"
    archive = Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
    train_files = tuple(f"data_batch_{number}" for number in range(1, 6))
    test_file = "test_batch"
    meta_file = "batches.meta"
    label_key = "labels"
    names_key = "label_names"
    published: ClassVar[dict[str, tuple[int, str]]] = {
        "data_batch_1": (31_035_704, "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": (31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": (31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": (31_035_696, "634d18415352ddfa80567beed471001a"),
        "data_batch_5": (31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
        "test_batch": (31_035_526, "40351d587109b95175f43aff81a1287e"),
        "batches.meta": (158, "5ff9c542aee3614f3951f8cda6e48888"),
    }


@register("cifar100")
class CIFAR100(_CIFAR):
    """CIFAR-100 with its fine labels, in file order."""

    info = DatasetInfo(
        title="CIFAR-100",
        year=2009,
        paper=_PAPER,
        summary="Colour photographs of 100 kinds of things, 32x32, fine labels.",
        layout="the folder that holds cifar-100-python as torchvision unpacks it",
        num_classes=100,
        image_size=(3, 32, 32),
        train=50_000,
        test=10_000,
    )
    normalize = "cifar100"
    folder = "cifar-100-python"
    archive = Archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
    train_files = ("train",)
    test_file = "test"
    meta_file = "meta"
    label_key = "fine_labels"
    names_key = "fine_label_names"
    published: ClassVar[dict[str, tuple[int, str]]] = {
        "train": (155_249_918, "16019d7e3df5f24257cddd939b257f8d"),
        "test": (31_049_696, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        "meta": (1_473, "7973b15100ade9c7d40fb424638fde48"),
    }


def _md5(path: Path) -> str | None:
    """MD5 of a file, which the publisher gives as its checksum; None if there is no such file."""
    if not path.is_file():
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
