"""Running a plan: order, failures, limits, kills, two runners; stages here are quick, or hang, or kill themselves."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_workers
import pytest

from bbfast.bench import LocalPool, Plan, Pool, grid_rows, run_plan, to_csv
from bbfast.bench.grid import Limits
from bbfast.bench.outcomes import Book, Outcome, Status
from bbfast.bench.run import Summary
from bbfast.bench.work import Memory
from bbfast.store import Store

MakePlan = Callable[..., Plan]
HERE = Path(__file__).parent


def go(made: Plan, root: Path, work: Any = bench_workers.quick, **options: Any) -> Summary:
    limits = options.pop("limits", Limits())
    pool: Pool
    if work is bench_workers.Inline:
        pool = bench_workers.Inline(root)
    else:
        pool = LocalPool(root, options.pop("workers", 2), limits, threads=1, work=work)
    return run_plan(made, Store(root), pool, progress=False, **options)


def times_made(root: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in root.glob("*.made")}


def test_everything_is_done_once_and_defenses_first(plan: MakePlan, tmp_path: Path) -> None:
    made, lines = plan(), []
    done = go(made, tmp_path, workers=1, say=lines.append)
    assert (done.done, done.begun, done.failed, done.blocked) == (6, 6, 0, 0)
    assert set(times_made(tmp_path).values()) == {1} and len(times_made(tmp_path)) == 6
    assert [line.split()[3] for line in lines] == ["badnets"] * 3 + ["sig"] * 3
    again = go(made, tmp_path)
    assert again.begun == 0 and again.done == 6
    more = plan(defenses=["none", "ft", "nc", "clp"])
    assert go(more, tmp_path).begun == 2, "a grid that grew runs what is new"


def test_lost_outcomes_are_found_again_in_the_store(plan: MakePlan, tmp_path: Path) -> None:
    made = plan()
    go(made, tmp_path)
    first = to_csv(grid_rows(made, Store(tmp_path)))
    for path in (tmp_path / ".bench").glob("*.json"):
        path.write_text("{" if path.name < "8" else "[]")
    (tmp_path / "index.sqlite").write_bytes(b"no database")
    assert go(made, tmp_path).begun == 6
    assert set(times_made(tmp_path).values()) == {1}
    assert to_csv(grid_rows(made, Store(tmp_path))) == first


def test_failures_stay_where_they_are(plan: MakePlan, tmp_path: Path) -> None:
    made = plan(attacks=["badnets", "blended"], defenses=["none", "ft", "fp", "nc", "clp"])
    done = go(made, tmp_path, bench_workers.unlucky)
    rows = {(row["attack"], row["defense"]): row for row in grid_rows(made, Store(tmp_path))}
    status = {place: row["status"] for place, row in rows.items()}
    assert {d: status["badnets", d] for d in ("none", "ft", "fp", "nc", "clp")} == {
        "none": "done",
        "ft": "failed",
        "fp": "not_applicable",
        "nc": "done",  # its worker was killed under it, once
        "clp": "done",
    }
    assert {status["blended", d] for d in ("none", "ft", "nc")} == {"not_applicable"}
    assert rows["badnets", "ft"]["reason"] == "ValueError: no" and rows["badnets", "ft"]["c_acc"] is None
    assert (done.done, done.failed, done.not_applicable, done.blocked) == (3, 1, 6, 0)
    key = next(cell.task for cell in made.cells if cell.defense == "nc" and cell.attack == "badnets")
    outcome = Book(Store(tmp_path)).read(key or "")
    assert outcome is not None and outcome.attempts == 2
    assert go(made, tmp_path).begun == 0
    assert go(made, tmp_path, retry_failed=True).begun == 1
    assert {row["status"] for row in grid_rows(made, Store(tmp_path))} == {"done", "not_applicable"}


def test_a_stage_that_kills_its_worker_is_given_up(plan: MakePlan, tmp_path: Path) -> None:
    made = plan()
    done = go(made, tmp_path, bench_workers.always_killed)
    assert (done.done, done.failed) == (4, 2)
    reasons = {row["reason"] for row in grid_rows(made, Store(tmp_path)) if row["status"] == "failed"}
    assert reasons == {"its worker ended with signal SIGKILL"}


@pytest.mark.parametrize(
    ("work", "limits", "reason"),
    [
        (bench_workers.hangs, Limits(seconds=1.5), "the limit is 1.5 s"),
        (bench_workers.hungry, Limits(memory_gib=0.9), "the limit is 0.9 GiB"),
    ],
)
def test_limits(plan: MakePlan, tmp_path: Path, work: Any, limits: Limits, reason: str) -> None:
    """What ``nc`` does is ended; ``ft`` waits all that time for a result that another process makes, and is not."""
    made, other = plan(attacks=["badnets"]), contextlib.ExitStack()
    spec = next(task.spec for task in made.tasks.values() if task.method == "ft")
    key = Store.key("defense", {"spec": {name: value for name, value in spec.items() if name != "device"}})
    other.enter_context(Store(tmp_path).lock(key))
    began = time.monotonic()
    done = go(made, tmp_path, work, limits=limits, say=lambda line: other.close() if "failed" in line else None)
    assert (done.done, done.failed) == (2, 1) and time.monotonic() - began < 60
    (row,) = [row for row in grid_rows(made, Store(tmp_path)) if row["status"] == "failed"]
    assert row["defense"] == "nc" and reason in row["reason"]


def test_a_damaged_attack_is_made_anew(plan: MakePlan, tmp_path: Path) -> None:
    done = go(plan(attacks=["badnets"]), tmp_path, bench_workers.rotten)
    assert (done.done, done.failed) == (3, 0) and (tmp_path / "attacks").read_text() == "xx"


@pytest.mark.parametrize("status", ["failed", "not_applicable", "damaged"])
def test_a_failure_does_not_replace_what_another_runner_made(plan: MakePlan, tmp_path: Path, status: Status) -> None:
    made, store, turns = plan(attacks=["badnets"]), Store(tmp_path), itertools.count()

    def slower(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
        if next(turns) == 0:
            go(made, tmp_path, bench_workers.Inline)
        return Outcome(status, reason="DatasetError: not on this machine")

    done = run_plan(made, store, bench_workers.Inline(tmp_path, slower), progress=False)
    assert (done.done, done.failed, done.not_applicable, done.blocked) == (3, 0, 0, 0)
    assert [row["status"] for row in grid_rows(made, store)] == ["done"] * 3
    key = next(iter(made.tasks))
    Book(store).write(key, Outcome(status))
    noted = Book(store).read(key)
    assert noted is not None and noted.status == "done"


def test_ctrl_c_does_not_reach_a_worker_that_starts(plan: MakePlan, tmp_path: Path) -> None:
    """Python would end with a traceback while it imports, before the worker can say that it ignores the signal."""
    made = plan(attacks=["badnets"])
    key, task = next(iter(made.tasks.items()))
    pool, heard = LocalPool(tmp_path, 1, threads=1, work=bench_workers.quick), []
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        pool.submit(key, {"kind": task.kind, "spec": task.spec})
        (pid,) = [worker.pid for worker in multiprocessing.active_children()]
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
        assert blocked >> (signal.SIGINT - 1) & 1
        signal.raise_signal(signal.SIGINT)
        assert heard, "the runner hears it as before"
    finally:
        signal.signal(signal.SIGINT, handler)
        pool.close()


@pytest.mark.slow
def test_ctrl_c_of_the_command_while_its_workers_start(tmp_path: Path) -> None:
    """As a terminal sends it: to the runner and to every worker."""
    command = [sys.executable, "-m", "bbfast.cli", "bench", "run", "smoke", "--store", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:  # the helper, and the first worker
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("interrupted"), err
    assert not list((tmp_path / "runs").glob("attack-*"))


RUNNER = """
import sys
sys.path.insert(0, {here!r})
import bench_workers
from bbfast.bench import LocalPool, load_grid, make_plan, run_plan
from bbfast.store import Store

