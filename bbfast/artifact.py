"""One result, one folder: JSON and safetensors, written whole or not at all, checked when read.

A folder holds

- ``manifest.json``: format version, kind, library version and commit, torch version, time, and size and SHA-256 of
  every other file; it carries its own checksum;
- ``config.json``: how the result was made; ``metrics.json``: what came out; ``extra.json`` (optional): anything else;
- ``log.jsonl`` (optional): one line per epoch;
- ``<stem>.safetensors``: tensors, memory-mapped when read. There is no pickle anywhere.

Floats that JSON cannot write: in ``metrics.json`` NaN is ``null`` ("not defined", as ASR without backdoor images) and
every ``null`` is read back as NaN, so None is no metric; elsewhere NaN is ``{"$float": "nan"}`` and None stays None.
Infinities are ``{"$float": "inf"}`` and ``{"$float": "-inf"}`` everywhere. Tuples come back as lists.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bbfast import _atomic
from bbfast._artifact_read import (
    FORMAT_VERSION,
    LOG,
    MANIFEST,
    TENSORS,
    Artifact,
    manifest_checksum,
    read,
    read_manifest,
)
from bbfast._hashing import sha256_file, to_json
from bbfast._version import __version__, commit
from bbfast.errors import ArtifactError

__all__ = ["FORMAT_VERSION", "Artifact", "exists", "read", "read_manifest", "write"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REMEDIES = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some space or choose a folder on another disk",
    errno.EROFS: "choose a folder that may be written to",
    errno.EACCES: "choose a folder that may be written to, or change its permissions",
    errno.EPERM: "choose a folder that may be written to, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write(
    folder: str | Path,
    kind: str,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an artefact: all of it, or nothing.

    Args:
        folder: Where it shall stand; parents are made.
        kind: What it is ("attack", "defense"); readers ask for it.
        config: How it was made.
        metrics: What came out; NaN means not defined.
        tensors: File stem to named dense tensors, whatever their strides and device; those that share memory are stored
            one by one.
        extra: Anything else that fits JSON.
        log: One mapping per epoch.
        meta: What to record in the manifest beside the standard entries.
        overwrite: Replace an artefact that is there. A reader finds the old or the new one, whole, at every moment. A
            folder that holds anything else than an artefact is never replaced.

    Returns:
        ``folder``.

    Raises:
        ArtifactError: if something stands at ``folder`` already, or the disk is full or read-only; nothing is left.
        TypeError: if a value has no JSON form or a tensor cannot be stored (sparse, quantised, meta).
        ValueError: if ``kind`` or a file stem is not a plain name.
    """
    folder = Path(folder)
    _check_name("kind", kind)
    documents = {
        "config.json": _document(config, "config"),
        "metrics.json": _document(_undefined_as_null(dict(metrics or {})), "metrics"),
    }
    if extra:
        documents["extra.json"] = _document(extra, "extra")
    if log:
        documents[LOG] = b"".join(_line(entry, f"log[{i}]") for i, entry in enumerate(log))
    recorded = to_json(dict(meta or {}), "meta")
    stored = {_check_name("tensors", stem): _storable(stem, named) for stem, named in (tensors or {}).items()}
    _check_place(folder, overwrite)
    with explained(folder), _atomic.new_folder(folder, replace=overwrite) as temp:
        for name, data in documents.items():
            _atomic.write_bytes(temp / name, data)
        for stem, named in stored.items():
            _write_tensors(temp / f"{stem}{TENSORS}", named)
        _atomic.write_bytes(temp / MANIFEST, _manifest(temp, kind, recorded))
    return folder


def exists(folder: str | Path) -> bool:
    """Whether an artefact (not verified) stands at ``folder``."""
    folder = Path(folder)
    return any((place / MANIFEST).is_file() for place in (folder, _atomic.retired(folder)))


def _manifest(temp: Path, kind: str, meta: Any) -> bytes:
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(temp.iterdir())}
    manifest: dict[str, Any] = {
        "format": "bbfast-artifact",
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "bbfast": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "meta": meta,
        "files": files,
    }
    manifest["checksum"] = manifest_checksum(manifest)
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def _write_tensors(path: Path, named: dict[str, Tensor]) -> None:
    try:
        safetensors.torch.save_file(named, path, metadata={"format": "pt"})
    except KeyError as error:
        raise TypeError(f"tensors[{path.stem!r}]: safetensors cannot store {error}; convert it first") from None
    _atomic.sync(path)


def _storable(stem: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors, contiguous, none sharing memory with another: what safetensors asks for."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        where = f"tensors[{stem!r}][{name!r}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise TypeError(f"{where} must be a dense tensor with values, got {kind}")
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[str(name)] = plain
    return ready


def _undefined_as_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _undefined_as_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_undefined_as_null(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _document(value: Any, where: str) -> bytes:
    return (json.dumps(to_json(value, where), indent=1, allow_nan=False) + "\n").encode()


def _line(value: Any, where: str) -> bytes:
    return (json.dumps(to_json(value, where), allow_nan=False) + "\n").encode()


def _check_name(argument: str, name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{argument} must be a plain name of letters, digits, '_', '-' and '.', got {name!r}")
    return name


def _check_place(folder: Path, overwrite: bool) -> None:
    with explained(folder):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"cannot write {folder}: it is a file; choose another folder")
        occupied = folder.is_dir() and any(folder.iterdir())
    if exists(folder):
        if not overwrite:
            raise ArtifactError(
                f"cannot write {folder}: a result is there already; remove it, choose another folder or overwrite it"
            )
    elif occupied:
        raise ArtifactError(
            f"cannot write {folder}: the folder holds other files and is no bbfast result; choose another folder"
        )


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Failures of the file system as an ArtifactError that names the place and what to do."""
    try:
        yield
    except OSError as error:
        _explain(folder, error.errno, error.strerror or str(error), error)
    except safetensors.SafetensorError as error:
        # The library reports I/O failures as text only.
        code = re.search(r"os error (\d+)", str(error))
        _explain(folder, int(code.group(1)) if code else None, str(error), error)


def _explain(folder: Path, code: int | None, reason: str, error: Exception) -> NoReturn:
    if code in (errno.ENOTEMPTY, errno.EEXIST):
        reason, remedy = "another process has just written a result there", "read that one, or choose another folder"
    elif code is not None:
        reason, remedy = os.strerror(code), _REMEDIES.get(code, "check the folder and the disk")
    else:
        remedy = "check the folder and the disk"
    raise ArtifactError(f"cannot write {folder}: {reason}; {remedy}") from error
