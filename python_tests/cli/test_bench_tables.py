"""Tables of ``bbfast bench``: what fits a terminal, what is left out, what is counted."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from bbfast.bench.failures import refusals
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
    cells = [row("badnets", f"defense {chr(97 + i)}", 0.1, None) for i in range(20) for _ in range(100 - i)]
    shown = text(tables.refused(refusals({**cell, "reason": f"no {cell['defense']}"} for cell in cells), cells))
    assert "100  defense a: no defense a" in shown and "defense l" in shown and "defense m" not in shown
    assert f"{sum(100 - i for i in range(12, 20))}  for 8 more reasons" in shown


def test_reasons_that_differ_in_numbers_are_one_and_say_where() -> None:
    cells = [row(attack, "ft", ratio, None) for attack in ("lc", "sig") for ratio in (0.01, 0.05, 0.1)]
    bad = [cell for cell in cells if cell["attack"] == "lc" and cell["ratio"] > 0.01][::-1]
    shown = text(tables.refused(refusals({**cell, "reason": f"asks for {cell['ratio']}"} for cell in bad), cells))
    assert "2  lc / ratio 0.05, 0.1: asks for 0.1 (and the like, with other numbers)" in shown
    assert "3  asks" in text(tables.refused(refusals({**cell, "reason": "asks"} for cell in cells[:3]), cells[:3]))


def test_failures_are_told_once_a_reason() -> None:
    found = [{"stage": f"digits {name}, seed 0", "reason": "ValueError: no"} for name in ("ft", "fp", "nc")]
    found.append({"stage": "digits lf, seed 0", "reason": "it hung"})
    first, second = tables.failures(found)
    assert first == "  digits ft, seed 0 and 2 more: ValueError: no"
    assert second == "  digits lf, seed 0: it hung"


def test_costs_have_units_of_their_own() -> None:
    rows = [row("badnets", "ft", 0.1, 0.5, seconds=100.0, peak_memory_bytes=1.5 * 2**30)]
    shown = text(tables.listed(rows))
    assert "GiB" in shown and "100.0  1.50" in shown and "50.0" in shown
    ((title, table),) = tables.pivoted(rows, "seconds", 80)
    assert title.startswith("seconds, s: ") and "100.0" in text(table)
    ((title, table),) = tables.pivoted(rows, "peak_memory_bytes", 80, "ratio", "model")
    assert title == "peak_memory_bytes, GiB: digits, badnets, ft" and "0.1         1.50" in text(table)
