"""Activation distribution: shares by a full sort, a planted channel, and channels that know nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis._topk import classes_of, in_order
from bbfast.attacks import AttackResult
from bbfast.errors import DataRequirementError

CPU = torch.device("cpu")


class Planted(nn.Module):
    """Channel 5 of ``seen`` is the poison indicator; the others hash the image, and so know nothing."""

    def __init__(self, triggered: Tensor) -> None:
        super().__init__()
        self.seen = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 10)
        self.register_buffer("known", triggered)
        nn.init.eye_(self.seen.weight)

    def forward(self, x: Tensor) -> Tensor:
        code = x.double().flatten(1) @ torch.linspace(0.5, 1.5, x[0].numel(), dtype=torch.float64)
        noise = torch.sin(code[:, None] * torch.arange(101, 165) * 1e4).float()
        hits = torch.isclose(code[:, None], self.known, rtol=0, atol=1e-9).any(1)  # type: ignore[arg-type]
        noise[:, 5] = hits.float() + noise[:, 5] / 100
        logits: Tensor = self.head(self.seen(noise))
        return logits


def codes(subject: Subject, images: Tensor) -> Tensor:
    x = subject.pixels(images).double().flatten(1)
    return x @ torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64)


def test_planted_and_ignorant_channels(badnets: AttackResult, tmp_path: Path) -> None:
    subject = Subject(badnets, None, CPU)
    view = subject.view("mixed")
    model = Planted(codes(subject, view.images[view.poisoned])).eval()
    made = dataclasses.replace(badnets, model=model)
    found = analysis.run("activation_distribution", made, out=tmp_path, device="cpu")
    arrays, m = found.numbers.arrays, int(found.numbers.arrays["m"])
    assert found.numbers.meta["layers"] == ["seen", "head"] and m == int(view.poisoned.sum()) == 20
    assert (arrays["count"].sum(1) == m).all() and arrays["offsets"].tolist() == [0, 64, 74]
    share = arrays["count"][:64, 10] / m
    assert share[5] == 1 and found.summary["first_layer"] == "seen" and found.summary["largest_share"] == 1
    others = np.delete(share, 5)
    rate = found.summary["base_rate"]
    assert abs(others.mean() - rate) < 3 * (rate * (1 - rate) / (m * len(others))) ** 0.5
    assert found.numbers.table[0]["n_above_half"] == 1


def test_equals_a_full_sort(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("activation_distribution", badnets, out=tmp_path, device="cpu", sort=False).numbers
    subject = Subject(badnets, None, CPU)
    view = in_order(subject.view("mixed"))
    kept: list[Tensor] = []
    with subject.watching({"layer3.0.conv2": kept.append}):
        subject.logits(view.images)
    sums = kept[0].sum((2, 3))
    top = sums.topk(int(found.arrays["m"]), dim=0).indices
    wanted = nn.functional.one_hot(classes_of(view, 10)[top], 11).sum(0)
    i = found.meta["layers"].index("layer3.0.conv2")
    np.testing.assert_array_equal(found.arrays["count"][slice(*found.arrays["offsets"][i : i + 2])], wanted)


def test_without_poisoned_images(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("activation_distribution", badnets, out=tmp_path, device="cpu", view="clean_test", n=100)
    assert int(found.numbers.arrays["m"]) == 10 and found.summary["base_rate"] == 0
    assert (found.numbers.arrays["count"][:, 10] == 0).all() and found.summary["trigger_neurons"] == 0
    empty = dataclasses.replace(badnets, backdoor_test=badnets.backdoor_test[:0])
    with pytest.raises(DataRequirementError, match="the view 'bd_test' is empty"):
        analysis.run("activation_distribution", empty, out=tmp_path, device="cpu")
