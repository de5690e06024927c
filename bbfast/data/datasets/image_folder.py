"""Images in class folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``)."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from bbfast.data.cache import Decoded
from bbfast.data.datasets._base import Dataset, DatasetInfo, FileOptions, Side, register
from bbfast.data.decode import IMAGE_SUFFIXES, image_files, read_images
from bbfast.errors import DatasetError

__all__ = ["ImageFolder"]

Samples = list[tuple[Path, int]]


class ImageFolderOptions(FileOptions):
    """Options of an image folder."""

    size: Side | tuple[Side, Side] | None = Field(
        None, description="side, or height and width, to resize to; default: all files have one size already"
    )


@register("image_folder")
class ImageFolder(Dataset):
    """Your own images, one folder a class.

    Classes are the folders of ``train``, sorted by name; files are sorted by name in each. The test set is in ``test``,
    or ``val`` if there is no ``test``, and may lack classes but have no new ones. Files are decoded as RGB; those
    without an image suffix are left out.
    """

    info = DatasetInfo(
        title="Image folder",
        summary="Your own images: train/<class>/* and test/<class>/* (or val).",
        layout="a folder with train/<class>/* and test/<class>/* (or val/<class>/*)",
    )
    Options = ImageFolderOptions

    def sources(self, root: Path, options: ImageFolderOptions) -> list[Path]:
        """Every image."""
        classes, train = self._train(root)
        return [path for path, _ in (*train, *self._test(root, classes))]

    def decode(self, root: Path, options: ImageFolderOptions) -> Decoded:
        """Decode every image."""
        classes, train = self._train(root)
        test = self._test(root, classes)
        side = options.size
        size = (side, side) if isinstance(side, int) else side
        remedy = "replace or remove the file"
        train_images = read_images([path for path, _ in train], size, remedy)
        height, width = train_images.shape[2:]
        test_images = read_images([path for path, _ in test], size, remedy)
        if test_images.shape[2:] != train_images.shape[2:]:
            found = "x".join(map(str, test_images.shape[2:]))
            raise DatasetError(
                f"data set {self.name!r}: train images of {root} are {height}x{width}, test images {found}; "
                "pass size= to resize them"
            )
        return Decoded(
            train_images,
            torch.tensor([label for _, label in train], dtype=torch.int64),
            test_images,
            torch.tensor([label for _, label in test], dtype=torch.int64),
            tuple(classes),
        )

    def _train(self, root: Path) -> tuple[list[str], Samples]:
        folder = root / "train"
        if not folder.is_dir():
            raise self.missing(folder, root)
        classes = _class_folders(folder)
        if not classes:
            raise self.damaged(folder, "it holds no class folders", root)
        samples = [(path, label) for label, name in enumerate(classes) for path in image_files(folder / name)]
        empty = [name for label, name in enumerate(classes) if not any(found == label for _, found in samples)]
        if empty:
            raise self.damaged(folder / empty[0], f"it holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})", root)
        return classes, samples

    def _test(self, root: Path, classes: list[str]) -> Samples:
        folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if folder is None:
            raise self.missing(root / "test", root)
        found = _class_folders(folder)
        new = sorted(set(found) - set(classes))
        if new:
            raise self.damaged(folder / new[0], "this class has no folder in train", root)
        samples = [(path, classes.index(name)) for name in found for path in image_files(folder / name)]
        if not samples:
            raise self.damaged(folder, "it holds no images in class folders", root)
        return samples


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
