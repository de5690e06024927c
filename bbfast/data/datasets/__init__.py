"""Data sets by name. Each file here is one family; a new one is a new file, or an entry point of a package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbfast.data.datapair import DataPair
from bbfast.data.datasets._base import DATASETS, Dataset, DatasetInfo, DatasetOptions, register

__all__ = ["Dataset", "DatasetInfo", "DatasetOptions", "available", "info", "load", "register"]


def available() -> list[str]:
    """Names of all data sets, third-party ones included, sorted."""
    return DATASETS.names()


def load(name: str, root: str | Path | None = None, **options: Any) -> DataPair:
    """Load a data set.

    Images are decoded once into uint8 tensors, cached on disk and memory-mapped from then on.

    Args:
        name: One of :func:`available`.
        root: Folder (``npz``: file) that holds the data; ``digits`` needs none. :func:`info` says what it must contain.
        **options: Options of the data set; :func:`info` lists them. Common ones: ``normalize``, ``mean``, ``std``,
            ``flip``, ``padding``, ``cache``, ``download``.

    Returns:
        The pair of training and test set.

    Raises:
        UnknownNameError: if there is no such data set; the message gives the nearest names.
        ConfigError: if an option is unknown or out of range.
        DatasetError: if a file is missing or damaged; the message names it and the command that fetches it.
    """
    pair = DATASETS.get(name)().load(root, **options)
    if not isinstance(pair, DataPair):
        raise TypeError(f"data set {name!r} must load a DataPair, got {type(pair).__name__}")
    return pair


def info(name: str) -> dict[str, Any]:
    """What is known about a data set: title, year, summary, sizes, layout of ``root``, and options with their defaults.

    Raises:
        UnknownNameError: if there is no such data set.
    """
    entry = DATASETS.get(name)
    described = getattr(entry, "info", {})
    facts = dict(described) if isinstance(described, Mapping) else dataclasses.asdict(described)
    options = getattr(entry, "Options", None)
    if options is not None:
        facts["options"] = {key: field.default for key, field in options.model_fields.items()}
        facts["option_help"] = {key: field.description for key, field in options.model_fields.items()}
    return {"name": DATASETS.canonical(name), **facts}
