"""Removing what no grid refers to, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_workers
import pytest
from typer.testing import CliRunner

from bbfast.bench import Plan, find_garbage, grid_rows, remove_garbage, run_plan
from bbfast.cli.app import app
from bbfast.errors import ArtifactError
from bbfast.store import Content, Store

MakePlan = Callable[..., Plan]


def test_what_a_grid_refers_to_stays(plan: MakePlan, tmp_path: Path) -> None:
    store, whole, part = Store(tmp_path), plan(), plan(attacks=["sig"], defenses=["nc"])
    run_plan(whole, store, bench_workers.Inline(tmp_path), progress=False)
    store.write("prerequisite", "surrogate", "1" * 64, Content("prerequisite", {}))
    (tmp_path / ".quarantine" / "attack-old").mkdir(parents=True)
    assert len(find_garbage(store, [whole]).results) == 0 and len(find_garbage(store, [whole]).quarantine) == 1
    found = find_garbage(store, [part])
    assert len(found.results) == 4 and len(found.outcomes) == 4 and found.size > 0
    remove_garbage(found)
    assert [row["status"] for row in grid_rows(part, store)] == ["done"]
    assert len(store.list("prerequisite")) == 1 and len(store.list()) == 3
    assert run_plan(part, store, bench_workers.Inline(tmp_path), progress=False).begun == 0
    assert len(find_garbage(store, [part])) == 0


def test_grids_that_never_ran_would_take_everything(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no store at"):
        find_garbage(Store(tmp_path / "none"), [plan()])
    with pytest.raises(ArtifactError, match=r"no stage of these grids has been run .* all of it would be removed"):
        find_garbage(Store(tmp_path), [plan()])


def test_the_command_asks(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: smoke\nattacks: [badnets]\ndefenses: [none]\n")
    (tmp_path / "both.yaml").write_text("base: smoke\ndefenses: [none]\n")
    from bbfast.bench import load_grid, make_plan

    both = make_plan(load_grid(tmp_path / "both.yaml"))
    root = tmp_path / "runs"
    run_plan(both, Store(root), bench_workers.Inline(root), progress=False)
    call = ["bench", "gc", str(tmp_path / "mine.yaml"), "--store", str(root)]
    done = CliRunner().invoke(app, call, input="n\n", prog_name="bbfast")
    assert done.exit_code == 0 and "attack-blended-" in done.stdout and len(Store(root).list()) == 2
    done = CliRunner().invoke(app, [*call, "--yes"], prog_name="bbfast")
    assert done.exit_code == 0 and [entry.name for entry in Store(root).list()] == ["badnets"]
