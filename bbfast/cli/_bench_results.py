"""``bbfast bench results`` and ``compare``: a grid's figures as tables and files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bbfast.cli._bench_options import RUNS, Set, Source, StorePath, again, planned, there
from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Json, parse_settings

__all__ = ["register"]

_METRIC = typer.Option(help="c_acc, asr, r_acc, der, rir, tpr, fpr, auroc, seconds or peak_memory_bytes.")
_AXIS = "dataset, model, attack, ratio, seed or defense; with --pivot."


def register(bench: typer.Typer) -> None:
    @command(
        bench,
        "results",
        examples="bbfast bench results smoke --pivot asr\nbbfast bench results grid.yaml --csv table.csv --mean",
    )
    def results(
        source: Source,
        store: StorePath = RUNS,
        settings: Set = [],  # noqa: B006
        where: Annotated[
            list[str], typer.Option(metavar="KEY=VALUE", help="Only cells with this: attack=badnets, ratio=0.1.")
        ] = [],  # noqa: B006
        mean: Annotated[bool, typer.Option("--mean", help="Mean and standard deviation over the seeds.")] = False,
        pivot: Annotated[str | None, _METRIC] = None,
        index: Annotated[str | None, typer.Option("--rows", help=f"Down (attack): {_AXIS}")] = None,
        columns: Annotated[str | None, typer.Option("--columns", help=f"Across (defense): {_AXIS}")] = None,
        csv: Annotated[Path | None, typer.Option(help="Write the rows, or the pivot, to this file.")] = None,
        parquet: Annotated[
            Path | None, typer.Option(help="The same as Parquet; needs pip install 'bbfast[query]'.")
        ] = None,
        costs: Annotated[
            bool, typer.Option("--costs", help="Seconds and memory as well; in files also versions and device.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Show a grid's figures: its cells, or attacks by defenses with --pivot."""
        from bbfast.bench import aggregate, grid_rows, pivot_rows, select, to_csv, write_parquet
        from bbfast.bench.results import COSTS, METRICS
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        if pivot is None and (index or columns):
            with usage():
                raise ValueError("--rows and --columns are the axes of --pivot; say which figure with it")
        index, columns, costs = index or "attack", columns or "defense", costs or pivot in COSTS
        rows = grid_rows(planned(source, settings), there(Store(store.expanduser())), costs=costs, records=costs)
        wanted = parse_settings(where, "--where")
        with usage():
            rows = select(rows, wanted)
        without = sum(row["status"] != "done" for row in rows)
        if mean:
            rows = aggregate(rows, (*METRICS, *(COSTS if costs else ())))
        written = rows
        if pivot is not None:
            with usage():
                written = pivot_rows(rows, pivot, index, columns)
        if csv is not None:
            csv.expanduser().write_text(to_csv(written), encoding="utf-8")
            note(f"{len(written)} rows in {csv}")
        if parquet is not None:
            write_parquet(written, parquet)
            note(f"{len(written)} rows in {parquet}")
        if json:
            emit_json(written)
        elif csv is None and parquet is None and pivot is not None:
            for title, table in tables.pivoted(rows, pivot, screen().width, index, columns):
                screen().print(title, markup=False, soft_wrap=True)
                screen().print(table)
        elif csv is None and parquet is None:
            # Cells without figures are shown to who asks for them.
            every = "status" in wanted
            shown = [row for row in rows if every or (row["n"] if mean else row["status"] == "done")]
            screen().print(tables.listed(shown))
        if without and not json:
            note(f"{without} of the cells have no figures: {again('status', source, store, settings)} shows why")

    @command(bench, "compare", examples="bbfast bench compare paper published.csv --store runs/")
    def compare(
        source: Source,
        published: Annotated[Path, typer.Argument(help="CSV of the published table.")],
        store: StorePath = RUNS,
        settings: Set = [],  # noqa: B006
        csv: Annotated[Path | None, typer.Option(help="Write the matched cells to this file.")] = None,
        json: Json = False,
    ) -> None:
        """Put a grid's figures beside a published leaderboard: matched cells, differences, coverage."""
        from bbfast.bench import compare as compared
        from bbfast.bench import grid_rows, read_published, to_csv
        from bbfast.bench.compare import COMPARED
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        rows = grid_rows(planned(source, settings), there(Store(store.expanduser())))
        found = compared(rows, read_published(published))
        if csv is not None:
            csv.expanduser().write_text(to_csv(found["cells"], COMPARED), encoding="utf-8")
            note(f"{len(found['cells'])} cells in {csv}")
        if json:
            emit_json(found)
            return
        console, coverage = screen(), found["coverage"]
        console.print(
            f"{coverage['matched']} cells in both; {coverage['ours_only']} only ours; the published table has "
            f"{coverage['published']} filled and {coverage['published_empty']} empty",
            soft_wrap=True,
        )
        for key, (mine, theirs) in found["apart"].items():
            console.print(f"  no {key} in both: ours {mine}, theirs {theirs}", markup=False, soft_wrap=True)
        for metric, summary in found["summary"].items():
            if summary["n"]:
                console.print(
                    f"  {metric}: ours minus theirs {100 * summary['mean_difference']:+.2f} points on average, "
                    f"{100 * summary['mean_absolute_difference']:.2f} in absolute value ({summary['n']} cells)",
                    soft_wrap=True,
                )
        if found["summary"]["asr"]["n"]:
            console.print(tables.differences(found["cells"], "asr"))
