"""Beatrix: bounds and deviations by formula and against the reference's saved outputs, its faults, a real backdoor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import golden
from torch import Tensor, nn

from bbfast import defenses, ops
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection._gram_bounds import calibrate, class_bounds, deviations, kmmd, order_statistic, sort_rows
from bbfast.defenses.detection.beatrix import class_anomaly, last_stage_input
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ORDERS = range(1, 9)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(n: int, seed: int, channels: int = 6, scale: float = 1.0) -> Tensor:
    g = generator(seed)
    levels = torch.linspace(0.2, 2, channels)[:, None, None]
    return scale * levels * torch.randn(n, channels, 3, 3, generator=g).relu()


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- the pieces by formula --------------------------------------------------------------------------------------------


def slow_grams(x: np.ndarray) -> np.ndarray:
    """As the paper writes it, float64: ``[n, P, C, C]``."""
    flat = x.reshape(*x.shape[:2], -1).astype(np.float64)
    powers = []
    for p in ORDERS:
        gram = np.einsum("ncs,nds->ncd", flat**p, flat**p)
        powers.append(np.sign(gram) * np.abs(gram) ** (1 / p))
    return np.stack(powers, axis=1)


def slow_deviations(clean: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The dense reference: full matrices, then the upper triangle, loops over samples and orders."""
    g, h = slow_grams(clean), slow_grams(x)
    c = g.shape[-1]
    upper = np.triu_indices(c)
    total = np.zeros(len(x))
    for p in range(len(ORDERS)):
        known = g[:, p][:, upper[0], upper[1]]
        middle = np.sort(known, axis=0)[(len(known) - 1) // 2]
        mad = np.sort(np.abs(known - middle), axis=0)[(len(known) - 1) // 2]
        low, high = middle - 10 * mad, middle + 10 * mad
        least = 1e-3 * np.abs(middle).mean()
        for i in range(len(x)):
            value = h[i, p][upper]
            below = np.maximum(low - value, 0) / np.maximum(np.abs(low), least)
            total[i] += (below + np.maximum(value - high, 0) / np.maximum(np.abs(high), least)).sum()
    return total / (len(ORDERS) * c * c / 2)


@pytest.mark.parametrize("n", [5, 12, 30])
def test_deviations_agree_with_a_dense_reference(n: int) -> None:
    clean, other = maps(n, 0), torch.cat([maps(20, 1), maps(20, 2).flip(1)])
    bounds, own = calibrate(clean, ORDERS)
    found = deviations(other, ORDERS, bounds)
    np.testing.assert_allclose(found.numpy(), slow_deviations(clean.numpy(), other.numpy()), rtol=1e-3, atol=1e-7)
    assert float(found[20:].mean()) > 10 * float(found[:20].mean())
    for fold in range(5):
        start, stop = n * fold // 5, n * (fold + 1) // 5
        rest = torch.cat([clean[:start], clean[stop:]])
        expected = slow_deviations(rest.numpy(), clean[start:stop].numpy())
        np.testing.assert_allclose(own[start:stop].numpy(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_features_changes_nothing(scale: float) -> None:
    one = deviations(maps(10, 1).flip(1), ORDERS, calibrate(maps(20, 0), ORDERS)[0])
    other = deviations(maps(10, 1, scale=scale).flip(1), ORDERS, calibrate(maps(20, 0, scale=scale), ORDERS)[0])
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_channels_that_are_dead_on_clean_images_count_but_not_without_bound() -> None:
    """Regression: median and MAD 0 make the reference divide by 1e-6."""
    clean, other = maps(20, 0), maps(5, 1)
    clean[:, 2] = 0
    other[:, 2] = 1e-3
    small = deviations(other, ORDERS, calibrate(clean, ORDERS)[0])
    other[:, 2] = 1.0
    large = deviations(other, ORDERS, calibrate(clean, ORDERS)[0])
    assert bool((large > small).all())
    assert float(large.max()) < 1e4
    reference = deviations(other, ORDERS, calibrate(clean, ORDERS, compat=True)[0], compat=True)
    assert float(reference.min()) > 1e5


@pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 30, 33])
def test_sorting_network_and_medians(n: int) -> None:
    x = torch.randn(n, 3, 7, generator=generator(n)).mul(3).round()
    assert torch.equal(sort_rows(x), x.sort(dim=0).values)
    middle = x.median(dim=0).values
    mad = (x - middle).abs().median(dim=0).values
    bounds = class_bounds(x)
    assert torch.equal(bounds.low, middle - 10 * mad)
    assert torch.equal(bounds.high, middle + 10 * mad)


def test_order_statistic() -> None:
    values = torch.arange(30.0)[torch.randperm(30, generator=generator(0))]
    assert (order_statistic(values, 0.95), order_statistic(values, 0.99), order_statistic(values, 0.5)) == (28, 29, 15)
    assert order_statistic(values[:1], 0.999999) == float(values[0])


def test_kmmd_by_its_definition() -> None:
    x, y = torch.randn(7, 4, generator=generator(0)), torch.randn(5, 4, generator=generator(1)) + 1
    z = torch.cat([x, y]).double()
    square = torch.cdist(z, z).square()
    base = square.flatten().sort().values[(144 - 1) // 2] / 2
    k = torch.exp(-square / base) + torch.exp(-square / (2 * base))
    value = 35 / 12 * (k[:7, :7].mean() + k[7:, 7:].mean() - 2 * k[:7, 7:].mean())
    assert kmmd(x, y) == pytest.approx(float(value), rel=1e-9)
    assert kmmd(x + 1e4, y + 1e4) == pytest.approx(float(value), rel=1e-3)
    assert kmmd(x, y[:0]) == 0
    assert kmmd(x[:0], y) == 0
    assert kmmd(torch.ones(4, 3), torch.ones(5, 3)) == 0
    assert kmmd(torch.zeros(9, 3), torch.ones(1, 3)) > 1


def test_class_anomaly() -> None:
    found = class_anomaly(torch.tensor([50.0, 10, 4, 2, 0, 8, torch.nan]).double())
    # Median 6, MAD 4: not the deviation downwards.
    torch.testing.assert_close(found[:6], torch.tensor([44.0, 4, 0, 0, 0, 2]).double() / (1.4826 * 4))
    assert bool(found[6].isnan())
    # One odd image where the other classes have none is no infinite anomaly.
    found = class_anomaly(torch.tensor([0.0, 2, 0, 0, 30]).double())
    assert found.tolist() == [0, 1, 0, 0, 15]


# -- the reference's saved outputs ------------------------------------------------------------------------------------


def test_golden_but_for_the_missing_power() -> None:
    """The reference does not raise features to the p-th power: ``compat`` reproduces it, the default differs."""
    data = {key: torch.from_numpy(np.asarray(value)) for key, value in golden("beatrix").items()}
    clean, test = data["features_clean"], data["features_test"]
    rows_, columns = torch.triu_indices(12, 12)
    upper = rows_ * 12 + columns
    bounds, own = calibrate(clean, ORDERS, compat=True)
    middle, mad = data["medians"][:, upper], data["mads"][:, upper]
    torch.testing.assert_close(bounds.low, middle - 10 * mad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bounds.high, middle + 10 * mad, rtol=1e-3, atol=1e-3)
    found = deviations(test, ORDERS, bounds, compat=True)
    torch.testing.assert_close(found, data["deviations_"][:, 0], rtol=1e-3, atol=1e-6)
    assert order_statistic(own, 0.95) == pytest.approx(float(data["threshold_95"]), rel=1e-3)
    assert order_statistic(own, 0.99) == pytest.approx(float(data["threshold_99"]), rel=1e-3)
    right = deviations(test, ORDERS, calibrate(clean, ORDERS)[0])
    assert not torch.allclose(right, found, rtol=0.1)
    np.testing.assert_allclose(right.numpy(), slow_deviations(clean.numpy(), test.numpy()), rtol=1e-3, atol=1e-7)


def test_golden_kmmd() -> None:
    data = golden("beatrix")
    found = kmmd(torch.from_numpy(data["kmmd_clean"]), torch.from_numpy(data["kmmd_bd"]))
    assert found == pytest.approx(float(data["kmmd"]), rel=1e-4)


# -- the defense ------------------------------------------------------------------------------------------------------


def pictures(n: int, seed: int = 0, size: int = 12) -> Tensor:
    """Smooth random pictures: noise of a quarter of the size, enlarged."""
    x = torch.rand(n, 3, size // 4, size // 4, generator=generator(seed))
    return (255 * nn.functional.interpolate(x, scale_factor=4.0, mode="bilinear")).to(torch.uint8)


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    net = build("small_cnn", classes, 12).eval()
    with torch.no_grad():  # an untrained network says the same of everything: even its classes out
        x = (pictures(400, 99) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        logits = net(x)
        net.linear.weight /= logits.std(dim=0)[:, None]
        net.linear.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
    return net


def view_with(
    model: nn.Module, reserve: Tensor, inspected: Tensor, stage: str = "inference", classes: int = 4
) -> DefenderView:
    labels = torch.arange(len(reserve)) % classes
    known = ImageSet(reserve, labels, mean=MEAN, std=STD)
    given = ImageSet(inspected, torch.zeros(len(inspected)).long())
    grants = Grants(model=model, reserve=known, stream=Stream(inspected), poisoned_train=given)
    needs = defenses.create("beatrix", stage=stage).card.needs
    return DefenderView("beatrix", needs, DataFacts("toy", classes, (3, 12, 12), MEAN, STD), grants)


def test_result_and_storage_order() -> None:
    net, inspected = network(), pictures(70, 5)
    result = defenses.create("beatrix").run(view_with(net, pictures(160, 1), inspected))
    scores, flags = rows(result)
    assert result.kind == "inference"
    assert result.threshold == 1.0
    assert torch.equal(flags, scores > 1)
    assert result.info["layer"] == "stage3"
    limits = result.info["calibration"]["limits"]
    assert set(limits) == set(result.verdict["anomaly"]) == {0, 1, 2, 3}

    order = torch.randperm(160, generator=generator(0))
    again = defenses.create("beatrix").run(view_with(net, pictures(160, 1)[order], inspected[:9]))
    torch.testing.assert_close(rows(again)[0], scores[:9], rtol=1e-3, atol=1e-4)
    order = torch.randperm(70, generator=generator(1))
    other = defenses.create("beatrix").run(view_with(net, pictures(160, 1), inspected[order]))
    assert torch.equal(rows(other)[0], scores[order])
    train = defenses.create("beatrix", stage="train")
    assert train.card.needs == {"model", "reserve", "poisoned_train"}
    found = train.run(view_with(net, pictures(160, 1), inspected, "train"))
    assert found.kind == "detection"
    assert torch.equal(rows(found)[0], scores)
    assert isinstance(found.threshold, Tensor)
    assert found.threshold.shape == (4,)


@pytest.mark.parametrize("seed", [0, 1])
def test_few_clean_images_of_a_clean_model_are_flagged(seed: int) -> None:
    net = network(seed)
    result = defenses.create("beatrix").run(view_with(net, pictures(150, 10 + seed), pictures(1200, 20 + seed)))
    assert 0.02 <= float(rows(result)[1].double().mean()) <= 0.10
    assert not result.verdict["backdoored"]


def test_classes_without_reserve(caplog: pytest.LogCaptureFixture) -> None:
    """A class that the reserve has too few predictions of is not scored; with few, a warning."""
    net = network()
    inspected = pictures(60, 5)
    with torch.no_grad():
        x = ops.gather_augment(inspected, torch.arange(60), mean=MEAN, std=STD)
        predicted = net(x).argmax(1)
        reserve = pictures(120, 1)
        known = net(ops.gather_augment(reserve, torch.arange(120), mean=MEAN, std=STD)).argmax(1)
    missing = int(known.bincount(minlength=4).argmin())
    keep = known != missing
    keep[(known == missing).nonzero()[:4, 0]] = True
    with caplog.at_level(logging.WARNING, "bbfast.defenses.detection.beatrix"):
        result = defenses.create("beatrix", reserve_per_class=10).run(view_with(net, reserve[keep], inspected))
    assert "fewer than 20 clean images" in caplog.text
    scores, flags = rows(result)
    assert result.info["unscored"] == [missing]
    assert torch.equal(scores.isnan(), predicted == missing)
    assert not flags[scores.isnan()].any()
    assert set(result.info["calibration"]["samples"].values()) <= set(range(5, 11))


def test_identical_clean_images() -> None:
    """No entry varies: any other image is suspicious, the same one is not."""
    one = pictures(1, 3)
    result = defenses.create("beatrix").run(
        view_with(network(), one.expand(20, -1, -1, -1), torch.cat([one, pictures(30, 4)]))
    )
    scores, flags = rows(result)
    assert not flags[0]
    assert scores[~scores.isnan()].isfinite().all()
    assert flags[1:][~scores[1:].isnan()].all()


def test_models_and_reserves_that_do_not_serve() -> None:
    beatrix = defenses.create("beatrix")
    with pytest.raises(DataRequirementError, match="at least 5 clean images of a class, the reserve has 4"):
        beatrix.check(view_with(network(), pictures(4), pictures(3)))
    with pytest.raises(DataRequirementError, match="the reserve has 0"):
        beatrix.check(view_with(network(), pictures(0), pictures(3)))
    with pytest.raises(UnsupportedModelError, match="before its last stage"):
        beatrix.check(view_with(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), pictures(20), pictures(3)))
    broken = network()
    with torch.no_grad():
        broken.linear.bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="its training diverged"):
        beatrix.run(view_with(broken, pictures(20), pictures(3)))
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="predicts no class for 5 or more of 8"):
        beatrix.run(view_with(network(), pictures(8), pictures(3)))


def test_a_model_with_one_class() -> None:
    torch.manual_seed(0)
    net = build("small_cnn", 1, 12).eval()
    result = defenses.create("beatrix").run(view_with(net, pictures(30, 1), pictures(20, 2), classes=1))
    assert rows(result)[0].isfinite().all()
    assert result.verdict == {"backdoored": False, "targets": [], "anomaly": {0: 0.0}}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("preactresnet18", "stage3"),
        pytest.param("vgg19_bn", "stage4", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "stage3", marks=pytest.mark.slow),
        pytest.param("vit_b_16", "stage3", marks=pytest.mark.slow),
    ],
)
def test_architectures(name: str, layer: str) -> None:
    torch.manual_seed(0)
    net = build(name, 1, 32).eval()
    view = view_with(net, pictures(6, 1, 32), pictures(4, 2, 32), classes=1)
    assert last_stage_input(view) == layer
    assert rows(defenses.create("beatrix").run(view))[0].isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        {"stage": "test"},
        {"reserve_per_class": 4},
        {"quantile": 1.0},
        {"quantile": 0.0},
        {"anomaly_threshold": 0},
        {"flag_mode": "class"},
    ],
)
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        defenses.create("beatrix", **config)


