"""A method whose version is raised: new keys for it and what builds on it, and never a table of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_workers
import pytest

from bbfast import artifact, defenses
from bbfast.attacks.base import registry
from bbfast.bench import Plan, grid_rows, run_plan
from bbfast.bench.work import Memory, perform
from bbfast.store import Store

MakePlan = Callable[..., Plan]


def places(plan: Plan) -> dict[tuple[str, str], str | None]:
    return {(cell.attack, cell.defense): cell.task for cell in plan.cells}


def test_a_new_version_has_new_keys_and_no_mixed_rows(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = Store(tmp_path), plan()

    def run(made: Plan) -> int:
        return run_plan(made, store, bench_workers.Inline(tmp_path), progress=False).begun

    assert run(first) == 6
    monkeypatch.setattr(registry.get("badnets"), "version", 2)
    second = plan()
    new = {place for place, key in places(second).items() if key not in first.tasks}
    assert new == {("badnets", "none"), ("badnets", "ft"), ("badnets", "nc")}
    status = {(row["attack"], row["defense"]): row["status"] for row in grid_rows(second, store)}
    assert {place for place, said in status.items() if said == "missing"} == new
    monkeypatch.setattr(defenses.find("ft"), "version", 3)
    third = plan()
    newer = {place for place, key in places(third).items() if key not in second.tasks}
    assert newer == {("badnets", "ft"), ("sig", "ft")}
    assert run(third) == 4 and {row["status"] for row in grid_rows(third, store)} == {"done"}
    assert len(store.list()) == 10, "what the older versions made is still there, for their own bbfast"


def test_real_stages_of_two_versions(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, settings = Memory(), {"attacks": ["badnets"], "defenses": ["clp"], "recipe": {"epochs": 1}, "device": "cpu"}

    def run() -> tuple[str, str]:
        attack, defense = plan(**settings).tasks.values()
        first = perform({"kind": "attack", "spec": attack.spec}, str(tmp_path), memory)
        task = {"kind": "defense", "spec": defense.spec, "parent": first.folder}
        return first.folder, perform(task, str(tmp_path), memory).folder

    before, old = run(), next(iter(plan(**settings).tasks.values()))
    monkeypatch.setattr(registry.get("badnets"), "version", 2)
    after = run()
    assert not set(before) & set(after)
    record = artifact.read(tmp_path / after[1]).config
    assert record["attack"]["attack_version"] == 2 == record["attack"]["versions"]["method"]
    assert "defense_version" not in record and record["versions"]["method"] == 1
    monkeypatch.setattr(defenses.find("clp"), "version", 2)
    again = run()
    assert again[0] == after[0] and again[1] != after[1]
    out = perform({"kind": "attack", "spec": old.spec}, str(tmp_path), memory)
    assert out.status == "failed" and "has version 2 here, the runner planned version 1" in out.reason


def test_a_default_that_changed_has_a_new_key(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one for a data set alone; and what is said aloud is the same stage as what is left to the default."""
    first = plan()
    config = defenses.find("nc").Config
    told = {"name": "nc", "set": {"asr_threshold": config().for_dataset("digits").model_dump()["asr_threshold"]}}
    assert set(plan(defenses=["none", "ft", told]).tasks) == set(first.tasks)
    monkeypatch.setattr(config, "dataset_defaults", {"digits": {"asr_threshold": 0.5}})
    changed = {place for place, key in places(plan()).items() if key not in first.tasks}
    assert changed == {("badnets", "nc"), ("sig", "nc")}
