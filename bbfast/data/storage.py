"""An :class:`ImageSet` on disk: one artefact folder (see :mod:`bbfast.artifact`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from bbfast import artifact
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.errors import CorruptArtifactError

__all__ = ["load_imageset", "save_imageset"]

KIND = "imageset"
_CLASSES: dict[str, type[ImageSet]] = {cls.__name__: cls for cls in (ImageSet, BackdoorSet)}


def save_imageset(images: ImageSet, folder: Path) -> Path:
    """Write a set into ``folder``, which must not hold another result.

    Raises:
        ArtifactError: if something stands at ``folder`` already, or the disk is full or read-only.
    """
    rows = {f.name: getattr(images, f.name) for f in dataclasses.fields(images)}
    config = {
        "class": "BackdoorSet" if isinstance(images, BackdoorSet) else "ImageSet",
        "mean": list(images.mean),
        "std": list(images.std),
    }
    return artifact.write(
        folder,
        KIND,
        config=config,
        metrics={"samples": len(images)},
        tensors={"data": {name: value for name, value in rows.items() if isinstance(value, Tensor)}},
    )


def load_imageset(folder: Path) -> ImageSet:
    """Read a set written by :func:`save_imageset`; pixels are memory-mapped.

    Raises:
        ArtifactError: if there is no image set at ``folder``.
        CorruptArtifactError: if a file is damaged.
    """
    found = artifact.read(folder, KIND)
    cls = _CLASSES.get(found.config.get("class", ""))
    if cls is None:
        kind = found.config.get("class")
        raise CorruptArtifactError(f"{folder} names an unknown class {kind!r} of image set; save it again")
    rows: dict[str, Any] = found.tensors("data")
    return cls(mean=tuple(found.config["mean"]), std=tuple(found.config["std"]), **rows)
