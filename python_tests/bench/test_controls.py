"""Ratio 0: one clean model for all attacks, each attack's trigger on the test images, and defenses of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_workers import Inline

from bbfast import Recipe, attacks, datasets, defend, defenses, evaluate
from bbfast.attacks import AttackResult
from bbfast.bench import Plan, grid_rows, load_grid, make_plan, pivot, run_plan
from bbfast.bench.work import perform
from bbfast.defenses import DefenseResult
from bbfast.defenses._benign import triggerless
from bbfast.store import Store

MakePlan = Callable[..., Plan]
OWN: dict[str, Any] = {
    "attacks": ["badnets", "sig", "input_aware"],
    "ratios": [0, 0.05],
    "defenses": ["none", "clp", "ss"],
    "recipe": {"epochs": 2},
    "device": "cpu",
}


def test_what_is_learned_with_the_model_has_no_row_at_0(plan: MakePlan) -> None:
    made = plan(**{**OWN, "attacks": "all"})
    at_0 = {cell.attack: cell.reason for cell in made.cells if cell.ratio == 0}
    assert {name for name, reason in at_0.items() if reason} == {"input_aware", "lira"}
    assert "its trigger is learned together with the poisoned model" in (at_0["lira"] or "")
    assert all(cell.reason is None for cell in made.cells if cell.ratio != 0)


def test_it_is_known_before_the_files_are(plan: MakePlan) -> None:
    made = plan(**{**OWN, "attacks": ["lira"], "datasets": ["gtsrb"], "models": ["preactresnet18"]})
    assert {cell.ratio for cell in made.cells if cell.reason is not None} == {0}


def test_keys_of_other_ratios_stay(plan: MakePlan) -> None:
    with_control, without = plan(**OWN), plan(**{**OWN, "ratios": [0.05]})
    assert without.tasks.keys() < with_control.tasks.keys()


def test_paper_full_has_five_ratios() -> None:
    assert load_grid("paper-full").ratios == (0, 0.01, 0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store]:
    root = tmp_path_factory.mktemp("store")
    grid = {"datasets": ["digits"], "models": ["small_cnn"], "preset": "quick", **OWN, "attacks": ["badnets", "sig"]}
    made = make_plan(load_grid({**grid, "ratios": [0]}))
    done = run_plan(made, Store(root), Inline(root, perform), progress=False)
    assert (done.done, done.failed, done.not_applicable) == (6, 0, 0)
    return made, Store(root)


def results(store: Store) -> dict[str, AttackResult]:
    return {entry.name: AttackResult.load(entry.path) for entry in store.list("attack")}


def test_one_clean_model_serves_all_attacks(ran: tuple[Plan, Store]) -> None:
    store = ran[1]
    assert [entry.name for entry in store.list("prerequisite")].count("clean_model") == 1
    badnets, sig = (results(store)[name] for name in ("badnets", "sig"))
    assert all(map(torch.equal, badnets.model.state_dict().values(), sig.model.state_dict().values()))
    data = datasets.load("digits")
    for result in (badnets, sig):
        assert not result.poisoned.any() and torch.equal(result.train.images, data.train.images)
        assert torch.equal(result.clean_train.labels, data.train.labels)
        assert result.config["attack_config"]["ratio"] == 0 and result.metrics["poison_ratio"] == 0
        measured = evaluate(result.model, data.test, result.backdoor_test, device="cpu")
        assert all(result.metrics[name] == measured[name] for name in ("c_acc", "asr", "r_acc"))
    assert not torch.equal(badnets.backdoor_test.images, sig.backdoor_test.images)
    assert badnets.metrics["c_acc"] == sig.metrics["c_acc"]


def test_a_defense_of_the_clean_model_runs_once(ran: tuple[Plan, Store]) -> None:
    """It sees the same, whatever the trigger; what it is judged by is each attack's own."""
    store = ran[1]
    shared = sorted(entry.name for entry in store.list("prerequisite"))
    assert shared == ["clean_model", "clp_of_a_clean_model", "ss_of_a_clean_model"]
    both = results(store)
    for name in ("clp", "ss"):
        found = [DefenseResult.load(entry.path) for entry in store.list("defense", name)]
        alone = [defend(name, both[made.config["attack"]["attack"]], device="cpu", progress=False) for made in found]
        assert len(found) == 2 and found[0].seconds == found[1].seconds != alone[0].seconds
        for one, other in zip(found, alone, strict=True):
            timeless = {"seconds", "peak_memory_bytes"}
            assert {k: v for k, v in one.metrics.items() if k not in timeless} == pytest.approx(
                {k: v for k, v in other.metrics.items() if k not in timeless}, nan_ok=True
            )
            assert one.info["data_used"] == other.info["data_used"] and one.config["attack"] == other.config["attack"]
    assert not triggerless(both["sig"], defenses.create("strip"))  # it judges a stream with triggered images
    poisoned = dataclasses.replace(both["sig"], poisoned=torch.ones_like(both["sig"].poisoned))
    assert triggerless(both["sig"], defenses.create("ft")) and not triggerless(poisoned, defenses.create("ft"))


def test_the_trigger_is_that_of_the_attack(ran: tuple[Plan, Store]) -> None:
    data, result = datasets.load("digits"), results(ran[1])["badnets"]
    attack = attacks.create("badnets", ratio=0.05)
    attack.poison(data.train, 0)
    assert torch.equal(result.backdoor_test.images, attack.backdoor_test(data.test, 0).images)
    assert torch.equal(result.trigger(data.test.images[:4]), attack.trigger(data.test.images[:4]))


def test_tables_have_the_row(ran: tuple[Plan, Store]) -> None:
    rows = {(row["attack"], row["defense"]): row for row in grid_rows(*ran)}
    assert {row["ratio"] for row in rows.values()} == {0} and {row["status"] for row in rows.values()} == {"done"}
    clean = rows["badnets", "none"]
    assert clean["asr"] < 0.3 and clean["c_acc"] > 0.6 and clean["der"] is None
    # Nothing is poisoned: there is no positive to find, and what is flagged is a false alarm.
    found = rows["sig", "ss"]
    assert found["tpr"] is None and found["auroc"] is None and 0 <= found["fpr"] <= 1
    # DER is by its definition: there is hardly an ASR that could fall, so 0.5 is what a harmless defense gets.
    repaired = rows["badnets", "clp"]
    drop = max(0.0, clean["asr"] - repaired["asr"]) - max(0.0, clean["c_acc"] - repaired["c_acc"])
    assert repaired["der"] == pytest.approx((drop + 1) / 2)
    assert set(pivot(list(rows.values()), "asr", "ratio")[0]) == {0}


def test_controls_refuse_what_has_no_trigger() -> None:
    data = datasets.load("digits")
    with pytest.raises(ValueError, match="input_aware: its trigger is learned together"):
        attacks.control(attacks.create("input_aware"), data, "small_cnn", Recipe(epochs=1))
