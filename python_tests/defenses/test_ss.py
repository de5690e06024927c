"""Spectral Signatures: against torch.linalg.svd, the reference's saved outputs, its faults, and a real backdoor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bbfast import defenses, metrics
from bbfast.attacks.result import AttackResult
from bbfast.defenses import DefenderView, DefenseResult
from bbfast.defenses.detection._inspected import inspect
from bbfast.defenses.detection._reduce import principal_axes
from bbfast.defenses.detection.ss import budget, spectral_scores
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build

SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "spectral.npz"
Gauss = Callable[..., tuple[Tensor, Tensor, Tensor]]
MakeView = Callable[..., DefenderView]


def run(view: DefenderView, **config: Any) -> DefenseResult:
    return defenses.create("ss", retrain=False, **config).run(view)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


def slow_scores(features: Tensor, labels: Tensor) -> Tensor:
    """The paper's formula by a singular value decomposition, in units of the class's median."""
    scores = torch.empty(len(labels), dtype=torch.float64)
    for c in labels.unique():
        x = features[labels == c].double()
        x = x - x.mean(dim=0)
        squares = (x @ torch.linalg.svd(x, full_matrices=False).Vh[0]).square()
        scores[labels == c] = squares / np.median(squares.numpy())
    return scores


@pytest.mark.parametrize(("n", "d", "classes"), [(60, 7, 4), (60, 40, 4), (60, 1500, 4), (1100, 1030, 1)])
def test_scores_are_those_of_a_singular_value_decomposition(
    feature_view: MakeView, n: int, d: int, classes: int
) -> None:
    """More than 1,024 features take ways without a covariance: one for few samples, one for many."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(n)[torch.randperm(n * classes, generator=g)]
    features = torch.randn(n * classes, d, generator=g) * torch.linspace(3, 0.1, d) + 50
    scores, _ = rows(run(feature_view(features, labels, classes)))
    torch.testing.assert_close(scores.double(), slow_scores(features, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaussian_fixture(gauss: Gauss, feature_view: MakeView, seed: int) -> None:
    features, labels, truth = gauss(seed, contamination=0.05)
    scores, flags = rows(run(feature_view(features, labels, 5)))
    assert metrics.detection(scores, truth)["auroc"] > 0.95
    mine = labels == 0
    inside = metrics.detection(scores[mine], truth[mine], flags[mine])
    assert inside["auroc"] > 0.99
    assert inside["tpr"] >= 0.99


@pytest.mark.parametrize(("fraction", "sizes"), [(0.1, (100, 61, 7, 200)), (0.02, (100, 61, 7, 200)), (0.5, (5, 8))])
def test_flags_are_exactly_the_budget(feature_view: MakeView, fraction: float, sizes: tuple[int, ...]) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    features = torch.randn(len(labels), 9, generator=torch.Generator().manual_seed(1))
    result = run(feature_view(features, labels, len(sizes)), assumed_poison_fraction=fraction)
    scores, flags = rows(result)
    assert isinstance(result.threshold, Tensor)
    for c, n in enumerate(sizes):
        mine = labels == c
        assert int(flags[mine].sum()) == math.ceil(round(1.5 * fraction * n, 9))
        assert scores[mine & flags].min() >= scores[mine & ~flags].max()
        assert float(result.threshold[c]) == float(scores[mine & flags].min())


def test_the_budget_is_not_rounded_up_by_rounding() -> None:
    """1.5 * 0.1 * 100 is 15.000000000000002."""
    assert [budget(n, 0.1) for n in (0, 1, 3, 20, 100, 101, 5000)] == [0, 1, 1, 3, 15, 16, 750]


@pytest.mark.parametrize("seed", range(5))
def test_a_large_common_mean_does_not_invert_the_ranking(feature_view: MakeView, seed: int) -> None:
    """Regression: the reference projects uncentred features; 100 samples at +2.5 against 1,000 at -2.5."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(1100, 64, generator=g)
    truth = torch.arange(1100) >= 1000
    features[:, 0] += torch.where(truth, 2.5, -2.5)
    labels = torch.zeros(1100, dtype=torch.int64)
    _, flags = rows(run(feature_view(features, labels, 1)))
    assert flags[truth].double().mean() >= 0.95
    axis = principal_axes(features, labels, 1, 1)[1][0, :, 0]
    uncentred = (features.double() @ axis).abs()
    assert uncentred.argsort(descending=True)[: int(flags.sum())].ge(1000).double().sum() <= 30


def test_storage_order_permutes_the_outcome(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(3, n=90, d=16)
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), dtype=torch.uint8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))
    one = rows(run(feature_view(features, labels, 5, images)))
    other = rows(run(feature_view(features[order], labels[order], 5, images[order])))
    assert torch.equal(one[0][order], other[0])
    assert torch.equal(one[1][order], other[1])


def test_only_the_classes_that_are_named(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(0, n=60)
    view = feature_view(features, labels, 5)
    result = run(view, target_labels=(1, 3))
    assert set(labels[rows(result)[1]].tolist()) == {1, 3}
    assert isinstance(result.threshold, Tensor)
    assert result.threshold.isinf().tolist() == [True, False, True, False, True]
    with pytest.raises(ValueError, match=r"target_labels must lie in 0\.\.3, got \[1, 4\]"):
        defenses.create("ss", target_labels=(1, 4)).check(
            feature_view(features, labels, 4, model=build("small_cnn", 4, 8))
        )


def test_suspicious_classes(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, truth = gauss(1, classes=10, n=300)
    result = run(feature_view(features, labels, 10), classes="suspicious")
    assert result.verdict["targets"] == [0]
    assert set(labels[rows(result)[1]].tolist()) == {0}
    assert metrics.detection(None, truth, rows(result)[1])["fpr"] < 0.01
    clean = run(feature_view(features[~truth], labels[~truth], 10), classes="suspicious", anomaly_threshold=6.0)
    assert not clean.verdict["backdoored"]
    assert not rows(clean)[1].any()
    assert run(feature_view(features, labels, 10)).verdict == {}


def test_small_missing_and_constant_classes(feature_view: MakeView, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] + [4] * 30 + [5] * 3)
    features = torch.randn(len(labels), 6, generator=g)
    features[labels == 4] = torch.tensor([0.1, 3.0, 700.0, -1.0, 0.0, 9.0])
    result = run(feature_view(features, labels, 7))
    scores, flags = rows(result)
    small = (labels == 1) | (labels == 2)
    assert result.info["unscored"] == [1, 2]
    assert torch.equal(scores.isnan(), small)
    assert torch.equal(scores[labels == 4], torch.zeros(30))
    assert not flags[small | (labels == 4)].any()
    assert flags[labels == 0].sum() == 6
    assert flags[labels == 5].sum() == 1
    assert result.info["class_stat"][4] == 1.0
    result.save(tmp_path / "r")
    assert torch.equal(rows(DefenseResult.load(tmp_path / "r"))[1], flags)


def test_one_direction_and_a_median_of_zero(feature_view: MakeView) -> None:
    features = torch.zeros(20, 1)
    features[:4] = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    result = run(feature_view(features, torch.zeros(20, dtype=torch.int64), 1))
    scores, flags = rows(result)
    assert result.info["class_stat"][0] == math.inf
    torch.testing.assert_close(scores[:5], torch.tensor([2.0, 2.0, 8.0, 8.0, 0.0]))  # in units of the mean, 10 / 20
    assert flags.nonzero()[:, 0].tolist()[-2:] == [2, 3]


def test_features_that_are_not_finite(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(0, n=30)
    features[7, 3] = torch.nan
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 1 of 150 training samples"):
        run(feature_view(features, labels, 5))


@pytest.mark.parametrize(
    "config",
    [
        {"assumed_poison_fraction": 0},
        {"assumed_poison_fraction": 0.6},
        {"percentile": 101},
        {"target_labels": ()},
        {"target_labels": (-1,)},
        {"classes": "best"},
        {"feature": "logits"},
    ],
)
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        defenses.create("ss", **config)


def test_refusals_before_work(toy_attack: Callable[..., AttackResult]) -> None:
    attack = toy_attack(model=build("small_cnn", 4, 12))
    del attack.config["recipe"]
    with pytest.raises(DataRequirementError, match="ss trains models, but this run has no recipe"):
        defenses.defend("ss", attack, device="cpu")
    convolutional = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 12), torch.nn.Flatten())
    attack = toy_attack(model=convolutional)
    with pytest.raises(UnsupportedModelError):
        defenses.defend(defenses.create("ss", retrain=False), attack, device="cpu")


def test_the_fourth_stage(toy_attack: Callable[..., AttackResult]) -> None:
    """``layer4_flat``: small_cnn's stage 4 on 12 pixels is 64 channels on 2 x 2."""
    attack = toy_attack()
    ss = defenses.create("ss", feature="layer4_flat", retrain=False)
    flat, pooled = (
        rows(defenses.defend(method, attack, device="cpu"))[0] for method in (ss, defenses.create("ss", retrain=False))
    )
    assert flat.isfinite().all()
    assert not torch.equal(flat, pooled)


# -- the reference's saved outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip(f"the golden files are not here ({GOLDEN}); set BBFAST_SHARED")
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_but_for_the_uncentred_projection(golden: dict[str, np.ndarray], feature_view: MakeView) -> None:
    """The saved scores project uncentred features and do not square: so do we here, with our axes. Ours are centred,
    and checked against the paper's formula."""
    features, labels = torch.from_numpy(golden["features"]), torch.from_numpy(golden["labels"])
    axes = principal_axes(features, labels, 5, 1)[1]
    theirs = (features.double() * axes[labels, :, 0]).sum(dim=1).abs()
    np.testing.assert_allclose(theirs, golden["score"], rtol=1e-4, atol=1e-6)
    view = feature_view(features, labels, 5)
    scores, flags = rows(run(view, preset="reference"))
    torch.testing.assert_close(scores.double(), slow_scores(features, labels), rtol=1e-4, atol=1e-6)
    # Their rule on our scores, and the budget, which here is the same number of samples.
    limit = [np.percentile(scores[labels == c].numpy(), 85) for c in range(5)]
    assert torch.equal(flags, scores > torch.tensor(limit, dtype=torch.float32)[labels])
    assert int(flags.sum()) == len(golden["suspicious"])
    assert torch.equal(rows(run(view))[1], flags)
    truth = torch.from_numpy(golden["planted"]).bool()
    found = metrics.detection(scores, truth, flags)
    assert found["tpr"] >= np.isin(np.flatnonzero(golden["planted"]), golden["suspicious"]).mean()


# -- on a trained model -----------------------------------------------------------------------------------------------


def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    result = defenses.defend(defenses.create("ss", retrain=False), digits_attack, device="cpu", progress=False)
    assert result.model is None
    assert result.metrics["auroc"] > 0.5
    assert metrics.detection(-rows(result)[0], digits_attack.poisoned)["auroc"] < 0.5
    assert {"features", "score"} == set(result.info["seconds"])


def test_retraining(toy_attack: Callable[..., AttackResult]) -> None:
    attack = toy_attack()
    result = defenses.defend("ss", attack, device="cpu", progress=False)
    composed = defenses.filter_and_retrain(attack, result, device="cpu", progress=False)
    assert result.model is not None
    assert composed.model is not None
    for a, b in zip(result.model.state_dict().values(), composed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_spectrum_of_the_whole_set(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(0, n=200)
    _, ratio = spectral_scores(inspect(feature_view(features, labels, 5)))
    for c in range(5):
        values = np.linalg.svd(features[labels == c].double().numpy() - features[labels == c].double().mean(0).numpy())[
            1
        ]
        assert float(ratio[c]) == pytest.approx((values[0] / values[1]) ** 2, rel=1e-6)
