"""MM-BD: ascent against torch's optimiser class by class, p-values on simulated nulls, two backdoors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses.detection._margins import largest_margins, margin_p_value, margins
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build
from bbfast.training.device import Numerics

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(classes: int = 5, size: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size * size, classes))
    return net.eval()


def view_of(model: nn.Module, classes: int = 5, size: int = 6, **options: Any) -> DefenderView:
    facts = DataFacts("toy", classes, (3, size, size), MEAN, STD)
    return DefenderView("mm_bd", {"model"}, facts, Grants(model=model), progress=False, **options)


def ascend(model: nn.Module, start: Tensor, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    settings: dict[str, Any] = {
        "mean": MEAN,
        "std": STD,
        "lr": 0.05,
        "momentum": 0.0,
        "steps": 20,
        "tolerance": 0.0,
        "batch_size": 1000,
        "numerics": Numerics(torch.float32, False),
    }
    return largest_margins(model, start, **{**settings, **changes})


def noise(classes: int = 5, each: int = 4, size: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(classes, each, 3, size, size, generator=generator(seed))


# -- the ascent -------------------------------------------------------------------------------------------------------


def test_margins_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-1.0, -1.0, -5.0]])
    assert margins(logits, torch.tensor([0, 2, 1])).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("momentum", [0.0, 0.2])
def test_ascent_against_torchs_sgd_class_by_class(momentum: float) -> None:
    net, start = network(), noise()
    final, first, taken = ascend(net, start, momentum=momentum)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for c in range(5):
        images = start[c].clone().requires_grad_()
        sgd = torch.optim.SGD([images], lr=0.05, momentum=momentum)
        others = [k for k in range(5) if k != c]

        def value(x: Tensor, c: int = c, others: list[int] = others) -> Tensor:
            logits = net((x.clamp(0, 1) - mean) / std)
            return logits[:, c] - logits[:, others].max(dim=1).values

        torch.testing.assert_close(first[c], value(images).detach())
        for _ in range(20):
            sgd.zero_grad()
            (-value(images).sum()).backward()
            sgd.step()
        torch.testing.assert_close(final[c], value(images).detach(), atol=1e-3, rtol=1e-3)
    assert taken.tolist() == [20] * 5


def test_margins_rise() -> None:
    """Step by step for the median: each number of steps begins anew from the same images."""
    net, start = network(), noise()
    before = start.clone()
    medians = [float(ascend(net, start, lr=0.01, steps=steps)[0].median()) for steps in (1, 2, 5, 10, 20, 40)]
    assert all(low <= high for low, high in itertools.pairwise(medians))
    assert medians[0] > float(ascend(net, start, steps=1)[1].median())
    assert torch.equal(start, before)


def test_a_settled_class_stops_and_the_others_do_not() -> None:
    class Flat(nn.Module):
        """Class 0's margin does not depend on the image, except through the others'."""

        def forward(self, x: Tensor) -> Tensor:
            bright = x.mean(dim=(1, 2, 3))
            return torch.stack([torch.full_like(bright, 90.0), bright, -bright], dim=1)

    _, _, taken = ascend(Flat(), noise(3) * 0 + 0.5, tolerance=1e-3, steps=30, lr=0.01)
    assert int(taken[0]) == 2
    net, start = network(), noise()
    final, _, taken = ascend(net, start, tolerance=0.05, steps=200)
    assert len(taken.unique()) > 1
    for c in range(5):
        alone, _, _ = ascend(net, start, steps=int(taken[c]))
        torch.testing.assert_close(final[c], alone[c], atol=1e-3, rtol=1e-3)


def test_batch_size_has_no_say() -> None:
    net, start = network(), noise()
    whole = ascend(net, start)[0]
    torch.testing.assert_close(ascend(net, start, batch_size=3)[0], whole, atol=1e-4, rtol=1e-4)


# -- the p-value ------------------------------------------------------------------------------------------------------


def test_p_value_by_formula() -> None:
    values = torch.from_numpy(stats.gamma.rvs(3, loc=5, scale=2, size=20, random_state=0))
    ranked = np.sort(values.numpy())
    p, fit = margin_p_value(values[torch.randperm(20, generator=generator(0))])
    parameters = stats.gamma.fit(ranked[:-1])
    assert fit["fit"] == "gamma3"
    assert p == pytest.approx(1 - stats.gamma.cdf(ranked[-1], *parameters) ** 20, rel=1e-6)
    few = values[:6]
    p, fit = margin_p_value(few)
    shape, _, scale = stats.gamma.fit(np.sort(few.numpy())[:-1], floc=0)
    assert (fit["fit"], fit["origin"]) == ("gamma2", 0.0)
    assert p == pytest.approx(1 - stats.gamma.cdf(float(few.max()), shape, scale=scale) ** 6, rel=1e-6)


def test_p_of_a_far_outlier_does_not_round_to_zero_early() -> None:
    values = torch.cat([torch.from_numpy(stats.gamma.rvs(3, scale=2, size=9, random_state=0)), torch.tensor([60.0])])
    p, _ = margin_p_value(values)
    assert p is not None
    assert 0 < p < 1e-3


def test_p_values_under_the_null() -> None:
    """With many classes p is roughly uniform. The fit leaves the largest value out and p asks for it as if it had been
    drawn with the others, so it leans to small values: that, too, is the authors' statistic."""
    p = [margin_p_value(torch.from_numpy(stats.gamma.rvs(3, scale=2, size=200, random_state=s)))[0] for s in range(40)]
    known = np.array([value for value in p if value is not None])
    assert len(known) == 40
    assert stats.kstest(known, "uniform").pvalue > 0.01
    assert (known < 0.05).mean() < 0.25


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [4.0] * 9 + [5.0], [-3.0, -2.0, -1.0, 4.0]])
def test_nothing_to_fit(values: list[float]) -> None:
    assert margin_p_value(torch.tensor(values)) == (None, {"fit": "none"})