if __name__ == "__main__":
    plan = make_plan(load_grid({grid!r}))
    pool = LocalPool({root!r}, 2, threads=1, work=bench_workers.slow)
    print("begun", flush=True)
    run_plan(plan, Store({root!r}), pool, progress=False)
    print("over", flush=True)
"""
GRID = {
    "datasets": ["digits"],
    "models": ["small_cnn"],
    "attacks": ["badnets", "sig"],
    "ratios": [0.05],
    "defenses": ["none", "ft", "nc", "clp"],
    "preset": "quick",
    "seeds": [0, 1],
}


def runner(root: Path, script: Path) -> subprocess.Popen[str]:
    script.write_text(RUNNER.format(here=str(HERE), grid=GRID, root=str(root)))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments(plan: MakePlan, tmp_path: Path, times: int) -> None:
    """SIGKILL of one worker or another, in a stage, between two or while it starts; who is killed thrice is retried."""
    made, root, chance = plan(**GRID), tmp_path / "killed", random.Random(times)
    go(made, tmp_path / "calm", bench_workers.Inline)
    over, killed = threading.Event(), []

    def kill() -> None:
        while len(killed) < times and not over.wait(chance.uniform(0.1, 4)):
            if workers := multiprocessing.active_children():
                victim = chance.choice(workers)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    while len(killed) < times:
        go(made, root, bench_workers.slow, retry_failed=True)
        if len(killed) < times and (done := sorted(root.glob("defense-*"))):
            shutil.rmtree(chance.choice(done))  # all is done before the last kill: there must be work again
    over.set()
    killer.join()
    last = go(made, root, bench_workers.slow, retry_failed=True)
    assert (last.done, last.failed) == (16, 0) and len(set(killed)) > 1
    assert to_csv(grid_rows(made, Store(root))) == to_csv(grid_rows(made, Store(tmp_path / "calm")))


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_ends_as_if_never_killed(plan: MakePlan, tmp_path: Path, times: int) -> None:
    """SIGKILL of the runner at moments spread over its run; its workers end with it."""
    made = plan(**GRID)
    go(made, tmp_path / "calm", bench_workers.Inline)
    root, kills = tmp_path / "killed", 0
    for i in range(times):
        process = runner(root, tmp_path / "run.py")
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        try:
            process.wait(timeout=0.5 + 3 * i / times)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
    assert kills >= 2
    go(made, root, bench_workers.slow)
    assert to_csv(grid_rows(made, Store(root))) == to_csv(grid_rows(made, Store(tmp_path / "calm")))
    assert set(times_made(root).values()) <= {1}, "done to the end twice"


@pytest.mark.slow
def test_two_runners_share_the_work(plan: MakePlan, tmp_path: Path) -> None:
    root = tmp_path / "store"
    both = [runner(root, tmp_path / f"run{i}.py") for i in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out.endswith("over\n")
    assert set(times_made(root).values()) == {1} and len(times_made(root)) == 16
    assert {row["status"] for row in grid_rows(plan(**GRID), Store(root))} == {"done"}


def test_workers_end_with_their_runner(tmp_path: Path) -> None:
    process = runner(tmp_path / "store", tmp_path / "run.py")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    deadline = time.monotonic() + 30
    while not (workers := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(text) for text in found.read_text().split()] if found.exists() else []


def test_a_store_that_may_not_be_written(plan: MakePlan, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(0o500)
    with pytest.raises(Exception, match="may be written to"):
        go(plan(), root)


def test_many_stages_cost_little(plan: MakePlan, tmp_path: Path) -> None:
    """Not a timing: that nothing in the runner grows with the number of stages squared would show as minutes."""
    made = plan(seeds=list(range(400)))
    done = go(made, tmp_path, bench_workers.nothing)
    assert done.done == len(made.tasks) == 2400
