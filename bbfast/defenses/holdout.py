"""Who gets which clean images: hold-out, reserve, the defender's own split, and the stream of incoming images.

Every draw depends on the seed and the data alone, not on the method, so that all methods of one comparison get the same
images.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.data.loader import derive_seed
from bbfast.errors import DataRequirementError

__all__ = ["StreamTruth", "draw_holdout", "draw_reserve", "make_stream", "split_stratified", "without_ids"]

S = TypeVar("S", bound=ImageSet)


def draw_holdout(labels: Tensor, fraction: float, num_classes: int, seed: int, stratified: bool = False) -> Tensor:
    """Positions of the hold-out H in the clean training set, without replacement, in random order.

    Args:
        labels: True labels of the training set, int64 ``[N]``.
        fraction: Part of the training set, in ``(0, 1]``: ``int(fraction * N)`` images are drawn.
        num_classes: Number of classes K.
        seed: Seed of the draw.
        stratified: ``int(fraction * N / K)`` of each class instead of a uniform draw (as FT-SAM and NPD do).

    Returns:
        int64 ``[n_H]``.

    Raises:
        DataRequirementError: if that is less than one image a class, or a class has fewer than are asked of it.

    Source: spec of the protocol, section 1.1 points 2 to 4 (BackdoorBench: same rule, other generator).
    """
    n = labels.numel()
    size = int(fraction * n)
    if size < num_classes:
        raise DataRequirementError(
            f"the clean hold-out would have {size} images for {num_classes} classes: clean_fraction={fraction} of {n} "
            f"training images; it takes one image a class, that is clean_fraction >= {num_classes / max(n, 1):.4g}"
        )
    generator = torch.Generator().manual_seed(derive_seed("holdout", seed))
    if not stratified:
        return torch.randperm(n, generator=generator)[:size]
    each = size // num_classes
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    short = torch.nonzero(counts[:num_classes] < each).flatten().tolist()
    if short:
        raise DataRequirementError(
            f"a stratified hold-out takes {each} images of each class, but class {short[0]} has "
            f"{int(counts[short[0]])} ({len(short)} classes have too few); lower clean_fraction (now {fraction}) or "
            "draw uniformly (stratified=False)"
        )
    index = _per_class(labels.cpu(), num_classes, each, generator)
    return index[torch.randperm(index.numel(), generator=generator)]


def draw_reserve(labels: Tensor, per_class: int, num_classes: int, seed: int) -> Tensor:
    """Positions of the calibration reserve in the clean test set: ``per_class`` images of each class, in random order.

    Raises:
        DataRequirementError: if a class would have no test image left for the evaluation.

    Source: spec of the detectors, section 0.4 point 1.
    """
    counts = torch.bincount(labels.cpu(), minlength=num_classes)[:num_classes]
    short = torch.nonzero(counts <= per_class).flatten().tolist()
    if short:
        raise DataRequirementError(
            f"the reserve takes {per_class} test images of each class and must leave some for the evaluation, but "
            f"class {short[0]} has {int(counts[short[0]])} ({len(short)} classes have too few)"
        )
    generator = torch.Generator().manual_seed(derive_seed("reserve", seed))
    index = _per_class(labels.cpu(), num_classes, per_class, generator)
    return index[torch.randperm(index.numel(), generator=generator)]


def split_stratified(
    labels: Tensor, val_fraction: float, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Positions of two parts, ``(fit, val)``, split class by class; each part has at least one sample of every class.

    Args:
        labels: int64 ``[n]``.
        val_fraction: Part of each class that goes to ``val``, rounded to whole samples, in ``(0, 1)``.
        num_classes: Number of classes.
        generator: CPU generator of the draw.

    Returns:
        Two sorted int64 tensors.

    Raises:
        ValueError: if ``val_fraction`` lies outside ``(0, 1)``.
        DataRequirementError: if a class has fewer than two samples.

    Source: spec of the protocol, section 1.4.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=num_classes)[:num_classes]
    short = torch.nonzero(counts < 2).flatten().tolist()
    if short:
        shown = ", ".join(f"class {c}: {int(counts[c])}" for c in short[:5]) + (", ..." if len(short) > 5 else "")
        raise DataRequirementError(
            f"splitting the clean hold-out of {labels.numel()} images for selection needs at least two of each of "
            f"{num_classes} classes, but {shown}; raise clean_fraction, draw with stratified=True, or let the method "
            "select nothing (val_fraction=0 with a fixed threshold)"
        )
    val = []
    for c in range(num_classes):
        members = torch.nonzero(labels == c).flatten()
        take = min(max(round(val_fraction * members.numel()), 1), members.numel() - 1)
        val.append(members[torch.randperm(members.numel(), generator=generator)[:take]])
    chosen = torch.zeros(labels.numel(), dtype=torch.bool)
    chosen[torch.cat(val)] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def without_ids(images: S, ids: Tensor) -> S:
    """``images`` without the samples whose ids are in ``ids``; of the same class, a BackdoorSet too."""
    kept: S = images.subset(~torch.isin(images.ids, ids.to(images.ids.device)))  # type: ignore[assignment]
    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class StreamTruth:
    """What the runner knows about the stream and no defense does.

    Args:
        images: uint8 ``[M, C, H, W]``, the stream.
        triggered: bool ``[M]``, which images carry the trigger.
        wanted: int64 ``[M]``, what the model must predict for the image to count in the ``effective`` view: the true
            label of a clean copy, the attacker's label of a triggered one.
    """

    images: Tensor
    triggered: Tensor
    wanted: Tensor


def make_stream(test: ImageSet, backdoor_test: BackdoorSet, seed: int) -> StreamTruth:
    """Incoming images: for every backdoor test image one clean and one triggered copy, shuffled.

    Args:
        test: Clean test images, the reserve already removed.
        backdoor_test: Triggered test images, the reserve already removed; ``ids`` name the clean image in ``test``.
        seed: Seed of the order.

    Returns:
        ``2 n`` images and the truth about them, on the CPU.

    Raises:
        DataRequirementError: if there is no backdoor test image or one whose clean image is not in ``test``.

    Source: spec of the detectors, section 0.4 point 3.
    """
    if not len(backdoor_test):
        raise DataRequirementError("the attack has no backdoor test images, so there is no stream to inspect")
    order = torch.argsort(test.ids)
    slot = torch.searchsorted(test.ids[order], backdoor_test.ids).clamp_(max=max(len(test) - 1, 0))
    position = order[slot] if len(test) else slot
    if not len(test) or not torch.equal(test.ids[position], backdoor_test.ids):
        raise DataRequirementError(
            "backdoor_test.ids must name clean images of test, so that each triggered image can be paired with its "
            "clean copy"
        )
    n = len(backdoor_test)
    shuffle = torch.randperm(2 * n, generator=torch.Generator().manual_seed(derive_seed("stream", seed)))
    images = torch.cat([test.images[position].cpu(), backdoor_test.images.cpu()])[shuffle]
    triggered = (torch.arange(2 * n) >= n)[shuffle]
    wanted = torch.cat([test.labels[position].cpu(), backdoor_test.labels.cpu()])[shuffle]
    return StreamTruth(images, triggered, wanted)


def _per_class(labels: Tensor, num_classes: int, each: int, generator: torch.Generator) -> Tensor:
    parts = []
    for c in range(num_classes):
        members = torch.nonzero(labels == c).flatten()
        parts.append(members[torch.randperm(members.numel(), generator=generator)[:each]])
    return torch.cat(parts)
