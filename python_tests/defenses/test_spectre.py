"""SPECTRE: its algebra against slow formulas, the reference's saved outputs, its faults, and a real backdoor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bbfast import defenses, metrics
from bbfast.attacks.result import AttackResult
from bbfast.defenses import DefenderView, DefenseResult
from bbfast.defenses.detection import _quantum, spectre
from bbfast.defenses.detection._quantum import (
    covariance,
    inverse_root,
    que_matrix,
    que_scores,
    robust_members,
    top_eigenpair,
)
from bbfast.defenses.detection.spectre import poison_budget
from bbfast.errors import ConfigError, UnsupportedModelError
from bbfast.models import build

SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "spectre.npz"
Gauss = Callable[..., tuple[Tensor, Tensor, Tensor]]
MakeView = Callable[..., DefenderView]
Array = np.ndarray


def run(view: DefenderView, **config: Any) -> DefenseResult:
    return defenses.create("spectre", **config).run(view)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def anisotropic(seed: int, n: int = 500, d: int = 64) -> tuple[Tensor, Tensor]:
    """One class whose standard deviation falls from 3 to 0.5, and 15 samples 6 away along two directions."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g) * torch.from_numpy(np.geomspace(3, 0.5, d)).float()
    truth = torch.arange(n) < 15
    directions = torch.linalg.qr(torch.randn(d, 2, generator=g)).Q
    x[truth] += 6 * directions.T[torch.arange(15) % 2]
    return x, truth


# -- the algebra ------------------------------------------------------------------------------------------------------


def test_que_matrix_is_the_matrix_exponential() -> None:
    """Regression: both Python ports take the exponential of each element."""
    x = torch.randn(3, 50, 6, dtype=torch.float64, generator=generator(0)) * torch.linspace(2, 0.3, 6)
    cov = covariance(x, every(x))
    for c, m in zip(cov.numpy(), que_matrix(cov, 4.0).numpy(), strict=True):
        theirs = scipy.linalg.expm(4 * (c - np.eye(6)) / (np.linalg.norm(c, 2) - 1))
        np.testing.assert_allclose(m, theirs / np.trace(theirs), atol=1e-12)
        assert np.trace(m) == pytest.approx(1)
        assert np.linalg.eigvalsh(m).min() >= 0


def test_que_scores_do_not_depend_on_the_basis() -> None:
    x = torch.randn(1, 80, 6, dtype=torch.float64, generator=generator(1)) * torch.linspace(2, 0.3, 6)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator(2))).Q

    def scores(points: Tensor, elementwise: bool) -> Tensor:
        cov = covariance(points, every(points))
        if not elementwise:
            return que_scores(points, que_matrix(cov, 4.0))
        m = torch.exp(4 * (cov - torch.eye(6)) / (torch.linalg.matrix_norm(cov, 2) - 1))
        return que_scores(points, m / m.diagonal(dim1=1, dim2=2).sum())

    torch.testing.assert_close(scores(x, False), scores(x @ q, False), rtol=1e-9, atol=1e-9)
    assert (scores(x, True) - scores(x @ q, True)).abs().max() > 0.1


def test_que_matrix_where_nothing_stands_out() -> None:
    """Regression: the reference divides rounding errors by rounding errors."""
    for scale in (1.0, 1 + 1e-13, 0.5):
        cov = scale * torch.eye(4, dtype=torch.float64)[None]
        torch.testing.assert_close(que_matrix(cov, 4.0), torch.eye(4, dtype=torch.float64)[None] / 4)


