"""Decoded data sets on disk: made once, memory-mapped afterwards, rebuilt when stale or damaged.

A cache entry is an artefact folder (:mod:`bbfast.artifact`): it appears whole or not at all and is checked when read.
Its name comes from the data set, its place and the options that change pixels; inside stands a signature of the source
files (names, sizes, modification times). One entry a data set and option choice: a changed source replaces it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bbfast import artifact
from bbfast._hashing import sha256_json
from bbfast.data.datapair import fingerprint
from bbfast.data.imageset import ImageSet
from bbfast.errors import ArtifactError

__all__ = ["Decoded", "cache_root", "cached", "signature"]

VERSION = 1
"""Raised when decoding changes, so that entries of older versions are not taken."""

_KIND = "dataset-cache"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """Pixels and labels of a data set before normalisation is chosen.

    Args:
        train_images, test_images: uint8 ``[N, C, H, W]``.
        train_labels, test_labels: int64 ``[N]``.
        class_names: One name a class.
        fingerprint: SHA-256 over all of it but the names; empty computes it when a pair is made.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    fingerprint: str = ""


def cache_root(choice: str | Path | bool | None = None) -> Path | None:
    """The folder that holds cache entries.

    Args:
        choice: A folder; None or True for the environment variable ``BBFAST_CACHE`` or else the user's cache folder of
            the platform (``~/.cache/bbfast`` on Linux); False for no cache at all.
    """
    if choice is False:
        return None
    if choice is None or choice is True:
        configured = os.environ.get("BBFAST_CACHE")
        return Path(configured).expanduser() if configured else _user_cache()
    return Path(choice).expanduser()


def signature(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over sizes, modification times and names below ``root`` of ``files``, in any order and spelling of root.

    Raises:
        OSError: if a file cannot be looked up.
    """
    lines = []
    for path in files:
        status = path.stat()
        lines.append(f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def cached(
    name: str,
    root: Path,
    options: Mapping[str, Any],
    files: Iterable[Path],
    decode: Callable[[], Decoded],
    cache: Path | None,
) -> Decoded:
    """The decoded data set from the cache, or from ``decode``, whose result is then put there.

    A cache that cannot be written is reported by a logged warning and done without.

    Args:
        name: The data set.
        root: Where its files lie.
        options: Those that change pixels, labels or their order.
        files: The files that ``decode`` reads.
        decode: Makes the data set from its files.
        cache: Folder of the cache; None decodes every time.
    """
    if cache is None:
        return decode()
    key = sha256_json([VERSION, artifact.FORMAT_VERSION, name, str(root.resolve()), options])
    entry = cache / "datasets" / f"{name}-{key[:16]}"
    source = signature(files, root)
    found = _read(entry, source)
    if found is not None:
        return found
    decoded = _with_fingerprint(decode())
    _write(entry, source, decoded, {"name": name, "root": str(root), "options": dict(options)})
    return _read(entry, source) or decoded


def _read(entry: Path, source: str) -> Decoded | None:
    if not artifact.exists(entry):
        return None
    try:
        found = artifact.read(entry, _KIND)
        if found.config["source"] != source:
            _log.info("the files behind %s have changed; decoding them again", entry)
            return None
        return Decoded(
            **found.tensors("data"),
            class_names=tuple(found.extra["class_names"]),
            fingerprint=found.config["fingerprint"],
        )
    except ArtifactError as error:
        _log.warning("the data set cache is damaged and is made again: %s", error)
        return None


def _write(entry: Path, source: str, decoded: Decoded, description: dict[str, Any]) -> None:
    tensors = {f.name: getattr(decoded, f.name) for f in dataclasses.fields(decoded)}
    try:
        # Another process may have made the entry meanwhile; a damaged one can lack what marks it as replaceable.
        if entry.exists() and not artifact.exists(entry):
            shutil.rmtree(entry)
        artifact.write(
            entry,
            _KIND,
            config={**description, "source": source, "fingerprint": decoded.fingerprint},
            tensors={"data": {name: value for name, value in tensors.items() if isinstance(value, Tensor)}},
            extra={"class_names": list(decoded.class_names)},
            overwrite=True,
        )
    except (ArtifactError, OSError) as error:
        _log.warning(
            "the decoded data set cannot be cached and is decoded again next time: %s; "
            "set BBFAST_CACHE or cache= to a folder that can be written, or cache=False",
            error,
        )


def _with_fingerprint(decoded: Decoded) -> Decoded:
    train = ImageSet(decoded.train_images, decoded.train_labels)
    test = ImageSet(decoded.test_images, decoded.test_labels)
    return dataclasses.replace(decoded, fingerprint=fingerprint(train, test))


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "bbfast" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bbfast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bbfast"
