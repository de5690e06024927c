"""A training's rows as tensors, for what is kept as tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_ROW = "history/"


def pack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of finite numbers as one tensor a name: int64 of whole numbers, else float64, NaN where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {f"{_ROW}{name}": _column([row.get(name, math.nan) for row in rows]) for name in names}


def unpack(tensors: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows that :func:`pack` made tensors of, and the other tensors."""
    columns = {name.removeprefix(_ROW): value.tolist() for name, value in tensors.items() if name.startswith(_ROW)}
    rows = [
        {name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)}
        for row in zip(*columns.values(), strict=True)
    ]
    return rows, {name: value for name, value in tensors.items() if not name.startswith(_ROW)}


def _column(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64 if all(isinstance(value, int) for value in values) else torch.float64)
