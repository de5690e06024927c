"""``bbfast bench``: a grid planned, run, looked at, and compared with a published table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Json, parse_settings

if TYPE_CHECKING:
    from bbfast.bench import Plan

__all__ = ["register"]

Source = Annotated[str, typer.Argument(metavar="GRID", help="A YAML file, or paper, paper-full, digits-full, smoke.")]
StorePath = Annotated[Path, typer.Option("--store", help="Folder of results.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="A key of the grid, instead of the file's: seeds=[0,1].")
]
_METRIC = typer.Option(help="c_acc, asr, r_acc, der, rir, tpr, fpr or auroc.")
_RUNS = Path("runs")


def register(app: typer.Typer) -> None:
    bench = typer.Typer(no_args_is_help=True, help="Plan and run many attacks and defenses, and read the table.")
    app.add_typer(bench, name="bench")

    @command(bench, "plan", examples="bbfast bench plan paper\nbbfast bench plan grid.yaml --json")
    def plan(source: Source, store: StorePath = _RUNS, settings: Set = [], json: Json = False) -> None:  # noqa: B006
        """Show what a grid takes: cells, stages, what is shared, what is not applicable and why, time and disk."""
        from bbfast.bench.cost import estimate
        from bbfast.bench.progress import duration
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        made = _planned(source, settings)
        left = estimate(made, Store(store.expanduser()))
        reasons = made.not_applicable()
        if json:
            emit_json(
                {
                    "cells": len(made.cells),
                    "stages": made.stages(),
                    "not_applicable": sum(reasons.values()),
                    "reasons": reasons,
                    "estimate": {name: getattr(left, name) for name in left.__dataclass_fields__},
                }
            )
            return
        stages = made.stages()
        console = screen()
        console.print(
            f"{made.grid.name}: {len(made.cells)} cells; {stages['total']} stages ({stages['attack']} attacks, "
            f"{stages['defense']} defenses); {stages['saved_by_sharing']} trainings saved, since one attack serves "
            "all its defenses",
            soft_wrap=True,
        )
        if reasons:
            console.print(tables.reasons(reasons))
        unknown = f"; {left.unmeasured} stages have no measurement in the store" if left.unmeasured else ""
        console.print(
            f"left: {left.left} stages, {duration(left.seconds)} one after another, {left.disk_bytes / 1e9:.1f} GB"
            + unknown,
            markup=False,
            soft_wrap=True,
        )

    @command(
        bench,
        "run",
        examples="bbfast bench run smoke\nbbfast bench run grid.yaml --store runs/ --workers 4",
        resume="run the same command again to go on",
    )
    def run(
        source: Source,
        store: StorePath = _RUNS,
        settings: Set = [],  # noqa: B006
        executor: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
        workers: Annotated[int | None, typer.Option(min=1, help="Stages at once; one a GPU, or one a core.")] = None,
        gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker of ray or slurm.")] = 0.0,
        retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
        verify: Annotated[bool, typer.Option("--verify", help="Check what is there first, file by file.")] = False,
        json: Json = False,
    ) -> None:
        """Run what is not done yet. It may be stopped or killed at any moment: the same command goes on."""
        from bbfast.bench import make_pool, run_plan
        from bbfast.bench.progress import duration
        from bbfast.store import Store

        made = _planned(source, settings)
        place = Store(store.expanduser())
        with usage():
            pool = make_pool(executor, place.root, made, workers, gpus)
        done = run_plan(made, place, pool, retry_failed=retry_failed, verify=verify, say=_unless_bar())
        if json:
            emit_json({name: getattr(done, name) for name in done.__dataclass_fields__})
        else:
            screen().print(
                f"{done.done} done, {done.failed} failed, {done.not_applicable} not applicable, {done.blocked} without "
                f"their attack; {done.begun} of them now, in {duration(done.seconds)}",
                markup=False,
            )
        if done.failed:
            note(f"bbfast bench status {source} --store {store} shows why; --retry-failed tries again")
            raise typer.Exit(1)

    @command(bench, "status", examples="bbfast bench status grid.yaml --store runs/")
    def status(source: Source, store: StorePath = _RUNS, settings: Set = [], json: Json = False) -> None:  # noqa: B006
        """Show how far a grid is, and why what failed has failed."""
        from collections import Counter

        from bbfast.bench import grid_rows
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        rows = grid_rows(_planned(source, settings), _there(Store(store.expanduser())))
        counts = Counter(row["status"] for row in rows)
        refused = Counter(row["reason"] for row in rows if row["status"] == "not_applicable")
        failed = [row for row in rows if row["status"] == "failed"]
        if json:
            emit_json({"cells": len(rows), "status": counts, "failed": failed, "not_applicable": refused})
            return
        shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
        screen().print(f"{len(rows)} cells: {shown}", markup=False)
        if refused:
            screen().print(tables.reasons(refused))
        if failed:
            screen().print("failed")
        for line in tables.failures(failed):
            screen().print(line, markup=False, soft_wrap=True)
        if left := counts["missing"] + counts["blocked"]:
            note(f"{left} cells are left: bbfast bench run {source} --store {store} goes on")

    @command(
        bench,
        "results",
        examples="bbfast bench results smoke --pivot asr\nbbfast bench results grid.yaml --csv table.csv --mean",
    )
    def results(
        source: Source,
        store: StorePath = _RUNS,
        settings: Set = [],  # noqa: B006
        where: Annotated[
            list[str], typer.Option(metavar="KEY=VALUE", help="Only cells with this: attack=badnets, ratio=0.1.")
        ] = [],  # noqa: B006
        mean: Annotated[bool, typer.Option("--mean", help="Mean and standard deviation over the seeds.")] = False,
        pivot: Annotated[str | None, _METRIC] = None,
        csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
        parquet: Annotated[
            Path | None, typer.Option(help="The same as Parquet; needs pip install 'bbfast[query]'.")
        ] = None,
        costs: Annotated[bool, typer.Option("--costs", help="Seconds and memory as well.")] = False,
        json: Json = False,
    ) -> None:
        """Show a grid's figures: its cells, or attacks by defenses with --pivot."""
        from bbfast.bench import aggregate, grid_rows, select, to_csv, write_parquet
        from bbfast.bench.results import COSTS, METRICS
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        rows = grid_rows(_planned(source, settings), _there(Store(store.expanduser())), costs=costs)
        with usage():
            rows = select(rows, parse_settings(where, "--where"))
        without = sum(row["status"] != "done" for row in rows)
        if mean:
            rows = aggregate(rows, (*METRICS, *(COSTS if costs else ())))
        if csv is not None:
            csv.expanduser().write_text(to_csv(rows), encoding="utf-8")
            note(f"{len(rows)} rows in {csv}")
        if parquet is not None:
            write_parquet(rows, parquet)
            note(f"{len(rows)} rows in {parquet}")
        if json:
            emit_json(rows)
        elif pivot is not None:
            with usage():
                for title, table in tables.pivoted(rows, pivot, screen().width):
                    screen().print(title, markup=False, soft_wrap=True)
                    screen().print(table)
        elif csv is None and parquet is None:
            screen().print(tables.listed([row for row in rows if (row["n"] if mean else row["status"] == "done")]))
        if without and not json:
            note(f"{without} of the cells have no figures: bbfast bench status {source} --store {store} shows why")

    @command(bench, "gc", examples="bbfast bench gc paper mine.yaml --store runs/")
    def gc(
        sources: Annotated[list[str], typer.Argument(metavar="GRID...", help="Grids whose results stay.")],
        store: StorePath = _RUNS,
        only: Annotated[
            bool, typer.Option("--only", help="Other grids that were run on the store do not count, and are forgotten.")
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    ) -> None:
        """Remove results that no grid refers to: those named, and those that were run on the store.

        Shows what would go, and asks. Nothing is removed while a runner is at work on the store.
        """
        from bbfast.bench import find_garbage, remove_garbage
        from bbfast.store import Store

        plans = [_planned(source, []) for source in sources]
        found = find_garbage(Store(store.expanduser()), plans, kept=not only)
        for path in found.results:
            screen().print(f"  {path.name}", markup=False)
        screen().print(
            f"{len(found.results)} results, {len(found.outcomes)} notes and {len(found.quarantine)} damaged results, "
            f"none of them of the grids {', '.join(found.grids)}: {found.size / 1e6:.1f} MB",
            markup=False,
            soft_wrap=True,
        )
        if found and (yes or typer.confirm("Remove them?", default=False)):
            remove_garbage(found)
            note("removed")

    @command(bench, "compare", examples="bbfast bench compare paper published.csv --store runs/")
    def compare(
        source: Source,
        published: Annotated[Path, typer.Argument(help="CSV of the published table.")],
        store: StorePath = _RUNS,
        settings: Set = [],  # noqa: B006
        csv: Annotated[Path | None, typer.Option(help="Write the matched cells to this file.")] = None,
        json: Json = False,
    ) -> None:
        """Put a grid's figures beside a published leaderboard: matched cells, differences, coverage."""
        from bbfast.bench import compare as compared
        from bbfast.bench import grid_rows, read_published, to_csv
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        rows = grid_rows(_planned(source, settings), _there(Store(store.expanduser())))
        found = compared(rows, read_published(published))
        if csv is not None and found["cells"]:
            csv.expanduser().write_text(to_csv(found["cells"]), encoding="utf-8")
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


def _planned(source: str, settings: list[str]) -> Plan:
    from bbfast.bench import load_grid, make_plan

    with usage():
        return make_plan(load_grid(source, **parse_settings(settings)))


def _there(store: Any) -> Any:
    from bbfast.errors import ArtifactError

    if not store.root.is_dir():
        raise ArtifactError(f"there is no store at {store.root}; name the folder with --store")
    return store


def _unless_bar() -> Any:
    from bbfast._progress import wanted

    return (lambda line: None) if wanted(None) else note
