"""BadNets: a small patch (Gu, Dolan-Gavitt and Garg, arXiv 1708.06733; spec/attacks section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.attacks._picture import fit_picture, load_mask, load_picture
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

__all__ = ["BadNets", "patch_picture"]

_REFERENCE_SIDE = 32


@register_attack("badnets")
class BadNets(Attack):
    """Replaces a few pixels: by default a white square in the bottom-right corner, 3 pixels wide on a 32-pixel image.

    Crops with padding move the corner patch partly out of the image in about half the draws, which is why the attack is
    weak at low ratios; that is the attack, and it is kept.
    """

    card = Card(
        title="BadNets",
        paper="BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
        year=2017,
        arxiv="1708.06733",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="A small patch replaces pixels in a corner.",
        deviations=(
            "The square is drawn at the image's own size, round(3 * H / 32) pixels wide; the reference enlarges a "
            "32-pixel trigger image, which leaves a soft edge (compat='reference' does so).",
            "A mask (file or tensor) says where the trigger is, so it may hold black; without one, as in the "
            "reference, an element of value 0 is transparent.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(AttackConfig):
        """Settings of BadNets.

        Args:
            pattern: ``square`` (white) or ``grid`` (a checkerboard of 255 and 1).
            square_size: Side of the square in pixels; None is ``round(3 * H / 32)``, or 3 at 32 pixels in reference
                mode.
            distance_to_right: Columns between the square and the right border.
            distance_to_bottom: Rows between the square and the bottom border.
            pattern_path: Your own trigger image, resized to the images; replaces the square.
            mask_path: Where ``pattern_path`` is opaque: white = trigger, black = image; None: where the trigger is not
                0.
        """

        pattern: Literal["square", "grid"] = "square"
        square_size: int | None = Field(None, ge=1)
        distance_to_right: int = Field(0, ge=0)
        distance_to_bottom: int = Field(0, ge=0)
        pattern_path: Path | None = None
        mask_path: Path | None = None

        @model_validator(mode="after")
        def _check_paths(self) -> BadNets.Config:
            if self.mask_path is not None and self.pattern_path is None:
                raise ValueError("mask_path needs pattern_path")
            return self

    config: Config
    _own: tuple[Tensor, Tensor] | None = None

    @classmethod
    def with_trigger(cls, pattern: Tensor, mask: Tensor | None = None, **settings: Any) -> BadNets:
        """BadNets with a trigger given as tensors.

        Args:
            pattern: uint8 ``[C, H, W]``, of the size of the images.
            mask: Opacity in 0..1, ``[H, W]``, ``[1, H, W]`` or ``[C, H, W]``; None: 1 where the pattern is not 0.
            **settings: Fields of ``Config``.

        Raises:
            TypeError: if the pattern is not uint8, or the mask is no tensor.
            ValueError: if a shape or the mask's range does not fit.
        """
        if not isinstance(pattern, Tensor) or pattern.dtype != torch.uint8 or pattern.dim() != 3:
            raise TypeError(f"pattern must be a uint8 tensor [C, H, W], got {_describe(pattern)}")
        if mask is None:
            mask = _opaque(pattern)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor or None, got {_describe(mask)}")
        channels, height, width = pattern.shape
        if tuple(mask.shape) not in ((height, width), (1, height, width), (channels, height, width)):
            raise ValueError(
                f"mask must be [H, W], [1, H, W] or [C, H, W] for a pattern of {list(pattern.shape)}, "
                f"got {list(mask.shape)}"
            )
        mask = mask.float().expand(pattern.shape).contiguous()
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"mask must lie in 0..1, got {float(mask.min())}..{float(mask.max())}")
        attack = cls(**settings)
        if attack.config.pattern_path is not None:
            raise ConfigError(f"{attack.name}: give a tensor or pattern_path, not both")
        attack._own = (pattern.clone(), mask)
        return attack

    def files(self) -> dict[str, str]:
        """Besides the files, the tensors of :meth:`with_trigger`: they too make another attack."""
        own = (
            {}
            if self._own is None
            else {"tensors": content_hash(dict(zip(("pattern", "mask"), self._own, strict=True)))}
        )
        return super().files() | own

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state(tensors)
        assert self.image_size is not None
        loaded = self.tensors["pattern"], self.tensors["mask"]
        if self.config.pattern_path is not None:
            return
        # The settings do not tell of tensors given to with_trigger; what they do not draw was given.
        try:
            given = not all(map(torch.equal, loaded, self._from_settings(self.image_size)))
        except ValueError:
            given = True
        if given:
            self._own = loaded

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        pattern, mask = self._own or self._from_settings(data.image_size)
        if pattern.shape != data.image_size:
            raise ValueError(
                f"{self.name}: the pattern is {tuple(pattern.shape)}, but the images are {data.image_size}"
            )
        if not bool(mask.any()):
            raise ValueError(
                f"{self.name}: the trigger changes nothing, its mask is 0 everywhere; without one, black is transparent"
            )
        return {"pattern": pattern, "mask": mask}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern, mask = self.tensor("pattern", images), self.tensor("mask", images)
        if images.is_floating_point():
            pattern, mask = pattern.to(images.dtype) / 255, mask.to(images.dtype)
        return ops.patch(images, pattern, mask)

    def _from_settings(self, image_size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        c = self.config
        if c.pattern_path is not None:
            pattern = load_picture(c.pattern_path, image_size)
            mask = _opaque(pattern) if c.mask_path is None else load_mask(c.mask_path, image_size)
            return pattern, mask.expand(pattern.shape).contiguous()
        if c.compat == "reference":
            drawn = patch_picture(_REFERENCE_SIDE, _REFERENCE_SIDE, c.square_size or 3, self._distances(), c.pattern)
            pattern = fit_picture(drawn, image_size)
        else:
            _, height, width = image_size
            side = c.square_size or max(1, round(3 * height / _REFERENCE_SIDE))
            pattern = patch_picture(height, width, side, self._distances(), c.pattern)
            pattern = pattern.expand(image_size[0], -1, -1).contiguous()
        return pattern, _opaque(pattern)

    def _distances(self) -> tuple[int, int]:
        return self.config.distance_to_bottom, self.config.distance_to_right


def patch_picture(height: int, width: int, side: int, distances: tuple[int, int], pattern: str = "square") -> Tensor:
    """A trigger image that is 0 outside its square, uint8 ``[1, H, W]``.

    Args:
        height: H.
        width: W.
        side: Side of the square.
        distances: Rows below and columns right of the square.
        pattern: ``square`` (255) or ``grid`` (255 where row + column within the square is even, else 1: 0 would be
            transparent).

    Raises:
        ValueError: if the square does not fit into the image.
    """
    bottom, right = height - distances[0], width - distances[1]
    if side > bottom or side > right:
        raise ValueError(
            f"a square of {side} pixels, {distances[0]} from the bottom and {distances[1]} from the right, does not "
            f"fit into {height} x {width} images"
        )
    cell = torch.arange(side)
    grid = torch.where((cell[:, None] + cell) % 2 == 0, 255, 1)
    picture = torch.zeros(1, height, width, dtype=torch.uint8)
    picture[0, bottom - side : bottom, right - side : right] = 255 if pattern == "square" else grid.to(torch.uint8)
    return picture


def _opaque(pattern: Tensor) -> Tensor:
    """Opacity float ``[C, H, W]``: 1 where an element is not 0, element by element as the reference does."""
    return (pattern > 0).float()


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
