"""Files that change under the same path: what was made of the old ones is not current, and keys stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_workers
import numpy as np
import pytest

from bbfast.bench import Plan, grid_rows, run_plan
from bbfast.bench.outcomes import Book, Outcome
from bbfast.bench.work import Memory, perform
from bbfast.store import Store

MakePlan = Callable[..., Plan]


def write(path: Path, seed: int) -> None:
    images, labels = np.random.default_rng(seed).integers(0, 255, (80, 32, 32, 3), np.uint8), np.arange(80) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:40], test_labels=labels[:40])


def test_data_that_are_replaced_are_run_anew(plan: MakePlan, tmp_path: Path) -> None:
    path, store = tmp_path / "d.npz", Store(tmp_path / "store")
    own: dict[str, Any] = {"attacks": ["badnets"], "ratios": [0.1], "defenses": ["none"], "recipe": {"epochs": 0}}

    def planned() -> Plan:
        return plan(datasets=[{"name": "npz", "root": str(path)}], **own, device="cpu")

    def run() -> int:
        done = run_plan(planned(), store, bench_workers.Inline(store.root, perform), progress=False)
        assert (done.done, done.failed) == (1, 0)
        return done.begun

    write(path, 0)
    keys = list(planned().tasks)
    assert run() == 1 and run() == 0
    first = {entry.path.name for entry in store.list("attack")}
    write(path, 1)
    assert list(planned().tasks) == keys
    assert [row["status"] for row in grid_rows(planned(), store)] == ["missing"]
    assert run() == 1 and run() == 0
    assert len(store.list("attack")) == 2 and [row["status"] for row in grid_rows(planned(), store)] == ["done"]
    write(path, 0)  # the old data again: found, not made
    assert run() == 1 and {entry.path.name for entry in store.list("attack")} >= first and len(store.list()) == 2
    path.unlink()  # a machine without the data believes what is noted
    assert run() == 0


@pytest.mark.parametrize("status", ["not_applicable", "failed"])
def test_what_the_old_data_could_not_is_tried_with_the_new(plan: MakePlan, tmp_path: Path, status: Any) -> None:
    path, store = tmp_path / "d.npz", Store(tmp_path / "store")

    def refuses(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
        return Outcome(status, reason="too few images")

    write(path, 0)
    data = [{"name": "npz", "root": str(path)}]
    old = plan(datasets=data, attacks=["badnets"])
    run_plan(old, store, bench_workers.Inline(store.root, refuses), progress=False)
    write(path, 1)
    new = plan(datasets=data, attacks=["badnets"])
    done = run_plan(new, store, bench_workers.Inline(store.root), progress=False)
    assert (done.done, done.begun) == (3, 3)


def test_a_file_that_an_attack_reads(plan: MakePlan, tmp_path: Path) -> None:
    """As of data; a note of a bbfast that did not keep what the files were is believed."""
    picture, store = tmp_path / "p.png", Store(tmp_path / "store")

    def planned() -> Plan:
        return plan(attacks=[{"name": "badnets", "set": {"pattern_path": str(picture)}}], defenses=["none"])

    picture.write_bytes(b"1")
    made = planned()
    run_plan(made, store, bench_workers.Inline(store.root), progress=False)
    picture.write_bytes(b"22")
    (key,) = planned().tasks
    assert [key] == list(made.tasks) and Book(store).read(key) is not None
    assert Book(store).read_all(planned().tasks) == {}
    noted = Book(store).read(key)
    assert noted is not None
    Book(store).write(key, Outcome("done", folder=noted.folder))
    assert set(Book(store).read_all(planned().tasks)) == {key}
