"""Names by content: values as strict JSON with one canonical spelling, and SHA-256 of values, files and tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["canonical_json", "content_hash", "from_json", "sha256_file", "sha256_json", "to_json"]

_FLOAT = "$float"
"""Key of the object that stands for a float JSON cannot write: ``{"$float": "nan"}``, ``"inf"`` or ``"-inf"``."""

_CHUNK = 1 << 22


def to_json(value: Any, where: str = "value") -> Any:
    """``value`` as what strict JSON can hold; :func:`from_json` gives it back.

    Mappings with text keys, lists, tuples (become lists), text, bool, int, float, None, paths (become text), numpy
    scalars and arrays, one-element tensors. NaN and infinities become ``{"$float": "nan"}`` and the like.

    Args:
        value: What to convert.
        where: Its name, for messages.

    Raises:
        TypeError: naming the place of whatever has no JSON form.
        ValueError: if a mapping uses the reserved key ``$float``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the text itself, of an enumeration's member too
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: _spell(value)}
    if isinstance(value, Mapping):
        return _mapping(value, where)
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return to_json(value.item(), where)
    if isinstance(value, np.ndarray):
        return to_json(value.tolist(), where)
    if isinstance(value, Tensor) and value.numel() == 1:
        return to_json(value.item(), where)
    raise TypeError(f"{where} must be text, a number, a list or a mapping of them, got {type(value).__name__}")


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json` on parsed JSON."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII, floats as Python's shortest exact form."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the device, strides or order of the mapping.

    Args:
        tensors: Dense tensors of any dtype and device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode("ascii"))
        flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    if _FLOAT in value:
        raise ValueError(f"{where} must not use the key {_FLOAT!r}: it is reserved for floats that JSON cannot write")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{where} must have text keys, got {type(key).__name__} {key!r}")
    return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}


def _spell(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
