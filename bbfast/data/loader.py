"""Batches of a resident image set: shuffled, augmented and normalised by one kernel call each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bbfast import ops
from bbfast.data.imageset import ImageSet

__all__ = ["Batch", "BatchLoader", "derive_seed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One training batch.

    Args:
        x: Normalised images, float ``[B, C, H, W]``.
        y: Labels the loss is taken against, int64 ``[B]``.
        index: Positions of the samples in the training set, int64 ``[B]``.
        epoch: Epoch number, from 0.
        step: Step within the epoch, from 0.
        role: What each sample is, int8 ``[B]``: 0 clean, 1 poison, 2 cross or cover; None when nobody assigned roles.
        weight: Weight of each sample in the loss, float ``[B]``; None means 1 for all.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int = 0
    step: int = 0
    role: Tensor | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def replace(self, **changes: object) -> Batch:
        """The same batch with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchLoader:
    """Iterates over an image set that stays on the device as uint8; a batch is one ``gather_augment`` call.

    Order, crop and flip of a sample are functions of ``(seed, epoch, position)`` alone. They are drawn on the CPU, so a
    resumed run, another batch size and another device see the same images in the same order.

    Args:
        images: The set; moved to ``device`` once.
        batch_size: Samples a batch.
        seed: Seed of order and augmentation.
        device: Where batches are made; default where the set is.
        dtype: Type of the batches' pixels.
        channels_last: Memory layout of the batches.
        augment: Crop and flip at random; False gives the stored images.
        padding: Zero padding of the random crop, in pixels; 0 means no crop.
        flip: Flip horizontally with probability 1/2.
        shuffle: New order each epoch; False keeps the stored order.
        drop_last: Leave out an incomplete last batch (never the only one).
        merge_single: Add a last batch of one sample to the batch before it: BatchNorm cannot train on one sample.

    Raises:
        ValueError: if ``batch_size`` < 1 or ``padding`` < 0.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        augment: bool = True,
        padding: int = 4,
        flip: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        merge_single: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}")
        self.images = images if device is None else images.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.dtype = dtype
        self.channels_last = channels_last
        self.padding = padding if augment else 0
        self.flip = flip and augment
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.merge_single = merge_single

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sizes())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in order."""
        order, offset, flip = self._draw(epoch)
        labels = self.images.labels[order]
        start = 0
        for step, size in enumerate(self._sizes()):
            part = slice(start, start + size)
            x = ops.gather_augment(
                self.images.images,
                order[part],
                offset=None if offset is None else offset[part],
                flip=None if flip is None else flip[part],
                padding=self.padding,
                mean=self.images.mean,
                std=self.images.std,
                dtype=self.dtype,
                channels_last=self.channels_last,
            )
            yield Batch(x=x, y=labels[part], index=order[part], epoch=epoch, step=step)
            start += size

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Order ``[N]``, crop offsets ``[N, 2]`` and flips ``[N]`` of an epoch, the latter two in that order."""
        n, device = len(self.images), self.images.device
        order = torch.randperm(n, generator=self._generator("order", epoch)) if self.shuffle else torch.arange(n)
        offset = flip = None
        if self.padding:
            drawn = torch.randint(2 * self.padding + 1, (n, 2), generator=self._generator("crop", epoch))
            offset = drawn[order].to(device)
        if self.flip:
            flip = torch.rand(n, generator=self._generator("flip", epoch)).lt(0.5)[order].to(device)
        return order.to(device), offset, flip

    def _generator(self, purpose: str, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed("loader", self.seed, purpose, epoch))

    def _sizes(self) -> list[int]:
        full, rest = divmod(len(self.images), self.batch_size)
        sizes = [self.batch_size] * full
        if rest and not (self.drop_last and full):
            if rest == 1 and full and self.merge_single:
                sizes[-1] += 1
            else:
                sizes.append(rest)
        return sizes
