"""What several runs need and one of them makes: kept in a store under the hash of all that it depends on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bbfast.store import Content, Store

__all__ = ["STAGE", "obtain"]

STAGE = "prerequisite"


def obtain(
    store: Store | None,
    kind: str,
    config: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Tensor]],
    *,
    seed: int = 0,
    version: int = 1,
    work: Path | None = None,
) -> dict[str, Tensor]:
    """The prerequisite of these settings, made now if it is not in the store.

    Args:
        store: Where it is kept and found; None keeps nothing.
        kind: What it is ("surrogate", "lf_pattern"); part of its folder's name.
        config: Everything it depends on, fit for JSON, the data it is made from included (``content_hash``).
        make: Makes it; called with a folder for checkpoints.
        seed: Of its random numbers.
        version: Raised when the way it is made changes.
        work: That folder where there is no store; None is a temporary one.

    Returns:
        Its tensors on the CPU. Do not write to them.

    Raises:
        ArtifactError: if the store cannot be read or written.
    """
    config = {"kind": kind, **config}
    if store is None:
        if work is not None:
            return _on_cpu(make(work))
        with tempfile.TemporaryDirectory(prefix="bbfast-") as folder:
            return _on_cpu(make(Path(folder)))

    def content(folder: Path) -> Content:
        return Content(STAGE, {**config, "seed": seed}, tensors={"tensors": make(folder)})

    found = store.get_or_make(STAGE, kind, config, content, seed=seed, version=version, kind=STAGE)
    return found.tensors("tensors")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
