"""Clustering of many classes at once: against scikit-learn, and independent of order, padding and neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import Tensor

from bbfast.defenses._content import content_keys, mix64
from bbfast.defenses.detection import _reduce
from bbfast.defenses.detection._clusters import ClassClusters, cluster_classes
from bbfast.defenses.detection._kmeans import kmeans, split_starts
from bbfast.defenses.detection._reduce import principal_axes
from bbfast.defenses.detection._silhouette import silhouette


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(sizes: tuple[int, ...], d: int, seed: int, gap: float = 4.0) -> Tensor:
    """Normal clouds of the given sizes around points ``gap`` apart, in random order."""
    g = generator(seed)
    rows = [torch.randn(n, d, generator=g, dtype=torch.float64) + gap * i for i, n in enumerate(sizes)]
    points = torch.cat(rows)
    return points[torch.randperm(len(points), generator=g)]


def padded(sets: list[Tensor], fill: float = 1e6) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(s) for s in sets])
    points = torch.full((len(sets), int(counts.max()), sets[0].shape[1]), fill, dtype=torch.float64)
    for row, one in zip(points, sets, strict=True):
        row[: len(one)] = one
    return points, counts


def uniforms(g: int, restarts: int, k: int, seed: int = 0) -> Tensor:
    return torch.rand(g, restarts, k, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_inertia_matches_scikit_learn(k: int) -> None:
    sets = [blobs(sizes, 5, seed) for seed, sizes in enumerate([(40, 10), (60, 25, 9), (200,), (7, 7, 7)])]
    points, counts = padded(sets)
    found = kmeans(points, counts, k, uniforms(len(sets), 40, k))
    for i, rows in enumerate(sets):
        best = KMeans(k, n_init=20, random_state=0).fit(rows.numpy())
        assert float(found.inertia[i]) <= 1.001 * best.inertia_
        labels = found.labels[i, : len(rows)]
        assert (found.labels[i, len(rows) :] == -1).all()
        centers = torch.stack([rows[labels == j].mean(dim=0) for j in range(k)])
        torch.testing.assert_close(found.centers[i], centers)
        assert float((rows - centers[labels]).square().sum()) == pytest.approx(float(found.inertia[i]))
        assert found.sizes[i].tolist() == sorted(torch.bincount(labels, minlength=k).tolist(), reverse=True)


def test_neighbours_and_padding_do_not_matter() -> None:
    sets = [blobs((30, 20), 3, 0, gap=1.0), blobs((90, 40), 3, 1, gap=1.0)]
    draws = uniforms(2, 4, 2)
    both = kmeans(*padded(sets), 2, draws)
    for i, rows in enumerate(sets):
        alone = kmeans(rows[None], torch.tensor([len(rows)]), 2, draws[i : i + 1])
        assert torch.equal(alone.labels[0], both.labels[i, : len(rows)])
        torch.testing.assert_close(alone.centers[0], both.centers[i])


def test_more_restarts_are_never_worse() -> None:
    rows = blobs((50, 50, 50, 50), 2, 3, gap=3.0)
    draws = uniforms(1, 20, 4, seed=5)
    inertia = [float(kmeans(rows[None], torch.tensor([200]), 4, draws[:, :r]).inertia) for r in (1, 5, 20)]
    assert inertia[0] >= inertia[1] >= inertia[2]


def test_split_starts_by_hand() -> None:
    points = torch.full((1, 12, 2), 1e6)
    points[0, :10] = torch.stack([torch.arange(10.0), torch.ones(10)], dim=1)
    starts = split_starts(points, torch.tensor([10]))
    assert starts.shape == (1, 6, 2, 2)
    # First axis cut below 1, 5 and 9; the second has no spread, so both parts are the mean.
    assert starts[0, ::2, :, 0].tolist() == [[0.0, 5.0], [2.0, 7.0], [4.0, 9.0]]
    assert torch.equal(starts[0, 1::2, :, 1], torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(starts[0, 1::2, :, 0], torch.full((3, 2), 4.5, dtype=torch.float64))
    assert kmeans(points, torch.tensor([10]), 2, uniforms(1, 1, 2), starts).sizes.tolist() == [[5, 5]]


def test_equal_points_make_one_cluster() -> None:
    found = kmeans(torch.full((2, 7, 3), 1 / 3), torch.tensor([7, 1]), 3, uniforms(2, 4, 3))
    assert found.sizes.tolist() == [[7, 0, 0], [1, 0, 0]]
    assert found.labels.tolist() == [[0] * 7, [0] + [-1] * 6]
    torch.testing.assert_close(found.inertia, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_two_points_far_apart_are_told_apart() -> None:
    points = torch.tensor([[[0.0], [1e4], [0.0], [1e4]]])
    assert kmeans(points, torch.tensor([4]), 2, uniforms(1, 1, 2)).sizes.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("points", "counts", "k", "draws", "text"),
    [
        (torch.zeros(2, 3), torch.tensor([3]), 2, uniforms(1, 1, 2), "points must be"),
        (torch.zeros(1, 3, 2), torch.tensor([3]), 2, uniforms(1, 1, 3), "uniforms must be"),
        (torch.zeros(1, 3, 2), torch.tensor([4]), 2, uniforms(1, 1, 2), r"counts must lie in 1\.\.3"),
        (torch.zeros(1, 3, 2), torch.tensor([0]), 2, uniforms(1, 1, 2), r"counts must lie in 1\.\.3"),
    ],
)
def test_bad_arguments(points: Tensor, counts: Tensor, k: int, draws: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kmeans(points, counts, k, draws)


@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([3, 17, 1024]))
@settings(max_examples=40, deadline=None)
def test_silhouette_matches_scikit_learn(n: int, d: int, k: int, seed: int, block: int) -> None:
    g = generator(seed)
    points = torch.randn(n, d, generator=g, dtype=torch.float64)
    labels = torch.randint(0, k, (n,), generator=g)
    present = len(labels.unique())
    found = silhouette(points, labels, k, block=block)
    if 2 <= present < n:
        assert found == pytest.approx(silhouette_score(points.numpy(), labels.numpy()), abs=1e-9)
    else:
        assert found == 0.0


def test_principal_axes_match_scikit_learn() -> None:
    g = generator(0)
    labels = torch.randint(0, 3, (600,), generator=g)
    features = torch.randn(600, 20, generator=g) * torch.linspace(3, 0.2, 20) + labels[:, None] * 5
    mean, axes, variances = principal_axes(features, labels, 4, 6)
    for c in range(3):
        pca = PCA(6, svd_solver="full").fit(features[labels == c].double().numpy())
        torch.testing.assert_close(mean[c], torch.from_numpy(pca.mean_))
        torch.testing.assert_close(variances[c], torch.from_numpy(pca.explained_variance_))
        overlap = (axes[c].T @ torch.from_numpy(pca.components_.T)).abs()
        torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.equal(variances[3], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_principal_axes_in_pieces(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator(1)
    labels, features = torch.randint(0, 5, (300,), generator=g), torch.randn(300, 8, generator=g)
    whole = principal_axes(features, labels, 5, 3)
    monkeypatch.setattr(_reduce, "_BUDGET", budget)
    for one, other in zip(whole, principal_axes(features, labels, 5, 3), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("largest", [10, 30])
def test_without_a_covariance_the_solution_is_the_same(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 features and 200 samples a class, by Lanczos; and with 25 samples a class, by their inner products."""
    g = generator(2)
    n = 400 if largest == 10 else 50
    labels = torch.arange(n) % 2
    strong = torch.randn(n, 5, generator=g) * torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])
    features = strong @ torch.randn(5, 60, generator=g) + 0.1 * torch.randn(n, 60, generator=g) + 3
    exact = principal_axes(features, labels, 3, 5)
    monkeypatch.setattr(_reduce, "_MAX_COVARIANCE", largest)
    mean, axes, variances = principal_axes(features, labels, 3, 5)
    torch.testing.assert_close(mean, exact[0])
    torch.testing.assert_close(variances, exact[2])
    for c in range(2):
        torch.testing.assert_close(
            (axes[c].T @ exact[1][c]).abs(), torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0
        )


