"""SCAn: EM and statistic against slow formulas, the reference's saved outputs, its faults, and a real backdoor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from bbfast import defenses, metrics
from bbfast.attacks.result import AttackResult
from bbfast.defenses import DefenderView, DefenseResult
from bbfast.defenses.detection._two_component import TwoComponent, fit, ledoit_wolf, likelihood_ratio
from bbfast.defenses.detection.scan import _split
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError

SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "scan.npz"
MakeView = Callable[..., DefenderView]
Array = np.ndarray


def run(view: DefenderView, **config: Any) -> DefenseResult:
    return defenses.create("scan", **config).run(view)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


def contaminated(
    seed: int, classes: int = 10, n: int = 500, d: int = 64, share: float = 0.2, each: int = 30, shift: float = 6.0
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Features, labels, truth and a clean reserve; in class 0 a part is moved along one direction."""
    g = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(classes, d, generator=g)
    labels = torch.arange(classes).repeat_interleave(n)
    features = means[labels] + torch.randn(len(labels), d, generator=g)
    truth = (labels == 0) & (torch.rand(len(labels), generator=g) < share)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    known = torch.arange(classes).repeat_interleave(each)
    clean = means[known] + torch.randn(len(known), d, generator=g)
    return features + shift * direction * truth[:, None], labels, truth, (clean, known)


# -- the model --------------------------------------------------------------------------------------------------------


def slow_em(x: Array, y: Array, classes: int, steps: int) -> tuple[Array, Array]:
    """EM as the paper writes it: with inverses and over the samples."""
    x = x - x.mean(0)
    mean = np.stack([x[y == k].mean(0) for k in range(classes)])
    between, within = np.cov(mean[y], rowvar=False), np.cov(x - mean[y], rowvar=False)
    for _ in range(steps):
        inverse = np.linalg.inv(within)
        for k in range(classes):
            n = int((y == k).sum())
            middle = np.linalg.inv(n * between + within)
            mean[k] = sum((within @ middle @ between @ inverse @ row for row in x[y == k]), np.zeros(x.shape[1]))
        between, within = np.cov(mean[y], rowvar=False), np.cov(x - mean[y], rowvar=False)
    return between, within


