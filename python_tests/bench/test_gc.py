"""Removing what no grid refers to, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_workers
import pytest
from typer.testing import CliRunner

from bbfast import artifact
from bbfast.bench import Plan, find_garbage, grid_rows, remove_garbage, run_plan
from bbfast.bench.outcomes import Outcome
from bbfast.bench.work import Memory, perform
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
    # A grid that was run on the store counts unless it is said not to.
    assert len(find_garbage(store, [part]).results) == 0 and find_garbage(store, [part]).grids == ("grid",)
    found = find_garbage(store, [part], kept=False)
    assert len(found.results) == 4 and len(found.outcomes) == 5 and found.size > 0
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
    done = CliRunner().invoke(app, call, prog_name="bbfast")
    assert done.exit_code == 0 and "0 results, 0 notes" in done.stdout and "of the grids mine, both" in done.stdout
    call += ["--only"]
    done = CliRunner().invoke(app, call, input="n\n", prog_name="bbfast")
    assert done.exit_code == 0 and "attack-blended-" in done.stdout and len(Store(root).list()) == 2
    done = CliRunner().invoke(app, [*call, "--yes"], prog_name="bbfast")
    assert done.exit_code == 0 and [entry.name for entry in Store(root).list()] == ["badnets"]


def test_a_result_without_a_note_stays(plan: MakePlan, tmp_path: Path) -> None:
    """Its runner was killed before it noted it, or a single command made it; its settings tell whose it is."""
    own = {"attacks": ["badnets"], "defenses": ["none", "clp"], "device": "cpu"}
    made, other = plan(**own, recipe={"epochs": 0}), plan(**own, recipe={"epochs": 0}, seeds=[1])
    store, memory = Store(tmp_path), Memory()
    for one in (made, other):
        parent = None
        for task in one.tasks.values():
            outcome = perform({"kind": task.kind, "spec": task.spec, "parent": parent}, str(tmp_path), memory)
            assert outcome.status == "done", outcome
            parent = outcome.folder
    assert not (tmp_path / ".bench").exists() and len(store.list()) == 4
    found = find_garbage(store, [made])
    seeds = {artifact.read(path).config["seed"] for path in found.results}
    assert len(found.results) == 2 and seeds == {1}
    assert len(find_garbage(store, [made, other]).results) == 0


def test_nothing_goes_while_a_runner_is_at_work(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(), Store(tmp_path)
    refused: list[str] = []

    def work(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
        with pytest.raises(ArtifactError, match="a runner is at work on") as error:
            find_garbage(store, [made])
        refused.append(str(error.value))
        return bench_workers.made(task, root)

    run_plan(made, store, bench_workers.Inline(tmp_path, work), progress=False)
    found = find_garbage(store, [made])
    assert len(refused) == 6 and len(found) == 0
    with store.lock("1" * 64), pytest.raises(ArtifactError, match="a result is being made in"):
        find_garbage(store, [made])
    run_plan(plan(seeds=[1]), store, bench_workers.Inline(tmp_path), progress=False)
    with pytest.raises(ArtifactError, match="has changed since it was looked at"):
        remove_garbage(found)


def test_a_kept_grid_that_cannot_be_read_stops_it(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(attacks=["badnets"], defenses=["none"]), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    (tmp_path / ".bench" / "grids" / "x.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"x\.json was run here and cannot be read .*--only"):
        find_garbage(store, [made])
    assert [path.name for path in find_garbage(store, [made], kept=False).outcomes] == ["x.json"]
