"""A full disk and a clock that is set back: an error that says so, nothing lost, and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import bench_workers
import pytest

from bbfast.bench import LocalPool, Plan, grid_rows, run_plan, to_csv
from bbfast.errors import ArtifactError
from bbfast.store import Store

MakePlan = Callable[..., Plan]


def test_a_full_disk(plan: MakePlan, small_disk: Path, tmp_path: Path) -> None:
    made, root = plan(seeds=[0, 1]), small_disk / "store"
    root.mkdir()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * (2 << 20))
    size = ballast.stat().st_size
    ballast.write_bytes(b"x" * (size - 60_000))  # room for a few results
    with pytest.raises(ArtifactError, match="No space left"):
        run_plan(made, Store(root), LocalPool(root, 1, threads=1, work=bench_workers.quick), progress=False)
        # A stage that found the disk full has failed, and says so; what is then to be noted is the runner's error.
        failed = [row for row in grid_rows(made, Store(root)) if row["status"] == "failed"]
        assert failed and all("No space left" in row["reason"] for row in failed)
        raise ArtifactError(failed[0]["reason"])
    ballast.unlink()
    done = run_plan(
        made, Store(root), LocalPool(root, 1, threads=1, work=bench_workers.quick), progress=False, retry_failed=True
    )
    assert (done.done, done.failed) == (12, 0)
    calm = tmp_path / "calm"
    run_plan(made, Store(calm), bench_workers.Inline(calm), progress=False)
    assert to_csv(grid_rows(made, Store(root))) == to_csv(grid_rows(made, Store(calm)))


def test_a_clock_that_is_set_back(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks the wall clock what is newer: results of tomorrow are found today."""
    made = plan()
    run_plan(made, Store(tmp_path), bench_workers.Inline(tmp_path), progress=False)
    first = to_csv(grid_rows(made, Store(tmp_path)))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86400 * 30)
    more = plan(seeds=[0, 1])
    pool = bench_workers.Inline(tmp_path)
    done = run_plan(more, Store(tmp_path), pool, progress=False)
    assert done.begun == 6 and done.done == 12
    assert to_csv(grid_rows(made, Store(tmp_path))) == first
