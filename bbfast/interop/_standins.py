"""What the objects of an attack result become when it is read: inert descriptions, turned into tensors when needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bbfast.interop._unpickle import Allowed, Names, Rebuilt

__all__ = ["ArrayValue", "PictureValue", "StorageValue", "TensorValue", "allowed_names", "storage"]

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NUMERIC = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
"""Element types of arrays: numbers. Not there: objects, which would hold pickles of their own, records and text."""

_PICTURES = (
    ("PIL.Image", "Image"),
    ("PIL.PngImagePlugin", "PngImageFile"),
    ("PIL.JpegImagePlugin", "JpegImageFile"),
    ("PIL.PpmImagePlugin", "PpmImageFile"),
    ("PIL.BmpImagePlugin", "BmpImageFile"),
)
_CHANNELS = {"L": 1, "RGB": 3}


@dataclasses.dataclass(eq=False)
class StorageValue:
    """Memory of tensors: where it lies in the file is filled in by whoever reads the file."""

    key: str
    dtype: torch.dtype
    length: int
    data: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TensorValue:
    """A strided view of a storage."""

    storage: StorageValue
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor: memory of the file, not to be written to."""
        if self.storage.data is None:
            raise ValueError(f"the data of storage {self.storage.key!r} is missing")
        return self.storage.data.as_strided(self.size, self.stride, self.offset)


class ArrayValue(Rebuilt):
    """A numpy array of numbers."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


class DTypeValue(Rebuilt):
    """An element type: its code and byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def fill(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise ValueError("a state that is none of a numeric numpy dtype")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order if self.order != "|" else "=")  # type: ignore[arg-type]


class PictureValue(Rebuilt):
    """A picture of PIL in memory: mode, ``(W, H)`` and bytes."""

    def __init__(self, *arguments: Any) -> None:
        self.pixels: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        _, mode, (width, height), _, raw = state[:5]
        if not isinstance(mode, str) or mode not in _CHANNELS:
            raise ValueError(f"a picture must have mode L or RGB, got {_shown(mode)}")
        shape = (_count(height), _count(width), _CHANNELS[mode])
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape):
            raise ValueError(f"a picture of {shape} whose bytes are missing or too many")
        self.pixels = np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _Mapping(dict[Any, Any], Rebuilt):
    """An OrderedDict. Its attributes (torch keeps versions of the layers there) are left out."""

    def fill(self, state: Any) -> None:
        return


def storage(kind: Any, key: Any, length: Any) -> StorageValue:
    """Of the parts of a persistent id of torch; raises ``ValueError`` or ``TypeError`` if it is none."""
    if not isinstance(kind, Allowed) or not isinstance(kind.make, _Storage):
        raise ValueError("a persistent id of no storage type")
    if not isinstance(key, str):
        raise TypeError("a storage key that is no text")
    return StorageValue(key, kind.make.dtype, _count(length))


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype

    def __call__(self, *arguments: Any) -> Any:
        raise ValueError("a storage is referred to by a persistent id, not made")


class _Budget:
    """Bytes that conversions may copy: each value of a real file is converted once, so they are fewer than the file's.

    Without it a small file could have one long text converted a million times.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError("more converted bytes than the file holds")

    def encode(self, text: str, encoding: str) -> bytes:
        """``_codecs.encode``, the way in which protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes that are no latin-1 text")
        self.take(len(text))
        return text.encode("latin-1")

    def raw(self, content: Any = b"", encoding: str = "latin-1") -> bytes:
        """``bytes`` or ``bytearray``."""
        if isinstance(content, str):
            return self.encode(content, encoding)
        if not isinstance(content, bytes):
            raise TypeError(f"bytes of a {type(content).__name__}")
        return content

    def container(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """``set``, ``list``, ``tuple`` and the like of a list of plain values."""

        def make(items: Any = ()) -> Any:
            if not isinstance(items, (list, tuple)):
                raise TypeError(f"a container of a {type(items).__name__}")
            self.take(len(items))
            if kind in (set, frozenset) and not all(isinstance(item, (str, int, float)) for item in items):
                raise TypeError("a set of other things than text and numbers")
            return kind(items)

        return make


def allowed_names(limit: int) -> Names:
    """The names that an attack result may use, and what each of them makes.

    Args:
        limit: Size of the file in bytes.
    """
    budget = _Budget(limit)
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "device"): _device,
        ("torch", "Size"): budget.container(tuple),
        ("collections", "OrderedDict"): lambda: _Mapping(),
        ("numpy", "ndarray"): _never,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): budget.encode,
    }
    names |= {("torch", name): _Storage(dtype) for name, dtype in _STORAGES.items()}
    for package in ("numpy.core", "numpy._core"):  # before and since numpy 2
        names[f"{package}.multiarray", "_reconstruct"] = lambda kind, shape, code: ArrayValue()
        names[f"{package}.multiarray", "scalar"] = _scalar
        names[f"{package}.numeric", "_frombuffer"] = _from_buffer
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset, list, tuple):
            names[module, kind.__name__] = budget.container(kind)
        names[module, "bytes"] = names[module, "bytearray"] = budget.raw
    names |= dict.fromkeys(_PICTURES, PictureValue)
    return names


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or len(kind) > 20:
        raise TypeError("a device that is no short text")
    return kind if index is None else f"{kind}:{_count(index)}"


def _never(*arguments: Any) -> Any:
    raise ValueError("a numpy array that is not made by numpy's own functions")


def _tensor(source: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorValue:
    if not isinstance(source, StorageValue):
        raise TypeError(f"a tensor of a {type(source).__name__}")
    offset, size, stride = _count(offset), _counts(size), _counts(stride)
    if len(size) != len(stride):
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    elements = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if elements and (elements > source.length or last >= source.length):
        raise ValueError(f"a tensor of size {size} in a storage of {source.length} elements")
    return TensorValue(source, offset, size, stride)


def _parameter(data: Any, *_: Any) -> TensorValue:
    if not isinstance(data, TensorValue):
        raise TypeError(f"a parameter of a {type(data).__name__}")
    return data


def _dtype(code: Any, *_: Any) -> DTypeValue:
    if not isinstance(code, str) or code not in _NUMERIC:
        raise ValueError(f"numpy arrays must hold numbers, got dtype {_shown(code)}")
    return DTypeValue(code)


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    value: int | float | bool = _array(raw, dtype, (), "C").item()
    return value


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> ArrayValue:
    value = ArrayValue()
    value.array = _array(raw, dtype, shape, order)
    return value


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, DTypeValue) or not isinstance(raw, bytes) or order not in ("C", "F"):
        raise ValueError("an array that is none of numbers")
    shape, kind = _counts(shape), dtype.dtype
    if len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of shape {shape} and {kind} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype=kind).reshape(shape, order=order)


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 16:
        raise TypeError("a shape that is no short tuple")
    return tuple(map(_count, values))


def _shown(value: Any) -> str:
    """For messages. Only text is shown: any other value may be too deep to be written out."""
    return repr(value[:20]) if isinstance(value, str) else f"a {type(value).__name__}"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError("a size that is no whole number >= 0")
    return value
