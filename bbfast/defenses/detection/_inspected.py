"""The training set as class-wise detectors see it: features in an order that storage has no part in."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError

__all__ = ["Inspected", "demand_role", "finite_features", "inspect"]


@dataclasses.dataclass(frozen=True, eq=False)
class Inspected:
    """Features sorted by given label, within a class by the images' pixels.

    Sums over samples then run in an order that depends on the images alone, so storage order cannot change a bit.

    Args:
        features: float32 ``[N, d]``, finite.
        labels: int64 ``[N]``, rising.
        counts: int64 ``[K]``, samples of each class.
        order: int64 ``[N]``, where each row stands in the stored set.
    """

    features: Tensor
    labels: Tensor
    counts: Tensor
    order: Tensor

    def members(self, c: int) -> slice:
        """The rows of class ``c``."""
        stop = int(self.counts[: c + 1].sum())
        return slice(stop - int(self.counts[c]), stop)

    def stored(self, values: Tensor) -> Tensor:
        """``values`` ``[N]``, one a row, in the order of the stored set and on the CPU."""
        back = torch.empty_like(values)
        back[self.order] = values
        return back.cpu()


def inspect(view: DefenderView, role: str = "penultimate") -> Inspected:
    """The view's training set.

    Raises:
        UnsupportedModelError: if a feature is NaN or infinite.
    """
    data = view.poisoned_train
    features = finite_features(view, "poisoned_train", role)
    labels = data.labels.to(features.device)
    order = content_keys(data.images).to(features.device).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=view.num_classes)
    return Inspected(features[order], labels[order], counts, order)


def finite_features(view: DefenderView, source: str, role: str = "penultimate") -> Tensor:
    """Features of a granted set, ``[N, d]``.

    Raises:
        UnsupportedModelError: if one is NaN or infinite.
    """
    features = view.features(role, source).flatten(1)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise UnsupportedModelError(
            view.method,
            type(view.model).__name__,
            f"its features are NaN or infinite on {broken} of {len(features)} "
            + ("training samples" if source == "poisoned_train" else "clean images"),
            "its training diverged",
        )
    return features


def demand_role(view: DefenderView, role: str = "penultimate") -> None:
    """For ``check``: refuse a model without the layer.

    Raises:
        UnsupportedModelError: if it has none.
    """
    from bbfast.models import roles

    found = roles(view.model)
    if not found.has(role):
        raise UnsupportedModelError(view.method, found.label, f"it has no layer of role {role!r}")
