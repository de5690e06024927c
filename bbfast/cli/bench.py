"""``bbfast bench``: a grid planned, run and looked at; what it found is read by :mod:`bbfast.cli._bench_results`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli import _bench_results
from bbfast.cli._bench_options import RUNS, Set, Source, StorePath, again, planned, there
from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Json

if TYPE_CHECKING:
    from bbfast.bench.cost import Estimate

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    bench = typer.Typer(no_args_is_help=True, help="Plan and run many attacks and defenses, and read the table.")
    app.add_typer(bench, name="bench")

    @command(bench, "plan", examples="bbfast bench plan paper\nbbfast bench plan grid.yaml --workers 4 --json")
    def plan(
        source: Source,
        store: StorePath = RUNS,
        settings: Set = [],  # noqa: B006
        workers: Annotated[int, typer.Option(min=1, help="Stages at once, for the time.")] = 1,
        json: Json = False,
    ) -> None:
        """Show what a grid takes: cells, stages, what is shared, what is not applicable and why, time and disk."""
        from bbfast.bench.cost import estimate
        from bbfast.bench.failures import refusals
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        made = planned(source, settings)
        left = estimate(made, Store(store.expanduser()))
        stages, reasons = made.stages(), made.not_applicable()
        cells = [dataclasses.asdict(cell) for cell in made.cells]
        refused = refusals(cell for cell in cells if cell["reason"] is not None)
        if json:
            found = {name: value if left.measured else None for name, value in _expected(left, workers).items()}
            emit_json(
                {
                    "cells": len(cells),
                    "stages": stages,
                    "not_applicable": sum(reasons.values()),
                    "reasons": reasons,
                    "not_applicable_cells": refused,
                    "estimate": {"left": left.left, "unmeasured": left.unmeasured, "workers": workers, **found},
                }
            )
            return
        console = screen()
        console.print(
            f"{made.grid.name}: {len(cells)} cells; {stages['total']} stages ({stages['attack']} attacks, "
            f"{stages['defense']} defenses); {stages['saved_by_sharing']} trainings saved, since one attack serves "
            "all its defenses",
            soft_wrap=True,
        )
        if reasons:
            console.print(tables.refused(refused, cells))
        for line in _estimated(left, workers, str(store)):
            console.print(line, markup=False, soft_wrap=True)

    @command(
        bench,
        "run",
        examples="bbfast bench run smoke\nbbfast bench run grid.yaml --store runs/ --workers 4",
        resume="run the same command again to go on",
    )
    def run(
        source: Source,
        store: StorePath = RUNS,
        settings: Set = [],  # noqa: B006
        executor: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
        workers: Annotated[int | None, typer.Option(min=1, help="Stages at once; one a GPU, or one a core.")] = None,
        gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker; ray and slurm.")] = 0.0,
        retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
        verify: Annotated[bool, typer.Option("--verify", help="Check what is there first, file by file.")] = False,
        json: Json = False,
    ) -> None:
        """Run what is not done yet. It may be stopped or killed at any moment: the same command goes on."""
        from bbfast.bench import make_pool, run_plan
        from bbfast.bench.progress import duration
        from bbfast.store import Store

        made = planned(source, settings)
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
                soft_wrap=True,
            )
        if done.failed:
            note(f"{again('status', source, store, settings, '--failed')} shows why; --retry-failed tries again")
            raise typer.Exit(1)

    @command(bench, "status", examples="bbfast bench status grid.yaml --store runs/ --failed")
    def status(
        source: Source,
        store: StorePath = RUNS,
        settings: Set = [],  # noqa: B006
        failed: Annotated[
            bool, typer.Option("--failed", help="Every failed stage with its traceback, device and versions.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Show how far a grid is, and why what failed has failed."""
        from collections import Counter

        from bbfast.bench import failures, grid_rows
        from bbfast.bench.failures import refusals
        from bbfast.cli import _bench_tables as tables
        from bbfast.store import Store

        made, place = planned(source, settings), there(Store(store.expanduser()))
        rows, broken = grid_rows(made, place), failures(made, place)
        counts = Counter(row["status"] for row in rows)
        refused = refusals(row for row in rows if row["status"] == "not_applicable")
        reasons = {group["reason"]: group["count"] for group in refused}
        if json:
            every = {"not_applicable": reasons, "not_applicable_cells": refused}
            emit_json({"cells": len(rows), "status": counts, "failed": broken, **every})
            return
        shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
        screen().print(f"{len(rows)} cells: {shown}", markup=False)
        if reasons and not failed:
            screen().print(tables.refused(refused, rows))
        if broken:
            screen().print("failed")
        for line in tables.tracebacks(broken) if failed else tables.failures(broken):
            screen().print(line, markup=False, soft_wrap=True)
        if counts["missing"]:
            note(f"{counts['missing']} cells are left: {again('run', source, store, settings)} goes on")
        if broken:
            waits = f" and {counts['blocked']} cells that wait for them" if counts["blocked"] else ""
            retry = again("run", source, store, settings, "--retry-failed")
            note(f"{len(broken)} stages have failed: {retry} tries them again{waits}")
            if not failed:
                note(f"{again('status', source, store, settings, '--failed')} shows their tracebacks")

    @command(bench, "gc", examples="bbfast bench gc paper mine.yaml --store runs/")
    def gc(
        sources: Annotated[list[str], typer.Argument(metavar="GRID...", help="Grids whose results stay.")],
        store: StorePath = RUNS,
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

        plans = [planned(source, []) for source in sources]
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

    _bench_results.register(bench)


def _expected(left: Estimate, workers: int) -> dict[str, float]:
    return {"seconds": left.seconds, "wall_seconds": left.seconds / workers, "disk_bytes": left.disk_bytes}


def _estimated(left: Estimate, workers: int, store: str) -> list[str]:
    """What is left, in words."""
    from bbfast.bench.progress import duration

    if not left.left:
        return ["left: nothing"]
    if not left.measured:
        return [
            f"left: {left.left} stages; how long they take is not known: none of their methods has been measured on "
            f"these data sets and models in {store}",
            "run a part of the grid (such as one ratio and one seed with --set), or name a store that has some with "
            "--store, and plan again",
        ]
    at_once = "one after another" if workers == 1 else f"on {workers} workers, if all are kept busy"
    line = f"left: {left.left} stages, {duration(left.seconds / workers)} {at_once}, {left.disk_bytes / 1e9:.1f} GB"
    rest = f"that leaves out {left.unmeasured} stages whose methods have not been measured on their data set and model"
    return [line, *([rest] if left.unmeasured else [])]


def _unless_bar() -> Any:
    from bbfast._progress import wanted

    return (lambda line: None) if wanted(None) else note
