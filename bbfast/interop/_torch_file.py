"""Files of ``torch.save``, both formats, without torch's own unpickler."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbfast.errors import ArtifactError, CorruptArtifactError
from bbfast.interop._standins import StorageValue, allowed_names, storage
from bbfast.interop._unpickle import Unpickler

__all__ = ["read_torch_file"]

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error, KeyError)


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote: plain values, and the stand-ins of :mod:`bbfast.interop._standins` for the rest.

    Tensors are memory of the file (private pages): reading a model costs no second copy of it.

    Raises:
        ArtifactError: if the file cannot be opened.
        CorruptArtifactError: if it is damaged, or in no format of ``torch.save``.
        UnsafeFileError: if it holds anything but plain values, tensors, arrays of numbers and pictures.
    """
    try:
        with path.open("rb") as file:
            # Copy on write: torch asks for memory that may be written to.
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except ValueError:
        raise CorruptArtifactError(f"{path} is empty; copy it again") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}; check that the file is there") from error
    if bytes(memory[:4]) == b"PK\x03\x04":
        return _read_zip(path, memory)
    if bytes(memory[:1]) == b"\x80":
        return _Legacy(path, memory).read()
    raise CorruptArtifactError(f"{path} is no file of torch.save: it is neither a zip archive nor a pickle")


def _read_zip(path: Path, memory: memoryview) -> Any:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (*_ZIP_ERRORS, OSError) as error:
        raise CorruptArtifactError(f"{path} is damaged: {error}; copy it again") from None
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CorruptArtifactError(f"{path} is no file of torch.save: it holds {len(pickles)} data.pkl, expected one")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(_content(path, memory, order)) != b"little":
        raise CorruptArtifactError(f"{path} was written on a big-endian machine, which bbfast does not read")
    found: dict[str, StorageValue] = {}

    def persistent(pid: Any) -> StorageValue:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("a persistent id of no storage")
        value = found.get(pid[2]) if isinstance(pid[2], str) else None
        if value is None:
            value = storage(pid[1], pid[2], pid[4])
            entry = entries.get(f"{prefix}data/{value.key}")
            if entry is None:
                raise CorruptArtifactError(f"{path} is damaged: the data of storage {value.key[:40]!r} is missing")
            value.data = _typed(path, _content(path, memory, entry), value)
            found[value.key] = value
        return value

    content = _content(path, memory, entries[pickles[0]])
    return Unpickler(content, allowed_names(len(memory)), persistent, str(path)).load()


def _content(path: Path, memory: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """Bytes of an entry, where they lie, their checksum verified."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise CorruptArtifactError(f"{path} is no file of torch.save: its entry {entry.filename[:80]!r} is compressed")
    start = entry.header_offset
    header = bytes(memory[start : start + 30])
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CorruptArtifactError(f"{path} is damaged: no entry at byte {start}; copy it again")
    name, extra = struct.unpack("<HH", header[26:30])
    start += 30 + name + extra
    content = memory[start : start + entry.file_size]
    if len(content) < entry.file_size:
        raise CorruptArtifactError(
            f"{path} is damaged: entry {entry.filename[:80]!r} claims {entry.file_size} bytes and has {len(content)}"
        )
    if zlib.crc32(content) != entry.CRC:
        raise CorruptArtifactError(
            f"{path} is damaged: the checksum of {entry.filename[:80]!r} is wrong; copy it again"
        )
    return content


def _typed(path: Path, content: memoryview, value: StorageValue) -> Tensor:
    size = value.dtype.itemsize
    if len(content) != value.length * size:
        raise CorruptArtifactError(
            f"{path} is damaged: storage {value.key[:40]!r} claims {value.length} elements of {size} bytes and has "
            f"{len(content)} bytes"
        )
    if not value.length:
        return torch.empty(0, dtype=value.dtype)
    tensor = torch.frombuffer(content, dtype=torch.uint8)
    # Only the older format leaves tensors where their elements are not aligned.
    return (tensor.clone() if tensor.data_ptr() % size else tensor).view(value.dtype)


class _Legacy:
    """The format of torch before 1.6: four pickles, a list of keys, the storages one after another."""

    def __init__(self, path: Path, memory: memoryview) -> None:
        self.path, self.memory = path, memory
        self.found: dict[str, StorageValue] = {}
        self.reader = Unpickler(memory, allowed_names(len(memory)), self.persistent, str(path))

    def read(self) -> Any:
        if self.reader.load() != _MAGIC or self.reader.load() != _LEGACY_VERSION:
            raise CorruptArtifactError(f"{self.path} is no file of torch.save, but some other pickle")
        system = self.reader.load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CorruptArtifactError(f"{self.path} was written on a big-endian machine, which bbfast does not read")
        value, keys = self.reader.load(), self.reader.load()
        if not isinstance(keys, list) or set(map(str, keys)) != self.found.keys() or len(keys) != len(self.found):
            raise CorruptArtifactError(f"{self.path} is damaged: the list of its storages does not fit its tensors")
        at = self.reader.at
        for key in map(str, keys):
            at = self.fill(self.found[key], at)
        return value

    def fill(self, value: StorageValue, at: int) -> int:
        end = at + 8 + value.length * value.dtype.itemsize
        if end > len(self.memory) or struct.unpack("<q", self.memory[at : at + 8])[0] != value.length:
            raise CorruptArtifactError(
                f"{self.path} is damaged: storage {value.key[:40]!r} claims {value.length} elements and has not as many"
            )
        value.data = _typed(self.path, self.memory[at + 8 : end], value)
        return end

    def persistent(self, pid: Any) -> StorageValue:
        if not isinstance(pid, tuple) or len(pid) != 6 or pid[0] != "storage" or pid[5] is not None:
            raise ValueError("a persistent id of no whole storage")
        value = self.found.get(pid[2]) if isinstance(pid[2], str) else None
        if value is None:
            value = storage(pid[1], pid[2], pid[4])
            self.found[value.key] = value
        return value
