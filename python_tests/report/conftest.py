"""A store of real runs to report on, and a published table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_kit import HOSTILE

from bbfast import attacks, datasets, defenses
from bbfast.bench import Plan, load_grid, make_plan
from bbfast.bench.kept import keep_grid
from bbfast.bench.outcomes import Book, Outcome
from bbfast.bench.stages import attack_stage, defense_stage, recipe_for
from bbfast.store import Store


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    """BadNets with two seeds; CLP and SS done, FT failed, NC not run yet, and SIG not applicable at that ratio."""
    store = Store(tmp_path_factory.mktemp("report") / "runs")
    settings: dict[str, Any] = {
        "name": "tiny",
        "datasets": ["digits"],
        "models": ["small_cnn"],
        "attacks": ["badnets", "sig"],
        "ratios": [0.2],
        "defenses": ["none", "clp", {"name": "ss", "set": {"retrain": False}}, "ft", "nc"],
        "seeds": [0, 1],
        "preset": "quick",
        "recipe": {"epochs": 1},
    }
    plan = make_plan(load_grid(settings))
    keep_grid(store, plan.grid)
    book, data = Book(store), datasets.load("digits")
    for key, task in plan.tasks.items():
        spec, seed = task.spec, task.spec["seed"]
        attack = attacks.create(spec["attack"]["name"], **spec["attack"]["settings"])
        recipe = recipe_for(attack, "quick", "digits", "small_cnn").replace(epochs=1)
        made: Any = attack_stage(store, attack, data, "small_cnn", recipe, seed=seed, progress=False)
        if task.method in ("clp", "ss"):
            method = defenses.create(task.method, **spec["defense"]["settings"])
            made = defense_stage(store, method, made.result, seed=seed, progress=False)
        if task.method == "ft":
            book.write(key, Outcome("failed", reason=HOSTILE, traceback="..."))
        elif task.method != "nc":
            book.write(key, Outcome("done", folder=made.folder.name))
    return store, plan


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A published table: a cell that the real runs have, one that they have not, one that was never filled."""
    path = tmp_path / "published.csv"
    path.write_text(
        "dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
        "digits,small_cnn,badnet,no defense,0.2,0.91,0.88,0.05\n"
        "cifar10,preactresnet18,wanet,nc,0.1,0.89,0.1,0.8\n"
        "cifar10,preactresnet18,lf,nc,0.1,,,\n",
        encoding="utf-8",
    )
    return path
