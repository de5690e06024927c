from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from bbfast.report.figures import anomaly_bars, loss_curve, progress_curve, rate_curves, score_histogram

HISTORY = [{"epoch": e, "loss": 2.0 / (e + 1), "c_acc": 0.5 + 0.1 * e, "asr": 0.2 * e} for e in range(5)]


def _figures() -> list[str]:
    scores = score_histogram([0.0, 0.1, 0.9, math.nan], [False, False, True, True], 0.5)
    drawn = [loss_curve(HISTORY), rate_curves(HISTORY), anomaly_bars([0.5, 3.2, 0.1], [1], 2.0), scores]
    assert all(drawn)
    return [svg for svg in drawn if svg]


def test_svg_is_one_wellformed_element_that_asks_for_nothing() -> None:
    for svg in _figures():
        root = ET.fromstring(svg.replace("xlink:href", "href"))
        assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
        assert "http" not in svg and "<style" not in svg and "<metadata" not in svg


def test_colours_are_the_pages_own() -> None:
    for svg in _figures():
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a fixed colour would not follow dark mode"
        assert "var(--ink-soft)" in svg


def test_text_stays_text_in_the_pages_font() -> None:
    svg = loss_curve(HISTORY)
    assert svg is not None
    assert ">epoch<" in svg and ">Training loss<" in svg and "DejaVu" not in svg


def test_ids_of_two_figures_differ_and_references_resolve() -> None:
    found = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in _figures()]
    assert all(found) and len(set().union(*found)) == sum(map(len, found))
    for svg, ids in zip(_figures(), found, strict=True):
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {(i, "") for i in ids} | {
            ("", i) for i in ids
        }


def test_same_data_gives_same_drawing() -> None:
    assert _figures() == _figures()


@pytest.mark.parametrize("draw", [loss_curve, rate_curves])
def test_nothing_to_draw_gives_none(draw: object) -> None:
    assert callable(draw)
    assert draw([]) is None
    assert draw([{"epoch": 0.0}]) is None


def test_epochs_without_measurement_are_left_out() -> None:
    history = [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5, "c_acc": 0.9, "asr": 1.0}]
    svg = rate_curves(history)
    assert svg is not None and ">C-Acc<" in svg and ">ASR<" in svg


def test_anomaly_marks_flagged_classes_and_survives_infinite_and_undefined_values() -> None:
    svg = anomaly_bars([0.5, math.inf, math.nan, 0.2], [1], 2.0)
    assert svg is not None
    assert svg.count("var(--orange)") == 1 and ">threshold 2<" in svg
    assert "inf" not in svg and "nan" not in svg
    assert anomaly_bars([], [], 2.0) is None


def test_a_defense_counts_epochs_or_steps() -> None:
    for key, label in (("epoch", ">epoch<"), ("steps", ">step<"), ("round", ">round<")):
        svg = progress_curve([{key: 1, "loss": 1.0}, {key: 2, "loss": 0.5}])
        assert svg is not None and label in svg
    assert progress_curve([]) is None and progress_curve([{"steps": 1, "mask": 0.5}]) is None


def test_scores_of_one_kind_only_or_all_the_same_are_not_drawn() -> None:
    assert score_histogram([0.1, 0.2], [False, False]) is None
    assert score_histogram([0.1, math.nan], [False, True]) is None
    assert score_histogram([0.5, 0.5], [False, True]) is None
    svg = score_histogram([0.1, 0.2, 0.9], [False, False, True], 7.0)
    assert svg is not None and ">clean (2)<" in svg and ">threshold<" not in svg, "a line outside would stretch it"
