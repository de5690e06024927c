"""P2: curves over the ratio, counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bbfast import studies
from bbfast.analysis import Numbers
from bbfast.errors import ConfigError
from bbfast.studies.perspectives.poisoning_ratio import curve

RATIOS = [0.01, 0.05, 0.1, 0.2]
ASR = {"none": [0.2, 0.8, 0.9, 1.0], "ft": [0.1, 0.7, 0.4, 0.1], "clp": [0.1, 0.1, 0.1, 0.1]}


def figures(place: Any) -> dict[str, Any]:
    asr = ASR[place["defense"]][RATIOS.index(place["ratio"])] - 0.02 * place["seed"]
    if place["attack"] == "sig" and place["ratio"] > 0.1:
        return {"status": "not_applicable", "reason": "too many"}
    return {"c_acc": 0.9, "asr": asr, "r_acc": 0.9 * (1 - asr)}


@pytest.fixture
def measured(hand_made: Callable[..., studies.Results]) -> Numbers:
    study = studies.create(
        "poisoning_ratio", attacks=["badnets", "sig"], ratios=RATIOS[::-1], defenses=["ft", "clp"], seeds=[0, 1]
    )
    return study.measure(hand_made(study, figures))


def test_a_curve() -> None:
    found = curve(RATIOS, np.array(ASR["ft"]))
    assert (found["argmax_ratio"], found["peak"]) == (0.05, 0.7)
    assert found["drop_after_peak"] == pytest.approx(0.6)
    rising = curve(RATIOS, np.array(ASR["none"]))
    assert rising["spearman"] == pytest.approx(1.0) and rising["drop_after_peak"] == 0 and rising["argmax_ratio"] == 0.2
    flat = curve(RATIOS, np.array(ASR["clp"]))
    assert math.isnan(flat["spearman"]) and flat["argmax_ratio"] == 0.01
    assert all(math.isnan(value) for value in curve(RATIOS, np.full(4, np.nan)).values())


def test_numbers(measured: Numbers) -> None:
    arrays, meta = measured.arrays, measured.meta
    assert meta["ratios"] == RATIOS and meta["defenses"] == ["none", "ft", "clp"]
    assert arrays["asr"].shape == (2, 4, 3, 2) and arrays["asr"][0, 1, 1].tolist() == pytest.approx([0.7, 0.68])
    ranks = np.array([1.5, 4, 3, 1.5])  # of ft's ASR: 0.1 twice
    assert arrays["spearman"][0, 1] == pytest.approx(np.corrcoef(ranks, [1, 2, 3, 4])[0, 1])
    assert arrays["argmax_ratio"][0].tolist() == [0.2, 0.05, 0.01]
    # SIG has no cell at 20 %: its fall under ft ends at 10 %.
    assert arrays["drop_after_peak"][1, 1] == pytest.approx(0.3) and arrays["argmax_ratio"][1, 0] == 0.1
    assert measured.summary["curves"] == 4 and measured.summary["curves_that_fall"] == 2
    assert measured.summary["spearman_without_defense"] == pytest.approx(1.0)
    assert "60 points after its peak at 5 %" in measured.meta["findings"][-1]


def test_drawn_from_loaded_numbers(measured: Numbers, redrawn: Callable[..., None]) -> None:
    redrawn("poisoning_ratio", measured)


def test_no_ratios() -> None:
    with pytest.raises(ConfigError, match="ratios: Tuple should have at least 1 item"):
        studies.create("poisoning_ratio", ratios=[])
    with pytest.raises(ConfigError, match=r"ratios\.0: Input should be greater than 0"):
        studies.create("poisoning_ratio", ratios=[0.0]).grids()
