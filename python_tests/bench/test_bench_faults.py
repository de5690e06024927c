"""What disks, clocks, machines and versions do: an error that says so, nothing lost, and the run goes on."""

from __future__ import annotations

import errno
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_workers
import numpy as np
import pytest

from bbfast.bench import LocalPool, Plan, grid_rows, run_plan, to_csv
from bbfast.bench.outcomes import Outcome
from bbfast.bench.work import Memory, failure, perform
from bbfast.errors import ArtifactError, NewerFormatError
from bbfast.store import Store

MakePlan = Callable[..., Plan]


def test_a_full_disk(plan: MakePlan, small_disk: Path, tmp_path: Path) -> None:
    made, root = plan(seeds=[0, 1]), small_disk / "store"
    root.mkdir()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * (2 << 20))
    size = ballast.stat().st_size
    ballast.write_bytes(b"x" * (size - 200_000))  # room for a few results
    with pytest.raises(ArtifactError, match=r"No space left.*free some space, and the same command goes on"):
        pool = LocalPool(root, 1, threads=1, work=bench_workers.careful)
        run_plan(made, Store(root), pool, progress=False)
    ballast.unlink()
    # What was made before is whole, and nothing has failed: the same call goes on.
    statuses = [row["status"] for row in grid_rows(made, Store(root))]
    ready = statuses.count("done")
    assert ready >= 2 and statuses.count("missing") == 12 - ready > 0
    assert all(Store(root).check(entry.path) for entry in Store(root).list())
    done = run_plan(made, Store(root), bench_workers.Inline(root), progress=False)
    assert (done.done, done.failed, done.begun) == (12, 0, 12 - ready)
    calm = tmp_path / "calm"
    run_plan(made, Store(calm), bench_workers.Inline(calm), progress=False)
    assert to_csv(grid_rows(made, Store(root))) == to_csv(grid_rows(made, Store(calm)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_anywhere_in_a_stage(plan: MakePlan, tmp_path: Path, code: int) -> None:
    """Also below another error, as an artefact's and a data set's are."""
    made, root, begun = plan(), tmp_path / "store", itertools.count()

    def work(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
        next(begun)
        try:
            try:
                raise OSError(code, "No space left", "/elsewhere/x")
            except OSError as error:
                raise ArtifactError("cannot write") from error
        except ArtifactError as error:
            return failure(error)

    with pytest.raises(ArtifactError, match=r"cannot write.* free some space"):
        run_plan(made, Store(root), bench_workers.Inline(root, work), progress=False)
    assert next(begun) == 1 and {row["status"] for row in grid_rows(made, Store(root))} == {"missing"}


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


def test_a_read_only_store(plan: MakePlan, small_disk: Path) -> None:
    """What is there can be read as ever; what is to be written is one clear error, and nothing is touched."""
    made, more, root = plan(attacks=["badnets"]), plan(attacks=["badnets"], seeds=[0, 1]), small_disk / "store"
    run_plan(made, Store(root), bench_workers.Inline(root), progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        first = to_csv(grid_rows(made, Store(root)))
        assert first.count(",done,") == 3
        with pytest.raises(ArtifactError, match=r"Read-only file system.* may be written to"):
            run_plan(more, Store(root), bench_workers.Inline(root), progress=False)
        assert {path.name: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert to_csv(grid_rows(made, Store(root))) == first
    done = run_plan(more, Store(root), bench_workers.Inline(root), progress=False)
    assert (done.done, done.begun, done.failed) == (6, 3, 0)


def flip(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    return content


def test_one_flipped_bit_in_a_defense_is_found_and_remade(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(), Store(tmp_path)

    def run(**options: bool) -> int:
        return run_plan(made, store, bench_workers.Inline(tmp_path), progress=False, **options).begun

    run()
    first = next(tmp_path.glob("defense-nc-*")) / "metrics.json"
    good = flip(first)
    damaged = [row for row in grid_rows(made, store) if row["status"] == "missing"]
    assert len(damaged) == 1 and "does not match its checksum" in damaged[0]["reason"]
    assert run() == 1 and first.read_bytes() == good
    assert [path.name.split(".")[0] for path in (tmp_path / ".quarantine").iterdir()] == [first.parent.name]
    whole = to_csv(grid_rows(made, store))
    # Once it is in the index, a result is believed until somebody looks: then the attack is remade, its defenses stay.
    second = next(tmp_path.glob("attack-sig-*")) / "config.json"
    good = flip(second)
    assert run() == 0 and run(verify=True) == 1 and second.read_bytes() == good and run(verify=True) == 0
    assert to_csv(grid_rows(made, store)) == whole


def test_a_store_of_a_newer_format(plan: MakePlan, tmp_path: Path) -> None:
    """It is no damage: nothing is put aside or made again."""
    made, store = plan(), Store(tmp_path)
    run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    folder = next(tmp_path.glob("attack-sig-*"))
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 99, "bbfast": "9.0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (row,) = [row for row in grid_rows(made, store) if row["status"] != "done"]
    assert row["attack"] == "sig" and "format 99" in row["reason"] and "update bbfast" in row["reason"]
    with pytest.raises(NewerFormatError, match=r"written by bbfast 9\.0: update bbfast"):
        run_plan(made, store, bench_workers.Inline(tmp_path), progress=False)
    assert folder.is_dir() and not (tmp_path / ".quarantine").exists()


def test_data_that_one_worker_does_not_have(plan: MakePlan, tmp_path: Path) -> None:
    """Its stages fail and say which machine it was; the others' are done, and the rest when it is asked for again."""
    images, labels = np.zeros((40, 32, 32, 3), np.uint8), np.arange(40) % 10
    here = tmp_path / "here.npz"
    np.savez(here, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    made = plan(datasets=[{"name": "npz", "root": str(here)}], attacks=["badnets", "blended"], ratios=[0.1])
    root, turns = tmp_path / "store", itertools.count()

    def two_machines(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
        if task["kind"] == "attack" and next(turns) == 1:
            data = {**task["spec"]["data"], "root": str(tmp_path / "not here.npz")}
            return perform({**task, "spec": {**task["spec"], "data": data}}, root, Memory())
        return bench_workers.made(task, root)

    done = run_plan(made, Store(root), bench_workers.Inline(root, two_machines), progress=False)
    assert (done.done, done.failed, done.blocked) == (3, 1, 2)
    reasons = {row["reason"] for row in grid_rows(made, Store(root)) if row["status"] == "failed"}
    (reason,) = reasons
    assert reason.startswith("DatasetError: ") and "not here.npz" in reason and socket.gethostname() in reason
    again = run_plan(made, Store(root), bench_workers.Inline(root), progress=False, retry_failed=True)
    assert (again.done, again.begun, again.failed) == (6, 3, 0)
