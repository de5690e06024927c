"""Images that a tool is given and what is known of them, and the record of which they were."""

from __future__ import annotations

import dataclasses
import hashlib

from torch import Tensor

__all__ = ["Pairs", "Taken", "View"]


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """Some images and what is known of them.

    Args:
        images: uint8 ``[n, C, H, W]``.
        labels: True classes, int64 ``[n]``.
        given: Labels that they carry for the learner or the attacker, int64 ``[n]``.
        poisoned: Whether they carry the trigger, bool ``[n]``.
        ids: Which samples of their set they are, int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor
    given: Tensor
    poisoned: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def take(self, index: Tensor) -> View:
        """The samples ``index``."""
        return View(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The same test images without and with the trigger.

    Args:
        clean: uint8 ``[n, C, H, W]``.
        triggered: The same images with the trigger, as the backdoor test set has them.
        labels: True classes, int64 ``[n]``.
        targets: What the attacker wants, int64 ``[n]``.
        ids: Sample numbers in the test set, int64 ``[n]``.
    """

    clean: Tensor
    triggered: Tensor
    labels: Tensor
    targets: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return self.clean.shape[0]


class Taken:
    """Which samples were handed out, view by view."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, bytes]] = []

    def add(self, view: str, ids: Tensor) -> None:
        """Note the samples ``ids``, int64 ``[n]``, of a view."""
        self._parts.append((view, ids.numpy().astype("<i8").tobytes()))

    def clear(self) -> None:
        """Forget them all."""
        self._parts.clear()

    def sha256(self) -> str | None:
        """SHA-256 of all names and ids in the order they were handed out; None if there were none."""
        found = hashlib.sha256()
        for view, ids in self._parts:
            found.update(f"{view} {len(ids)}\n".encode() + ids)
        return found.hexdigest() if self._parts else None