def clusters_of(features: Tensor, labels: Tensor, ids: Tensor, classes: int, **options: object) -> ClassClusters:
    settings_: dict[str, object] = {
        "k": 2,
        "n_dims": 4,
        "whiten": False,
        "n_init": 10,
        "min_count": 20,
        "generator": generator,
    }
    return cluster_classes(features, labels, ids, classes, **{**settings_, **options})  # type: ignore[arg-type]


def test_classes_of_any_size_together() -> None:
    sizes = {0: (200, 30), 1: (15, 3), 2: (1,), 4: (900, 100), 5: (25, 6)}
    rows = [blobs(size, 8, c) for c, size in sizes.items()]
    labels = torch.cat([torch.full((len(r),), c) for c, r in zip(sizes, rows, strict=True)])
    features = torch.cat(rows).float()
    found = clusters_of(features, labels, torch.arange(len(labels)), 7)
    assert found.classes.tolist() == [0, 4, 5]
    assert found.sizes.tolist() == [[200, 30], [900, 100], [25, 6]]
    small = (labels == 1) | (labels == 2)
    assert torch.equal(found.slot == -1, small)
    assert torch.equal(found.cluster == -1, small)
    assert (found.silhouettes > 0.5).all()
    assert torch.equal(found.squared.argmin(dim=1)[~small], found.cluster[~small])
    torch.testing.assert_close(found.shares.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_no_class_is_large_enough() -> None:
    found = clusters_of(torch.randn(6, 8), torch.arange(6) % 3, torch.arange(6), 3)
    assert found.classes.tolist() == []
    assert (found.cluster == -1).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_storage_order_does_not_matter(whiten: bool) -> None:
    g = generator(3)
    features = torch.randn(300, 8, generator=g)  # no structure: where restarts and rounding would show
    labels, ids = torch.randint(0, 3, (300,), generator=g), torch.randperm(300, generator=g) * 7
    order = torch.randperm(300, generator=g)
    one = clusters_of(features, labels, ids, 3, whiten=whiten, silhouette_samples=50)
    other = clusters_of(features[order], labels[order], ids[order], 3, whiten=whiten, silhouette_samples=50)
    assert torch.equal(one.cluster[order], other.cluster)
    assert torch.equal(one.squared[order], other.squared)
    assert torch.equal(one.silhouettes, other.silhouettes)


def test_whitening_ignores_directions_without_variance() -> None:
    features = torch.zeros(60, 6)
    features[:, 0] = torch.randn(60, generator=generator(4))
    found = clusters_of(features, torch.zeros(60, dtype=torch.int64), torch.arange(60), 1, whiten=True)
    assert found.squared.isfinite().all()
    assert found.sizes.min() > 0


def test_silhouette_of_a_sample_is_near_that_of_the_whole() -> None:
    rows, labels = blobs((1500, 500), 6, 0).float(), torch.zeros(2000, dtype=torch.int64)
    exact = clusters_of(rows, labels, torch.arange(2000), 1)
    sampled = clusters_of(rows, labels, torch.arange(2000), 1, silhouette_samples=400)
    assert torch.equal(exact.cluster, sampled.cluster)
    assert float(sampled.silhouettes) == pytest.approx(float(exact.silhouettes), abs=0.03)
    assert float(sampled.silhouettes) != float(exact.silhouettes)


def test_content_keys(toy_images: Callable[..., object]) -> None:
    images = toy_images(50, 2).images  # type: ignore[attr-defined]
    keys = content_keys(images)
    assert len(keys.unique()) == 50
    assert torch.equal(content_keys(images[[3, 3, 7]]), keys[[3, 3, 7]])
    changed = images.clone()
    changed[:, 0, 0, 0] ^= 1
    assert not (content_keys(changed) == keys).any()
    assert content_keys(images[:0]).shape == (0,)


def test_mix64_is_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 0 and 1234567: the mix of the seed plus multiples of the increment.
    expected = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    for seed, value in expected.items():
        assert int(np.uint64(int(mix64(torch.tensor(seed))) & (2**64 - 1))) == value
