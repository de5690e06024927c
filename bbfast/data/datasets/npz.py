"""Arrays in one .npz file: ``train_images``, ``train_labels``, ``test_images``, ``test_labels``[, ``class_names``]."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast.data.cache import Decoded
from bbfast.data.datapair import MOST_CLASSES
from bbfast.data.datasets._base import Dataset, DatasetInfo, FileOptions, Side, register
from bbfast.data.resize import resize_u8
from bbfast.errors import DatasetError

__all__ = ["Npz"]

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


class NpzOptions(FileOptions):
    """Options of an .npz file."""

    layout: Literal["auto", "hwc", "chw"] = Field(
        "auto", description="order of the axes of an image; auto: channels are the axis of 1 or 3, the last if both are"
    )
    size: Side | tuple[Side, Side] | None = Field(None, description="side, or height and width, to resize to")
    num_classes: int | None = Field(
        None, ge=1, le=MOST_CLASSES, description="number of classes; default: class_names or the largest label + 1"
    )


@register("npz")
class Npz(Dataset):
    """Your own arrays in one file written by ``numpy.savez`` (compressed or not, without pickled objects).

    Images are uint8 ``[N, H, W, C]``, ``[N, C, H, W]`` or ``[N, H, W]``, labels whole numbers ``[N]`` or ``[N, 1]``
    from 0 on. Order is that of the file. Other keys are ignored.
    """

    info = DatasetInfo(
        title="Arrays in an .npz file",
        summary="Your own arrays: train_images, train_labels, test_images, test_labels[, class_names].",
        layout="the path of the .npz file",
    )
    Options = NpzOptions

    def sources(self, root: Path, options: NpzOptions) -> list[Path]:
        """The file."""
        if not root.is_file():
            raise self.missing(root, root)
        return [root]

    def decode(self, root: Path, options: NpzOptions) -> Decoded:
        """Read and check the arrays."""
        arrays = self._read(root)
        parts: dict[str, Tensor] = {}
        for part in ("train", "test"):
            images = self._images(arrays[f"{part}_images"], f"{part}_images", options, root)
            parts[f"{part}_images"] = images if options.size is None else resize_u8(images, options.size)
            parts[f"{part}_labels"] = self._labels(arrays[f"{part}_labels"], f"{part}_labels", len(images), root)
        shapes = [tuple(parts[f"{part}_images"].shape[1:]) for part in ("train", "test")]
        if shapes[0] != shapes[1]:
            raise self._wrong(root, "test_images", f"of the size of train_images {shapes[0]}", str(shapes[1]))
        names = self._class_names(arrays, parts, options, root)
        train_images, train_labels, test_images, test_labels = (parts[key] for key in _KEYS)
        return Decoded(train_images, train_labels, test_images, test_labels, names)

    def _read(self, root: Path) -> dict[str, np.ndarray]:
        try:
            # Opened here because numpy leaves the file open when it is no archive.
            with root.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise self.damaged(root, "it is not an .npz archive", root)
                with archive:
                    return self._arrays(archive, root)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise self.damaged(root, f"{type(error).__name__}: {error}", root) from error

    def _arrays(self, archive: Any, root: Path) -> dict[str, np.ndarray]:
        lacking = [key for key in _KEYS if key not in archive.files]
        if lacking:
            raise DatasetError(
                f"data set 'npz': {root} lacks {', '.join(map(repr, lacking))}; it has "
                f"{', '.join(map(repr, archive.files)) or 'nothing'}; write {', '.join(_KEYS)} with numpy.savez"
            )
        return {key: archive[key] for key in (*_KEYS, "class_names") if key in archive.files}

    def _images(self, array: np.ndarray, key: str, options: NpzOptions, root: Path) -> Tensor:
        if array.dtype != np.uint8:
            raise self._wrong(root, key, "uint8 (0..255)", f"{array.dtype}")
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim != 4:
            raise self._wrong(root, key, "[N, H, W, C], [N, C, H, W] or [N, H, W]", f"shape {list(array.shape)}")
        elif options.layout == "hwc" or (options.layout == "auto" and array.shape[3] in (1, 3)):
            array = array.transpose(0, 3, 1, 2)
        elif options.layout == "auto" and array.shape[1] not in (1, 3):
            expected = "of 1 or 3 channels (say layout='hwc' or 'chw' for others)"
            raise self._wrong(root, key, expected, f"shape {list(array.shape)}")
        if 0 in array.shape:
            raise self._wrong(root, key, "at least one image", f"shape {list(array.shape)}")
        return torch.from_numpy(np.ascontiguousarray(array))

    def _labels(self, array: np.ndarray, key: str, count: int, root: Path) -> Tensor:
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.shape != (count,):
            raise self._wrong(root, key, f"one label for each of {count} images", f"shape {list(array.shape)}")
        if not np.issubdtype(array.dtype, np.integer):
            raise self._wrong(root, key, "whole numbers", f"{array.dtype}")
        if array.min() < 0:
            raise self._wrong(root, key, "class numbers >= 0", f"{array.min()}")
        if array.max() >= MOST_CLASSES:
            raise self._wrong(root, key, f"class numbers below {MOST_CLASSES}", f"{array.max()}")
        return torch.from_numpy(array.astype(np.int64))

    def _class_names(
        self, arrays: dict[str, Any], parts: dict[str, Tensor], options: NpzOptions, root: Path
    ) -> tuple[str, ...]:
        key, largest = max(
            (("train_labels", int(parts["train_labels"].max())), ("test_labels", int(parts["test_labels"].max()))),
            key=lambda entry: entry[1],
        )
        names = arrays.get("class_names")
        if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
            raise self._wrong(root, "class_names", "a vector of text", f"{names.dtype} of shape {list(names.shape)}")
        count = options.num_classes or (largest + 1 if names is None else len(names))
        if largest >= count:
            raise self._wrong(root, key, f"labels in 0..{count - 1} ({count} classes)", f"{largest}")
        if names is None:
            return tuple(map(str, range(count)))
        if len(names) != count:
            raise self._wrong(root, "class_names", f"{count} names", f"{len(names)}")
        return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)

    def _wrong(self, root: Path, key: str, expected: str, got: str) -> DatasetError:
        return DatasetError(f"data set 'npz': {key} of {root} must be {expected}, got {got}")
