"""What is recorded of stages without a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_workers

from bbfast.bench import Outcome, Plan, failures, run_plan
from bbfast.bench.outcomes import Book
from bbfast.bench.work import Memory
from bbfast.store import PROTOCOL_VERSION, Store

MakePlan = Callable[..., Plan]


def _work(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    name = bench_workers.name_of(task)
    if name == "badnets-0.05-7":
        return Outcome("failed", reason="ValueError: no", traceback="Traceback ...")
    return Outcome("not_applicable", reason="cannot") if name.startswith("sig") else bench_workers.made(task, root)


def test_notes_name_what_they_are_about(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(seeds=[7], device="cpu", defenses=["ft", "nc"]), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path, _work), progress=False)
    notes = Book(store).read_all(made.tasks)
    assert sorted(note.status for note in notes.values()) == ["failed", *["not_applicable"] * 3]
    for key, note in notes.items():
        assert note.record["spec"] == made.tasks[key].spec and note.record["spec"]["device"] == "cpu"
        assert note.record["versions"]["protocol"] == PROTOCOL_VERSION and note.record["ended"][:2] == "20"
    # The attack has no row of its own here: only its stage says why its defenses wait.
    (found,) = failures(made, store)
    assert (found["stage"], found["waiting"]) == ("digits small_cnn badnets 0.05, seed 7", 2)
    assert (found["attack"], found["ratio"], found["seed"], found["defense"]) == ("badnets", 0.05, 7, "none")
    assert (found["traceback"], found["attempts"]) == ("Traceback ...", 1)


def test_notes_of_results_stay_small(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(attacks=["badnets"], defenses=["none"]), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    (note,) = Book(store).read_all(made.tasks).values()
    assert note.status == "done" and note.record == {}
