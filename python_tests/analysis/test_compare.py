"""Results side by side: shared axes and colours where they mean the same, a sheet of whole tiles, a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.image import imread

from bbfast import analysis
from bbfast.analysis import Numbers
from bbfast.analysis._tiles import share, tiled
from bbfast.analysis.base import find
from bbfast.analysis.style import DPI, figure
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.errors import ArtifactError, DataRequirementError


def _pair(*, log: bool = False, images: int = 1) -> list[Any]:
    made = []
    for i in range(2):
        with figure(3, 2, "a caption") as one:
            left, right = one.subplots(1, 2)
            left.plot([0, 1 + i], [1, 10 ** (1 + i)])
            if log and i:
                left.set_yscale("log")
            for _ in range(images if i else 1):
                shown = right.imshow(np.arange(4.0).reshape(2, 2) + 5 * i, cmap="Blues")
            one.colorbar(shown, ax=right)
        made.append(one)
    return made


def test_limits_and_colours_span_both() -> None:
    figures = _pair()
    assert share(figures)
    (left, right, bar), (left_2, right_2, bar_2) = (made.axes for made in figures)
    assert left.get_xlim() == left_2.get_xlim() and left.get_ylim() == left_2.get_ylim()
    assert left.get_xlim()[0] < 0 and left.get_xlim()[1] > 2 and left.get_ylim()[1] > 100
    assert right.images[0].get_clim() == right_2.images[0].get_clim() == (0, 8)
    assert bar.get_ylim() == bar_2.get_ylim() == (0, 8), "bars follow their images"
    assert right.get_ylim() == right_2.get_ylim() == (1.5, -0.5), "the first row stays on top"


def test_what_is_not_of_a_kind_is_left_alone() -> None:
    figures = _pair(log=True, images=2)
    before = [made.axes[0].get_ylim() for made in figures]
    figures[1].axes[1].images[0].set_norm(LogNorm(1, 9))
    assert share(figures)
    assert [made.axes[0].get_ylim() for made in figures] == before
    assert figures[0].axes[0].get_xlim() == figures[1].axes[0].get_xlim(), "the other axis is of a kind"
    assert figures[0].axes[1].images[0].get_clim() == (0, 3)
    for i, made in enumerate(figures):
        made.axes[0].set_xscale("symlog", linthresh=1 + i)
        made.axes[0].set_xlim(-9 - i, 9)
    assert share(figures) and [made.axes[0].get_xlim()[0] for made in figures] == [-9, -10], "other thresholds"
    with figure(3, 2) as lone:
        lone.subplots().plot([0, 99])
    before_x = figures[0].axes[0].get_xlim()
    assert not share([figures[0], lone]) and figures[0].axes[0].get_xlim() == before_x


def test_tiles_are_whole_and_sharp(tmp_path: Path) -> None:
    """Each tile stands on the sheet pixel by pixel as it is drawn alone."""
    sheet = tiled(_pair(), ["a caption", "another, much longer name of a tile, in two lines"], "Title", shared=False)
    sheet.savefig(tmp_path / "sheet.png")
    whole = imread(tmp_path / "sheet.png")[..., :3]
    assert whole.shape[1] >= 2 * 3 * DPI or whole.shape[0] >= 2 * 2 * DPI
    alone = _pair()[1]
    alone.savefig(tmp_path / "alone.png")
    tile = imread(tmp_path / "alone.png")[..., :3]
    boxes = [axes.get_window_extent() for axes in sheet.axes]
    box = boxes[1]
    top = whole.shape[0] - round(box.y1)
    left = round(box.x0)
    found = whole[top : top + tile.shape[0], left : left + tile.shape[1]]
    np.testing.assert_allclose(found, tile, atol=1 / 255)
    assert not boxes[0].overlaps(boxes[1])


def test_a_defense_beside_its_attack(badnets: AttackResult, tuned: DefenseResult, tmp_path: Path) -> None:
    alone = [
        analysis.run("confusion_matrix", badnets, defense, tmp_path / name, device="cpu", figures=False)
        for name, defense in (("attack", None), ("ft", tuned))
    ]
    found = analysis.compare([alone[0], tmp_path / "ft"], tmp_path / "both")
    assert found.figure is not None and imread(found.figure).std() > 0.01
    assert (tmp_path / "both" / "figure.pdf").stat().st_size > 1000
    with (tmp_path / "both" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    captions = [one.numbers.meta["caption"] for one in alone]
    assert list(rows[0]) == ["figure", *captions] and captions[1].split(", ")[-2] == "ft"
    by_name = {row["figure"]: [float(row[caption]) for caption in captions] for row in rows}
    assert by_name["asr"] == [one.summary["asr"] for one in alone] and "most_confused" not in by_name
    back = Numbers.load(tmp_path / "both")
    assert back.meta["tool"] == "confusion_matrix" and back.meta["comparable"] and len(back.meta["compared"]) == 2
    place = back.arrays["figures"].tolist().index("asr")
    assert back.arrays["values"][place].tolist() == by_name["asr"]


def test_the_same_caption_twice_and_figures_that_one_lacks(tmp_path: Path) -> None:
    for name, summary in (("a", {"x": 1.0, "word": "one"}), ("b", {"x": 2.0, "y": None, "word": "two"})):
        meta = {"tool": "metrics", "options": {}, "caption": "the same", "class_names": [name]}
        Numbers({"z": np.zeros(1)}, (), summary, meta).save(tmp_path / name)
    found = analysis.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", figures=False)
    assert found.figure is None and found.summary["x"] == {"the same": 1.0, "the same (2)": 2.0}
    assert found.numbers.arrays["figures"].tolist() == ["x", "y"] and np.isnan(found.numbers.arrays["values"][1]).all()
    assert not found.numbers.meta["comparable"], "of other classes"


def test_a_scale_that_is_no_axis(badnets: AttackResult, tuned: DefenseResult, tmp_path: Path) -> None:
    """The differences of feature maps are colours of a picture; their bar must say the same for both."""
    tool = find("feature_map")
    parts = [
        analysis.run("feature_map", badnets, one, tmp_path, device="cpu", figures=False, channels=4).numbers
        for one in (None, tuned)
    ]
    most = [float(np.abs(part.arrays["bd"] - part.arrays["clean"].astype(float)).max()) for part in parts]
    more = tool.common(parts)
    bars = []
    for part in parts:
        for meta in (part.meta, {**part.meta, **more}):
            made = tool.draw(Numbers(part.arrays, (), part.summary, meta))
            bars.append(made.axes[-1].get_ylim()[1])
    assert more["limit"] == pytest.approx(max(most)) and most[0] != most[1]
    assert bars == pytest.approx([most[0], max(most), most[1], max(most)])


def test_spectra_are_linear_around_zero_as_far(tmp_path: Path) -> None:
    parts = []
    for widest in (5.0, 300.0):
        arrays = {f"{key}_{side}": np.array([[1.0, widest]]) for key in ("ritz", "w") for side in ("clean", "bd")}
        arrays |= {f"top_{side}": np.array([widest]) for side in ("clean", "bd")}
        summary = {"lambda_max_clean": widest, "lambda_max_bd": widest}
        parts.append(Numbers(arrays, (), summary, {"caption": "", "n": [1, 1], "probes": 1}))
    tool = find("hessian")

    def thresholds(more: dict[str, Any]) -> list[float]:
        drawn = [tool.draw(Numbers(part.arrays, (), part.summary, {**part.meta, **more})) for part in parts]
        return [made.axes[0].xaxis.get_transform().linthresh for made in drawn]  # type: ignore[attr-defined]

    assert thresholds({}) == pytest.approx([0.01, 1.0]) and thresholds(tool.common(parts)) == pytest.approx([1.0, 1.0])


def test_embeddings_have_no_common_axes() -> None:
    apart = {name for name in analysis.available() if not find(name).shared_axes}
    assert apart == {"tsne", "umap"}


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    for name, tool, options in (("a", "metrics", {"bins": 1}), ("b", "tsne", {}), ("c", "metrics", {"bins": 2})):
        Numbers({"z": np.zeros(1)}, (), {}, {"tool": tool, "options": options}).save(tmp_path / name)
    out = tmp_path / "out"
    for names, said in ((("a",), "two analyses at least, got 1"), ("ab", "of metrics, tsne"), ("ac", "settings: bins")):
        with pytest.raises(DataRequirementError, match=said):
            analysis.compare([tmp_path / name for name in names], out)
    with pytest.raises(ArtifactError, match="cannot read the numbers in"):
        analysis.compare([tmp_path / "a", tmp_path / "none"], out)
    assert not out.exists()
