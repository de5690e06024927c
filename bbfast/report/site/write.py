"""From a store to the site: reads every result once, writes the whole site or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast import _atomic
from bbfast._progress import bar
from bbfast.attacks import AttackResult
from bbfast.bench import Plan, kept_grids, make_plan, read_published, to_csv, to_json
from bbfast.bench.grid import Grid
from bbfast.defenses import DefenseResult
from bbfast.report._templates import render, write_text
from bbfast.report.page import METRICS, write
from bbfast.report.site.analyses import copy_analyses
from bbfast.report.site.board import board_lines, coverage, per_run_rows, reasons
from bbfast.report.site.pages import attack_page, defense_page, page_name, row_of
from bbfast.report.site.records import Record, failure, read_records
from bbfast.store import Store

__all__ = ["Site", "write_site"]

_MARK = '<meta name="generator" content="bbfast report">'


@dataclasses.dataclass(frozen=True)
class Site:
    """What was written.

    Args:
        index: The page to open.
        runs: How many runs have a page.
        broken: Folder of a result or an analysis that cannot be shown to why.
    """

    index: Path
    runs: int
    broken: Mapping[str, str]


def write_site(
    store: str | Path | Store,
    out: str | Path,
    *,
    grids: Sequence[Grid] = (),
    published: str | Path | None = None,
    title: str = "Backdoor benchmark",
    progress: bool | None = None,
) -> Site:
    """Write the site of a store: it needs no server and no network.

    ``index.html`` has the leaderboard, heat maps, coverage and downloads, ``runs/`` a page for each run with its
    settings, curves, trigger pictures, the figures that ``bbfast analyze`` made of it, and the command that gives it
    again. A result or an analysis that cannot be read is counted and named, and left out.

    Args:
        store: Folder of results.
        out: Folder of the site; a report that lies there is replaced as a whole.
        grids: Grids whose cells are to be accounted for, beside those that were run on this store.
        published: A published table to show beside ours, see :func:`bbfast.bench.read_published`.
        title: Headline.
        progress: Show a bar; None decides by the terminal.

    Raises:
        ArtifactError: if there is no store, or the published table cannot be read.
        ValueError: if ``out`` holds something else than a report.
    """
    store, out = store if isinstance(store, Store) else Store(store), Path(out)
    _check_place(out)
    theirs = {} if published is None else read_published(published)
    records, broken = read_records(store)
    kept, lost = kept_grids(store)
    plans = [make_plan(grid) for grid in _distinct([*kept, *grids])]
    with _atomic.new_folder(out, replace=True) as folder:
        with bar("report", len(records), progress) as shown:
            failed, analyses = _write_runs(store, records, folder, shown.advance)
        broken = {**broken, **{f"grid {name}": why for name, why in lost.items()}, **failed, **analyses}
        pages = {name: record for name, record in records.items() if name not in failed}
        _write_board(store, plans, pages, broken, theirs, title, folder)
    return Site(out / "index.html", len(pages), broken)


def _write_runs(
    store: Store, records: Mapping[str, Record], folder: Path, advance: Callable[[int], object]
) -> tuple[dict[str, str], dict[str, str]]:
    """A page for each run, one attack and its defenses after the other; what went wrong with the runs that have none,
    and with analyses that are not on their pages."""
    failed: dict[str, str] = {}
    broken: dict[str, str] = {}
    children: dict[str, list[Record]] = {}
    for record in records.values():
        if record.row["stage"] == "defense":
            if record.attack is None:
                failed[record.folder] = "the attack that it was run on is not in the store"
                advance(1)
            else:
                children.setdefault(record.attack, []).append(record)
    for record in records.values():
        if record.row["stage"] != "attack":
            continue
        mine = children.get(record.folder, [])
        try:
            attack = AttackResult.load(store.root / record.folder)
            rows = []
            for child in mine:
                try:
                    result = DefenseResult.load(store.root / child.folder)
                    found, lost = copy_analyses(store.root, child.folder, folder)
                    broken |= lost
                    page = defense_page(child, record, attack, result, found, store.root.name)
                    write(page, folder / "runs" / page_name(child.folder))
                    rows.append(row_of(child, result))
                except Exception as error:  # whatever it holds, the other pages are written
                    failed[child.folder] = failure(error)
                advance(1)
            found, lost = copy_analyses(store.root, record.folder, folder)
            broken |= lost
            page = attack_page(record, attack, rows, found, store.root.name)
            write(page, folder / "runs" / page_name(record.folder))
        except Exception as error:
            failed |= {record.folder: failure(error)}
            failed |= {child.folder: f"its attack cannot be shown: {failure(error)}" for child in mine}
        advance(1)
    return failed, broken


def _write_board(
    store: Store,
    plans: Sequence[Plan],
    records: Mapping[str, Record],
    broken: Mapping[str, str],
    published: Mapping[Any, Mapping[str, float | None]],
    title: str,
    folder: Path,
) -> None:
    lines = board_lines(plans, store, records, published)
    rows = per_run_rows([line for line in lines if line["status"] != "published"], records)
    write_text(folder / "results.csv", to_csv(rows))
    write_text(folder / "results.json", to_json(rows))
    columns = [
        {"key": c.key, "title": c.title, "meaning": c.meaning, "better": c.better, "scale": _SCALES[c.key]}
        for c in METRICS
    ]
    html = render(
        "board.html.j2",
        mark=_MARK,
        title=title,
        grids=[plan.grid.name for plan in plans],
        data={"columns": columns, "lines": lines, "titles": _titles(lines), "published": bool(published)},
        coverage=coverage(lines),
        reasons=reasons(lines),
        broken=broken,
        runs=len(records),
        commands=[f"bbfast bench run {plan.grid.name} --store {store.root.name}" for plan in plans],
    )
    write_text(folder / "index.html", html)


_SCALES = {
    "c_acc": "good",
    "asr": "bad",
    "r_acc": "good",
    "der": "signed",
    "rir": "signed",
    "tpr": "good",
    "fpr": "bad",
    "auroc": "signed",
}
"""How a heat map colours a metric: the higher the better or the worse for the defender, or around one half."""


def _titles(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Full names of the methods in the table, by the names that it uses."""
    from bbfast import attacks, defenses

    found = {}
    for key, known in (("attack", attacks), ("defense", defenses)):
        for name in {str(line[key]) for line in lines} & set(known.available()):
            found[name] = str(known.info(name)["title"])
    return found


def _distinct(grids: Sequence[Grid]) -> list[Grid]:
    return [grid for i, grid in enumerate(grids) if grid not in grids[:i]]


def _check_place(out: Path) -> None:
    """A folder is replaced only if it holds a report."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    index = out / "index.html"
    if not index.is_file() or _MARK not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ValueError(f"out must be a new or empty folder, or hold a report; {out} holds something else")
