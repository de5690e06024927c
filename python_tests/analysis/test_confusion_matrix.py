"""The confusion matrix: counts, shares, what the trigger turns, and classes without images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from bbfast import analysis, evaluate
from bbfast.analysis import Subject
from bbfast.analysis.base import find
from bbfast.analysis.tools.confusion_matrix import confusion
from bbfast.attacks import AttackResult

CPU = torch.device("cpu")


def test_by_hand() -> None:
    found = confusion(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]


def test_counts_and_shares(strong: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("confusion_matrix", strong, out=tmp_path, device="cpu", figures=False)
    clean, bad = found.numbers.arrays["clean"], found.numbers.arrays["bd"]
    assert clean.dtype == bad.dtype == np.int64
    assert (clean.sum(), bad.sum()) == (len(strong.test), len(strong.backdoor_test))
    said = Subject(strong, None, CPU).logits(strong.test.images).argmax(1)
    assert (clean == confusion_matrix(strong.test.labels, said, labels=range(10))).all()
    rates = evaluate(strong.model, strong.test, strong.backdoor_test, device="cpu")
    assert found.summary["accuracy"] == pytest.approx(rates["c_acc"])
    assert found.summary["asr"] == pytest.approx(rates["asr"])
    table = found.numbers.table
    recall, precision, turned = (np.array([row[key] for row in table]) for key in ("recall", "precision", "to_target"))
    np.testing.assert_allclose(recall, recall_score(strong.test.labels, said, average=None))
    np.testing.assert_allclose(precision, precision_score(strong.test.labels, said, average=None))
    # All go to one target, class 0, which has no triggered images itself.
    assert np.isnan(turned[0]) and (turned[1:] == bad[1:, 0] / bad[1:].sum(1)).all()
    for key, counts in (("clean", clean), ("bd", bad[1:])):
        shares = np.array([[row[f"{key}_{j}"] for j in range(10)] for row in table])[-len(counts) :]
        np.testing.assert_allclose(shares, counts / counts.sum(1, keepdims=True))
    assert np.isnan([table[0][f"bd_{j}"] for j in range(10)]).all()


def test_balanced_classes(strong: AttackResult, tmp_path: Path) -> None:
    """The mean of the diagonal's shares is then the accuracy."""
    test = strong.test
    least = int(torch.bincount(test.labels).min())
    rows = torch.cat([(test.labels == c).nonzero().flatten()[:least] for c in range(10)]).sort().values
    kept = test.subset(rows)
    bad = strong.backdoor_test.subset(torch.isin(strong.backdoor_test.ids, kept.ids).nonzero().flatten())
    even = dataclasses.replace(strong, test=kept, backdoor_test=bad)
    found = analysis.run("confusion_matrix", even, out=tmp_path, device="cpu", figures=False)
    diagonal = [row[f"clean_{i}"] for i, row in enumerate(found.numbers.table)]
    assert least > 1 and found.summary["accuracy"] == pytest.approx(float(np.mean(diagonal)))


def test_a_class_without_images_is_grey(strong: AttackResult, tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    numbers = analysis.run("confusion_matrix", strong, out=tmp_path, device="cpu", figures=False).numbers
    figure = find("confusion_matrix").draw(numbers)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, grey = np.asarray(canvas.buffer_rgba())[..., :3], 0xD0
    for axis, empty in zip(figure.axes[:2], (False, True), strict=True):
        left, right, middle = (axis.transData.transform(at) for at in ((-0.4, 0), (9.4, 0), (3, 3.3)))
        row = pixels[-int(left[1]) - 1, int(left[0]) : int(right[0])]
        assert bool((row == grey).all()) is empty
        assert not (pixels[-int(middle[1]) - 1, int(middle[0])] == grey).all()
