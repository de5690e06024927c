"""An imported result is as good as one of our own: defenses, metrics, report and command line take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference_kit import write_as_reference
from typer.testing import CliRunner

import bbfast
from bbfast import attacks, datasets, defenses
from bbfast.attacks import AttackResult
from bbfast.cli.app import app
from bbfast.data import BackdoorSet, DataPair
from bbfast.errors import DataRequirementError
from bbfast.interop.backdoorbench import load_attack_result, save_attack_result
from bbfast.report.page import render
from bbfast.report.run_page import Finished, run_page
from bbfast.training import Recipe


@pytest.fixture(scope="module")
def digits() -> DataPair:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def imported(digits: DataPair, tmp_path_factory: pytest.TempPathFactory) -> AttackResult:
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(epochs=3)
    before = bbfast.attack(attacks.create("badnets"), digits, "small_cnn", recipe, device="cpu", progress=False)
    folder = save_attack_result(before, tmp_path_factory.mktemp("x") / "record" / "run")
    (folder / "info.pickle").unlink()
    return load_attack_result(folder, device="cpu")


def test_defenses(imported: AttackResult, tmp_path: Path) -> None:
    assert imported.config["recipe"] is None and imported.config["attack"] == "unknown"
    quick: dict[str, dict[str, Any]] = {
        "ft": {"epochs": 1},
        "nc": {"inversion_epochs": 2, "unlearn_epochs": 1},
        "strip": {"overlays": 10},
        "ac": {"retrain": False},
    }
    done = {}
    for name, settings in quick.items():
        done[name] = bbfast.defend(defenses.create(name, **settings), imported, device="cpu", progress=False)
        done[name].save(tmp_path / name)
    assert {"c_acc", "asr", "der"} <= done["ft"].metrics.keys() and "auroc" in done["strip"].metrics
    assert done["ac"].metrics["samples"] == len(imported.train) and 0 <= done["ac"].metrics["auroc"] <= 1
    measured = bbfast.evaluate(done["ft"].model, imported.test, imported.backdoor_test, imported, device="cpu")
    assert measured["der"] == pytest.approx(done["ft"].metrics["der"])

    page = render(run_page(imported, [Finished(n, d, tmp_path / n) for n, d in done.items()]))
    assert "unknown" in page and "<td>nan</td>" not in page


def test_what_needs_a_recipe_says_so(imported: AttackResult) -> None:
    with pytest.raises(DataRequirementError, match="recipe"):
        bbfast.defend("ac", imported, device="cpu")


def test_without_a_poisoned_training_set(imported: AttackResult, digits: DataPair, tmp_path: Path) -> None:
    bad = imported.backdoor_test
    test = {int(i): (image, int(y)) for i, image, y in zip(bad.ids, bad.images, bad.labels, strict=True)}
    path = write_as_reference(tmp_path / "run", digits, imported.model, "small_cnn", test=test)
    found = load_attack_result(path, digits, device="cpu")
    assert found.metrics["asr"] == imported.metrics["asr"] and "poison_ratio" not in found.metrics
    assert "poisoned_train" in found.config["imported"]["absent"] and isinstance(found.backdoor_test, BackdoorSet)
    fixed = bbfast.defend(defenses.create("ft", epochs=1), found, device="cpu", progress=False)
    assert 0 <= fixed.metrics["c_acc"] <= 1
    with pytest.raises(DataRequirementError, match="'ac' is not applicable: it needs the poisoned training set"):
        bbfast.defend(defenses.create("ac", retrain=False), found, device="cpu")


def test_on_the_command_line(imported: AttackResult, tmp_path: Path) -> None:
    folder = imported.save(tmp_path / "attack-imported")
    run = CliRunner().invoke(app, ["evaluate", str(folder), "--json", "--device", "cpu"])
    assert run.exit_code == 0, run.stderr
    defend = ["defend", "ft", "--attack", str(folder), "--set", "epochs=1", "--out", str(tmp_path / "runs")]
    run = CliRunner().invoke(app, defend)
    assert run.exit_code == 0, run.stderr
    assert "unknown" in run.stdout and "nan" not in run.stdout
