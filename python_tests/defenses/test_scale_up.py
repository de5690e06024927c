"""SCALE-UP: exact scaling, consistency by hand, calibration by class of prediction, and a real backdoor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection.scale_up import amplified, consistency, standardised
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SCALES = (3, 5, 7, 9, 11)
NORM: dict[str, Any] = {"mean": MEAN, "std": STD}


def pictures(n: int, seed: int = 0, size: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    # Mostly dark, so that scaling changes much and not all at once.
    return torch.randint(0, 256, (n, 3, size, size), generator=g).pow(2).div(255, rounding_mode="floor").byte()


def network(seed: int = 0, size: int = 6, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 32), nn.Tanh(), nn.Linear(32, classes)).eval()


class Fixed(nn.Module):
    """Class from the first pixel's red value, by a table."""

    def __init__(self, table: dict[int, int], classes: int = 5) -> None:
        super().__init__()
        self.table, self.classes = table, classes

    def forward(self, x: Tensor) -> Tensor:
        values = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().int().tolist()
        labels = torch.tensor([self.table.get(value, 0) for value in values], dtype=torch.int64)
        return nn.functional.one_hot(labels, self.classes).float()


def view_with(model: nn.Module, reserve: Tensor | None, inspected: Tensor, classes: int = 5, **options: Any) -> Any:
    clean = None if reserve is None else ImageSet(reserve, torch.arange(len(reserve)) % classes, mean=MEAN, std=STD)
    grants = Grants(model=model, reserve=clean, stream=Stream(inspected))
    needs = {"model", "stream"} | ({"reserve"} if clean is not None else set())
    return DefenderView("scale_up", needs, DataFacts("toy", classes, (3, 6, 6), MEAN, STD), grants, **options)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


@pytest.mark.parametrize("scale", [2, 3, 5, 7, 9, 11, 255, 256, 1000])
def test_scaling_is_exact(scale: int) -> None:
    """Regression: one reference multiplies normalised images and clips nothing."""
    values = torch.arange(256, dtype=torch.uint8)
    kept = values.clone()
    expected = np.minimum(values.numpy().astype(np.int64) * scale, 255)
    assert amplified(values, scale).tolist() == expected.tolist()
    assert torch.equal(values, kept)


