"""Checkpoints at epoch ends: a killed run goes on from the last one, to the same bits."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from bbfast import artifact
from bbfast._hashing import sha256_json, to_json
from bbfast.errors import CorruptArtifactError, NewerFormatError

__all__ = ["Checkpoint", "Checkpoints"]

_log = logging.getLogger(__name__)
_KIND = "checkpoint"
# Writing takes at most this share of the time, so that runs of many short epochs are not slowed down by it.
_LARGEST_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A run after ``epochs_done`` epochs.

    Args:
        epochs_done: Finished epochs.
        history: Their rows.
        values: Small state: schedule, loss scaler, seconds so far.
        tensors: ``model``, ``optimizer``, ``program`` and ``recording`` to named tensors.
    """

    epochs_done: int
    history: list[dict[str, Any]]
    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """Writes and finds the checkpoint of one run in a folder; the newest replaces the one before in one step.

    Args:
        folder: Where; the checkpoint is the artefact ``last`` in it. None keeps none.
        identity: Everything that makes the run what it is; a checkpoint of another run is not taken.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]) -> None:
        self._path = None if folder is None else Path(folder) / "last"
        self._identity = identity
        self._next_write = 0.0

    @property
    def active(self) -> bool:
        """Whether checkpoints are kept at all."""
        return self._path is not None

    def find(self) -> Checkpoint | None:
        """The checkpoint to go on from; one that is damaged or of another run is left aside, with a warning in the log.

        Raises:
            NewerFormatError: if a newer bbfast wrote it: it is not overwritten.
        """
        if self._path is None or not artifact.exists(self._path):
            return None
        try:
            found = artifact.read(self._path, _KIND)
            wanted, has = sha256_json(self._identity), found.extra.get("identity_hash")
            if has != wanted:
                names = {*self._identity, *found.config}
                different = sorted(k for k in names if found.config.get(k) != to_json(self._identity.get(k)))
                _log.warning("checkpoint %s is of another run (%s): starting anew", self._path, ", ".join(different))
                return None
            stems = ("model", "optimizer", "program", "recording")
            tensors = {stem: found.tensors(stem) if stem in found.extra["stems"] else {} for stem in stems}
            extra = found.extra
            return Checkpoint(extra["epochs_done"], extra["history"], extra["values"], tensors)
        except NewerFormatError:
            raise
        except (CorruptArtifactError, KeyError) as error:
            _log.warning("checkpoint %s cannot be used, starting anew: %s", self._path, error)
            return None

    def due(self, last: bool) -> bool:
        """Whether to write now: after the last epoch always, else if writing stays a small share of the time."""
        return self.active and (last or time.monotonic() >= self._next_write)

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint.

        Raises:
            ArtifactError: if the folder cannot be written; the old checkpoint stays whole.
        """
        assert self._path is not None
        started = time.monotonic()
        tensors = {stem: named for stem, named in checkpoint.tensors.items() if named}
        artifact.write(
            self._path,
            _KIND,
            config=self._identity,
            tensors=tensors,
            extra={
                "identity_hash": sha256_json(self._identity),
                "stems": sorted(tensors),
                "epochs_done": checkpoint.epochs_done,
                "history": checkpoint.history,
                "values": checkpoint.values,
            },
            overwrite=True,
        )
        ended = time.monotonic()
        self._next_write = ended + (ended - started) / _LARGEST_SHARE
