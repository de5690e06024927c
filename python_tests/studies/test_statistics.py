"""Statistics against counts by hand and independent formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bbfast.studies.looks import colours_apart, look
from bbfast.studies.statistics import compare_pairs, holm, kendall, nanmean, spearman, two_way


def test_kendall_is_the_share_of_pairs_in_the_same_order() -> None:
    rows = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    found = kendall(rows)
    for i, j in itertools.product(range(3), repeat=2):
        signs = [
            np.sign(rows[i, a] - rows[i, b]) * np.sign(rows[j, a] - rows[j, b])
            for a, b in itertools.combinations(range(5), 2)
        ]
        assert found[i, j] == pytest.approx(np.mean(signs))
    holes = rows.copy()
    holes[1, 4] = np.nan
    assert kendall(holes)[0, 1] == pytest.approx((5 - 1) / 6)
    assert math.isnan(kendall([[1.0, 1.0], [1.0, 2.0]])[0, 1]) and kendall([[1.0, 2.0]]).tolist() == [[1.0]]


def test_spearman_is_the_correlation_of_ranks() -> None:
    x, y = [1.0, 10.0, 100.0, 1000.0], [0.1, 0.7, 0.6, 0.9]
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(x, [math.nan, 1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert math.isnan(spearman(x, [1.0] * 4)) and math.isnan(spearman(x[:2], y[:2]))


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).shape == (0,)
    found = holm([0.02, math.nan, 0.01])
    assert found[[0, 2]].tolist() == pytest.approx([0.02, 0.02]) and math.isnan(found[1])


def test_pairs_are_compared_by_signed_ranks() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(8)
    gaps = np.array([0.11, 0.22, -0.03, 0.44, 0.55, 0.66, 0.07, 0.08])
    same, holes = base.copy(), np.full(8, np.nan)
    rows = {(row["a"], row["b"]): row for row in compare_pairs({"x": base + gaps, "y": base, "z": same, "w": holes})}
    # The exact test counts the sign patterns whose smaller rank sum is no larger than the one seen.
    ranks = np.argsort(np.argsort(np.abs(gaps))) + 1
    seen = min(ranks[gaps > 0].sum(), ranks[gaps < 0].sum())
    sums = [ranks @ np.array(signs) for signs in itertools.product((0, 1), repeat=8)]
    exact = min(1.0, 2 * np.mean([total <= seen for total in sums]))
    assert rows["x", "y"]["p"] == pytest.approx(exact)
    assert rows["x", "y"]["median_difference"] == pytest.approx(np.median(gaps)) and rows["x", "y"]["n"] == 8
    assert rows["y", "z"]["p"] == 1.0 and rows["y", "z"]["median_difference"] == 0.0
    assert rows["x", "w"]["n"] == 0 and math.isnan(rows["x", "w"]["p_holm"])
    assert rows["x", "y"]["p_holm"] == pytest.approx(3 * exact)  # three pairs have cells in common; x, z ties with it


def test_two_way_is_the_classic_one_when_no_cell_is_missing() -> None:
    y = np.random.default_rng(1).random((3, 4, 2))
    mean, rows, columns = y.mean(), y.mean((1, 2)), y.mean((0, 2))
    ss = [8 * np.square(rows - mean).sum(), 6 * np.square(columns - mean).sum()]
    rest = np.square(y - rows[:, None, None] - columns[None, :, None] + mean).sum()
    found = two_way(y)
    assert [row["term"] for row in found] == ["first", "second", "residual"]
    assert [row["ss"] for row in found] == pytest.approx([*ss, rest])
    assert [row["df"] for row in found] == [2, 3, 24 - 6] and sum(row["share"] for row in found) == pytest.approx(1)
    for row, own, df in zip(found, ss, (2, 3), strict=False):
        assert row["f"] == pytest.approx((own / df) / (rest / 18))
        assert row["p"] == pytest.approx(stats.f.sf(row["f"], df, 18))


def test_two_way_without_all_cells() -> None:
    y = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, math.nan]])  # rows differ by 1, exactly
    first, second, rest = two_way(y)
    assert (
        first["ss"] == pytest.approx(2 * 2 * 0.25) and second["df"] == 2 and rest["ss"] == pytest.approx(0, abs=1e-20)
    )
    assert math.isnan(first["p"])  # nothing is left to test against
    alone = two_way([[1.0, 2.0]])
    assert alone[0]["df"] == 0 and alone[1]["df"] == 1 and math.isnan(alone[1]["f"]) and alone[1]["share"] == 1.0
    assert all(row["ss"] == 0 and math.isnan(row["share"]) for row in two_way(np.full((2, 2), math.nan)))


def test_means_of_what_is_known() -> None:
    found = nanmean([[1.0, math.nan], [3.0, math.nan]], 0)
    assert found[0] == 2.0 and math.isnan(found[1]) and nanmean([[1.0, math.nan], [3.0, 2.0]]) == 2.0


def test_colours_of_defenses() -> None:
    """A defense keeps its colour unless one before it in the figure has the same."""
    assert look("ft")["color"] == look("ft_sam")["color"] and look("ft")["marker"] != look("ft_sam")["marker"]
    apart = colours_apart(["none", "ft", "ft_sam", "nc"])
    assert len(set(apart.values())) == 4 and apart["ft"] == look("ft")["color"]
    assert colours_apart(["ft_sam", "nc"]) == {name: look(name)["color"] for name in ("ft_sam", "nc")}
