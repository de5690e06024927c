"""Tiny ImageNet from its published folder ``tiny-imagenet-200``."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from bbfast.data.cache import Decoded
from bbfast.data.datasets._base import Archive, Dataset, DatasetInfo, DownloadOptions, fetch_archive, register
from bbfast.data.decode import image_files, read_images

__all__ = ["TinyImageNet"]

_FOLDER = "tiny-imagenet-200"

Samples = list[tuple[Path, int]]


class TinyImageNetOptions(DownloadOptions):
    """Options of Tiny ImageNet."""

    size: int = Field(64, ge=8, description="side of the images in pixels")


@register("tiny_imagenet")
class TinyImageNet(Dataset):
    """Tiny ImageNet: 200 classes, 100,000 training images; the 10,000 validation images serve as test set.

    Order (attacks.md 0.1): class folder name (wnid), then file name, both sorted as text; the test set alike, as if its
    files lay in class folders. Below ``root`` or ``root/tiny-imagenet-200``: ``train/<wnid>/images/*.JPEG`` and either
    ``val/val_annotations.txt`` with ``val/images/*.JPEG`` or ``val/<wnid>/[images/]*.JPEG``. Classes are named by the
    first word group of ``words.txt`` where there is one.
    """

    info = DatasetInfo(
        title="Tiny ImageNet",
        year=2015,
        paper="Stanford CS231N; a subset of ImageNet (Deng et al., CVPR 2009)",
        summary="Photographs of 200 kinds of things, 64x64.",
        layout="the folder that holds tiny-imagenet-200 as its zip file unpacks",
        num_classes=200,
        image_size=(3, 64, 64),
        train=100_000,
        test=10_000,
    )
    Options = TinyImageNetOptions
    normalize = "tiny_imagenet"
    archive = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")

    def fetch(self, root: Path) -> None:
        """Download unless the training folder is there."""
        if not (_base(root) / "train").is_dir() or not (_base(root) / "val").is_dir():
            fetch_archive(self.name, [self.archive], root)

    def sources(self, root: Path, options: TinyImageNetOptions) -> list[Path]:
        """Every image and every list."""
        base = _base(root)
        wnids, train = self._train(root)
        lists = [base / "words.txt", base / "val" / "val_annotations.txt"]
        return [*(path for path in lists if path.is_file()), *(path for path, _ in (*train, *self._test(root, wnids)))]

    def decode(self, root: Path, options: TinyImageNetOptions) -> Decoded:
        """Decode every image."""
        size, remedy = (options.size, options.size), self.remedy(root)
        wnids, train = self._train(root)
        test = self._test(root, wnids)
        return Decoded(
            read_images([path for path, _ in train], size, remedy),
            torch.tensor([label for _, label in train], dtype=torch.int64),
            read_images([path for path, _ in test], size, remedy),
            torch.tensor([label for _, label in test], dtype=torch.int64),
            self._names(wnids, root),
        )

    def _train(self, root: Path) -> tuple[list[str], Samples]:
        folder = _base(root) / "train"
        if not folder.is_dir():
            raise self.missing(folder, root)
        wnids = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        samples: Samples = []
        for label, wnid in enumerate(wnids):
            files = _class_files(folder / wnid)
            if not files:
                raise self.damaged(folder / wnid, "it holds no images", root)
            samples += [(path, label) for path in files]
        if not samples:
            raise self.damaged(folder, "it holds no class folders", root)
        return wnids, samples

    def _test(self, root: Path, wnids: list[str]) -> Samples:
        folder = _base(root) / "val"
        if not folder.is_dir():
            raise self.missing(folder, root)
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        table = folder / "val_annotations.txt"
        if table.is_file() and (folder / "images").is_dir():
            return self._annotated(table, labels, root)
        found = [path.name for path in folder.iterdir() if path.is_dir() and path.name in labels]
        if not found:
            raise self.missing(table, root)
        samples = [(path, labels[wnid]) for wnid in sorted(found) for path in _class_files(folder / wnid)]
        if not samples:
            raise self.damaged(folder, "its class folders hold no images", root)
        return samples

    def _annotated(self, table: Path, labels: dict[str, int], root: Path) -> Samples:
        rows = []
        try:
            text = table.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise self.damaged(table, str(error), root) from error
        for number, line in enumerate(text.splitlines(), start=1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in labels:
                raise self.damaged(table, f"line {number} names the class {wnid!r}, which has no training folder", root)
            path = table.parent / "images" / name
            if not path.is_file():
                raise self.missing(path, root)
            rows.append((wnid, name, path))
        if not rows:
            raise self.damaged(table, "it has no lines", root)
        return [(path, labels[wnid]) for wnid, _, path in sorted(rows)]

    def _names(self, wnids: list[str], root: Path) -> tuple[str, ...]:
        path = _base(root) / "words.txt"
        if not path.is_file():
            return tuple(wnids)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise self.damaged(path, str(error), root) from error
        words = {wnid: text.partition(",")[0].strip() for wnid, _, text in (line.partition("\t") for line in lines)}
        return tuple(words.get(wnid) or wnid for wnid in wnids)


def _class_files(folder: Path) -> list[Path]:
    inner = folder / "images"
    return image_files(inner if inner.is_dir() else folder)


def _base(root: Path) -> Path:
    return root if (root / "train").is_dir() else root / _FOLDER
