"""What the curves of trigger generalisation come to: rows and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbfast.bench.grid import NO_DEFENSE

__all__ = ["as_row", "findings", "radius"]

_LOW = 0.5


def radius(values: NDArray[np.float64], asr: NDArray[np.float64], own: float) -> float:
    """How far the nearest value with an ASR below a half lies from the trained one; NaN if there is none."""
    gone = np.abs(values[asr < _LOW] - own)
    return float(gone.min()) if len(gone) else float("nan")


def as_row(
    attack: str, defense: str, family: str, values: NDArray[Any], asr: NDArray[Any], trained: float
) -> dict[str, Any]:
    """The row of a curve."""
    return {
        "attack": attack,
        "defense": defense,
        "family": family,
        "trained": trained,
        "values": len(values),
        "asr_trained": float(asr[values == trained][0]),
        "lowest": float(asr.min()),
        "at": float(values[asr.argmin()]),
        "highest_elsewhere": float(asr[values != trained].max()) if len(values) > 1 else float("nan"),
        "radius": radius(values, asr, trained),
    }


def findings(table: Sequence[dict[str, Any]], attacks: Sequence[str]) -> list[str]:
    """What the rows say, in words."""
    lines = []
    for attack in attacks:
        own = [one for one in table if one["attack"] == attack]
        plain = [one for one in own if one["defense"] == NO_DEFENSE]
        if not plain:
            lines.append(f"{attack}: no figures.")
            continue
        bounds = [f"{one['family']} {one['radius']:.3g}" for one in plain if np.isfinite(one["radius"])]
        never = [one["family"] for one in plain if not np.isfinite(one["radius"])]
        text = f"{attack} (ASR {100 * plain[0]['asr_trained']:.0f} %): the ASR falls below 50 % at a distance of "
        lines.append(
            text + (", ".join(bounds) or "nothing tried") + (f"; never by {', '.join(never)}" if never else "") + "."
        )
        for one in own:
            if one["defense"] != NO_DEFENSE and one["asr_trained"] < _LOW < one["highest_elsewhere"]:
                lines.append(
                    f"{one['defense']} closes {attack}'s trigger (ASR {100 * one['asr_trained']:.0f} %) and leaves "
                    f"one of another {one['family']} open (up to {100 * one['highest_elsewhere']:.0f} %)."
                )
    return lines
