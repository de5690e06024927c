"""P3 and P4 on tables made by hand: models, data sets, classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bbfast import studies
from bbfast.analysis import Numbers
from bbfast.errors import ConfigError, UnknownNameError
from bbfast.studies.cells import STATES
from bbfast.studies.perspectives._factor import spread
from bbfast.studies.perspectives.dataset_sensitivity import contamination

MakeResults = Callable[..., studies.Results]
AFTER = {("small_cnn", "ft"): 0.4, ("resnet18", "ft"): 0.6, ("small_cnn", "clp"): 0.1, ("resnet18", "clp"): 0.5}


def by_model(place: Any) -> dict[str, Any]:
    more = 0.1 * (place["attack"] == "blended")
    if place["model"] == "vit_b_16":
        if place["defense"] == "clp":
            return {"status": "not_applicable", "reason": "clp needs BatchNorm"}
        return {"c_acc": 0.8, "asr": 0.8 + more if place["defense"] == "none" else 0.3 + more}
    return {"c_acc": 0.9, "asr": AFTER.get((place["model"], place["defense"]), 0.9) + more}


@pytest.fixture
def models(hand_made: MakeResults) -> Numbers:
    study = studies.create(
        "model_sensitivity",
        models=["small_cnn", "resnet18", "vit_b_16"],
        attacks=["badnets", "blended"],
        defenses=["ft", "clp"],
    )
    return study.measure(hand_made(study, by_model))


def test_models(models: Numbers) -> None:
    arrays, summary = models.arrays, models.summary
    assert arrays["asr"].shape == (2, 3, 3, 1) and models.meta["levels"] == ["small_cnn", "resnet18", "vit_b_16"]
    # DER of a defense that costs no accuracy: (fall of ASR + 1) / 2; both attacks fall by the same.
    assert arrays["level_der"][0].tolist() == pytest.approx([(1 + 0.5) / 2, (1 + 0.3) / 2, (1 + 0.5) / 2])
    assert arrays["spread_der"][0] == pytest.approx(np.std([0.75, 0.65, 0.75], ddof=1))
    assert arrays["spread_der"][1] == pytest.approx(np.std([0.9, 0.7], ddof=1))
    assert summary["most_stable_defense"] == "ft" and summary["not_applicable"] == 2
    assert STATES[arrays["state"][0, 2, 2]] == "not applicable"
    # Without a defense: attack 0.1 apart on every model, models 0.9, 0.9, 0.8: no residual.
    ss = [6 * 0.05**2, 2 * np.square(np.array([0.9, 0.9, 0.8]) - 2.6 / 3).sum()]
    assert arrays["anova_share"][0].tolist() == pytest.approx([ss[0] / sum(ss), ss[1] / sum(ss), 0], abs=1e-9)
    assert len(models.meta["anova"]) == 9 and {row["term"] for row in models.meta["anova"]} == {
        "attack",
        "model",
        "residual",
    }
    assert any(line.startswith("ft: mean DER 0.717, and moves by 0.058") for line in models.meta["findings"])


def test_models_drawn_from_loaded_numbers(models: Numbers, redrawn: Callable[..., None]) -> None:
    redrawn("model_sensitivity", models)


def test_the_spread_is_over_what_can_be_compared() -> None:
    nan = math.nan
    values = np.array([[0.5, 0.7, nan], [0.9, nan, nan], [0.3, 0.7, nan]])
    assert spread(values) == pytest.approx(np.std([0.4, 0.7], ddof=1))
    assert math.isnan(spread(values[:, :1])) and math.isnan(spread(np.full((2, 2), nan)))


def by_classes(place: Any) -> dict[str, Any]:
    classes = int(place["dataset"].partition("K=")[2] or 10)
    if place["defense"] == "none":
        return {"c_acc": 0.9, "asr": 0.9}
    return {"c_acc": 0.9 - classes / 100, "asr": 0.05 * classes + 0.1 * place["seed"]}


@pytest.fixture
def classes(hand_made: MakeResults, monkeypatch: pytest.MonkeyPatch) -> Numbers:
    def result(self: studies.Results, row: Any) -> Any:
        # Six images labelled as the target, two of them poisoned.
        labels = torch.tensor([1, 1, 1, 1, 1, 1, 0])
        return SimpleNamespace(train=SimpleNamespace(labels=labels), poisoned=torch.arange(7) < 2)

    monkeypatch.setattr(studies.Results, "attack", result)
    study = studies.create(
        "dataset_sensitivity", attacks=["badnets"], defenses=["ft"], classes=[10, 2, 5], seeds=[0, 1], ratio=0.1
    )
    return study.measure(hand_made(study, by_classes))


def test_classes(classes: Numbers) -> None:
    arrays, summary = classes.arrays, classes.summary
    assert arrays["classes"].tolist() == [2, 5, 10] and arrays["sweep_asr"].shape == (1, 2, 3, 2)
    assert arrays["sweep_asr"][0, 1].tolist() == [pytest.approx(row) for row in ([0.1, 0.2], [0.25, 0.35], [0.5, 0.6])]
    assert arrays["sweep_d_c_acc"][0, 1, :, 0].tolist() == pytest.approx([0.02, 0.05, 0.1])
    # Of 1,000 images 100 are poisoned; beside them 500, 200 or 100 of the class itself.
    assert arrays["contamination"].tolist() == pytest.approx([100 / 600, 100 / 300, 100 / 200])
    assert arrays["measured_contamination"].tolist() == [[pytest.approx(2 / 6)] * 3]
    assert math.isnan(summary["asr_spearman_with_classes"])  # constant without a defense
    assert "Spearman with K 1.00" in classes.meta["findings"][-1]
    assert len(classes.table) == 2 * 2 + 2 * 2 * 3


def test_classes_drawn_from_loaded_numbers(classes: Numbers, redrawn: Callable[..., None]) -> None:
    redrawn("dataset_sensitivity", classes)


def test_several_data_sets_without_a_sweep(hand_made: MakeResults, redrawn: Callable[..., None]) -> None:
    data = [{"name": "digits", "label": "ten"}, {"name": "digits", "label": "three", "options": {"classes": 3}}]
    study = studies.create(
        "dataset_sensitivity",
        datasets=data,
        classes=[],
        attacks=["badnets", "blended"],
        defenses=["ft", "clp"],
        seeds=[0],
    )
    found = study.measure(hand_made(study, by_classes))
    assert found.arrays["asr"].shape == (2, 3, 2, 1) and "classes" not in found.arrays
    assert found.summary["asr_share_of_dataset"] >= 0 or math.isnan(found.summary["asr_share_of_dataset"])
    redrawn("dataset_sensitivity", found)


def test_contamination() -> None:
    assert contamination(0.1, 10) == pytest.approx(0.5) and contamination(0.1, 100) == pytest.approx(10 / 11)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="models: Tuple should have at least 1 item"):
        studies.create("model_sensitivity", models=[])
    with pytest.raises(ConfigError, match="datasets: Tuple should have at least 1 item"):
        studies.create("dataset_sensitivity", datasets=[])
    with pytest.raises(UnknownNameError, match="digits"):
        studies.create("dataset_sensitivity", classes_of="digit").grids()
    with pytest.raises(ConfigError, match="datasets must differ"):
        studies.create("dataset_sensitivity", classes=[3, 3]).grids()
    from bbfast.studies.run import plans_of

    with pytest.raises(ConfigError, match="classes must be at most the 10 there are, got 11"):
        plans_of(studies.create("dataset_sensitivity", classes=[11]))
