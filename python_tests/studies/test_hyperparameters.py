"""P5: sweeps, areas and gaps, counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bbfast import studies
from bbfast.analysis import Numbers
from bbfast.errors import ConfigError, UnknownNameError
from bbfast.studies.perspectives._sweeps import area, gap, sweep_of
from bbfast.studies.perspectives.hyperparameters import Hyperparameters

SMALL: dict[str, Any] = {
    "attacks": ["badnets", "lf"],
    "defenses": ["ft"],
    "attack_sweeps": {
        "badnets": {"square_size": [1, 2], "target": [3, 5]},
        "blended": {"train_alpha+test_alpha": [0.4]},
    },
    "defense_sweeps": {"clp": {"u": [4.0, 1.0]}},
    "clean_fractions": [0.1],
    "clean_fraction_of": ["ft"],
    "seeds": [0, 1],
}
AFTER = {"clp u=1": 0.4, "clp u=3": 0.2, "clp u=4": 0.6}


def figures(place: Any) -> dict[str, Any]:
    if place["defense"] == "none":
        return {"c_acc": 0.9, "asr": 0.1 if place["attack"] == "badnets square_size=1" else 0.9}
    asr = AFTER.get(place["defense"], 0.3)
    if place["grid"] == "ft clean_fraction=0.1":
        asr = 0.1
    if place["attack"] == "badnets target=5":
        asr = 0.5
    return {"c_acc": 0.9, "asr": asr + 0.1 * place["seed"]}


@pytest.fixture
def measured(hand_made: Callable[..., studies.Results]) -> Numbers:
    study = studies.create("hyperparameters", **SMALL)
    return study.measure(hand_made(study, figures))


def test_a_sweep_has_the_default_among_its_values() -> None:
    found = sweep_of("defense", "clp", "u", [4.0, 1.0], "digits")
    assert found.values == (1.0, 3.0, 4.0) and found.default == 1
    assert found.entries()[0] == {"name": "clp", "label": "clp u=1", "set": {"u": 1.0}}
    # The default of a data set, and one that follows from the images.
    assert sweep_of("defense", "ft", "lr", [0.1], "digits").values == (0.02, 0.1)
    assert sweep_of("defense", "ft", "lr", [0.1], "cifar10").values == (0.01, 0.1)
    auto = sweep_of("attack", "badnet", "square_size", [2, 1], "digits")
    assert (auto.method, auto.values, auto.default) == ("badnets", (None, 1, 2), 0) and auto.entries()[0]["set"] == {}
    both = sweep_of("attack", "blended", "train_alpha+test_alpha", [0.2, 0.4], "digits")
    assert both.values == (0.2, 0.4) and both.entries()[1]["set"] == {"train_alpha": 0.4, "test_alpha": 0.4}
    sources = [{"source_classes": source, "label_mode": "one2one"} for source in ([1, 2], [3])]
    classes = sweep_of("attack", "badnets", "source_classes", sources, "digits")
    assert classes.texts == ["auto", "1,2", "3"] and classes.labels()[1] == "badnets source_classes=1,2"
    assert classes.entries()[2]["set"] == sources[1]


def test_area_and_gap() -> None:
    assert area(np.array([0.2, 0.6, 0.4])) == pytest.approx((0.4 + 0.5) / 2)
    assert area(np.array([0.2, math.nan, 0.4, 0.4])) == pytest.approx((0.3 * 2 + 0.4) / 3)
    assert math.isnan(area(np.array([math.nan, 0.5]))) and area(np.full(4, 0.7)) == pytest.approx(0.7)
    assert gap(np.array([0.2, 0.6, math.nan]), 0) == pytest.approx(0.4)
    assert math.isnan(gap(np.array([0.2, math.nan]), 1))


def test_numbers(measured: Numbers) -> None:
    panels, arrays = measured.meta["panels"], measured.arrays
    titles = ["badnets: square_size", "badnets: target", "blended: train_alpha, test_alpha"]
    assert [panel["title"] for panel in panels] == [*titles, "clp: u", "ft: clean_fraction"]
    assert panels[0]["texts"] == ["auto", "1", "2"] and panels[0]["auto"] and panels[0]["lines"] == ["ft"]
    # DER over seeds: (fall + 1) / 2 with falls of 0.6 and 0.5; a square of one pixel is no attack.
    assert arrays["der_0"][0, 0].tolist() == pytest.approx([0.8, 0.75]) and np.isnan(arrays["der_0"][1]).all()
    assert arrays["attack_asr_0"][:, 0].tolist() == pytest.approx([0.9, 0.1, 0.9])
    assert math.isnan(arrays["area"][0, 0])  # one value is known beside the default
    assert arrays["gap"][0, 0] == pytest.approx(0.0)
    assert panels[1]["boxes"] and panels[1]["texts"] == ["0", "3", "5"] and math.isnan(arrays["area"][1, 0])
    u = [(1 + 0.5 - 0.05) / 2, (1 + 0.7 - 0.05) / 2, (1 + 0.3 - 0.05) / 2]
    assert arrays["der_3"].shape == (3, 2, 2) and arrays["der_3"].mean(2)[:, 1].tolist() == pytest.approx(u)
    assert arrays["area"][3].tolist() == pytest.approx([(u[0] + 2 * u[1] + u[2]) / 4] * 2)
    assert arrays["gap"][3].tolist() == pytest.approx([0.0, 0.0])
    assert panels[4]["texts"] == ["0.05", "0.1"] and arrays["gap"][4].tolist() == pytest.approx([0.1, 0.1])
    assert measured.table[0]["sweep"] == "badnets square_size" and len(measured.meta["findings"]) == 1 + 3 + 4


def test_drawn_from_loaded_numbers(measured: Numbers, redrawn: Callable[..., None]) -> None:
    redrawn("hyperparameters", measured)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"attack_sweeps": {"badnts": {"target": [1]}}}, UnknownNameError, "unknown attack 'badnts'"),
        ({"attack_sweeps": {"badnets": {"size": [1]}}}, ConfigError, "unknown setting 'size'"),
        ({"attack_sweeps": {"badnets": {"ratio": [0.2]}}}, ConfigError, "ratio is what ratios lists"),
        ({"defense_sweeps": {"clp": {"u": ["high"]}}}, ConfigError, "u: Input should be a valid number"),
        ({"defense_sweeps": {"clp": {"u": []}}}, ConfigError, "defense_sweeps.clp.u: Tuple should have at least 1"),
        ({"clean_fractions": [0.0]}, ConfigError, "clean_fractions.0: Input should be greater than 0"),
        ({"clean_fraction_of": ["fft"]}, UnknownNameError, "unknown defense 'fft'"),
    ],
)
def test_bad_input(settings: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        studies.create("hyperparameters", **settings).grids()


def test_nothing_to_vary() -> None:
    nothing = Hyperparameters(attack_sweeps={}, defense_sweeps={}, clean_fractions=[])
    with pytest.raises(ValueError, match="attack_sweeps, defense_sweeps and clean_fractions are all empty"):
        nothing.grids()