def test_consistency_by_hand() -> None:
    # 10 stays, 20 stays at 3 and 9 only, 40 until it saturates, that is up to 5.
    table = {10: 1, 30: 1, 50: 1, 70: 1, 90: 1, 110: 1, 20: 2, 60: 2, 100: 0, 140: 0, 180: 2, 220: 0, 40: 3, 120: 3}
    table.update({200: 3, 255: 4})
    images = torch.zeros(3, 3, 6, 6, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([10, 20, 40])
    spc, labels = consistency(Fixed(table), images, SCALES, **NORM)
    assert labels.tolist() == [1, 2, 3]
    assert spc.tolist() == [1.0, 0.4, 0.4]


def test_consistency_against_one_image_at_a_time() -> None:
    net, images = network(), pictures(60)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = []
    for image in images:
        x = image / 255
        classes = [int(net(((x * n).clamp(0, 1) - mean).div(std)[None]).argmax()) for n in (1, *SCALES)]
        expected.append(sum(c == classes[0] for c in classes[1:]) / 5)
    spc, _ = consistency(net, images, SCALES, **NORM)
    assert spc.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 3
    assert set(spc.tolist()) <= {k / 5 for k in range(6)}


def test_constant_classifier_is_consistent() -> None:
    spc, labels = consistency(Fixed({}), pictures(20), SCALES, **NORM)
    assert torch.equal(spc, torch.ones(20).double())
    assert not labels.any()


@pytest.mark.parametrize("batch_size", [1, 13, 64, 10_000])
def test_batches_and_order_change_nothing(batch_size: int) -> None:
    net, images, sizes = network(), pictures(40), []
    whole = consistency(net, images, SCALES, **NORM)
    net.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for a, b in zip(whole, consistency(net, images[order], SCALES, batch_size=batch_size, **NORM), strict=True):
        assert torch.equal(a[order], b)
    assert sum(sizes) == 240
    assert max(sizes) <= max(batch_size, 6)


def test_standardised_by_class_of_prediction() -> None:
    """Regression: one pair for all classes hides that clean images of some classes are steadier than others."""
    clean = torch.tensor([0.2, 0.6, 1.0, 1.0, 0.4])
    by = torch.tensor([0, 0, 1, 1, 3])
    scores, labels = torch.tensor([0.8, 1.0, 0.0, 0.4, 0.4]), torch.tensor([0, 1, 1, 2, 3])
    found, facts = standardised(scores, labels, clean, by, 4)
    pooled = clean.double().numpy()
    assert facts["pooled"] == [2]
    assert facts["mean"] == pytest.approx([0.4, 1.0, pooled.mean(), 0.4])
    assert facts["sd"] == pytest.approx([0.2, 0.1, pooled.std(), 0.1])
    assert found.tolist() == pytest.approx([2.0, 0.0, -10.0, (0.4 - pooled.mean()) / pooled.std(), 0.0])
    found, facts = standardised(scores, labels, clean, by, 4, per_class=False)
    assert facts["pooled"] == [0, 1, 2, 3]
    assert found.tolist() == pytest.approx(list((scores.double().numpy() - pooled.mean()) / pooled.std()))


def test_calibration_goes_by_predictions_not_labels() -> None:
    """Regression: the references calibrate against labels, so a wrong but steady prediction counts as unsteady."""
    steady = Fixed({}, classes=5)  # predicts class 0 whatever the label
    result = defenses.create("scale_up").run(view_with(steady, pictures(20), pictures(7, 1)))
    assert result.info["calibration"]["mean"] == [1.0] * 5
    assert result.info["calibration"]["pooled"] == [1, 2, 3, 4]
    scores, flags = rows(result)
    assert torch.equal(scores, torch.zeros(7))
    assert not flags.any()


@pytest.mark.parametrize("mode", ["data_limited", "data_free"])
def test_result(mode: str) -> None:
    net, reserve, inspected = network(), pictures(30, 2), pictures(50, 3)
    defense = defenses.create("scale_up", mode=mode, precision="fp32", threshold=0.6)
    limited = mode == "data_limited"
    assert defense.card.needs == {"model", "stream"} | ({"reserve"} if limited else set())
    result = defense.run(view_with(net, reserve if limited else None, inspected))
    scores, flags = rows(result)
    spc, labels = consistency(net, inspected, SCALES, **NORM)
    if limited:
        spc, _ = standardised(spc, labels, *consistency(net, reserve, SCALES, **NORM), 5)
    torch.testing.assert_close(scores, spc.float())
    # Regression: a threshold that is given is used and kept.
    assert result.threshold == 0.6
    assert torch.equal(flags, scores >= 0.6)
    assert 0 < int(flags.sum()) < 50
    assert result.info["forwards"] == 6 * (50 + 30 * limited)


def test_empty_stream_and_one_class() -> None:
    result = defenses.create("scale_up").run(view_with(network(), pictures(10), pictures(0)))
    assert rows(result)[0].shape == (0,)
    result = defenses.create("scale_up").run(view_with(network(classes=1), pictures(4), pictures(9), classes=1))
    assert torch.equal(rows(result)[0], torch.zeros(9))


def test_model_that_has_diverged() -> None:
    """NaN has a largest position, so it would look like a prediction that nothing can change."""
    net = network()
    with torch.no_grad():
        net[3].bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="its predictions are NaN"):
        defenses.create("scale_up", mode="data_free").run(view_with(net, None, pictures(3)))


def test_empty_reserve() -> None:
    view = view_with(network(), pictures(0), pictures(3))
    with pytest.raises(DataRequirementError, match="the reserve has none; mode='data_free'"):
        defenses.create("scale_up").check(view)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"scales": ()}, "at least one"),
        ({"scales": (1, 3)}, "2 or more"),
        ({"scales": (3, 3)}, "different"),
        ({"threshold": float("nan")}, "threshold"),
        ({"sd_floor": 0}, "sd_floor"),
        ({"mode": "free"}, "mode"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("scale_up", **config)


def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    result = defenses.defend("scale_up", digits_attack, seed=0, device="cpu", progress=False)
    assert result.metrics["auroc"] > 0.8
    assert result.metrics["tpr"] > 0.8