@pytest.mark.parametrize("stage", ["inference", "train"])
def test_a_real_backdoor(digits_attack: AttackResult, stage: str, tmp_path: Path) -> None:
    result = defenses.defend(
        defenses.create("beatrix", stage=stage), digits_attack, seed=0, device="cpu", progress=False
    )
    assert result.metrics["auroc"] > 0.9
    assert result.metrics["tpr"] > 0.8
    assert result.metrics["fpr"] < 0.15
    assert result.verdict["targets"][:1] == [0]
    result.save(tmp_path / "beatrix")
    assert torch.equal(rows(DefenseResult.load(tmp_path / "beatrix"))[0], rows(result)[0])


def test_the_score_ranks_as_the_deviation_does_within_a_class() -> None:
    net, inspected = network(), pictures(50, 5)
    one = rows(defenses.create("beatrix").run(view_with(net, pictures(160, 1), inspected)))[0]
    other = rows(defenses.create("beatrix", quantile=0.5).run(view_with(net, pictures(160, 1), inspected)))[0]
    some = one > 0
    assert int(some.sum()) > 10
    assert bool((other[some] >= one[some]).all())
    assert len(set((other / one)[some].log().mul(100).round().tolist())) <= 4  # one factor a class
    assert torch.equal(other[~some], one[~some])
