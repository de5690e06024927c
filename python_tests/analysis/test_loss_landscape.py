"""The landscape: the centre, the directions, bits that come back, and a paraboloid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import evaluate
from bbfast.analysis import Subject
from bbfast.analysis.tools import loss_landscape as tool
from bbfast.analysis.tools.loss_landscape import LossLandscape, directions, moved
from bbfast.attacks import AttackResult
from bbfast.errors import ConfigError

CPU = torch.device("cpu")


def test_the_centre_is_the_model_and_bits_come_back(strong: AttackResult) -> None:
    subject = Subject(strong, None, CPU)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    found = LossLandscape(points=3, n=2000, batch=64).measure(subject)
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    arrays = found.arrays
    assert arrays["loss_clean"].shape == (3, 3) and arrays["a"].tolist() == [-1, 0, 1] == arrays["b"].tolist()
    for key, share, data in (
        ("loss_clean", "acc", strong.test),
        ("loss_bd", "asr", strong.backdoor_test),
    ):
        logits = subject.logits(data.images)
        assert arrays[key][1, 1] == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-5)
        assert arrays[share][1, 1] == pytest.approx(float((logits.argmax(1) == data.labels).double().mean()))
    said = evaluate(strong.model, strong.test, strong.backdoor_test)
    assert arrays["acc"][1, 1] == pytest.approx(said["c_acc"]) and arrays["asr"][1, 1] == pytest.approx(said["asr"])
    assert found.summary["centre_clean"] == pytest.approx(arrays["loss_clean"][1, 1])
    assert abs(found.summary["cosine"]) < 1e-4


def test_directions_have_the_filters_lengths(badnets: AttackResult) -> None:
    model = Subject(badnets, None, CPU).model
    first, second, cosine = directions(model, torch.Generator().manual_seed(0))
    for value, *both in zip(model.parameters(), first, second, strict=True):
        for direction in both:
            if value.ndim < 2:
                assert not bool(direction.any())
            else:
                torch.testing.assert_close(
                    direction.flatten(1).norm(dim=1), value.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6
                )
    assert abs(cosine) < 1e-4
    again, _, _ = directions(model, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nobody_says_nan() -> None:
    """The largest of NaNs is class 0: a ruined model would always hit a target of 0."""
    x, labels = [torch.tensor([[torch.nan, 1.0], [2.0, 1.0]])], torch.zeros(2, dtype=torch.int64)
    assert tool.loss_and_share(nn.Identity(), x, labels)[1] == 0.5


def test_what_is_no_filter_stays() -> None:
    """ConvNeXt's scale of a layer has three axes, but one value a row: two directions of it would be parallel."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(1, 4))
    net.register_parameter("layer_scale", nn.Parameter(torch.ones(5, 1, 1)))
    named = [name for name, _ in net.named_parameters()]
    for found in directions(net, torch.Generator().manual_seed(0))[:2]:
        moves = {name: bool(part.any()) for name, part in zip(named, found, strict=True)}
        assert [name for name, any_move in moves.items() if any_move] == ["0.weight"]


def test_a_paraboloid(badnets: AttackResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss |theta|^2: along orthogonal directions of the filters' length it is |theta|^2 (1 + a^2 + b^2) + linear."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10, bias=False))
    stand_in: Any = SimpleNamespace(model=model)
    monkeypatch.setattr(tool, "loss_and_share", lambda net, *_: (float(net[1].weight.double().square().sum()), 1.0))
    found = LossLandscape(points=5, n=4).measure(Subject(badnets, stand_in, CPU)).arrays["loss_clean"]
    whole = float(model[1].weight.detach().double().square().sum())
    even = (found + found[::-1, ::-1]) / 2
    steps = np.linspace(-1, 1, 5)
    np.testing.assert_allclose(even, whole * (1 + steps[:, None] ** 2 + steps[None, :] ** 2), rtol=1e-5)


def test_restored_after_a_failure() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), moved(net) as go:
        go(0.3, 0.7, [torch.ones(2, 3), torch.ones(2)], [torch.ones(2, 3), torch.ones(2)])
        torch.testing.assert_close(net.weight.detach(), before + 1)
        raise RuntimeError("stop")
    assert torch.equal(net.weight, before)


def test_recalibrate_and_overflow(strong: AttackResult) -> None:
    subject = Subject(strong, None, CPU)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    fixed, fresh = (LossLandscape(points=3, n=60, bn=bn).measure(subject) for bn in ("fixed", "recalibrate"))
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    assert not any(module.training for module in subject.model.modules())
    assert not np.allclose(fixed.arrays["loss_clean"], fresh.arrays["loss_clean"], rtol=0.01)
    wild = LossLandscape(points=3, n=20, extent=1e6).measure(subject)
    assert wild.meta["overflowed"] > 0 and wild.arrays["loss_clean"].max() == 1e4
    assert np.isfinite(wild.arrays["loss_bd"]).all()


def test_radius_and_settings() -> None:
    steps = np.linspace(-1, 1, 5)
    share = np.full((5, 5), 0.9)
    share[3:, 2] = [0.5, 0.1]
    row = tool._sharpness(steps, np.full((5, 5), 2.0), share)
    assert row["half_at_+1"] == 1.0 and np.isnan(row["half_at_-1"]) and row["sharpness"] == 1.0
    with pytest.raises(ConfigError, match="must be odd"):
        LossLandscape(points=30)
