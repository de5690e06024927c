"""The confusion matrix: counts, shares, what the trigger turns, and classes without images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from bbfast import analysis, evaluate
from bbfast.analysis import Numbers, Subject
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
    taken = found.numbers.arrays["to_target"]
    assert taken.dtype == np.int64 and taken.tolist() == bad[:, 0].tolist()
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


def test_the_column_of_what_goes_to_the_target() -> None:
    """Of several targets each class's own counts, not a column of the matrix."""
    bad = np.array([[1, 3, 0], [0, 0, 0], [2, 1, 1]])
    arrays = {"clean": np.eye(3, dtype=int), "bd": bad, "to_target": np.array([3, 0, 2])}
    numbers = Numbers(arrays, (), {}, {"caption": "all to the next", "class_names": ["a", "b", "c"]})
    axis = find("confusion_matrix").draw(numbers).axes[1]
    matrix, beside = (image.get_array() for image in axis.images)
    assert beside is not None and beside[:, 0].tolist() == [0.75, None, 0.5] and matrix is not None
    assert matrix.tolist() == [[0.25, 0.75, 0], [None] * 3, [0.5, 0.25, 0.25]]
    said = [text.get_text() for text in axis.texts]
    assert said == [".25", ".75", ".50", ".25", ".25", ".75", ".50", "to\ntarget"]


def test_many_classes_are_sorted_by_what_the_trigger_does() -> None:
    k = 24
    taken = np.arange(k) * 7 % k
    bad = np.diag(k - taken)
    bad[:, 5] += taken
    bad[5], taken[5] = 0, 0
    clean = np.diag(np.arange(1, k + 1))
    clean[:, 5] += 1
    names = [f"class {i}" for i in range(k)]
    numbers = Numbers({"clean": clean, "bd": bad, "to_target": taken}, (), {}, {"caption": "", "class_names": names})
    left, right = find("confusion_matrix").draw(numbers).axes[:2]
    order = sorted(range(k), key=lambda i: -2.0 if i == 5 else -taken[i] / k)
    beside, sides = right.images[1].get_array(), (left.images[0].get_array(), right.images[0].get_array())
    assert beside is not None and beside[0, 0] is np.ma.masked
    assert beside[1:, 0].tolist() == [taken[i] / k for i in order[1:]]
    for counts, shown in zip((clean, bad), sides, strict=True):
        assert shown is not None
        wanted = counts[np.ix_(order, order)][1:]
        np.testing.assert_allclose(shown[1:], wanted / wanted.sum(1, keepdims=True))
    assert not left.texts and len(right.texts) == 1 and not len(right.get_xticks())
    assert left.get_ylabel() == "true class, by share taken for the target"


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
