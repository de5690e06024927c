"""Embeddings: planted clusters, statistics against scikit-learn, and what must not matter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from bbfast.analysis import Subject, View
from bbfast.analysis._embedding import features, principal, sample, statistics
from bbfast.analysis.tools.tsne import TSNE
from bbfast.attacks import AttackResult
from bbfast.errors import UnknownNameError

CPU = torch.device("cpu")


def planted(gap: float = 20.0, n: int = 150) -> tuple[np.ndarray, View]:
    """Clean samples of two classes, and poisoned ones ``gap`` away from them; target class 0."""
    values = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    poisoned = torch.arange(n) >= n - 50
    values[poisoned.numpy(), 0] += gap
    labels = torch.arange(n) % 2
    return values, View(torch.zeros(n, 1, 1, 1), labels, labels.where(~poisoned, 0), poisoned, torch.arange(n))


def test_planted_clusters() -> None:
    values, view = planted()
    apart = statistics(values, values[:, :2], view)
    assert apart["purity"] > 0.95 and apart["silhouette"] > 0.7 and apart["silhouette_2d"] > 0.8
    mixed = statistics(*(planted(0.0)[0][:, :width] for width in (8, 2)), view)
    assert abs(mixed["purity"] - mixed["purity_baseline"]) < 0.1 and abs(mixed["silhouette"]) < 0.1
    assert apart["separation"] > 10 * mixed["separation"] > 0
    order = torch.randperm(len(view), generator=torch.Generator().manual_seed(0))
    again = statistics(values[order], values[order][:, :2], view.take(order))
    assert again == pytest.approx(apart)


def test_against_scikit_learn() -> None:
    values, view = planted(1.0)
    found = statistics(values, values[:, :2], view)
    bad, target = view.poisoned.numpy(), (~view.poisoned & (view.labels == 0)).numpy()
    near = NearestNeighbors(n_neighbors=21).fit(values).kneighbors(values[bad], return_distance=False)[:, 1:]
    assert found["purity"] == pytest.approx(bad[near].mean())
    some = bad | target
    assert found["silhouette"] == pytest.approx(silhouette_samples(values[some], bad[some])[bad[some]].mean(), rel=1e-4)
    centre = values[bad].mean(0)
    clean = [values[(~view.poisoned & (view.labels == c)).numpy()] for c in (0, 1)]
    spread = np.mean([np.linalg.norm(own - own.mean(0), axis=1).mean() for own in clean])
    assert found["distance_to_1"] == pytest.approx(np.linalg.norm(centre - clean[1].mean(0)) / spread, rel=1e-4)
    gap = np.linalg.norm(centre - clean[0].mean(0))
    traces = (np.trace(np.cov(values[bad].T)) + np.trace(np.cov(clean[0].T))) / 8
    assert found["separation"] == pytest.approx(gap / np.sqrt(traces), rel=1e-4)


def test_no_poisoned_samples() -> None:
    values, view = planted()
    clean = dataclasses.replace(view, poisoned=torch.zeros(len(view), dtype=torch.bool), given=view.labels)
    found = statistics(values, values[:, :2], clean)
    assert np.isnan(found["purity"]) and found["purity_baseline"] == 0 and "distance_to_0" not in found


def test_features_do_not_depend_on_batches(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    images = subject.view("mixed", 300).images
    whole = features(subject, "last_conv", images)
    assert whole.shape == (200, 64 * 4 * 4)
    torch.testing.assert_close(features(subject, "last_conv", images[:3]), whole[:3], rtol=1e-4, atol=1e-5)
    parts = principal(whole, 50, 0)
    assert parts.shape == (200, 50) and parts[:, 0].var() == parts.var(0).max()
    with pytest.raises(UnknownNameError, match="unknown layer 'lost_conv'"):
        TSNE(layer="lost_conv").check(subject)


def test_classes_are_chosen_and_poison_kept(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    view = sample(subject, "bd_train", 400, 3)
    assert 0 in view.labels[~view.poisoned].tolist() and view.labels[~view.poisoned].unique().numel() == 3
    assert int(view.poisoned.sum()) == int(badnets.poisoned.sum()) and len(view) == 400
    assert torch.equal(view.ids, sample(Subject(badnets, None, CPU), "bd_train", 400, 3).ids)


def test_a_strong_backdoor_stands_apart(strong: AttackResult) -> None:
    numbers = TSNE().measure(Subject(strong, None, CPU))
    assert numbers.summary["purity"] > 5 * numbers.summary["purity_baseline"]
    assert numbers.arrays["xy"].shape == (200, 2) and numbers.arrays["xy"].dtype == np.float32
    assert numbers.arrays["poison"].sum() == 20 and {"name", "value"} == set(numbers.table[0])
