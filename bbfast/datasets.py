"""Data sets by name: ``available()``, ``load(name, root=None, **options)``, ``info(name)``, ``register(name)``."""

from __future__ import annotations

from bbfast.data.datasets import Dataset, DatasetInfo, DatasetOptions, available, info, load, register

__all__ = ["Dataset", "DatasetInfo", "DatasetOptions", "available", "info", "load", "register"]