def covariances(model: TwoComponent) -> tuple[Array, Array]:
    q = model.basis
    return (q @ model.between @ q.T).numpy(), (q @ model.within @ q.T).numpy()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_em_agrees_with_a_slow_one_over_samples(steps: int) -> None:
    """Classes of different sizes, six dimensions."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([5, 9, 9, 17]))
    features = torch.randn(40, 6, generator=g).double() + 3 * torch.randn(4, 6, generator=g)[labels] + 100
    model = fit(features, labels, 4, 0.0, max_iter=steps, tolerance=0.0)
    assert model.iterations == steps
    for mine, theirs in zip(covariances(model), slow_em(features.numpy(), labels.numpy(), 4, steps), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-8)


def test_em_in_the_span_of_few_samples() -> None:
    """30 samples in 50 dimensions: the same as in coordinates of their span."""
    _, _, _, (clean, known) = contaminated(0, classes=3, d=50, each=10)
    model = fit(clean, known, 3, 0.0)
    assert model.basis.shape == (50, 29)
    x = (clean.double() - clean.double().mean(0)) @ model.basis
    again = fit(x, known, 3, 0.0)
    np.testing.assert_allclose(covariances(again)[1], model.within.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (30, 50)])
def test_ledoit_wolf_is_scikit_learns(n: int, d: int) -> None:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * torch.linspace(3, 0.5, d)
    assert ledoit_wolf(x, d) == pytest.approx(ledoit_wolf_shrinkage(x.numpy()), rel=1e-9)
    basis = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: n - 1]
    assert ledoit_wolf(x @ basis.T, d) == pytest.approx(ledoit_wolf_shrinkage(x.numpy()), rel=1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("each", [4, 40])
def test_whitening_is_the_square_root_of_the_inverse(shrinkage: float, each: int) -> None:
    _, _, _, (clean, known) = contaminated(1, classes=4, d=20, each=each)
    model = fit(clean, known, 4, shrinkage)
    within = covariances(model)[1]
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / 20 * np.eye(20)
    whitened = model.whitened(torch.eye(20, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(whitened @ whitened.T, np.linalg.pinv(within, rcond=1e-10, hermitian=True), atol=1e-8)


def test_statistic_is_the_sum_over_samples() -> None:
    """Regression: the reference leaves Su Se^-1 out of the posterior mean."""
    g = torch.Generator().manual_seed(0)
    _, _, _, (clean, known) = contaminated(2, classes=5, d=6, each=20)
    model = fit(clean, known, 5, 0.1)
    between, within = covariances(model)
    within = 0.9 * within + 0.1 * np.trace(within) / 6 * np.eye(6)
    x = torch.randn(40, 6, dtype=torch.float64, generator=g) + 2
    group = torch.rand(40, generator=g) < 0.3
    mu = between @ np.linalg.inv(40 * between + within) @ x.sum(0).numpy()
    np.testing.assert_allclose(model.class_mean(torch.tensor([40]), x.sum(0)[None]).numpy()[0], mu, rtol=1e-6)
    inverse = np.linalg.inv(within)
    slow = 0.0
    for row, second in zip(x.numpy(), group.tolist(), strict=True):
        own = x[group == second].mean(0).numpy()
        slow += (row - mu) @ inverse @ (row - mu) - (row - own) @ inverse @ (row - own)
    centers = torch.stack([x[~group].mean(0), x[group].mean(0)])
    sizes = torch.tensor([[int((~group).sum()), int(group.sum())]])
    w = model.whitened
    fast = likelihood_ratio(sizes, w(centers)[None], w(x.mean(0))[None], w(torch.from_numpy(mu))[None])
    assert float(fast) == pytest.approx(slow / 40, rel=1e-6)


def test_the_split_is_at_least_as_good_as_scikit_learns() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([400, 370])
    points = torch.zeros(2, 400, 60, dtype=torch.float64)
    for s, n in enumerate(sizes.tolist()):
        points[s, :n] = torch.randn(n, 60, generator=g).double() + 3
        points[s, : n // 20, :4] += 4
    found = _split(points, sizes, torch.rand(2, 10, 2, dtype=torch.float64, generator=g))
    for s, n in enumerate(sizes.tolist()):
        theirs = KMeans(2, n_init=10, random_state=0).fit(points[s, :n].numpy())
        assert float(found.inertia[s]) <= 1.0001 * theirs.inertia_
        assert found.labels[s, : n // 20].double().mean() >= 0.95


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shrinkage", [0.2, "ledoit_wolf"])
def test_gaussian_fixture(feature_view: MakeView, seed: int, shrinkage: Any) -> None:
    features, labels, truth, reserve = contaminated(seed)
    result = run(feature_view(features, labels, 10, reserve=reserve), shrinkage=shrinkage)
    scores, flags = rows(result)
    found = metrics.detection(scores, truth, flags)
    assert result.verdict["targets"] == [0]
    assert found["tpr"] >= 0.98
    assert found["fpr"] <= 0.03
    assert found["auroc"] > 0.97
    assert max(value for c, value in result.verdict["anomaly"].items() if c) < 5
    assert isinstance(result.threshold, Tensor)
    assert torch.equal(flags, scores > result.threshold[labels])


def test_more_than_half_of_a_class(feature_view: MakeView) -> None:
    """The reserve says which of two groups is the class, whatever their sizes."""
    features, labels, truth, reserve = contaminated(4, share=0.7, n=200)
    scores, flags = rows(run(feature_view(features, labels, 10, reserve=reserve)))
    assert metrics.detection(scores, truth, flags)["tpr"] >= 0.98
    assert int((flags & ~truth).sum()) <= 5


def test_a_clean_set_has_no_target(feature_view: MakeView) -> None:
    for seed in range(4):
        features, labels, _, reserve = contaminated(seed, share=0.0, n=200)
        result = run(feature_view(features, labels, 10, reserve=reserve))
        assert not rows(result)[1].any()
        assert not result.verdict["backdoored"]


def test_storage_order_permutes_the_outcome(feature_view: MakeView) -> None:
    features, labels, _, reserve = contaminated(0, n=60)
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), dtype=torch.uint8, generator=g)
    order = torch.randperm(len(labels), generator=g)
    one = rows(run(feature_view(features, labels, 10, images, reserve)))
    other = rows(run(feature_view(features[order], labels[order], 10, images[order], reserve)))
    assert torch.equal(one[0][order], other[0])
    assert torch.equal(one[1][order], other[1])


def test_an_unusually_even_class_is_no_target(feature_view: MakeView) -> None:
    """Regression: the reference's index is two-sided."""
    features, labels, _, reserve = contaminated(0, share=0.0)
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    features[labels == 3] = means[3] + 0.1 * (features[labels == 3] - means[3])
    result = run(feature_view(features, labels, 10, reserve=reserve), anomaly_threshold=3.0)
    assert result.verdict["targets"] == []
    ratio = np.array([result.info["likelihood_ratio"][c] for c in range(10)])
    assert metrics.anomaly_index(ratio, side="both")[3] > 3.0