# -- the defense ------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """Linear logits of about the same size; a corner that is bright adds ``strength`` to class 3."""

    def __init__(self, classes: int = 10, strength: float = 30.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 36, classes)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(3 * (x[:, :, -2:, -2:].mean(dim=(1, 2, 3)) - 0.5))
        logits = self.linear(x.flatten(1))
        return logits + self.strength * gate[:, None] * nn.functional.one_hot(torch.tensor(3), logits.shape[1])


def test_a_planted_backdoor_and_none() -> None:
    found = defenses.create("mm_bd", restarts=5, steps=60, lr=0.1).run(view_of(Planted(), 10))
    assert found.kind == "model"
    assert found.scores is None
    assert found.verdict["backdoored"] is True
    assert found.verdict["targets"] == [3]
    assert found.info["p"] < 0.05
    assert 3 < found.info["statistic"] <= 50
    anomaly = found.verdict["anomaly"]
    assert max(anomaly, key=anomaly.get) == 3
    assert found.info["median_margin"]["end"] > found.info["median_margin"]["start"]
    none = defenses.create("mm_bd", restarts=5, steps=60, lr=0.1).run(view_of(Planted(strength=0.0), 10))
    assert none.verdict["backdoored"] is False
    assert none.verdict["targets"] == []


def test_same_seed_same_verdict() -> None:
    mm = defenses.create("mm_bd", restarts=3, steps=5)
    one, again, other = (mm.run(view_of(network(), seed=seed)) for seed in (0, 0, 1))
    assert one.info["class_stat"] == again.info["class_stat"] != other.info["class_stat"]


def test_few_classes() -> None:
    with pytest.raises(DataRequirementError, match="at least 2, the model has 1"):
        defenses.create("mm_bd").check(view_of(network(1), 1))
    result = defenses.create("mm_bd", restarts=2, steps=2).run(view_of(network(3), 3))
    assert result.verdict["backdoored"] is None
    assert result.info["statistic"] is None
    assert len(result.verdict["anomaly"]) == 3


def test_model_that_has_diverged() -> None:
    net = network()
    with torch.no_grad():
        net[3].bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="its training diverged"):
        defenses.create("mm_bd", restarts=2, steps=2).run(view_of(net))


@pytest.mark.parametrize(
    ("config", "text"),
    [({"restarts": 0}, "restarts"), ({"significance": 1.0}, "significance"), ({"lr": 0.0}, "lr"), ({"steps": 0}, "st")],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("mm_bd", **config)


SMALL = ("small_cnn", "preactresnet18")
LARGE = ("vgg19_bn", "convnext_tiny", "vit_b_16")


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 4, (32, 32)).eval()
    result = defenses.create("mm_bd", restarts=1, steps=1).run(view_of(model, 4, 32))
    assert all(np.isfinite(list(result.info["class_stat"].values())))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    result = defenses.defend(
        defenses.create("mm_bd", restarts=5, steps=40), digits_attack, device="cpu", progress=False
    )
    stat = result.info["class_stat"]
    assert max(stat, key=stat.get) == 0
    assert set(result.metrics) >= {"backdoored", "seconds"}
    assert result.metrics["backdoored"] == 1.0
    assert result.metrics["target_found"] == 1.0
