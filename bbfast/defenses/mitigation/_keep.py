"""State of a loop that a killed run goes on from."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bbfast import artifact
from bbfast._hashing import content_hash, to_json
from bbfast.data.imageset import ImageSet
from bbfast.errors import ArtifactError

__all__ = ["SAVE_EVERY_SECONDS", "Keeper"]

_log = logging.getLogger(__name__)

SAVE_EVERY_SECONDS = 60.0


class Keeper:
    """Writes the state of one loop into a folder, at most once a minute, and finds it again.

    Args:
        folder: Where; None keeps nothing.
        model: The model that the loop works on.
        images: The images that it works with.
        settings: What else determines the outcome.
    """

    def __init__(self, folder: Path | None, model: nn.Module, images: ImageSet, settings: dict[str, Any]) -> None:
        self._folder, self._identity, self._saved = folder, {}, time.monotonic()
        if folder is not None:
            self._identity = {
                "settings": to_json(settings),
                "images": content_hash({"images": images.images, "labels": images.labels}),
                "model": content_hash(dict(model.state_dict())),
            }

    def find(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Tensors and history of the same loop; what is of another one, or damaged, is left to be overwritten."""
        if self._folder is None or not artifact.exists(self._folder):
            return None
        try:
            found = artifact.read(self._folder, "loop_checkpoint")
        except ArtifactError as error:
            _log.warning("starting anew: %s", error)
            return None
        if found.config != self._identity:
            _log.warning("starting anew: the checkpoint in %s is of another run", self._folder)
            return None
        return found.tensors("state"), list(found.extra["history"])

    def offer(self, tensors: dict[str, Tensor], history: list[dict[str, Any]]) -> None:
        """Write, unless the last time was less than a minute ago."""
        if self._folder is None or time.monotonic() - self._saved < SAVE_EVERY_SECONDS:
            return
        extra = {"history": history}
        stems = {"state": tensors}
        artifact.write(
            self._folder, "loop_checkpoint", config=self._identity, tensors=stems, extra=extra, overwrite=True
        )
        self._saved = time.monotonic()