def test_small_missing_and_constant_classes(feature_view: MakeView) -> None:
    features, labels, _, reserve = contaminated(1, n=100, share=0.0)
    features[labels == 4] = features[labels == 4][0]
    keep = torch.ones(1000, dtype=torch.bool)
    keep[labels == 2] = False
    keep[(labels == 3).nonzero()[19:, 0]] = False
    keep[(labels == 5).nonzero()[1:, 0]] = False
    result = run(feature_view(features[keep], labels[keep], 10, reserve=reserve))
    scores, flags = rows(result)
    small = (labels[keep] == 3) | (labels[keep] == 5)
    assert result.info["unscored"] == [3, 5]
    assert torch.equal(scores.isnan(), small)
    assert scores[~small].isfinite().all()
    # A hundred copies of one image are not what the reserve shows of their class.
    assert result.verdict["targets"] == [4]
    assert flags[labels[keep] == 4].all()
    assert not flags[labels[keep] != 4].any()


def test_few_classes_and_one(feature_view: MakeView, caplog: pytest.LogCaptureFixture) -> None:
    features, labels, _, reserve = contaminated(1, classes=3, n=100)
    with caplog.at_level(logging.WARNING, "bbfast.defenses.detection.scan"):
        assert rows(run(feature_view(features, labels, 3, reserve=reserve)))[0].isfinite().all()
    assert "3 classes are scored" in caplog.text
    only = labels == 0
    result = run(feature_view(features[only], labels[only], 3, reserve=reserve))
    assert not result.verdict["backdoored"]
    assert torch.equal(rows(result)[0].abs(), torch.zeros(100))


def test_more_features_than_samples(feature_view: MakeView) -> None:
    features, labels, truth, reserve = contaminated(0, n=80, d=512, each=10, shift=20)
    for shrinkage in ("ledoit_wolf", 0.0):
        scores, flags = rows(run(feature_view(features, labels, 10, reserve=reserve), shrinkage=shrinkage))
        assert scores.isfinite().all()
        if shrinkage:
            assert metrics.detection(scores, truth, flags)["tpr"] >= 0.98


def test_reserves_that_do_not_serve(feature_view: MakeView) -> None:
    features, labels, _, (clean, known) = contaminated(0, n=40)
    scan = defenses.create("scan")
    for index, text in (
        (torch.tensor([], dtype=torch.int64), "0 images of 0 classes"),
        (known == 3, "30 images of 1 class"),
        (torch.arange(0, 300, 30), "10 images of 10 classes"),
    ):
        view = feature_view(
            features, labels, 10, reserve=(clean[index], known[index]), model=torch.nn.Sequential(torch.nn.Linear(2, 2))
        )
        with pytest.raises(DataRequirementError, match=text):
            scan.check(view)
    with pytest.raises(UnsupportedModelError, match="the same for all clean samples"):
        scan.run(feature_view(features, labels, 10, reserve=(torch.ones(300, 64), known)))
    with pytest.raises(UnsupportedModelError, match="the same for all clean samples of a class"):
        scan.run(feature_view(features, labels, 10, reserve=(clean[known * 30], known)))
    clean[4, 4] = torch.inf
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 1 of 300 clean images"):
        scan.run(feature_view(features, labels, 10, reserve=(clean, known)))
    features[2, 2] = torch.nan
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 1 of 400 training samples"):
        scan.run(feature_view(features, labels, 10, reserve=(clean, known)))


