"""What a caller may hang into a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Callbacks", "EpochInfo"]


@dataclasses.dataclass(frozen=True)
class EpochInfo:
    """Where a run stands.

    Args:
        epoch: The epoch just finished, from 0.
        epochs: Epochs in all.
        model: The model, in training; a callback that changes it changes the run.
        metrics: The epoch's history row: loss, train_acc, lr, seconds, and c_acc, asr, r_acc if measured.
    """

    epoch: int
    epochs: int
    model: nn.Module
    metrics: dict[str, Any]


class Callbacks:
    """Calls ``on_epoch_end(info)`` and ``on_end(info)`` of those objects that have them.

    Raises:
        TypeError: if an object has neither: it would never be called.
    """

    _EVENTS = ("on_epoch_end", "on_end")

    def __init__(self, callbacks: Sequence[Any]) -> None:
        for callback in callbacks:
            if not any(callable(getattr(callback, event, None)) for event in self._EVENTS):
                raise TypeError(f"callbacks must have a method {' or '.join(self._EVENTS)}, got {callback!r}")
        self._callbacks = tuple(callbacks)

    def epoch_end(self, info: EpochInfo) -> None:
        """An epoch is finished, measured, and not yet in a checkpoint."""
        self._call("on_epoch_end", info)

    def end(self, info: EpochInfo) -> None:
        """The last epoch is finished."""
        self._call("on_end", info)

    def _call(self, event: str, info: EpochInfo) -> None:
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(info)