def test_covariance_and_root_of_members() -> None:
    x = torch.randn(2, 30, 4, dtype=torch.float64, generator=generator(3)) + 5
    member = torch.arange(30) < torch.tensor([[30], [20]])
    cov = covariance(x, member)
    np.testing.assert_allclose(cov[1].numpy(), np.cov(x[1, :20].numpy(), rowvar=False))
    root = inverse_root(cov)
    np.testing.assert_allclose((root @ cov @ root).numpy(), np.eye(4)[None].repeat(2, 0), atol=1e-10)
    flat = torch.diag(torch.tensor([4.0, 1e-9, 0.0], dtype=torch.float64))[None]
    torch.testing.assert_close(inverse_root(flat)[0].diagonal(), torch.tensor([0.5, 500.0, 500.0], dtype=torch.float64))
    assert inverse_root(torch.zeros(1, 3, 3, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("few", [0, 1024])
def test_top_eigenpair(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through matrices and through inner products, padded sets, and a good or a useless guess."""
    monkeypatch.setattr(_quantum, "_FEW_POINTS", few)
    x = torch.randn(2, 90, 5, dtype=torch.float64, generator=generator(4)) ** 3
    count = torch.tensor([90, 60])
    x[1, 60:] = 0
    y = x @ inverse_root(x.mT @ x / count[:, None, None])
    value, vector, weight = top_eigenpair(y, count)
    for s, n in enumerate(count.tolist()):
        z = (y[s, :n, :, None] * y[s, :n, None]).flatten(1) - torch.eye(5).flatten()
        values, vectors = np.linalg.eigh((z.T @ z / n).numpy())
        assert float(value[s]) == pytest.approx(values[-1], rel=1e-8)
        assert abs(float(vector[s].flatten() @ torch.from_numpy(vectors[:, -1]))) == pytest.approx(1, abs=1e-6)
    again = top_eigenpair(y, count, weight)
    torch.testing.assert_close(again[0], value)
    torch.testing.assert_close(top_eigenpair(y, count, torch.zeros_like(weight))[0], value)


def slow_filter(x: Array, e: float, limit: int, tau: float = 0.1) -> Array:
    """The filter as the spec writes it, one set, with a dense eigenproblem."""
    kept = np.arange(len(x))
    total = len(x)
    while len(kept) > total - limit:
        part = x[kept]
        n, k = part.shape
        values, vectors = np.linalg.eigh(part.T @ part / n)
        y = part @ (vectors / np.sqrt(values)) @ vectors.T
        far = (y**2).sum(1)
        wrong, rank = far >= 10 * k * np.log(n / tau), far
        if not wrong.any():
            z = (y[:, :, None] * y[:, None]).reshape(n, -1)
            moments = z.T @ z / n - np.outer(np.eye(k).ravel(), np.eye(k).ravel())
            values, vectors = np.linalg.eigh(moments)
            if values[-1] <= 1 + 10 * e * np.log(1 / e) ** 2:
                break
            v = vectors[:, -1].reshape(k, k)
            p = (np.einsum("ij,jk,ik->i", y, v, y) - np.trace(v)) / np.sqrt(2)
            rank = np.abs(p - np.median(p))
            for i, away in enumerate(np.sort(rank)):
                t = away - 3
                if t > 0 and 1 - i / n >= (1 if t <= 10 * np.log(1 / e) else 3 * e / (t * np.log(t)) ** 2):
                    wrong = rank > t
                    break
            if not wrong.any():
                break
        order = np.argsort(-np.where(wrong, rank, -np.inf), kind="stable")
        drop = order[: min(int(wrong.sum()), limit - (total - len(kept)))]
        kept = np.delete(kept, drop)
    mask = np.zeros(total, dtype=bool)
    mask[kept] = True
    return mask


@pytest.mark.parametrize("few", [0, 1024])
def test_the_filter_agrees_with_a_slow_one(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A very far point, points that only the fourth moments show, heavy tails, a small budget; all in one batch."""
    monkeypatch.setattr(_quantum, "_FEW_POINTS", few)
    x = torch.randn(5, 400, 4, dtype=torch.float64, generator=generator(5))
    x[0, 7] += 1e4  # alone it has h = n - 1, and the bound is 10 k ln(10 n) = 332
    x[1, :3, 0] += 18
    x[2] = x[2] * torch.rand(400, 1, dtype=torch.float64, generator=generator(6)).rsqrt()
    x[3, :20] *= 60
    fraction = torch.tensor([0.05, 0.02, 0.03, 0.02, 0.1], dtype=torch.float64)
    limit = torch.tensor([30, 12, 18, 7, 60])
    x = x - x.mean(dim=1, keepdim=True)
    kept = robust_members(x, every(x), fraction, limit)
    dropped = []
    for s in range(5):
        theirs = slow_filter(x[s].numpy(), float(fraction[s]), int(limit[s]))
        assert np.array_equal(kept[s].numpy(), theirs), s
        dropped.append(int((~theirs).sum()))
    assert not kept[0, 7]
    assert not kept[1, :3].any()
    assert dropped[2] > 0
    assert dropped[3] == 7
    assert dropped[4] == 0


def test_budget() -> None:
    assert [poison_budget(n, 0.1) for n in (20, 499, 500, 5000)] == [2, 50, 50, 500]
    assert poison_budget(499, 0.3) == 50
    assert poison_budget(1000, 0.3) == 300
    assert poison_budget(1000, 0.33) == 330
    assert poison_budget(30, 0.001) == 3


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_sees_what_the_variance_hides(feature_view: MakeView, seed: int) -> None:
    features, truth = anisotropic(seed)
    view = feature_view(features, torch.zeros(500, dtype=torch.int64), 1)
    found = metrics.detection(rows(run(view))[0], truth)
    plain = metrics.detection(rows(defenses.create("ss", retrain=False).run(view))[0], truth)
    assert found["auroc"] >= 0.75
    assert found["auroc"] > plain["auroc"] + 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_gaussian_fixture(gauss: Gauss, feature_view: MakeView, seed: int) -> None:
    features, labels, truth = gauss(seed, classes=4, n=300, d=32)
    result = run(feature_view(features, labels, 4))
    scores, flags = rows(result)
    found = metrics.detection(scores, truth, flags)
    assert result.verdict["targets"] == [0]
    assert int(flags.sum()) == 45
    assert found["tpr"] >= 0.98
    assert found["auroc"] > 0.95
    assert isinstance(result.threshold, Tensor)
    assert torch.equal(flags, scores >= result.threshold[labels])
    assert result.threshold.isinf().tolist() == [False, True, True, True]
    everywhere = rows(run(feature_view(features, labels, 4), preset="reference"))[1]
    assert [int(everywhere[labels == c].sum()) for c in range(4)] == [45] * 4


def test_a_rotation_of_the_features_changes_nothing(feature_view: MakeView) -> None:
    features, _ = anisotropic(3, n=200, d=20)
    q = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator(1))).Q
    labels = torch.zeros(200, dtype=torch.int64)
    one = rows(run(feature_view(features, labels, 1)))
    other = rows(run(feature_view((features.double() @ q).float(), labels, 1)))
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-4)  # float32 features
    assert torch.equal(one[1], other[1])


