"""What a defense is and what it must be granted: data from which lists, checks and documentation are made."""

from __future__ import annotations

import dataclasses

__all__ = ["KINDS", "NEEDS", "DefenseCard"]

KINDS = ("mitigation", "training", "detection", "inference", "model")
"""``mitigation`` repairs a trained model, ``training`` filters the data or trains a clean model, ``detection`` scores
training samples, ``inference`` scores incoming images, ``model`` judges whether a model is backdoored."""

NEEDS = ("model", "clean", "reserve", "poisoned_train", "stream", "batch_norm", "fresh_model")
"""What a defense may ask for; see :class:`bbfast.defenses.view.DefenderView`. ``batch_norm`` is a demand on the model,
not a grant: the runner refuses models without affine BatchNorm2d layers before any work."""


@dataclasses.dataclass(frozen=True)
class DefenseCard:
    """The facts of one defense.

    Args:
        title: Full name.
        paper: Authors and venue.
        year: Year of the paper; None for a baseline without one.
        arxiv: arXiv id; empty if there is none.
        kinds: What it gives, of ``KINDS``; the first is the kind of its results.
        needs: What its view holds, of ``NEEDS``.
        summary: One sentence.
        clean_fraction: Part of the clean training set that the method's paper or reference grants.
        reserve_per_class: Clean test images a class it calibrates on, if it needs ``reserve``.
        deviations: Departures from the paper or from the reference code, one sentence each.
    """

    title: str
    paper: str
    year: int | None
    arxiv: str
    kinds: tuple[str, ...]
    needs: frozenset[str]
    summary: str
    clean_fraction: float = 0.05
    reserve_per_class: int = 10
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds must be some of {KINDS}, got {self.kinds}")
        if not self.needs <= set(NEEDS):
            raise ValueError(f"needs must be some of {NEEDS}, got {sorted(self.needs)}")
