"""How defenses, models and cells without figures look in every study: one colour and marker a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["COLOURS", "MARKERS", "WORDS", "colours_apart", "look", "percent", "series"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#808000")
"""Okabe and Ito's, and two of Tol's: apart for colour-blind readers on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NONE = "#222222"
_FIRST = (
    *("ft", "clp", "nc", "fp", "bnp", "i_bau", "anp", "abl"),
    *("ft_sam", "nad", "ac", "ss", "d_br", "d_st", "ep", "mbns", "dbd"),
)
"""The published defenses, those of the studies' defaults first, so that these differ by colour."""

WORDS = {"c_acc": "C-Acc", "asr": "ASR", "r_acc": "R-Acc", "der": "DER", "rir": "RIR"}


def look(defense: str) -> dict[str, Any]:
    """Colour and marker of a defense, the same in every figure; ``none`` is nearly black."""
    if defense == "none":
        return {"color": _NONE, "marker": "o"}
    from bbfast import defenses

    known = [*_FIRST, *(name for name in defenses.available() if name not in _FIRST)]
    # A label of the user's own: the name in front of it, or a place that follows from its letters alone.
    name = defense if defense in known else defense.replace(",", " ").split()[0]
    at = known.index(name) if name in known else sum(defense.encode())
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at // len(COLOURS) % len(MARKERS)]}


def colours_apart(defenses: Sequence[str]) -> dict[str, str]:
    """The defenses' colours where no marker tells two of one colour apart: the later one gets a colour that is free."""
    taken: dict[str, str] = {}
    for name in dict.fromkeys(defenses):
        own = look(name)["color"]
        free = (colour for colour in COLOURS if colour not in taken.values())
        taken[name] = next(free, own) if own in taken.values() else own
    return taken


def series(names: Sequence[str], skip: int = 0) -> list[dict[str, Any]]:
    """Colours and markers for a list of anything else, by place; ``skip`` those that stand for something else."""
    places = range(skip, skip + len(names))
    return [{"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8]} for i in places]


def percent(share: float) -> str:
    """``0.005`` as ``0.5 %``."""
    return f"{100 * share:.3g} %"
