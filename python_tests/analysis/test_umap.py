"""UMAP: neighbourhoods are kept, clean geometry first, and a clear word if the extra is missing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from bbfast.analysis import Subject
from bbfast.analysis.tools import umap as tool
from bbfast.attacks import AttackResult
from bbfast.errors import DataRequirementError, MissingExtraError

CPU = torch.device("cpu")


def test_trustworthy_and_the_same_twice(strong: AttackResult) -> None:
    pytest.importorskip("umap")
    subject = Subject(strong, None, CPU)
    first, second = (tool.UMAP().measure(subject) for _ in range(2))
    assert np.array_equal(first.arrays["xy"], second.arrays["xy"])
    assert first.summary["trustworthiness"] > 0.9
    assert first.summary["purity"] > 5 * first.summary["purity_baseline"]


def test_fit_on_clean(strong: AttackResult) -> None:
    """Triggered samples do not move the clean ones, and the statistics of the features stay."""
    pytest.importorskip("umap")
    subject = Subject(strong, None, CPU)
    both, clean = (tool.UMAP(fit_on=which).measure(subject) for which in ("all", "clean"))
    assert both.summary["purity"] == clean.summary["purity"]
    assert np.isfinite(clean.arrays["xy"]).all() and not np.array_equal(both.arrays["xy"], clean.arrays["xy"])


def test_refusals(badnets: AttackResult, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(badnets, None, CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else object())
    with pytest.raises(MissingExtraError, match=r"pip install 'bbfast\[analysis\]'"):
        tool.UMAP().check(subject)
    monkeypatch.undo()
    pytest.importorskip("umap")
    with pytest.raises(DataRequirementError, match="needs at least 301 samples, and mixed has 200"):
        tool.UMAP(n_neighbors=300).check(subject)
