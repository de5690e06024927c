"""P1 on a table made by hand: 3 attacks, 3 defenses, 2 seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bbfast import studies
from bbfast.analysis import Numbers
from bbfast.studies.cells import STATES

ASR = {"ft": (0.5, 0.6), "clp": (0.12, 0.2), "nc": (0.3, 0.1)}
"""After a defense, seeds 0 and 1, against badnets; blended leaves 0.1 more."""


def figures(place: Any) -> dict[str, Any]:
    if place["attack"] == "wanet":  # does not work
        return {"c_acc": 0.9, "asr": 0.1 if place["defense"] == "none" else 0.05}
    if place["attack"] == "blended" and place["defense"] == "nc":
        return {"status": "not_applicable", "reason": "nc: does not look at blends"}
    if place["defense"] == "none":
        return {"c_acc": 0.9, "asr": 1.0, "r_acc": 0.0}
    asr = ASR[place["defense"]][place["seed"]] + 0.1 * (place["attack"] == "blended")
    return {"c_acc": 0.8, "asr": asr, "r_acc": 1 - asr, "rir": 0.5}


@pytest.fixture
def measured(hand_made: Callable[..., studies.Results]) -> Numbers:
    study = studies.create("overview", attacks=["badnets", "blended", "wanet"], defenses=["ft", "clp", "nc"])
    return study.measure(hand_made(study, figures))


def test_numbers(measured: Numbers) -> None:
    arrays, summary = measured.arrays, measured.summary
    assert arrays["der"].shape == (3, 3, 2) and measured.meta["defenses"] == ["ft", "clp", "nc"]
    # DER = (max(0, fall of ASR) - max(0, fall of C-Acc) + 1) / 2
    for j, name in enumerate(("ft", "clp", "nc")):
        for s in range(2):
            assert arrays["der"][0, j, s] == pytest.approx((1 - ASR[name][s] - 0.1 + 1) / 2)
            assert arrays["d_c_acc"][0, j, s] == pytest.approx(0.1)
    assert np.isnan(arrays["der"][1, 2]).all() and np.isnan(arrays["der"][2]).all()
    words = [[STATES[k] for k in row] for row in arrays["state"]]
    assert words[0] == ["known"] * 3 and words[1][2] == "not applicable" and words[2] == ["attack failed"] * 3
    known = arrays["der"][np.isfinite(arrays["der"])]
    assert summary["mean_der"] == pytest.approx(np.mean([np.mean(arrays["der"][i, j]) for i, j in _cells()]))
    assert len(known) == 10 and summary["attacks_that_work"] == 2
    assert summary["best_defense"] == "nc" and summary["best_defense_der"] == pytest.approx(0.85)
    # On badnets clp has 0.87 and nc 0.85, a lead smaller than nc's spread; blended has no figure of nc.
    assert arrays["wins"].tolist() == [0, 2, 0] and arrays["clear"].tolist() == [False, True, False]


def _cells() -> list[tuple[int, int]]:
    return [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_rank_stability_over_seeds(measured: Numbers) -> None:
    # Mean DER over attacks: seed 0: ft 0.675, clp 0.865, nc 0.8; seed 1: ft 0.625, clp 0.825, nc 0.9.
    assert measured.arrays["tau_defenses"][0, 1] == pytest.approx((2 - 1) / 3)
    assert measured.summary["tau_defenses"] == pytest.approx(1 / 3)


def test_the_table_has_every_cell_and_says_how_it_stands(measured: Numbers) -> None:
    assert len(measured.table) == 3 * 4 * 2
    stand = {(row["attack"], row["defense"]): row["status"] for row in measured.table}
    assert stand["wanet", "ft"] == "attack_failed" and stand["blended", "nc"] == "not_applicable"
    row = next(row for row in measured.table if (row["attack"], row["defense"], row["seed"]) == ("badnets", "clp", 0))
    assert row["d_c_acc"] == pytest.approx(0.1) and row["peak_gb"] == 2.0 and row["rir"] == 0.5


def test_one_seed_has_no_rank_statistics(hand_made: Callable[..., studies.Results]) -> None:
    study = studies.create("overview", attacks=["badnets"], defenses=["ft", "clp"], seeds=[0])
    found = study.measure(hand_made(study, figures))
    assert math.isnan(found.summary["tau_defenses"]) and not found.arrays["clear"].any()
    assert found.summary["dominated_by_one"] is False  # one attack is no contest


def test_the_figure_is_drawn_from_loaded_numbers(measured: Numbers, redrawn: Callable[..., None]) -> None:
    redrawn("overview", measured)
