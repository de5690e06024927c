"""Real stages through real workers: figures, reuse by the single commands, refusals, damage."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_workers import Inline

import bbfast
from bbfast import Recipe, attacks, datasets
from bbfast._version import commit
from bbfast.bench import Index, LocalPool, Plan, grid_rows, run_plan, to_csv
from bbfast.bench.outcomes import Outcome
from bbfast.bench.stages import attack_stage
from bbfast.bench.work import Memory, perform
from bbfast.store import PROTOCOL_VERSION, Store

MakePlan = Callable[..., Plan]
QUICK: dict[str, Any] = {"attacks": ["badnets"], "defenses": ["none", "clp", "fp"], "recipe": {"epochs": 1}}


def step(plan: Plan, root: Path, key: str, memory: Memory, parent: str | None = None) -> Outcome:
    task = plan.tasks[key]
    return perform({"kind": task.kind, "spec": task.spec, "parent": parent}, str(root), memory)


def test_a_grid_finds_what_the_commands_made_and_the_other_way_round(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(**QUICK, device="cpu"), Store(tmp_path)
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(epochs=1)
    method = attacks.create("badnets", ratio=0.05)
    before = attack_stage(store, method, datasets.load("digits"), "small_cnn", recipe, device="cpu", progress=False)
    done = run_plan(made, store, LocalPool(tmp_path, 1, threads=1), progress=False)
    assert (done.done, done.failed) == (3, 0)
    folders = [path.name for path in tmp_path.iterdir() if path.name.startswith("attack-")]
    assert folders == [before.folder.name]
    rows = {row["defense"]: row for row in grid_rows(made, store)}
    assert rows["none"]["c_acc"] == before.result.metrics["c_acc"]
    assert rows["clp"]["der"] is not None and rows["none"]["der"] is None
    assert {row["status"] for row in rows.values()} == {"done"}
    with Index(store) as index:
        index.refresh()
        for row in index.rows():
            assert (row["device"], row["torch"], row["bbfast"]) == ("cpu", torch.__version__, bbfast.__version__)
            assert (row["commit_id"], row["protocol"], row["version"]) == (commit(), PROTOCOL_VERSION, 1)
            assert row["seed"] == 0 and row["seconds"] > 0 and row["created"]


@pytest.mark.parametrize("stage", ["attack-badnets", "defense-clp"])
def test_what_is_found_without_a_note_is_read_before_it_counts(plan: MakePlan, tmp_path: Path, stage: str) -> None:
    made, store = plan(**{**QUICK, "defenses": ["none", "clp"], "recipe": {"epochs": 0}}, device="cpu"), Store(tmp_path)
    run_plan(made, store, Inline(tmp_path, perform), progress=False)
    first = to_csv(grid_rows(made, store))
    (figures,) = tmp_path.glob(f"{stage}-*/metrics.json")
    content = figures.read_bytes()
    figures.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    for note in (tmp_path / ".bench").glob("*.json"):
        note.unlink()
    done = run_plan(made, store, Inline(tmp_path, perform), progress=False)
    assert (done.done, done.failed, done.begun) == (2, 0, 2)
    assert to_csv(grid_rows(made, store)) == first
    assert [path.name.split(".")[0] for path in (tmp_path / ".quarantine").iterdir()] == [figures.parent.name]


def test_what_only_the_data_can_tell_is_not_applicable(plan: MakePlan, tmp_path: Path) -> None:
    made, memory = plan(**{**QUICK, "attacks": ["sig"]}, device="cpu"), Memory()
    attack = next(task for task in made.tasks.values() if task.kind == "attack")
    spec = {**attack.spec, "attack": {"name": "sig", "settings": {"ratio": 0.5}}}
    out = perform({"kind": "attack", "spec": spec}, str(tmp_path), memory)
    assert out.status == "not_applicable" and "asks for 721 of 1442" in out.reason


def test_data_that_are_not_here_fail_and_say_where(plan: MakePlan, tmp_path: Path) -> None:
    made = plan(**{**QUICK, "datasets": [{"name": "npz", "root": "nowhere.npz"}]}, device="cpu")
    out = step(made, tmp_path, next(iter(made.tasks)), Memory())
    assert out.status == "failed" and "nowhere.npz" in out.reason and "Traceback" in out.traceback


@pytest.mark.slow
def test_one_flipped_bit_is_found_and_the_attack_made_anew(plan: MakePlan, tmp_path: Path) -> None:
    made, store = plan(**QUICK, device="cpu"), Store(tmp_path)
    only_attack = plan(**{**QUICK, "defenses": ["none"]}, device="cpu")
    run_plan(only_attack, store, LocalPool(tmp_path, 1, threads=1), progress=False)
    first = grid_rows(only_attack, store)
    (weights,) = tmp_path.glob("attack-*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    weights.write_bytes(content)
    done = run_plan(made, store, LocalPool(tmp_path, 1, threads=1), progress=False)
    assert (done.done, done.failed) == (3, 0)
    assert any((tmp_path / ".quarantine").iterdir()) and weights.read_bytes() != content
    assert grid_rows(only_attack, store) == first


def test_a_defense_that_refuses_is_not_a_failure(plan: MakePlan, tmp_path: Path) -> None:
    made, memory = plan(**{**QUICK, "defenses": ["none", "nc"]}, device="cpu", clean_fraction=0.0005), Memory()
    keys = list(made.tasks)
    first = step(made, tmp_path, keys[0], memory)
    out = step(made, tmp_path, keys[1], memory, first.folder)
    assert out.status == "not_applicable" and "the clean hold-out would have 0 images for 10 classes" in out.reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_command_killed_twenty_times_ends_as_if_never_killed(plan: MakePlan, tmp_path: Path) -> None:
    """SIGKILL while real attacks are trained and real defenses at work; trainings go on from their checkpoints."""
    grid: dict[str, Any] = {"datasets": ["digits"], "models": ["small_cnn"], "ratios": [0.05], "preset": "quick"}
    grid |= {"attacks": ["badnets", "blended"], "defenses": ["none", "ft", "clp", "nc", "i_bau", "ac"]}
    grid |= {"recipe": {"epochs": 12}, "device": "cpu"}
    made = plan(**grid)
    calm = Store(tmp_path / "calm")
    calm.root.mkdir()
    run_plan(made, calm, LocalPool(calm.root, 2, threads=1), progress=False)
    grid_file, root = tmp_path / "grid.yaml", tmp_path / "killed"
    grid_file.write_text(json.dumps(grid), encoding="utf-8")
    command = [sys.executable, "-m", "bbfast.cli", "bench", "run", str(grid_file), "--store", str(root)]
    moments, kills, under_way = random.Random(0), 0, 0
    for _ in range(20):
        process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=8 + 10 * moments.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            under_way += any((root / ".work").glob("*/*"))
    assert kills >= 5 and under_way >= 2
    done = run_plan(made, Store(root), LocalPool(root, 2, threads=1), progress=False)
    assert (done.done, done.failed) == (12, 0)
    assert to_csv(grid_rows(made, Store(root))) == to_csv(grid_rows(made, calm))
