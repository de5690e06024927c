"""Refool as a transform."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger, check_picture, in_units_of

__all__ = ["Refool"]


class Refool(Trigger):
    """A reflection, as in a window pane (Liu et al. 2020, arXiv 2007.02343).

    Args:
        reflection: uint8 ``[C, H, W]`` of the images' size, what is mirrored.
        mode: ``"ghost"``, ``"focus"`` or ``"out_of_focus"``.
        **parameters: Those of :func:`bbfast.ops.reflect`, numbers only: ``alpha_t``, ``offset``, ``ghost_alpha``,
            ``sigma``, ``att``, ``window_offset``, ``rounding``.

    Raises:
        TypeError: if ``reflection`` is not uint8.
        ValueError: as :func:`bbfast.ops.reflect`.
    """

    reflection: Tensor

    def __init__(self, reflection: Tensor, mode: str = "ghost", **parameters: Any) -> None:
        super().__init__()
        check_picture(self, "reflection", reflection)
        ops.reflect(reflection[None], reflection, mode, **parameters)  # says now what is wrong with them
        self.register_buffer("reflection", reflection)
        self.mode, self.parameters_of_mode = mode, parameters

    def apply(self, images: Tensor) -> Tensor:
        return ops.reflect(images, in_units_of(images, self.reflection), self.mode, **self.parameters_of_mode)