@pytest.mark.parametrize(
    "config",
    [
        {"reserve_per_class": 1},
        {"shrinkage": 1.0},
        {"shrinkage": -0.1},
        {"shrinkage": "oas"},
        {"anomaly_threshold": 0},
        {"n_init": 0},
        {"min_samples": 1},
        {"max_iter": 0},
    ],
)
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        defenses.create("scan", **config)


# -- the reference's saved outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    if not GOLDEN.exists():
        pytest.skip(f"the golden files are not here ({GOLDEN}); set BBFAST_SHARED")
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_covariances(golden: dict[str, Array]) -> None:
    features, labels = torch.from_numpy(golden["features_clean"]), torch.from_numpy(golden["labels_clean"])
    between, within = covariances(fit(features, labels, 10, 0.0))
    np.testing.assert_allclose(between, golden["Su"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(within, golden["Se"], rtol=1e-6, atol=1e-9)


def test_golden_statistic_but_for_the_dropped_factor(golden: dict[str, Array]) -> None:
    """The saved statistic has Se (n Su + Se)^-1 s for the posterior mean: with that in place of ours it is matched.
    Ours is checked against the sum over samples above."""
    model = fit(torch.from_numpy(golden["features_clean"]), torch.from_numpy(golden["labels_clean"]), 10, 0.0)
    between, within = covariances(model)
    x = np.concatenate([golden["features_inspected"], golden["features_clean"]]).astype(np.float64)
    y = np.concatenate([golden["labels_inspected"], golden["labels_clean"]])
    x = x - x.mean(0)
    statistic = []
    for c in range(10):
        mine, group = x[y == c], golden[f"subg_{c}"] > 0.5
        n = len(mine)
        theirs = within @ np.linalg.inv(n * between + within) @ mine.sum(0)
        centers = torch.from_numpy(np.stack([mine[~group].mean(0), mine[group].mean(0)]))
        sizes = torch.tensor([[int((~group).sum()), int(group.sum())]])
        w = model.whitened
        value = likelihood_ratio(
            sizes, w(centers)[None], w(torch.from_numpy(mine.mean(0)))[None], w(torch.from_numpy(theirs))[None]
        )
        statistic.append(float(value))
    np.testing.assert_allclose(statistic, golden["sts"][:, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics.anomaly_index(np.array(statistic)), golden["score"], rtol=1e-5)


def test_golden_target_and_group(golden: dict[str, Array], feature_view: MakeView) -> None:
    features, labels = torch.from_numpy(golden["features_inspected"]), torch.from_numpy(golden["labels_inspected"])
    reserve = torch.from_numpy(golden["features_clean"]), torch.from_numpy(golden["labels_clean"])
    result = run(feature_view(features, labels, 10, reserve=reserve), preset="reference")
    assert result.verdict["targets"] == [3]
    theirs = golden["subg_3"] > 0.5
    planted = golden["planted_inspected"].astype(bool)
    n = int((labels == 3).sum())
    flags = rows(result)[1].numpy()
    group = theirs[:n] if theirs[n:].mean() < 0.5 else ~theirs[:n]
    assert (flags[labels.numpy() == 3] != group).sum() <= 2
    assert flags[planted].sum() >= group[planted[labels.numpy() == 3]].sum() - 2
    assert flags[~planted].mean() <= 0.01


# -- on a trained model -----------------------------------------------------------------------------------------------


def test_a_real_backdoor(digits_attack: AttackResult, tmp_path: Path) -> None:
    """Half of the target class is poison."""
    result = defenses.defend("scan", digits_attack, device="cpu", progress=False)
    assert result.metrics["tpr"] >= 0.9
    assert result.metrics["fpr"] <= 0.02
    assert result.metrics["auroc"] >= 0.9
    assert result.metrics["target_found"] == 1.0
    assert metrics.detection(-rows(result)[0], digits_attack.poisoned)["auroc"] < 0.5
    assert set(result.info["seconds"]) == {"features", "calibrate", "score"}
    result.save(tmp_path / "scan")
    assert torch.equal(rows(DefenseResult.load(tmp_path / "scan"))[1], rows(result)[1])
