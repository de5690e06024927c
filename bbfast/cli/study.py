"""``bbfast study``: a ready study, from its grid to the figure and what to read in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Device, Json, parse_settings

__all__ = ["register"]

_EXAMPLES = """
bbfast study overview --out studies/overview
bbfast study overview --set attacks=[badnets,wanet] --set seeds=[0] --set "recipe={epochs: 5}"
bbfast study overview --set dataset=cifar10 --set root=data --set model=preactresnet18 --set preset=paper
"""
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the study; `bbfast info studies NAME` lists them."),
]


def register(app: typer.Typer) -> None:
    @command(app, "study", examples=_EXAMPLES, resume="run the same command again to go on")
    def study(
        name: Annotated[str, typer.Argument(help="The study; `bbfast list studies` shows them.")],
        store: Annotated[Path, typer.Option(help="Folder of results; what is there is not run again.")] = Path("runs"),
        out: Annotated[
            Path | None, typer.Option(help="Folder of figure and numbers; studies/NAME in the store if left out.")
        ] = None,
        settings: Set = [],  # noqa: B006 - typer makes a new list for every call
        device: Device = "auto",
        workers: Annotated[int | None, typer.Option(min=1, help="Stages at once; one a GPU, or one a core.")] = None,
        executor: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
        gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker of ray or slurm.")] = 0.0,
        figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figure.")] = True,
        retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
        json: Json = False,
    ) -> None:
        """Answer one of the paper's questions: runs a small grid, measures, and draws one figure.

        It may be stopped or killed at any moment: the same command goes on. Exit status 1 if cells failed; the figure
        then shows what is left.
        """
        from bbfast import studies
        from bbfast._progress import wanted
        from bbfast.bench.pools import EXECUTORS
        from bbfast.studies.run import plans_of

        with usage():
            made = studies.create(name, **parse_settings(settings))
            plans = plans_of(made, device)
            if executor not in EXECUTORS:
                raise ValueError(f"--executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
        place = store.expanduser()
        if plans:
            cells, stages = (sum(map(len, part)) for part in zip(*((p.cells, p.tasks) for p in plans), strict=True))
            note(f"{made.name}: {cells} cells, {stages} stages")
        found = studies.run(
            made,
            place / "studies" / made.name if out is None else out.expanduser(),
            store=place,
            device=device,
            workers=workers,
            executor=executor,
            gpus=gpus,
            figures=figures,
            retry_failed=retry_failed,
            say=(lambda line: None) if wanted(None) else note,
        )
        reading = found.data.with_name("reading.md")
        if json:
            said = {"study": found.name, "summary": found.summary, "cells": found.cells}
            more = {"seconds": found.numbers.meta["seconds"], "findings": found.numbers.meta.get("findings", [])}
            emit_json({**said, **more, "figure": found.figure, "data": found.data, "reading": reading})
        else:
            for line in found.numbers.meta.get("findings", []):
                screen().print(f"  {line}", markup=False)
            for path in (found.figure, found.data, reading):
                if path is not None:
                    screen().print(str(path), markup=False, soft_wrap=True)
        lost = {status: found.cells[status] for status in ("failed", "blocked", "missing") if found.cells.get(status)}
        if lost:
            shown = ", ".join(f"{count} {status}" for status, count in lost.items())
            again = "--retry-failed tries again" if plans else "the same command tries again"
            note(f"{shown} of {sum(found.cells.values())} cells; {reading} says why; {again}")
            raise typer.Exit(1)
