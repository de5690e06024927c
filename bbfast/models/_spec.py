"""How a model was built: enough to build it again, small enough for a JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["ModelSpec", "parse_image_size"]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The arguments of :func:`bbfast.models.build`.

    Args:
        name: Registered name.
        num_classes: Number of logits.
        image_size: ``(H, W)``.
        in_channels: Channels of the images.
        pretrained: Whether training started from ImageNet weights.
        additions: What a defense has built into it afterwards, in order: name and settings (sorted pairs), see
            :func:`bbfast.models.add`.
    """

    name: str
    num_classes: int
    image_size: tuple[int, int]
    in_channels: int = 3
    pretrained: bool = False
    additions: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def build(self, weights: bool = True) -> nn.Module:
        """A fresh model of this description, newly initialised from torch's global generator.

        Args:
            weights: Whether to load ImageNet weights if ``pretrained``. False makes the same layers without them
                (nothing is downloaded): what loading a saved state needs.
        """
        from bbfast.models._registry import build_spec

        return build_spec(self, weights=weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` is the inverse."""
        values = {**dataclasses.asdict(self), "image_size": list(self.image_size)}
        # Left out where there are none, so that descriptions written before there were any stay the same.
        del values["additions"]
        if self.additions:
            values["additions"] = [[name, dict(settings)] for name, settings in self.additions]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The description written by :meth:`to_dict`.

        Raises:
            TypeError: if a key is missing or unknown.
        """
        height, width = values["image_size"]
        additions = tuple((name, as_pairs(settings)) for name, settings in values.get("additions", ()))
        return cls(**{**values, "image_size": (int(height), int(width)), "additions": additions})


def as_pairs(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings of an addition as sorted pairs, lists as tuples: what can be hashed, and compared after JSON."""
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items()))


def parse_image_size(image_size: int | Sequence[int], in_channels: int | None = None) -> tuple[tuple[int, int], int]:
    """``(H, W)`` and the number of channels from a side, ``(H, W)`` or ``(C, H, W)``.

    Raises:
        TypeError: if ``image_size`` is neither a whole number nor a sequence of them.
        ValueError: if it has another length, a number is not positive, or ``in_channels`` differs from its ``C``.
    """
    numbers = list(image_size) if isinstance(image_size, Sequence) else [image_size] * 2
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"image_size must be a whole number, (H, W) or (C, H, W), got {image_size!r}")
    if len(numbers) not in (2, 3):
        raise ValueError(f"image_size must be a whole number, (H, W) or (C, H, W), got {image_size!r}")
    if len(numbers) == 3:
        if in_channels is not None and in_channels != numbers[0]:
            raise ValueError(f"in_channels must be that of image_size {tuple(numbers)}, got {in_channels}")
        in_channels = numbers[0]
    channels = 3 if in_channels is None else in_channels
    height, width = numbers[-2:]
    if min(channels, height, width) < 1:
        raise ValueError(f"image_size and in_channels must be positive, got {image_size!r} and {channels}")
    return (height, width), channels
