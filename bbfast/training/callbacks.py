"""What a caller may hang into a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch

__all__ = ["Callbacks", "EpochInfo", "StartInfo", "StepInfo"]


@dataclasses.dataclass(frozen=True, eq=False)
class StartInfo:
    """A run that is about to begin or to go on.

    Args:
        model: The model, on ``device``.
        train: The training set, on ``device``.
        test: What C-Acc is measured on, on ``device``; None if it is not.
        backdoor_test: What ASR is measured on, on ``device``; None if it is not.
        epochs: Epochs in all.
        steps: Steps an epoch.
        device: Where the run computes.
    """

    model: nn.Module
    train: ImageSet
    test: ImageSet | None
    backdoor_test: ImageSet | None
    epochs: int
    steps: int
    device: torch.device


@dataclasses.dataclass(frozen=True, eq=False)
class StepInfo:
    """A step that has been taken.

    Args:
        batch: What it was taken on.
        loss: Its loss, scalar.
        logits: float ``[B, K]``, of the training forward pass, before the step; None if there are none. The memory may
            be written to by the next step.
        model: The model after the step, in training mode; whoever changes it changes the run.
    """

    batch: Batch
    loss: Tensor
    logits: Tensor | None
    model: nn.Module


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
    """Calls those of these methods that an object has: ``on_poisoned(flags)``, ``on_start(info)``, ``on_step(info)``,
    ``on_epoch_end(info)``, ``on_end(info)``.

    One that carries something from epoch to epoch also has ``state() -> dict[str, Tensor]``, ``load_state(tensors)``
    and ``describe() -> dict`` (JSON): its state is part of the checkpoint, and a checkpoint without it, or of another
    description, is not taken, so that what it keeps is always of the whole run.

    Raises:
        TypeError: if an object has none of the events (it would never be called), or a state without the rest.
    """

    _EVENTS = ("on_start", "on_step", "on_epoch_end", "on_end")
    _KEEPS = ("state", "load_state", "describe")

    def __init__(self, callbacks: Sequence[Any]) -> None:
        for callback in callbacks:
            if not any(callable(getattr(callback, event, None)) for event in self._EVENTS):
                raise TypeError(f"callbacks must have a method {' or '.join(self._EVENTS)}, got {callback!r}")
            missing = [name for name in self._KEEPS if not callable(getattr(callback, name, None))]
            if hasattr(callback, "state") and missing:
                raise TypeError(f"callbacks that have a state must have {', '.join(missing)} too, got {callback!r}")
        self._callbacks = tuple(callbacks)
        self._keeping = tuple(callback for callback in callbacks if hasattr(callback, "state"))
        self._on_step = tuple(callback.on_step for callback in callbacks if hasattr(callback, "on_step"))

    def poisoned(self, flags: Tensor) -> None:
        """Which training samples are poisoned, bool ``[N]``: known before the training of a poison-only attack."""
        self._call("on_poisoned", flags)

    def start(self, info: StartInfo) -> None:
        """The run begins, or is about to be given the state of a checkpoint."""
        self._call("on_start", info)

    def step(self, batch: Batch, loss: Tensor, logits: Tensor | None, model: nn.Module) -> None:
        """A step has been taken."""
        if self._on_step:
            info = StepInfo(batch, loss, logits, model)
            for method in self._on_step:
                method(info)

    def epoch_end(self, info: EpochInfo) -> None:
        """An epoch is finished, measured, and not yet in a checkpoint."""
        self._call("on_epoch_end", info)

    def end(self, info: EpochInfo) -> None:
        """The last epoch is finished."""
        self._call("on_end", info)

    def describe(self) -> list[dict[str, Any]]:
        """What is kept across epochs, for the identity of a checkpoint."""
        return [callback.describe() for callback in self._keeping]

    def state(self) -> dict[str, Tensor]:
        """What all of them carry from one epoch to the next."""
        return {f"{i}.{name}": value for i, kept in enumerate(self._keeping) for name, value in kept.state().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        for i, callback in enumerate(self._keeping):
            callback.load_state(dict(self._own(tensors, f"{i}.")))

    @staticmethod
    def _own(tensors: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
        return ((name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix))

    def _call(self, event: str, info: object) -> None:
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(info)
