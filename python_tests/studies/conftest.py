"""Results of a study without a run: the cells of its own grids, figures from a function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from bbfast.analysis import Numbers
from bbfast.bench import Plan
from bbfast.bench.results import METRICS, PLACE
from bbfast.metrics import der
from bbfast.store import Store
from bbfast.studies import Results, Study
from bbfast.studies.base import find

Figures = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@pytest.fixture
def hand_made(tmp_path: Path) -> Callable[[Study, Figures], Results]:
    """``make(study, figures)``: ``figures`` gives ``c_acc`` and ``asr`` of a place (then DER follows), a ``status``, or
    both."""

    def make(study: Study, figures: Figures) -> Results:
        grids, rows = study.grids(), []
        for grid in grids:
            for data, model, attack, ratio, seed, defense in itertools.product(
                grid.datasets, grid.models, grid.attacks, grid.ratios, grid.seeds, grid.defenses
            ):
                labels = (data.label, model, attack.label, ratio, seed, defense.label)
                place = {"grid": grid.name, **dict(zip(PLACE, labels, strict=True))}
                given = {"status": "done", "reason": "", **figures(place)}
                row = {**place, **dict.fromkeys(METRICS), "seconds": 1.0, "peak_memory_bytes": 2e9, "key": "k", **given}
                if place["defense"] != "none" and row["der"] is None and row["c_acc"] is not None:
                    before = figures({**place, "defense": "none"})
                    row["der"] = der(before["c_acc"], before["asr"], row["c_acc"], row["asr"])
                rows.append(row)
        plans = [Plan(grid, (), {}) for grid in grids]
        return Results(plans, Store(tmp_path / "none"), torch.device("cpu"), study.name, rows)

    return make


@pytest.fixture
def redrawn(tmp_path: Path) -> Callable[[str, Numbers], None]:
    """``check(name, numbers)``: numbers that were saved and loaded give a figure that is not blank."""

    def check(name: str, numbers: Numbers) -> None:
        numbers.save(tmp_path / "numbers")
        find(name).draw(Numbers.load(tmp_path / "numbers")).savefig(tmp_path / "a.png", dpi=60)
        assert imread(tmp_path / "a.png").std() > 0.01

    return check
