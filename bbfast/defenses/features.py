"""What methods read of whole sets, made in one pass and shared between them."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.defenses._content import content_keys
from bbfast.training.prediction import evaluating

__all__ = ["Apart", "FeatureCache", "FeatureReader", "Reader", "extract_features", "read_set"]


PASS_BATCH = 256


class Reader(ABC):
    """Makes something of a set from one forward pass over it, batch by batch.

    Several readers of one set share the pass (:func:`read_set`), so what passes at a layer need not be kept by more
    than those who need all of it.
    """

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Layers whose features it wants, see :func:`bbfast.models.roles`."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What tells its outcome from that of other readers of the same set and model."""

    @abstractmethod
    def begin(self, total: int, device: torch.device) -> None:
        """A pass over ``total`` images starts."""

    @abstractmethod
    def batch(self, index: Tensor, found: Mapping[str, Tensor], logits: Tensor) -> None:
        """Take in one batch.

        Args:
            index: int64 ``[B]``, which images of the set these are.
            found: Role to feature ``[B, ...]``, not to be changed.
            logits: ``[B, K]``.
        """

    @abstractmethod
    def outcome(self) -> Any:
        """What was made, after the last batch."""


class FeatureReader(Reader):
    """Keeps the features of one role: float32 ``[N, ...]`` in the set's order."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._total = 0
        self._kept: Tensor | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return (self._role,)

    @property
    def key(self) -> Hashable:
        return self._role

    def begin(self, total: int, device: torch.device) -> None:
        self._total, self._kept = total, None

    def batch(self, index: Tensor, found: Mapping[str, Tensor], logits: Tensor) -> None:
        values = found[self._role]
        if self._kept is None:
            self._kept = torch.empty(self._total, *values.shape[1:], device=values.device)
        self._kept[index] = values.float()

    def outcome(self) -> Tensor:
        assert self._kept is not None
        return self._kept


class Apart(Reader):
    """A reader whose failure does not end the pass for the others: it is raised by :meth:`outcome`."""

    def __init__(self, wrapped: Reader) -> None:
        self.wrapped = wrapped
        self._failure: Exception | None = None
        self._made: list[Any] = []

    @property
    def roles(self) -> tuple[str, ...]:
        return self.wrapped.roles

    @property
    def key(self) -> Hashable:
        return self.wrapped.key

    def begin(self, total: int, device: torch.device) -> None:
        self.wrapped.begin(total, device)

    def batch(self, index: Tensor, found: Mapping[str, Tensor], logits: Tensor) -> None:
        if self._failure is None:
            try:
                self.wrapped.batch(index, found, logits)
            except Exception as error:
                self._failure = error

    def outcome(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if not self._made:
            self._made.append(self.wrapped.outcome())
        return self._made[0]


@torch.no_grad()
def read_set(
    model: nn.Module,
    images: Tensor,
    readers: Sequence[Reader],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
) -> None:
    """Run ``model`` once over a set, in eval mode and without augmentation, and let every reader take in each batch.

    Images come in an order given by their pixels, so that neither the storage order nor the company of other readers
    changes a bit of what a reader sees.

    Args:
        model: On ``device``; in eval mode for the pass.
        images: uint8 ``[N, C, H, W]``.
        readers: One or more.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        device: Where to compute.

    Raises:
        UnsupportedModelError: if the model has no layer of a role.
    """
    from bbfast.models import forward_features

    device = torch.device(device)
    images = images.to(device)
    roles = sorted({role for reader in readers for role in reader.roles})
    order = content_keys(images).argsort(stable=True)
    for reader in readers:
        reader.begin(len(images), device)
    with evaluating(model):
        # A set without images still makes one empty batch: it shows the shapes.
        for index in order.split(PASS_BATCH):
            found, logits = forward_features(model, ops.gather_augment(images, index, mean=mean, std=std), roles)
            for reader in readers:
                reader.batch(index, found, logits)


def extract_features(
    model: nn.Module,
    images: Tensor,
    role: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
) -> Tensor:
    """Features of a role, float32 ``[N, ...]`` on ``device`` in the set's order; arguments as of :func:`read_set`."""
    reader = FeatureReader(role)
    read_set(model, images, [reader], mean, std, device)
    return reader.outcome()


def normalised(
    images: Tensor, start: int, size: int, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool = False
) -> Tensor:
    """Images ``start`` to ``start + size`` as models want them: float32 ``[<=size, C, H, W]``, normalised."""
    stop = min(start + size, images.shape[0])
    index = torch.arange(start, stop, device=images.device)
    return ops.gather_augment(
        images,
        index,
        mean=mean,
        std=std,
        channels_last=channels_last,
    )


class FeatureCache:
    """Features that several defenses of the same attack share; give one to each :func:`bbfast.defend` call.

    It belongs to the runner. A view gets tensors from it, never the cache, so a defense finds no features of sets that
    it was not granted. Entries are kept for one model; another model, or the same one changed in place, empties it.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, Hashable], Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._state: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, model: nn.Module, draws: Mapping[str, Hashable]) -> dict[tuple[str, str], Tensor]:
        """Features by (source, role) of ``model``.

        Args:
            model: The undefended model.
            draws: For each source granted, what tells one draw of it from another (seed, fraction).
        """
        with self._lock:
            self._bind(model)
            return {
                (source, role): tensor
                for (source, role, draw), tensor in self._entries.items()
                if source in draws and draws[source] == draw
            }

    def put(self, model: nn.Module, draws: Mapping[str, Hashable], features: Mapping[tuple[str, str], Tensor]) -> None:
        """Keep ``features``, given by (source, role), for later calls of :meth:`take`."""
        with self._lock:
            self._bind(model)
            for (source, role), tensor in features.items():
                if source in draws:
                    self._entries[(source, role, draws[source])] = tensor

    def _bind(self, model: nn.Module) -> None:
        state = tuple(tensor._version for tensor in (*model.parameters(), *model.buffers()))
        if self._model is None or self._model() is not model or state != self._state:
            self._entries.clear()
            self._model, self._state = weakref.ref(model), state
