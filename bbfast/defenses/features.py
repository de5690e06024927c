"""Features of whole sets, made in one pass and shared between the methods that read them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.training.prediction import evaluating

__all__ = ["FeatureCache", "extract_features"]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    images: Tensor,
    role: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
    batch_size: int = 512,
) -> Tensor:
    """One pass over a set: eval mode, no augmentation, stored order, float32.

    Args:
        model: On ``device``; in eval mode for the pass.
        images: uint8 ``[N, C, H, W]``.
        role: Layer role, see :func:`bbfast.models.roles`.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        device: Where to compute.
        batch_size: Images in a forward pass.

    Returns:
        float32 ``[N, d]`` (``penultimate``) or ``[N, ...]``, on ``device``.

    Raises:
        UnsupportedModelError: if the model has no layer of that role.
    """
    from bbfast.models import features

    device = torch.device(device)
    images = images.to(device)
    with evaluating(model):
        parts = [
            features(model, normalised(images, start, batch_size, mean, std), role).float()
            for start in range(0, max(images.shape[0], 1), batch_size)
        ]
    return torch.cat(parts)


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
