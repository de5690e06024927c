"""Plans: cells, shared stages, what is not applicable, and keys that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bbfast import attacks, defenses
from bbfast.bench import Plan, load_grid, make_plan
from bbfast.bench.facts import Facts
from bbfast.bench.failures import refusals
from bbfast.bench.grid import DataEntry, Entry
from bbfast.defenses import refusal
from bbfast.errors import ConfigError

MakePlan = Callable[..., Plan]


def test_one_attack_serves_all_its_defenses(plan: MakePlan) -> None:
    made = plan(seeds=[0, 1])
    assert len(made.cells) == 2 * 2 * 3
    assert made.stages() == {"attack": 4, "defense": 8, "total": 12, "saved_by_sharing": 8}
    for cell in made.cells:
        task = made.tasks[cell.task or ""]
        assert task.kind == ("attack" if cell.defense == "none" else "defense")
        assert task.method == (cell.attack if cell.defense == "none" else cell.defense)
        assert task.parent is None or made.tasks[task.parent].method == cell.attack
        assert task.spec["seed"] == cell.seed and task.spec["attack"]["settings"]["ratio"] == cell.ratio
    order = list(made.tasks)
    assert all(t.parent is None or order.index(t.parent) < order.index(k) for k, t in made.tasks.items())


def test_a_defense_without_its_attacks_row_still_has_the_attack(plan: MakePlan) -> None:
    made = plan(defenses=["nc"])
    assert made.stages()["attack"] == 2 and {cell.defense for cell in made.cells} == {"nc"}


def test_what_is_not_applicable_has_a_reason(plan: MakePlan) -> None:
    made = plan(ratios=[0.05, 0.2], models=["small_cnn", "vit_b_16"], defenses=["none", "clp"])
    reasons = made.not_applicable()
    refused = refusal("clp", "vit_b_16")
    assert refused is not None and reasons.pop(refused) == 3  # once more of the attack that cannot be made
    (reason,) = reasons
    assert "label_mode 'clean_label' asks for 288 of 1442" in reason and reasons[reason] == 4
    assert all((cell.task is None) == (cell.reason is not None) for cell in made.cells)


def test_images_too_small_for_a_model(plan: MakePlan, tmp_path: Path) -> None:
    images, labels = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "small.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    made = plan(datasets=[{"name": "npz", "root": str(tmp_path / "small.npz")}], models=["vgg19_bn"])
    assert all(cell.task is None and "at least 32 pixels" in (cell.reason or "") for cell in made.cells)


def test_data_that_are_not_here_are_the_workers_to_find(plan: MakePlan) -> None:
    made = plan(datasets=[{"name": "npz", "root": "nowhere.npz"}])
    assert made.stages()["total"] == 6 and not made.not_applicable()


def test_keys_do_not_depend_on_the_company(plan: MakePlan) -> None:
    small, large = (
        plan(),
        plan(attacks=["blended", "sig", "badnets"], defenses=["nc", "none", "ft", "clp"], seeds=[1, 0]),
    )
    assert small.tasks.keys() <= large.tasks.keys()
    assert plan(device="cpu").tasks.keys() == small.tasks.keys()
    for other in ({"recipe": {"epochs": 3}}, {"clean_fraction": 0.1}, {"seeds": [3]}, {"ratios": [0.06]}):
        changed = plan(**other)
        shared = changed.tasks.keys() & small.tasks.keys()
        assert len(shared) == (2 if "clean_fraction" in other else 0)


def test_a_part_of_the_classes_is_planned_for_as_such(plan: MakePlan) -> None:
    data = [{"name": "cifar100", "root": "nowhere", "options": {"classes": k}, "label": f"K={k}"} for k in (10, 100)]
    cells = plan(datasets=data, attacks=["sig"], ratios=[0.02], defenses=["none"]).cells
    # One class has 500 images: a tenth of 5,000, a hundredth of 50,000.
    assert cells[0].reason is None and "asks for 1000" in str(cells[1].reason)


def test_classes_of_gtsrb_are_known_before_the_files_are(plan: MakePlan) -> None:
    facts = Facts(DataEntry(name="gtsrb"))
    # The first class has 210 of 39,209 images, the second 2,220.
    assert facts.unfit(Entry(name="sig"), 0.005) is None
    assert "asks for 392 of 39209 samples, but class [0] has 210" in str(facts.unfit(Entry(name="sig"), 0.01))
    second = Entry(name="sig", settings={"target": 1})
    assert facts.unfit(second, 0.05) is None and "class [1] has 2220" in str(facts.unfit(second, 0.1))
    assert "asks for 243 of 2430" in str(
        Facts(DataEntry(name="gtsrb", options={"classes": 2})).unfit(Entry(name="lc"), 0.1)
    )


def test_what_is_not_applicable_is_grouped_by_reason(plan: MakePlan) -> None:
    made = plan(ratios=[0.05, 0.2], seeds=[0, 1], defenses=["none", "ft"])
    (group,) = refusals(vars(cell) for cell in made.cells if cell.reason is not None)
    assert group["count"] == 4 and "asks for 288 of 1442" in group["reason"]
    place = {"dataset": "digits", "model": "small_cnn", "attack": "sig", "ratio": 0.2}
    assert group["cells"] == [{**place, "defenses": ["none", "ft"], "seeds": [0, 1]}]


def test_the_published_grid() -> None:
    made = make_plan(load_grid("paper"))
    assert len(made.cells) == 15_360
    stages = made.stages()
    assert stages["attack"] == 896 and stages["total"] == sum(cell.task is not None for cell in made.cells)
    # 2 clean-label attacks ask for more than a class of CIFAR-100 (2 ratios), of Tiny ImageNet (3) and the first one of
    # GTSRB (3) holds.
    too_many = sum(n for reason, n in made.not_applicable().items() if "clean_label" in reason)
    assert too_many == 2 * 8 * 4 * 16


def test_wrong_options_of_a_data_set_are_told_at_once(plan: MakePlan) -> None:
    with pytest.raises(ConfigError, match=r"unknown .*'sice'"):
        plan(datasets=[{"name": "digits", "options": {"sice": 16}}])


@pytest.mark.parametrize("name", ["smoke", "digits-full"])
def test_presets_for_the_digits_have_no_gap(name: str) -> None:
    assert make_plan(load_grid(name)).not_applicable() == {}


def test_the_grid_of_everything_on_the_digits_has_every_attack_and_defense() -> None:
    cells = make_plan(load_grid("digits-full")).cells
    assert {cell.attack for cell in cells} == set(attacks.available())
    assert {cell.defense for cell in cells} == {"none", *defenses.available()}