def test_storage_order_permutes_the_outcome(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(3, classes=2, n=90, d=12)
    images = torch.randint(0, 256, (180, 1, 4, 4), dtype=torch.uint8, generator=generator(8))
    order = torch.randperm(180, generator=generator(9))
    one = rows(run(feature_view(features, labels, 2, images)))
    other = rows(run(feature_view(features[order], labels[order], 2, images[order])))
    assert torch.equal(one[0][order], other[0])
    assert torch.equal(one[1][order], other[1])


def test_batches_of_classes_do_not_matter(
    gauss: Gauss, feature_view: MakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of other sizes and ranks in the batch leave a class alone."""
    features, labels, _ = gauss(2, classes=3, n=80, d=20)
    features[labels == 1, 7:] = 1.5
    keep = torch.ones(240, dtype=torch.bool)
    keep[(labels == 2).nonzero()[50:, 0]] = False
    view = feature_view(features[keep], labels[keep], 3)
    whole = run(view)
    monkeypatch.setitem(spectre._BATCH_POINTS, "cpu", 1)
    alone = run(view)
    torch.testing.assert_close(rows(whole)[0], rows(alone)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(rows(whole)[1], rows(alone)[1])
    for c, tau in alone.verdict["anomaly"].items():
        assert whole.verdict["anomaly"][c] == pytest.approx(tau, rel=1e-4)


def test_small_missing_and_constant_classes(gauss: Gauss, feature_view: MakeView, tmp_path: Path) -> None:
    features, labels, truth = gauss(1, classes=5, n=100, d=12, shift=12)
    features[labels == 4] = features[labels == 4][0]
    keep = (labels != 2) & ~((labels == 3) & (torch.arange(500) >= 319))
    result = run(feature_view(features[keep], labels[keep], 6))
    scores, flags = rows(result)
    assert result.info["unscored"] == [3, 4]
    assert torch.equal(scores.isnan(), labels[keep] >= 3)
    assert result.verdict["targets"] == [0]
    assert flags[truth[keep]].all()
    result.save(tmp_path / "r")
    assert torch.equal(rows(DefenseResult.load(tmp_path / "r"))[1], flags)


def test_nothing_to_score(feature_view: MakeView) -> None:
    for features in (torch.ones(30, 5), torch.randn(3, 5)):
        result = run(feature_view(features, torch.zeros(len(features), dtype=torch.int64), 2))
        assert rows(result)[0].isnan().all()
        assert not rows(result)[1].any()
        assert result.verdict["targets"] == []


def test_fewer_samples_than_components(feature_view: MakeView) -> None:
    features = torch.randn(24, 200, generator=generator(0))
    scores, flags = rows(run(feature_view(features, torch.zeros(24, dtype=torch.int64), 1)))
    assert scores.isfinite().all()
    assert int(flags.sum()) == 3


def test_features_that_are_not_finite(gauss: Gauss, feature_view: MakeView) -> None:
    features, labels, _ = gauss(0, n=30)
    features[7, 3] = torch.inf
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 1 of 150 training samples"):
        run(feature_view(features, labels, 5))
    with pytest.raises(UnsupportedModelError, match="no layer of role"):
        defenses.create("spectre").check(feature_view(features, labels, 5, model=torch.nn.Flatten()))
    defenses.create("spectre").check(feature_view(features, labels, 5, model=build("small_cnn", 5, 8)))


@pytest.mark.parametrize(
    "config",
    [
        {"assumed_poison_fraction": 0},
        {"assumed_poison_fraction": 0.4},
        {"alpha": -1},
        {"classes": "worst"},
        {"tau": 0},
        {"min_samples": 2},
    ],
)
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        defenses.create("spectre", **config)


# -- the reference's saved outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    if not GOLDEN.exists():
        pytest.skip(f"the golden files are not here ({GOLDEN}); set BBFAST_SHARED")
    with np.load(GOLDEN) as file:
        return dict(file)


def components(golden: dict[str, Array]) -> Tensor:
    """Principal components of the saved features, ``[1, 250, 64]``."""
    x = torch.from_numpy(golden["features"])
    x = x - x.mean(dim=0)
    return (x @ torch.linalg.svd(x, full_matrices=False).Vh[:64].T)[None]


def test_golden_components_and_robust_set(golden: dict[str, Array]) -> None:
    x = components(golden)
    fraction, limit = torch.tensor([30 / 250], dtype=torch.float64), torch.tensor([60])
    for k in (8, 16):
        np.testing.assert_allclose(x[0, :, :k].abs().numpy(), golden[f"pca_abs_k{k}"], atol=1e-9)
        kept = robust_members(x[..., :k], every(x), fraction, limit)
        assert np.array_equal(kept[0].numpy(), golden[f"robust_select_k{k}"])


def test_golden_tau_but_for_two_elementwise_operations(golden: dict[str, Array]) -> None:
    """The saved value has the exponential of each element and the trace of the product of elements. So done, ours is
    it; with the exponential and the product of matrices it is another number, checked against scipy."""
    x, kept = components(golden), torch.from_numpy(golden["kept_auto"])[None]
    shape = covariance(x @ inverse_root(covariance(x, kept)), every(x))
    c = shape[0].numpy()
    exponent = 4 * (c - np.eye(64)) / (np.linalg.norm(c, 2) - 1)
    theirs = np.exp(exponent)
    assert np.trace(c * theirs / np.trace(theirs)) == pytest.approx(float(golden["opnorm_auto"]), rel=1e-3)
    proper = scipy.linalg.expm(exponent)
    tau = spectre._judge(x, every(x), kept, torch.tensor([64]), 4.0)
    assert float(tau) == pytest.approx(np.trace(c @ proper / np.trace(proper)), rel=1e-6)


def test_golden_selection(golden: dict[str, Array], feature_view: MakeView, monkeypatch: pytest.MonkeyPatch) -> None:
    """One component is chosen, as there, where the two exponentials agree. The saved sets of 8 and 16 components come
    from rounding errors divided by rounding errors (their robust sets are whole) and cannot be compared."""
    monkeypatch.setattr(spectre, "poison_budget", lambda n, fraction: 30)  # ours would be a tenth of 250
    features = torch.from_numpy(golden["features"]).float()
    result = run(feature_view(features, torch.zeros(250, dtype=torch.int64), 1))
    assert result.info["dimensions"] == {0: 1}
    assert np.array_equal(golden["kept_auto"], golden["kept_k1"])
    assert np.array_equal(~rows(result)[1].numpy(), golden["kept_auto"])


# -- on a trained model -----------------------------------------------------------------------------------------------


def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    """Half of the target class is poison: too much for a robust covariance, so all that is asked is the sign."""
    result = defenses.defend("spectre", digits_attack, device="cpu", progress=False)
    assert result.metrics["auroc"] > 0.5
    assert metrics.detection(-rows(result)[0], digits_attack.poisoned)["auroc"] < 0.5
    assert 0 < int(rows(result)[1].sum()) <= round(0.15 * len(digits_attack.train))
    assert set(result.info["seconds"]) == {"features", "score"}
