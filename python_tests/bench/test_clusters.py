"""Ray and Slurm do what the local workers do; Ray in a process of its own, Slurm as submitit's local processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_workers
import pytest

from bbfast.bench import LocalPool, Plan, grid_rows, make_pool, pools, run_plan, to_csv
from bbfast.bench.grid import Limits
from bbfast.bench.outcomes import Outcome
from bbfast.store import Store

MakePlan = Callable[..., Plan]
HERE = Path(__file__).parent
GRID: dict[str, Any] = {
    "datasets": ["digits"],
    "models": ["small_cnn"],
    "attacks": ["badnets"],
    "ratios": [0.05],
    "defenses": ["none", "ft", "nc"],
    "preset": "quick",
}
# Workers of Ray and jobs of Slurm unpickle what they do by name.
RAY = """
import os, sys
sys.path.insert(0, {here!r})
os.environ["PYTHONPATH"] = {here!r}
import bench_workers
from bbfast.bench import load_grid, make_plan, run_plan
from bbfast.bench.grid import Limits
from bbfast.bench.pool_ray import RayPool
from bbfast.store import Store

if __name__ == "__main__":
    plan = make_plan(load_grid({grid!r}))
    pool = RayPool({root!r}, 2, Limits(**{limits!r}), cpus=0.5, work=bench_workers.{work})
    print(run_plan(plan, Store({root!r}), pool, progress=False))
"""


@pytest.mark.parametrize(
    ("work", "limits", "ends", "reason"),
    [
        ("dies_once", {}, "done=3, failed=0", ""),  # the worker of nc is killed mid-stage, once
        pytest.param("hangs", {"seconds": 3}, "done=2, failed=1", "the limit is 3 s", marks=pytest.mark.slow),
        pytest.param("hungry", {"memory_gib": 0.9}, "done=2, failed=1", "the limit is 0.9 GiB", marks=pytest.mark.slow),
    ],
)
def test_ray(plan: MakePlan, tmp_path: Path, work: str, limits: dict[str, Any], ends: str, reason: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    root, script = tmp_path / "store", tmp_path / "run.py"
    script.write_text(RAY.format(here=str(HERE), grid=GRID, root=str(root), limits=limits, work=work))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and ends in done.stdout, done.stderr[-2000:]
    rows = grid_rows(plan(**GRID), Store(root))
    assert [row["reason"] for row in rows if row["status"] == "failed" and reason not in row["reason"]] == []
    if not reason:
        local = tmp_path / "local"
        pool = LocalPool(local, 1, threads=1, work=bench_workers.quick)
        run_plan(plan(**GRID), Store(local), pool, progress=False)
        assert to_csv(rows) == to_csv(grid_rows(plan(**GRID), Store(local)))


@pytest.mark.slow
def test_slurm(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    from bbfast.bench.pool_slurm import SlurmPool

    monkeypatch.setenv("PYTHONPATH", str(HERE))
    made = plan(**GRID)
    pool = SlurmPool(tmp_path, 2, Limits(seconds=4), cluster="local", work=bench_workers.hangs)
    done = run_plan(made, Store(tmp_path), pool, progress=False)
    assert (done.done, done.failed) == (2, 1)
    (row,) = [row for row in grid_rows(made, Store(tmp_path)) if row["status"] == "failed"]
    assert row["defense"] == "nc" and "the limit is 4 s" in row["reason"]
    pool = SlurmPool(tmp_path, 2, cluster="local", work=bench_workers.dies_once)
    again = run_plan(made, Store(tmp_path), pool, progress=False, retry_failed=True)
    assert (again.done, again.failed, again.begun) == (3, 0, 1)
    local = tmp_path / "local"
    run_plan(made, Store(local), bench_workers.Inline(local), progress=False)
    assert to_csv(grid_rows(made, Store(tmp_path))) == to_csv(grid_rows(made, Store(local)))


def test_why_an_earlier_job_was_ended_is_not_why_a_later_one_is(tmp_path: Path) -> None:
    """A job that is lost before it begins leaves nothing; what lay there is of another."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    from bbfast.bench.pool_slurm import SlurmPool

    class Lost:
        job_id = "7"

        def submit(self, *_: object) -> Lost:
            return self

        def done(self) -> bool:
            return True

        def result(self) -> object:
            raise RuntimeError("preempted")

    pool = SlurmPool(tmp_path, cluster="local")
    pool._executor = Lost()
    note = tmp_path / ".bench" / "k.ended"
    note.parent.mkdir(exist_ok=True)
    note.write_text("ended after 9 s: the limit is 8 s")
    pool.submit("k", {})
    (ended,) = pool.wait(0)
    assert ended.lost and "its job 7 was lost" in ended.outcome.reason


def test_executors_by_name(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="executor must be one of local, ray, slurm, got 'dask'"):
        make_pool("dask", tmp_path, plan())
    with pytest.raises(ValueError, match=r"gpus must be a whole number for slurm, got 0\.5"):
        make_pool("slurm", tmp_path, plan(), gpus=0.5)
    with pytest.raises(ValueError, match="gpus is for ray and slurm, got 2 with local"):
        make_pool("local", tmp_path, plan(), gpus=2)


@pytest.mark.parametrize(
    ("device", "count", "devices"),
    [
        ("auto", 2, {"cuda:0", "cuda:1"}),
        ("cuda", 1, {None}),
        ("cuda:1", 1, {None}),
        ("cpu", len(os.sched_getaffinity(0)), {None}),
    ],
)
def test_local_workers_of_a_device(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, count: int, devices: set[str | None]
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(pools, "LocalPool", lambda root, workers, limits, **more: made.append({"n": workers, **more}))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    pools.local_pool(tmp_path, plan(device=device))
    pools.local_pool(tmp_path, plan(device=device), 3)
    assert [each["n"] for each in made] == [count, 3] and set(made[0]["devices"] or [None]) == devices


def test_other_machines_are_given_whole_paths(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[Any] = []
    monkeypatch.setattr(
        "bbfast.bench.pool_ray.RayPool",
        lambda root, *_, **__: bench_workers.Inline(root, lambda task, *_: given.append(task) or Outcome("done")),
    )
    made = plan(datasets=[{"name": "npz", "root": "mine.npz"}, "digits"], attacks=["badnets"], defenses=["none"])
    pool = make_pool("ray", "runs", made)
    for task in made.tasks.values():
        pool.submit(task.key, {"spec": task.spec})
    assert [each["spec"]["data"]["root"] for each in given] == [str(tmp_path / "mine.npz"), None]
    assert len(pool.wait(0)) == 2 and pool.free == 1
    assert [task.spec["data"]["root"] for task in made.tasks.values()] == ["mine.npz", None]
