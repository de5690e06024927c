"""What a run says while it runs: counts, rate, time left, and names that tell two entries of one method apart."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import bench_workers
import pytest
from rich.console import Console

from bbfast import _progress
from bbfast.bench import Outcome, Plan, run_plan
from bbfast.bench.progress import Pace, duration, labels
from bbfast.store import Store

MakePlan = Callable[..., Plan]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_count_every_stage_of_this_run(plan: MakePlan) -> None:
    made = plan(seeds=[0, 1])  # 4 attacks, 8 defenses
    keys, clock = list(made.tasks), Clock()
    known = {keys[0]: Outcome("done", folder="x")}
    pace = Pace(made, known, clock)
    assert pace.shown(2) == "1/12 done, 2 running, 0 failed"
    for key in keys[1:3]:  # a minute each: longer than what rich remembers
        clock.now += 60
        over = {key: Outcome("done", folder="x", seconds=60)}
        known |= over
        pace.took(over)
    assert pace.shown(1) == "3/12 done, 1 running, 0 failed, 1.0/min, 9 min 0 s left"
    clock.now += 120
    attack = keys[3]
    assert made.tasks[attack].kind == "attack"
    known[attack] = Outcome("failed", reason="no", seconds=120)
    pace.took({attack: known[attack]})
    # 12 less 4 that are over and 2 defenses that have lost their attack, at 3 in 4 minutes.
    assert pace.shown(0) == "3/12 done, 0 running, 1 failed, 45.0/h, 8 min 0 s left"
    assert pace.line(made.tasks[attack], known[attack]) == (
        "[4/12] digits small_cnn badnets 0.05, seed 1: failed: no (120.0 s), 1 failed, 45.0/h, 8 min 0 s left"
    )


def test_refused_defenses_were_not_begun(plan: MakePlan) -> None:
    made, clock = plan(), Clock()
    first, second, third = list(made.tasks)[:3]
    known: dict[str, Outcome] = {}
    pace = Pace(made, known, clock)
    clock.now = 1.0
    refused = Outcome("not_applicable", reason="no")
    over = {first: refused} | dict.fromkeys((second, third), dataclasses.replace(refused, attempts=0))
    known |= over
    pace.took(over)
    assert pace.shown(0) == "0/6 done, 0 running, 0 failed, 60/min, 3 s left"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 4800)] == ["0 s", "1 min 0 s", "3 min 5 s", "1 h 20 min"]


def test_lines_name_labels_counts_and_rate(plan: MakePlan, tmp_path: Path) -> None:
    attacks = [{"name": "wanet", "label": f"wanet, s {s}", "set": {"s": s}} for s in (0.5, 1.0)]
    made, lines = plan(attacks=attacks, defenses=["nc"]), []
    assert len(set(labels(made).values())) == len(made.tasks) == 4
    run_plan(made, Store(tmp_path), bench_workers.Inline(tmp_path), progress=False, say=lines.append)
    assert lines[0].startswith("[1/4] digits small_cnn wanet, s 0.5 0.05, seed 0: done (0.0 s), 0 failed, ")
    assert "wanet, s 1.0 0.05 nc, seed 0" in lines[3] and lines[3].endswith("/min, 0 s left")


def test_an_attack_that_no_cell_needs_has_a_name(plan: MakePlan) -> None:
    made = plan(models=["vit_b_16"], attacks=["badnets"], defenses=["clp"])
    assert all(cell.task is None for cell in made.cells)
    assert list(labels(made).values()) == ["digits vit_b_16 badnets 0.05, seed 0"][: len(made.tasks)]
    assert len(made.tasks) == 1


def test_the_view_fits_a_terminal_and_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    with _progress.bar("grid", 1056, True, done=3, left=False) as bar:
        bar.say("520/1056 done, 4 running, 12 failed, 12/min, 44 min 40 s left")
    assert "520/1056 done, 4 running, 12 failed, 12/min, 44 min 40 s left" in out.getvalue()
    assert "-:--:--" not in out.getvalue()
