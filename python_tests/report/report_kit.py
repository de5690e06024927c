"""Records made by hand, for the tests of reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bbfast.analysis import Numbers
from bbfast.store import Content, Store

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">&'\""


def fabricate(store: Store, attack: str, defense: str = "none", data: str = "digits", **figures: float) -> None:
    """A record without tensors: enough for the leaderboard, too little for a page."""
    facts: Mapping[str, Any] = {
        "data": {"name": data, "fingerprint": "0"},
        "model": {"name": "small_cnn", "pretrained": False},
        "attack": attack,
        "attack_config": {"ratio": 0.1},
        "recipe": None,
        "seed": 0,
    }
    kind = "attack" if defense == "none" else "defense"
    if defense != "none":
        facts = {"attack": facts, "defense": defense, "defense_config": {}, "seed": 0, "clean_fraction": 0.05}
    name = "badnets" if kind == "attack" else "ft"
    store.get_or_make(
        kind, name, facts, lambda work: Content(kind, dict(facts), {"seconds": 1.0, **figures}), kind=kind
    )


PNG = b"\x89PNG\r\n\x1a\n (no picture) IEND\xaeB`\x82"


def analysed(place: Path, summary: Mapping[str, Any], *, figure: bool = True, **meta: Any) -> Path:
    """The files of an analysis, by hand."""
    Numbers({"a": np.zeros(2)}, summary=dict(summary), meta=meta).save(place)
    if figure:
        (place / "figure.png").write_bytes(PNG)
    return place
