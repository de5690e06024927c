"""From rows to arrays: the cells of a grid along named axes, and what stands for those without figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbfast.bench import Grid
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.looks import percent

__all__ = ["STATES", "Cube", "cube", "described", "legend_of", "with_none"]

STATES = ("known", "not applicable", "failed", "attack failed", "no model")
"""What the numbers of ``state`` mean: figures are there; not applicable; no stage, or one that failed or whose attack
did; the attack does not work without a defense; the defense detects and gives no model."""

_RATES = ("c_acc", "asr", "r_acc", "der", "rir", "d_c_acc", "attack_c_acc", "attack_asr")
_NEEDS_ATTACK = ("der", "rir")


class Cube(dict[str, NDArray[np.float64]]):
    """Figures by name, one axis for each key that was asked for.

    Args:
        arrays: Figures; NaN where there are none. DER and RIR are NaN as well where the attack does not work.
        state: int8, as :data:`STATES`; over the axes without ``seed``, where the best state of any seed counts.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.float64]], state: NDArray[np.int8]) -> None:
        super().__init__(arrays)
        self.state = state

    @staticmethod
    def draw_states(axis: Any, state: NDArray[np.int8]) -> None:
        """Hatch, cross or grey the cells of a heat map that have no figures."""
        from matplotlib.patches import Rectangle

        axis.set_facecolor("#F2F2F2")
        for i, j in np.argwhere(state > 0).tolist():
            kind = STATES[state[i, j]]
            hatch = {"not applicable": "////", "failed": "....", "no model": ""}.get(kind, "")
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc="#E6E6E6", ec="#A0A0A0", hatch=hatch, lw=0))
            mark = {"attack failed": "\u00d7", "failed": "!", "no model": "-"}.get(kind)
            if mark:
                axis.text(j, i, mark, ha="center", va="center", fontsize=13, color="#555555")


def cube(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> Cube:
    """The figures of ``rows`` as arrays.

    Args:
        rows: Of :class:`bbfast.studies.results.Results`.
        axes: Key of a row to the values along that axis; at most one row may stand at a place.

    Returns:
        ``c_acc``, ``asr``, ``r_acc``, ``der``, ``rir``, ``d_c_acc``, ``attack_c_acc`` and ``attack_asr``, f64 of shape
        ``[len(values) for each axis]``.

    Raises:
        ValueError: if two rows stand at one place.
    """
    places = {key: {value: i for i, value in enumerate(values)} for key, values in axes.items()}
    shape = tuple(len(values) for values in axes.values())
    arrays = {key: np.full(shape, np.nan) for key in _RATES}
    state = np.full(shape, STATES.index("failed"), dtype=np.int8)
    seen = np.zeros(shape, dtype=bool)
    for row in rows:
        if any(row[key] not in place for key, place in places.items()):
            continue
        at = tuple(place[row[key]] for key, place in places.items())
        if seen[at]:
            raise ValueError(f"two cells stand at {[row[key] for key in axes]}; an axis is missing")
        seen[at] = True
        state[at] = STATES.index(_state(row))
        for key in _RATES:
            value = row.get(key)
            if value is not None and not (row["attack_failed"] and key in _NEEDS_ATTACK):
                arrays[key][at] = value
    if "seed" in axes:
        state = _over(state, list(axes).index("seed"))
    return Cube(arrays, state)


def legend_of(state: NDArray[np.int8]) -> str:
    """What the marks of :meth:`Cube.draw_states` mean, for the end of a caption; empty if there are none."""
    marks = {1: "hatched: not applicable", 2: "!: failed", 3: "crossed: no working attack", 4: "-: gives no model"}
    said = [words for kind, words in marks.items() if (state == kind).any()]
    return "; " + "; ".join(said) if said else ""


def with_none(defenses: Any) -> Any:
    """A grid's defenses with the attack alone among them."""
    if defenses == "all":
        return defenses
    plain = (NO_DEFENSE, "no defense", "no_defense")
    own = [entry for entry in defenses if (entry.get("name") if isinstance(entry, Mapping) else entry) not in plain]
    return [NO_DEFENSE, *own]


def described(grid: Grid) -> str:
    """A grid in a line: data, models, ratios, recipe, seeds; attacks and defenses are in the figure."""
    data, models = ", ".join(entry.label for entry in grid.datasets), ", ".join(grid.models)
    ratios = ", ".join(percent(ratio) for ratio in grid.ratios)
    seeds = f"seed{'s' if len(grid.seeds) > 1 else ''} {', '.join(map(str, grid.seeds))}"
    epochs = f", {grid.recipe['epochs']} epochs" if "epochs" in grid.recipe else ""
    return f"{data}; {models}; {ratios} poisoned; {grid.preset} recipe{epochs}; {seeds}"


def _state(row: Mapping[str, Any]) -> str:
    if row["status"] == "not_applicable":
        return "not applicable"
    if row["status"] != "done":
        return "failed"
    if row["attack_failed"]:
        return "attack failed"
    return "no model" if row["c_acc"] is None else "known"


def _over(state: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    """The best state along an axis, in the order of this list."""
    rank = np.array([0, 2, 4, 3, 1])
    best = rank[state].min(axis=axis)
    return np.argsort(rank)[best].astype(np.int8)
