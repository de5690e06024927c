"""Files of the reference's result folder, as the reference's own code reads them."""

from __future__ import annotations

import csv
import io
import math
import pickle
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bbfast._atomic import write_bytes
from bbfast.interop._layout import COLUMNS, TABLE, TABLE_SUMMARY, each

__all__ = ["part_state", "write_pictures", "write_tables", "write_torch_file"]

_MISSING = "nan_value"
"""What the reference writes for a figure that is not defined."""


class _Pickler(pickle.Pickler):
    """Names numpy's functions as numpy 1 does: numpy 2 still knows these names, numpy 1 (the reference's) not its new
    ones. Protocol 2 writes names as lines, so replacing one changes no length field."""

    def __init__(self, file: Any, protocol: int) -> None:
        self._file, self._own = file, io.BytesIO()
        super().__init__(self._own, protocol=protocol)

    def dump(self, obj: Any) -> None:
        super().dump(obj)
        self._file.write(self._own.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


_PICKLE = types.SimpleNamespace(__name__="bbfast.interop", Pickler=_Pickler)


def write_torch_file(path: Path, value: Any) -> None:
    """``torch.save`` with protocol 2; a full disk is an ``OSError``, which torch's own writer hides."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_PICKLE, pickle_protocol=2)
    with buffer.getbuffer() as content:
        write_bytes(path, content)  # type: ignore[arg-type]  # a buffer of bytes


def write_pictures(folder: Path, images: Tensor, index: Sequence[int], original: Sequence[int]) -> None:
    """``<folder>/<original label>/<index>.png``, lossless and quickly compressed; not flushed to disk.

    Args:
        folder: New folder.
        images: uint8 ``[P, C, H, W]`` on the CPU.
        index: Position of each in the clean set.
        original: True label of each.
    """
    folder.mkdir()
    for label in sorted(set(original)):
        (folder / str(label)).mkdir()

    def write(position: int) -> None:
        pixels = images[position].permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=1)
        (folder / str(original[position]) / f"{index[position]}.png").write_bytes(buffer.getvalue())

    each(write, range(len(index)))


def part_state(
    folder: str,
    total: int,
    shown: Tensor,
    index: Sequence[int],
    given: Sequence[int],
    original: Sequence[int],
    role: Tensor | None = None,
) -> dict[str, Any]:
    """``bd_train`` or ``bd_test``.

    Args:
        folder: Where the pictures lie, as the reference shall open them.
        total: Size of the clean set.
        shown: Clean index of every sample of the set.
        index: Clean index of the poisoned ones.
        given: New label of each of them.
        original: True label of each of them.
        role: Of every sample of the clean set; what the poison indicator cannot tell.
    """
    indicator = np.zeros(total, dtype=np.float64)
    indicator[list(index)] = 1
    entries = {
        int(i): {"path": f"{folder}/{y}/{i}.png", "other_info": [int(new), int(y)]}
        for i, new, y in zip(index, given, original, strict=True)
    }
    container = {"save_folder_path": folder, "data_dict": entries, "save_file_format": ".png"}
    return {
        "bd_data_container": container,
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": shown.numpy().astype(np.int64),
        "poison_indicator": indicator,
        "save_folder_path": folder,
        **({} if role is None else {"sample_role": role.numpy().astype(np.int8)}),
    }


def write_tables(folder: Path, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """attack_df.csv, one row an epoch, and attack_df_summary.csv, with the reference's columns.

    Args:
        folder: Where.
        history: Figures of each epoch.
        metrics: ``c_acc``, ``asr``, ``r_acc`` of the final model; they stand in the last row.
    """
    rows = [dict(row) for row in history] or [{"epoch": 0}]
    rows[-1] |= {key: metrics[key] for key in ("c_acc", "asr", "r_acc") if key in metrics}
    named = [{COLUMNS.get(key, key): value for key, value in row.items() if _is_number(value)} for row in rows]
    columns = list(dict.fromkeys(key for row in named for key in row))
    table = [[str(i), *(_cell(row.get(key)) for key in columns)] for i, row in enumerate(named)]
    write_bytes(folder / TABLE, _csv(["", *columns], table))
    series = [[row[key] for row in named if key in row] for key in columns]
    summary = [
        ["last", *(_cell(values[-1]) for values in series)],
        ["valid_max", *(_cell(max((v for v in values if v == v), default=None)) for values in series)],
        ["exist_nan_value", *(str(any(v != v for v in values)) for values in series)],
    ]
    write_bytes(folder / TABLE_SUMMARY, _csv(["", *columns], summary))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return _MISSING if math.isnan(value) else repr(value)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()
