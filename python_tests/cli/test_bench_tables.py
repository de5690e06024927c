"""Tables of ``bbfast bench``: what fits a terminal, what is left out, what is counted."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from bbfast.cli import _bench_tables as tables


def text(table: Table, width: int = 80) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    return out.getvalue()


def row(attack: str, defense: str, ratio: float, asr: float | None, **more: Any) -> dict[str, Any]:
    place = {"dataset": "digits", "model": "small_cnn", "attack": attack, "ratio": ratio, "seed": 0}
    return {**place, "defense": defense, "status": "done", "asr": asr, **more}


def test_a_wide_pivot_is_continued_and_ratios_are_apart() -> None:
    names = [f"defense{i}" for i in range(12)]
    rows = [row("badnets", name, ratio, i / 100) for ratio in (0.0, 0.1) for i, name in enumerate(names)]
    rows += [row("lf", names[0], 0.1, None), row("badnets", "nothing", 0.1, None)]
    made = list(tables.pivoted(rows, "asr", 60))
    assert len(made) == 2 * 3
    shown = [text(table, 60) for _, table in made]
    assert all(len(line) <= 60 and "…" not in line for part in shown for line in part.splitlines())
    assert made[1][0] == "asr, %: digits, small_cnn, ratio 0 (continued)" and made[3][0].endswith("ratio 0.1")
    assert sum(part.count("defense") for part in shown) == 24
    assert not any("lf" in part or "nothing" in part for part in shown)


def test_many_reasons_are_cut_and_counted() -> None:
    shown = text(tables.reasons({f"reason {i}": 100 - i for i in range(20)}))
    assert "reason 11" in shown and "reason 12" not in shown
    assert f"{sum(100 - i for i in range(12, 20))}  for 8 more reasons" in shown


def test_failures_are_told_once_a_reason() -> None:
    rows = [row("badnets", name, 0.1, None, reason="ValueError: no") for name in ("ft", "fp", "nc")]
    rows.append(row("lf", "ft", 0.1, None, reason="it hung"))
    first, second = tables.failures(rows)
    assert first == "  digits small_cnn badnets 0.1 ft, seed 0 and 2 more: ValueError: no"
    assert second.endswith("lf 0.1 ft, seed 0: it hung")
