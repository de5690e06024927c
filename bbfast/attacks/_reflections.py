"""Refool's random reflections: what is drawn for each sample, and laying them over images."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bbfast import ops
from bbfast.attacks.randomness import integers, make_key, uniform

__all__ = ["MODES", "Draws", "lay_over"]

MODES = ("ghost", "out_of_focus", "focus")
_ELEMENTS = 1 << 23
"""Pixels in one call: some intermediate results of it lie in memory as float32 at the same time."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of ``B`` samples.

    Args:
        kind: Position in :data:`MODES`, int64 ``[B]``.
        picture: Which reflection, int64 ``[B]``.
        alpha_t: Weight of the image, float32 ``[B]``.
        offset: Rows and columns between the two copies of a ghost, int64 ``[B, 2]``.
        ghost_alpha: Weight of the first copy, float32 ``[B]``.
        sigma: Deviation of the blur, float32 ``[B]``.
        att: How far a blurred reflection is lowered, float32 ``[B]``.
        window_offset: Place of the image in the blurred reflection's hill, int64 ``[B, 2]``.
    """

    kind: Tensor
    picture: Tensor
    alpha_t: Tensor
    offset: Tensor
    ghost_alpha: Tensor
    sigma: Tensor
    att: Tensor
    window_offset: Tensor

    @classmethod
    def of(
        cls,
        key: str,
        seed: int,
        index: Tensor,
        sides: tuple[int, int],
        pictures: int,
        shares: tuple[float, float],
        alpha_t: tuple[float, float],
    ) -> Draws:
        """Draw for the samples numbered ``index``.

        Args:
            key: What the draws are for; another key gives other draws.
            seed: Of the attack.
            index: Sample numbers, int64 ``[B]``.
            sides: Height and width of the images.
            pictures: Number of reflections.
            shares: Probabilities of a ghost and of an out-of-focus reflection; the rest is in focus.
            alpha_t: Range of the image's weight.
        """
        height, width = sides
        unit = uniform(make_key("refool", key, seed), index, (6,))
        ghost, blur = shares
        kind = (unit[:, 0] >= ghost).long() + (unit[:, 0] >= ghost + blur).long()
        # A ghost must not be cut to nothing in small images.
        far = [min(8, max(1, side // 2)) for side in (height, width)]
        steps = [integers(make_key("refool", key, seed, i), index, (), min(3, n), n) for i, n in enumerate(far)]
        free = [max(height, width) - side for side in (height, width)]
        # The reference moves the window only where the canvas is larger by more than 10 pixels.
        places = [
            integers(make_key("refool", key, seed, 2 + i), index, (), 0, n if n > 10 else 0) for i, n in enumerate(free)
        ]
        return cls(
            kind=kind,
            picture=integers(make_key("refool", key, seed, "picture"), index, (), 0, pictures - 1),
            alpha_t=_scaled(unit[:, 1], *alpha_t),
            offset=torch.stack(steps, 1),
            ghost_alpha=((unit[:, 2] >= 0.5).float() - _scaled(unit[:, 3], 0.15, 0.5)).abs(),
            sigma=_scaled(unit[:, 4], 1, 5),
            att=_scaled(unit[:, 5], 1.08, 1.18),
            window_offset=torch.stack(places, 1),
        )

    def fixed(self, **values: Tensor) -> Draws:
        """The same with given values, one for all samples or one for each, in place of drawn ones."""
        own = {name: getattr(self, name) for name in values}
        given = {name: v.to(own[name]).expand(own[name].shape) for name, v in values.items()}
        return dataclasses.replace(self, **given)

    def rows(self, index: Tensor) -> Draws:
        """Those of some of the samples, int64 ``[M]``."""
        return Draws(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def lay_over(images: Tensor, pool: Tensor, draws: Draws, rounding: str) -> Tensor:
    """Lay each sample's reflection over it.

    Args:
        images: uint8 or float ``[B, C, H, W]``.
        pool: Reflections, uint8 ``[M, C, H, W]``, same device.
        draws: Of these samples.
        rounding: As :func:`bbfast.ops.reflect`.

    Returns:
        Like ``images``.
    """
    limit = max(1, _ELEMENTS // max(1, images[:1].numel()))
    order, parts = [], []
    for number, mode in enumerate(MODES):
        for rows in (draws.kind == number).nonzero().flatten().split(limit):
            d = draws.rows(rows)
            reflection = pool[d.picture]
            if images.is_floating_point():
                reflection = reflection.to(images.dtype) / 255
            part = ops.reflect(
                images[rows],
                reflection,
                mode,
                alpha_t=d.alpha_t,
                offset=d.offset,
                ghost_alpha=d.ghost_alpha,
                sigma=d.sigma,
                att=d.att,
                window_offset=d.window_offset,
                rounding=rounding,
            )
            order.append(rows)
            parts.append(part)
    # Put back by a permutation, not by writing into rows, which gradients could not pass.
    return torch.cat(parts)[torch.cat(order).argsort()]


def _scaled(unit: Tensor, low: float, high: float) -> Tensor:
    return unit * (high - low) + low
