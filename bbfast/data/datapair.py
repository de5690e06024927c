"""A training set and a test set that belong together, with what every consumer of them must agree on."""

from __future__ import annotations

import dataclasses

import torch

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet

__all__ = ["MOST_CLASSES", "DataPair", "fingerprint"]

MOST_CLASSES = 1 << 20
"""Labels beyond are no class numbers (a hash, a time): every class gets a name, so they would fill the memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class DataPair:
    """Training and test images of one task.

    Only ``train`` and ``test`` must be given; the rest is taken from them.

    Args:
        train: Training set.
        test: Test set, images of the same size.
        name: Name of the data set; recipes look up their preset by it.
        num_classes: Number of classes; 0 takes the largest label plus one.
        class_names: One name a class; empty takes the class numbers.
        image_size: ``(C, H, W)``; empty takes that of the images.
        mean: Per-channel mean that models expect to be subtracted, in 0..1 units; empty takes that of ``train``.
        std: Per-channel standard deviation that models expect to be divided by; empty takes that of ``train``.
        flip: Whether training flips images horizontally (attacks.md 0.2: only CIFAR-10 does).
        padding: Zero padding of the random training crop, in pixels.
        fingerprint: SHA-256 over pixels and labels, 64 hexadecimal digits; empty computes it.

    Raises:
        ValueError: if image sizes differ, a label is not below ``num_classes``, there are more than 2**20 classes,
            ``class_names`` has another length, or ``padding`` is negative.
    """

    train: ImageSet
    test: ImageSet
    name: str = "custom"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    image_size: tuple[int, int, int] | tuple[()] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    padding: int = 4
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.test.image_size != self.train.image_size:
            sizes = f"{self.train.image_size} and {self.test.image_size}"
            raise ValueError(f"train and test images must have one size, got {sizes}")
        if self.image_size and tuple(self.image_size) != self.train.image_size:
            given = tuple(self.image_size)
            raise ValueError(f"image_size must be that of the images, {self.train.image_size}, got {given}")
        if self.padding < 0:
            raise ValueError(f"padding must be >= 0, got {self.padding}")
        self._set("image_size", self.train.image_size)
        largest = max((int(part.labels.max()) for part in (self.train, self.test) if len(part)), default=-1)
        self._set("num_classes", self.num_classes or largest + 1)
        if largest >= self.num_classes:
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {largest}")
        if self.num_classes > MOST_CLASSES:
            came = f"{self.num_classes} for labels of up to {largest}"
            raise ValueError(f"num_classes must be at most {MOST_CLASSES}, got {came}")
        self._set("class_names", tuple(map(str, self.class_names)) or tuple(map(str, range(self.num_classes))))
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names must have {self.num_classes} names, got {len(self.class_names)}")
        self._set("mean", tuple(map(float, self.mean)) or self.train.mean)
        self._set("std", tuple(map(float, self.std)) or self.train.std)
        for part in ("train", "test"):
            self._set(part, dataclasses.replace(getattr(self, part), mean=self.mean, std=self.std))
        self._set("fingerprint", self.fingerprint or fingerprint(self.train, self.test))

    def to(self, device: torch.device | str) -> DataPair:
        """The same pair with both sets on ``device``."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def fingerprint(train: ImageSet, test: ImageSet) -> str:
    """SHA-256 over the pixels and labels of both sets (not their normalisation), 64 hexadecimal digits."""
    parts = {"train": train, "test": test}
    rows = {f"{name}_{row}": getattr(part, row) for name, part in parts.items() for row in ("images", "labels")}
    return content_hash(rows)
