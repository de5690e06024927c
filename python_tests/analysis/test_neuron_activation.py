"""Neuron activation: against numpy, and nothing of a trigger that changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis.tools.neuron_activation import gini
from bbfast.attacks import AttackResult
from bbfast.errors import UnknownNameError

CPU = torch.device("cpu")


@pytest.mark.parametrize("reduce", ["mean", "flatten"])
def test_against_numpy(reduce: str, badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("neuron_activation", badnets, out=tmp_path, device="cpu", n=100, reduce=reduce).numbers
    subject = Subject(badnets, None, CPU)
    pairs, values = subject.pairs(100), []
    name, _ = subject.layer("last_conv")
    for images in (pairs.clean, pairs.triggered):
        kept: list[torch.Tensor] = []
        with subject.watching({name: lambda out, kept=kept: kept.append(out.double())}):  # type: ignore[misc]
            subject.logits(images)
        values.append((kept[0].mean((2, 3)) if reduce == "mean" else kept[0].flatten(1)).numpy())
    clean, bad = values
    for key, wanted in (
        ("mean_clean", clean.mean(0)),
        ("mean_bd", bad.mean(0)),
        ("sd_clean", clean.std(0, ddof=1)),
        ("sd_bd", bad.std(0, ddof=1)),
    ):
        np.testing.assert_allclose(found.arrays[key], wanted, atol=2e-5, err_msg=key)
    good = np.isfinite(found.arrays["t"]) & ((bad - clean).std(0) > 1e-3)
    np.testing.assert_allclose(
        found.arrays["t"][good], stats.ttest_rel(bad, clean).statistic[good], rtol=2e-3, atol=1e-3
    )
    assert (np.diff(found.arrays["mean_clean"][found.arrays["order"]]) <= 0).all()
    top = found.table[0]
    assert top["neuron"] == int(np.abs(bad.mean(0) - clean.mean(0)).argmax())
    assert top["neuron"] == top["channel"] * (1 if reduce == "mean" else pairs_of(badnets, name)) + top["place"]


def pairs_of(attacked: AttackResult, name: str) -> int:
    """Places of a layer's maps."""
    subject, sizes = Subject(attacked, None, CPU), []
    with subject.watching({name: lambda out: sizes.append(out.shape[2] * out.shape[3])}):
        subject.logits(attacked.test.images[:1])
    return int(sizes[0])


def test_an_identity_trigger_changes_nothing(badnets: AttackResult, tmp_path: Path) -> None:
    bad = badnets.backdoor_test
    place = {number: i for i, number in enumerate(badnets.test.ids.tolist())}
    images = badnets.test.images[[place[number] for number in bad.ids.tolist()]]
    same = dataclasses.replace(badnets, backdoor_test=dataclasses.replace(bad, images=images))
    found = analysis.run("neuron_activation", same, out=tmp_path, device="cpu")
    arrays = found.numbers.arrays
    assert (arrays["mean_clean"] == arrays["mean_bd"]).all() and (arrays["cohen_d"] == 0).all()
    assert found.summary["gini_of_change"] == 0 and np.isnan(arrays["t"]).all()
    assert found.summary["constant"] == found.numbers.meta["neurons"]


def test_dead_neurons_and_wrong_layers(badnets: AttackResult, tmp_path: Path) -> None:
    model = copy.deepcopy(badnets.model)
    name, _ = Subject(badnets, None, CPU).layer("last_conv")
    with torch.no_grad():
        model.get_submodule(name).get_parameter("weight")[7].zero_()
    found = analysis.run("neuron_activation", dataclasses.replace(badnets, model=model), out=tmp_path, device="cpu")
    assert np.isnan(found.numbers.arrays["t"][7]) and found.summary["constant"] == 1
    assert np.isfinite(np.delete(found.numbers.arrays["t"], 7)).all()
    with pytest.raises(UnknownNameError, match="unknown layer 'layer9'; did you mean"):
        analysis.run("neuron_activation", badnets, out=tmp_path, device="cpu", layer="layer9")


def test_gini() -> None:
    assert gini(np.ones(5)) == pytest.approx(0) and gini(np.eye(10)[0]) == pytest.approx(0.9) and gini(np.zeros(3)) == 0
