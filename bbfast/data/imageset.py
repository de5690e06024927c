"""Images and labels as they are stored: uint8 pixels, int64 labels, and the normalisation that models expect."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["BackdoorSet", "ImageSet"]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """A set of labelled images in memory, on disk (memory-mapped) or on a device.

    Args:
        images: uint8 ``[N, C, H, W]``, 0..255, as stored: before augmentation and normalisation.
        labels: int64 ``[N]``, non-negative class numbers.
        mean: Per-channel mean that models expect to be subtracted, in 0..1 units; empty means 0.
        std: Per-channel standard deviation that models expect to be divided by, in 0..1 units; empty means 1.
        ids: int64 ``[N]``, stable numbers of the samples; default ``0..N-1``. Subsets keep them.

    Raises:
        TypeError: if ``images`` is not uint8, ``labels`` or ``ids`` not int64.
        ValueError: if shapes or devices do not fit, a label is negative, or ``mean`` / ``std`` do not have one finite
            value a channel.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    ids: Tensor = dataclasses.field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        n = _check_images(self.images)
        _check_classes("labels", self.labels, n, self.device)
        channels = self.images.shape[1]
        object.__setattr__(self, "mean", tuple(map(float, self.mean)) or (0.0,) * channels)
        object.__setattr__(self, "std", tuple(map(float, self.std)) or (1.0,) * channels)
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean and std must have one value for each of {channels} channels, got {self.mean} and {self.std}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std, default=1.0) <= 0:
            raise ValueError(f"mean must be finite and std finite and positive, got {self.mean} and {self.std}")
        object.__setattr__(self, "ids", _ids(self.ids, n, self.device))

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, key: slice | Tensor) -> ImageSet:
        """The samples of a slice (a view of the same memory), an int64 index tensor or a bool mask (copies)."""
        if isinstance(key, slice):
            return self._select(key)
        return self.subset(key)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every image."""
        c, h, w = self.images.shape[1:]
        return int(c), int(h), int(w)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def subset(self, index: Tensor) -> ImageSet:
        """The samples at ``index`` (int64 ``[M]``, may repeat) or under a bool mask ``[N]``, copied.

        Raises:
            TypeError: if ``index`` is neither an int64 nor a bool tensor.
            IndexError: if a position lies outside ``0..N-1`` or a mask has another length.
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.bool):
            raise TypeError(f"index must be a slice, an int64 tensor or a bool mask, got {_describe(index)}")
        if index.dim() != 1:
            raise IndexError(f"index must have one dimension, got shape {list(index.shape)}")
        if index.dtype == torch.bool:
            if index.shape[0] != len(self):
                raise IndexError(f"a mask for {len(self)} samples must have as many entries, got {index.shape[0]}")
        elif index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {int(index.min())}..{int(index.max())}")
        return self._select(index.to(self.device))

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on ``device``; itself if it is already there."""
        if torch.device(device) == self.device:
            return self
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self) if self._is_row(f.name)}
        return dataclasses.replace(self, **moved)

    def with_labels(self, labels: Tensor) -> ImageSet:
        """The same images with other labels, int64 ``[N]``."""
        return dataclasses.replace(self, labels=labels)

    def save(self, folder: str | Path) -> Path:
        """Write the set into ``folder`` (safetensors and JSON, atomically). See :mod:`bbfast.artifact`."""
        from bbfast.data.storage import save_imageset

        return save_imageset(self, Path(folder))

    @staticmethod
    def load(folder: str | Path) -> ImageSet:
        """Read a set written by :meth:`save`; pixels are memory-mapped, checksums are verified."""
        from bbfast.data.storage import load_imageset

        return load_imageset(Path(folder))

    def _is_row(self, name: str) -> bool:
        return isinstance(getattr(self, name), Tensor)

    def _select(self, key: slice | Tensor) -> ImageSet:
        rows = {f.name: getattr(self, f.name)[key] for f in dataclasses.fields(self) if self._is_row(f.name)}
        return dataclasses.replace(self, **rows)


@dataclasses.dataclass(frozen=True, eq=False)
class BackdoorSet(ImageSet):
    """Test images that carry a trigger.

    Args:
        labels: What the attacker wants, int64 ``[N]``.
        original_labels: The true classes, int64 ``[N]``. The other arguments and the errors are those of
            :class:`ImageSet`.
        exact: The pixels before they were rounded to ``images``, float32 ``[N, C, H, W]`` in 0..1, of triggers that
            8 bits would erase (LIRA); models are measured on them. None: measured on ``images``.
    """

    original_labels: Tensor = dataclasses.field(default=None)  # type: ignore[assignment]
    exact: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_classes("original_labels", self.original_labels, len(self), self.device)
        if self.exact is not None:
            _check_exact(self.exact, self.images)


def _check_images(images: object) -> int:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor [N, C, H, W], got {_describe(images)}")
    if images.dim() != 4:
        raise ValueError(f"images must have four dimensions [N, C, H, W], got shape {list(images.shape)}")
    return int(images.shape[0])


def _check_exact(exact: object, images: Tensor) -> None:
    if not isinstance(exact, Tensor) or exact.dtype != torch.float32:
        raise TypeError(f"exact must be a float32 tensor [N, C, H, W] or None, got {_describe(exact)}")
    if exact.shape != images.shape or exact.device != images.device:
        raise ValueError(
            f"exact must have the shape and device of the images, {list(images.shape)} on {images.device}, got "
            f"{list(exact.shape)} on {exact.device}"
        )


def _ids(ids: Tensor | None, n: int, device: torch.device) -> Tensor:
    if ids is None:
        return torch.arange(n, device=device)
    _check_vector("ids", ids, n, device)
    return ids


def _check_classes(name: str, value: Tensor, n: int, device: torch.device) -> None:
    _check_vector(name, value, n, device)
    if n and int(value.min()) < 0:
        raise ValueError(f"{name} must be class numbers >= 0, got {int(value.min())}")


def _check_vector(name: str, value: object, n: int, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor [N], got {_describe(value)}")
    if value.shape != (n,):
        raise ValueError(f"{name} must have one entry for each of {n} images, got shape {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of the images, {device}, got {value.device}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {list(value.shape)}".replace("torch.", "")
    return f"{type(value).__name__} {value!r}"[:80]
