"""What an attack is, as data: lists, documentation and reports are made from it."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["Card", "Threat"]

Threat = Literal["poison-only", "training-controlled"]


@dataclasses.dataclass(frozen=True)
class Card:
    """Facts about an attack.

    Args:
        title: Name as printed.
        paper: Title of the paper that introduced it.
        year: Year of that paper.
        threat: ``poison-only`` (the attacker supplies data) or ``training-controlled`` (the attacker owns the loop).
        label_modes: Label modes it supports, see :class:`bbfast.attacks.poisoning.LabelRule`.
        arxiv: arXiv number, empty if there is none.
        needs: Prerequisites that the library makes itself ("surrogate", "encoder", ...).
        summary: One sentence: what the trigger is.
        deviations: Every departure from the paper or from the reference implementation, one sentence each.
    """

    title: str
    paper: str
    year: int
    threat: Threat
    label_modes: tuple[str, ...]
    arxiv: str = ""
    needs: tuple[str, ...] = ()
    summary: str = ""
    deviations: tuple[str, ...] = ()
