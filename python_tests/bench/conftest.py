"""A small grid over the embedded digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bbfast.bench import Plan, load_grid, make_plan

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan() -> MakePlan:
    def make(**changes: Any) -> Plan:
        own: dict[str, Any] = {
            "datasets": ["digits"],
            "models": ["small_cnn"],
            "attacks": ["badnets", "sig"],
            "ratios": [0.05],
            "defenses": ["none", "ft", "nc"],
            "preset": "quick",
        }
        return make_plan(load_grid({**own, **changes}))

    return make
