"""The poisoning protocol: which samples, which labels, which test images (spec/attacks 0.3 to 0.5)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bbfast.data.imageset import ImageSet

__all__ = ["LABEL_MODES", "IndexRng", "LabelMode", "LabelRule", "PoisonedSet", "Role", "draw_index", "poison_count"]

LabelMode = Literal["all2one", "all2all", "clean_label", "one2one"]
LABEL_MODES: tuple[LabelMode, ...] = ("all2one", "all2all", "clean_label", "one2one")
IndexRng = Literal["numpy_legacy", "torch"]


class Role(enum.IntEnum):
    """What a training sample is."""

    CLEAN = 0
    POISON = 1
    CROSS = 2
    """Carries the trigger or noise, but keeps its true label (cross samples of WaNet, cover samples of TaCT)."""


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Who is poisoned and what label follows.

    Args:
        mode: ``all2one``: any sample, target label. ``all2all``: any sample, ``(y + shift) mod K``. ``clean_label``:
            samples of the target class, label unchanged; tested like ``all2one``. ``one2one``: samples of the source
            classes, target label.
        num_classes: K.
        target: Target class, ignored by ``all2all``.
        shift: Label shift of ``all2all``.
        source_classes: Attacked classes of ``one2one``.

    Raises:
        ValueError: if the target or a source class lies outside ``0..K-1``, the source classes hold the target, or the
            shift leaves labels as they are.
    """

    mode: LabelMode
    num_classes: int
    target: int = 0
    shift: int = 1
    source_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        last = self.num_classes - 1
        if self.mode not in LABEL_MODES:
            raise ValueError(f"label_mode must be one of {', '.join(LABEL_MODES)}, got {self.mode!r}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.mode == "all2all":
            if self.shift % self.num_classes == 0:
                raise ValueError(f"shift must not be a multiple of the {self.num_classes} classes, got {self.shift}")
        elif not 0 <= self.target <= last:
            raise ValueError(f"target must be a class in 0..{last}, got {self.target}")
        if self.mode == "one2one":
            outside = [c for c in self.source_classes if not 0 <= c <= last]
            if outside or not self.source_classes:
                raise ValueError(f"source_classes must name classes in 0..{last}, got {list(self.source_classes)}")
            if self.target in self.source_classes:
                raise ValueError(
                    f"source_classes must not hold the target {self.target}, got {list(self.source_classes)}"
                )

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``ValueError`` if a label lies outside the classes."""
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            bad = int(((labels < 0) | (labels >= self.num_classes)).nonzero()[0])
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {int(labels[bad])} at sample {bad}")

    def wanted(self, labels: Tensor) -> Tensor:
        """What the attacker wants a triggered image of each label to be taken for, int64 ``[N]``."""
        if self.mode == "all2all":
            return (labels + self.shift) % self.num_classes
        return torch.full_like(labels, self.target)

    def given(self, labels: Tensor) -> Tensor:
        """Label that a poisoned training sample gets, int64 ``[N]``."""
        return labels.clone() if self.mode == "clean_label" else self.wanted(labels)

    def trainable(self, labels: Tensor) -> Tensor:
        """Which training samples may be poisoned, bool ``[N]``; dirty-label modes do not avoid the target class."""
        if self.mode == "clean_label":
            return labels == self.target
        if self.mode == "one2one":
            return self._from_source(labels)
        return torch.ones_like(labels, dtype=torch.bool)

    def testable(self, labels: Tensor) -> Tensor:
        """Which test images the attack is measured on, bool ``[N]``."""
        if self.mode == "all2all":
            return torch.ones_like(labels, dtype=torch.bool)
        if self.mode == "one2one":
            return self._from_source(labels)
        return labels != self.target

    def leaking(self, labels: Tensor) -> Tensor:
        """Test images of classes that a source-specific trigger should leave alone, bool ``[N]``; else all False."""
        if self.mode != "one2one":
            return torch.zeros_like(labels, dtype=torch.bool)
        return ~self._from_source(labels) & (labels != self.target)

    def _from_source(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(self.source_classes, dtype=labels.dtype, device=labels.device))


def poison_count(total: int, ratio: float | None, count: int | None) -> int:
    """Number of samples to poison: ``count`` if given, else ``round(ratio * total)``, halves to even.

    The ratio is a share of the whole set in every label mode.

    Raises:
        ValueError: if both are None, the ratio is outside (0, 1], the count is outside ``1..total``, or no sample
            results.
    """
    if total < 1:
        raise ValueError("the training set is empty: there is nothing to poison")
    if count is not None:
        if not 1 <= count <= total:
            raise ValueError(f"count must lie in 1..{total}, the size of the training set, got {count}")
        return count
    if ratio is None:
        raise ValueError("one of ratio and count is needed, got neither")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    number = round(ratio * total)
    if number == 0:
        raise ValueError(f"ratio {ratio} of {total} samples poisons none; use at least {1 / total:.3g} or give a count")
    return number


def draw_index(candidates: Tensor, count: int, seed: int, rng: IndexRng = "numpy_legacy") -> Tensor:
    """Draw ``count`` of the ``candidates`` without replacement.

    A smaller count gives a prefix of a larger one.

    Args:
        candidates: int64 ``[M]``, ascending.
        count: How many, at most M.
        seed: In ``0..2**32-1``.
        rng: ``numpy_legacy`` draws as ``numpy.random.RandomState(seed).choice`` does, which is the index set of the
            reference implementation; ``torch`` uses a ``torch.Generator``.

    Returns:
        int64 ``[count]`` in the order drawn, on the device of ``candidates``.

    Raises:
        ValueError: if ``count`` exceeds the candidates or the seed is out of range.
    """
    check_seed(seed)
    total = int(candidates.shape[0])
    if not 0 <= count <= total:
        raise ValueError(f"count must lie in 0..{total}, the number of candidates, got {count}")
    if rng == "numpy_legacy":
        # Not Generator: the legacy stream is frozen by numpy's policy, so the set is the same with every numpy.
        picked = torch.from_numpy(np.random.RandomState(seed).permutation(total)[:count].astype(np.int64))
    else:
        picked = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return candidates[picked.to(candidates.device)]


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an integer in ``0..2**32-1``."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__} {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0..2**32-1, got {seed}")


@dataclasses.dataclass(frozen=True, eq=False)
class PoisonedSet:
    """A poisoned training set together with the ground truth that defenders never see.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: Labels as given to the learner, int64 ``[N]``.
        poisoned: Which samples are poisoned, bool ``[N]``; cross and cover samples are not.
        original_labels: True labels, int64 ``[N]``.
        role: int8 ``[N]``, see :class:`Role`.
        mean: Normalisation of the set, see :class:`~bbfast.data.ImageSet`.
        std: Normalisation of the set.
        ids: Stable numbers of the samples, int64 ``[N]``.
    """

    images: Tensor
    labels: Tensor
    poisoned: Tensor
    original_labels: Tensor
    role: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    ids: Tensor | None = None

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def ratio(self) -> float:
        """The true share of poisoned samples, which ``clip_to_class`` may have made smaller than asked for."""
        return float(self.poisoned.double().mean())

    def as_imageset(self) -> ImageSet:
        """What the learner gets: images and given labels."""
        ids = {} if self.ids is None else {"ids": self.ids}
        return ImageSet(self.images, self.labels, mean=self.mean, std=self.std, **ids)
