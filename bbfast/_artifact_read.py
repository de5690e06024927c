"""Reading a result folder: every file is checked before anything in it is believed. See :mod:`bbfast.artifact`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from bbfast import _atomic
from bbfast._hashing import from_json, sha256_file
from bbfast.errors import ArtifactError, CorruptArtifactError, NewerFormatError

__all__ = ["FORMAT_VERSION", "LOG", "MANIFEST", "TENSORS", "Artifact", "manifest_checksum", "read", "read_manifest"]

FORMAT_VERSION = 1
"""Raised when a folder's layout changes; a reader refuses a higher one."""

MANIFEST, LOG, TENSORS = "manifest.json", "log.jsonl", ".safetensors"
_REMOVE = "remove the folder and make it again"
_ATTEMPTS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A result folder that has been read.

    Attributes:
        folder: Where it was found.
        kind: What it is.
        config, metrics, extra, log: Its JSON parts.
        manifest: Versions, time, ``meta``, and size and checksum of every file.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    extra: dict[str, Any]
    log: list[dict[str, Any]]
    manifest: dict[str, Any]
    _open: Mapping[str, Any] = dataclasses.field(repr=False)
    _lazy: bool = dataclasses.field(repr=False, default=False)

    @property
    def stems(self) -> list[str]:
        """Names of the tensor files, sorted."""
        return sorted(self._open)

    def tensors(self, stem: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one file.

        On the CPU they are memory-mapped: pages are read when touched, and writing to them changes a private copy, not
        the file.

        Raises:
            ArtifactError: if there is no such file.
            CorruptArtifactError: if checking was left to now and the file does not match its checksum.
        """
        if stem not in self._open:
            raise ArtifactError(f"{self.folder} has no tensors {stem!r}; it has {', '.join(self.stems) or 'none'}")
        name = stem + TENSORS
        if self._lazy:
            _check_digest(self.folder / name, self.manifest["files"][name])
        handle = self._open[stem]
        return {key: handle.get_tensor(key).to(device) for key in handle.keys()}  # noqa: SIM118 - not a mapping


def read(folder: str | Path, kind: str | None = None, *, verify: bool | Literal["lazy"] = True) -> Artifact:
    """Open a result folder.

    Args:
        folder: What :func:`bbfast.artifact.write` wrote.
        kind: The kind it must have; None takes any.
        verify: True compares every file with its checksum now; ``"lazy"`` does so for a tensor file when asked for;
            False compares tensor files by size alone. JSON files are always checked.

    Raises:
        ArtifactError: if there is no artefact at ``folder``, it is of another kind, or it cannot be read.
        CorruptArtifactError: if a file is missing, truncated, not JSON, or differs from its checksum; the message names
            it.
        NewerFormatError: if a newer bbfast wrote it.
    """
    folder = Path(folder)
    for attempt in range(_ATTEMPTS):
        place = _locate(folder)
        before = _identity(place)
        try:
            return _read_at(place, folder, kind, verify)
        except ArtifactError:
            # A writer may have swapped in a new version between two of our reads; what was read is then of both.
            if attempt == _ATTEMPTS - 1 or _identity(_locate(folder)) == before:
                raise
    raise AssertionError("the last attempt returns or raises")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked manifest alone; raises as :func:`read` does."""
    return _read_manifest(_locate(Path(folder)))


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest (JSON values) but its ``checksum``; this rule holds for every format version.

    Raises:
        ValueError: if there is a NaN or an infinity, which no writer puts there.
    """
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read_at(place: Path, folder: Path, kind: str | None, verify: bool | Literal["lazy"]) -> Artifact:
    manifest = _read_manifest(place)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(
            f"{folder} holds a result of kind {manifest['kind']!r}, expected {kind!r}; give a folder of that kind"
        )
    try:
        documents, handles = {}, {}
        for name, entry in manifest["files"].items():
            path = place / name
            if name.endswith(TENSORS):
                # Opened before the check: the file used is then the one checked, even if the folder is replaced.
                _check_size(path, entry)
                handles[name.removesuffix(TENSORS)] = _open_tensors(path)
                if verify is True:
                    _check_digest(path, entry)
            else:
                documents[name] = _read_checked(path, entry)
    except OSError as error:
        raise ArtifactError(
            f"cannot read {error.filename or folder}: {error.strerror}; check the folder and the disk"
        ) from error
    return Artifact(
        folder=folder,
        kind=manifest["kind"],
        config=_parse(documents, "config.json", place),
        metrics=_null_as_undefined(_parse(documents, "metrics.json", place)),
        extra=_parse(documents, "extra.json", place) if "extra.json" in documents else {},
        log=_parse_log(documents.get(LOG, b""), place / LOG),
        manifest=manifest,
        _open=handles,
        _lazy=verify == "lazy",
    )


def _locate(folder: Path) -> Path:
    """``folder``, or what a writer killed between two renames left in its stead."""
    old = _atomic.retired(folder)
    return old if not folder.exists() and (old / MANIFEST).is_file() else folder


def _identity(place: Path) -> tuple[int, int, int] | None:
    try:
        status = place.stat()
    except OSError:
        return None
    # A folder that replaces a removed one may get its inode; the time of its last file tells them apart.
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read_manifest(place: Path) -> dict[str, Any]:
    path = place / MANIFEST
    try:
        manifest = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(place) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the folder and the disk") from error
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is damaged: not JSON ({error}); {_REMOVE}") from None
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise CorruptArtifactError(f"{path} is damaged: no format version; {_REMOVE}")
    version = manifest["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{place} has format {version}, this bbfast reads up to {FORMAT_VERSION}; it was written by bbfast"
            f" {manifest.get('bbfast')}: update bbfast (pip install --upgrade bbfast)"
        )
    try:
        whole = manifest.get("checksum") == manifest_checksum(manifest)
    except ValueError:  # 1e400 is an infinity too
        whole = False
    if not whole:
        raise _mismatch(path)
    if not _well_formed(manifest):
        raise CorruptArtifactError(f"{path} is damaged: an entry is missing or has the wrong type; {_REMOVE}")
    return manifest


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    files = manifest.get("files")
    if type(manifest["format_version"]) is not int or manifest["format_version"] < 1:
        return False
    if not isinstance(manifest.get("kind"), str) or not isinstance(files, dict):
        return False
    # A name with a separator would read outside the folder.
    return all(
        Path(name).name == name and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}
        for name, entry in files.items()
    )


def _no_manifest(place: Path) -> ArtifactError:
    if not place.exists():
        return ArtifactError(
            f"no result at {place}: there is no such folder; give the folder that was printed when it was made"
        )
    if not place.is_dir():
        return ArtifactError(
            f"no result at {place}: it is a file; give the folder that was printed when the result was made"
        )
    if (place / "config.json").exists() or any(place.glob(f"*{TENSORS}")):
        return CorruptArtifactError(f"{place / MANIFEST} is missing; {_REMOVE}")
    return ArtifactError(
        f"{place} is no bbfast result: it has no {MANIFEST}; give the folder that was printed when the result was made"
    )


def _check_size(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptArtifactError(f"{path} is missing; {_REMOVE}") from None
    if size != entry["size"]:
        raise CorruptArtifactError(f"{path} is damaged: it has {size} bytes, {entry['size']} were written; {_REMOVE}")


def _check_digest(path: Path, entry: Mapping[str, Any]) -> None:
    if sha256_file(path) != entry["sha256"]:
        raise _mismatch(path)


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    _check_size(path, entry)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _mismatch(path)
    return data


def _mismatch(path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(f"{path} is damaged: it does not match its checksum; {_REMOVE}")


def _open_tensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise CorruptArtifactError(f"{path} is damaged: {error}; {_REMOVE}") from None


def _parse(documents: Mapping[str, bytes], name: str, place: Path) -> dict[str, Any]:
    if name not in documents:
        raise CorruptArtifactError(f"{place / name} is missing; {_REMOVE}")
    return dict(_decode(documents[name], place / name))


def _parse_log(data: bytes, path: Path) -> list[dict[str, Any]]:
    return [_decode(line, path) for line in data.splitlines()]


def _decode(data: bytes, path: Path) -> Any:
    try:
        return from_json(json.loads(data))
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is damaged: not JSON ({error}); {_REMOVE}") from None


def _null_as_undefined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_as_undefined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_null_as_undefined(item) for item in value]
    return float("nan") if value is None else value
