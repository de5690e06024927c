"""A grid's results as tables in Markdown: what each attack reaches, and what is left of it after each defense.

python benchmarks/matrix.py digits-full --store runs/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast import defenses
from bbfast.bench import grid_rows, load_grid, make_plan
from bbfast.bench.grid import NO_DEFENSE
from bbfast.store import Store

Rows = Mapping[tuple[str, str], Mapping[str, Any]]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|".join(["---", *("--:" for _ in head[1:])])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def matrix(rows: Rows, attacks: Sequence[str], names: Sequence[str], *figures: str) -> str:
    """A row a defense, a column an attack; several figures in a cell with a stroke between."""

    def cell(attack: str, name: str) -> str:
        row = rows.get((attack, name), {})
        if row.get("status") != "done":
            return {"not_applicable": "n/a", "missing": ""}.get(str(row.get("status")), "failed")
        return "/".join(percent(row.get(figure)) for figure in figures)

    return table(["", *attacks], ([name, *(cell(attack, name) for attack in attacks)] for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--store", type=Path, required=True)
    given = parser.parse_args()
    found = grid_rows(make_plan(load_grid(given.grid)), Store(given.store), costs=True)
    places = {tuple(row[key] for key in ("dataset", "model", "ratio", "seed")) for row in found}
    if len(places) != 1:
        raise SystemExit(f"the grid must have one data set, model, ratio and seed, got {len(places)} combinations")
    rows = {(row["attack"], row["defense"]): row for row in found}
    attacks = list(dict.fromkeys(attack for attack, _ in rows))
    kinds = {name: set(defenses.info(name)["kinds"]) for _, name in rows if name != NO_DEFENSE}
    makers = [name for name, kind in kinds.items() if kind & {"mitigation", "training"}]
    judges = [name for name, kind in kinds.items() if not kind & {"mitigation", "training"}]
    hours = sum(row["seconds"] or 0 for row in found) / 3600
    states = [row["status"] for row in found]
    said = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{said}; {hours:.1f} hours of stages\n")
    for title, figures, names in (
        ("C-Acc / ASR", ("c_acc", "asr"), [NO_DEFENSE, *makers]),
        ("DER", ("der",), makers),
        ("TPR / FPR", ("tpr", "fpr"), judges),
        ("AUROC", ("auroc",), judges),
    ):
        print(f"{title}, %\n\n{matrix(rows, attacks, names, *figures)}\n")


if __name__ == "__main__":
    main()
