from __future__ import annotations

import os
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bbfast.report.figures import anomaly_bars, loss_curve
from bbfast.report.images import png_uri
from bbfast.report.page import Example, Picture, Row, RunPage, render, write

VOID = {"meta", "link", "img", "br", "input", "hr", "use", "path"}


class _Checker(HTMLParser):
    """Collects what a page would load, and whether its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "srcset", "xlink:href", "action", "data") and value:
                self.loads.append(value)
        if tag not in VOID or tag in ("path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _page(**changes: object) -> RunPage:
    image = png_uri(torch.zeros(3, 4, 4, dtype=torch.uint8))
    parts: dict[str, object] = {
        "title": "BadNets on digits",
        "lead": "One attack.",
        "rows": [
            Row("badnets", "BadNets", "attack", {"c_acc": 0.9876, "asr": 1.0, "r_acc": 0.0}, 12.3),
            Row(
                "nc",
                "Neural Cleanse",
                "mitigation",
                {"c_acc": 0.97, "asr": 0.01, "r_acc": 0.9, "der": 0.99, "rir": None},
                8.0,
                True,
            ),
        ],
        "examples": [Example(image, image, "3", "0")],
        "charts": [loss_curve([{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}])],
        "inversion": {
            "title": "T",
            "text": "x",
            "chart": anomaly_bars([1, 3], [1], 2),
            "pictures": [Picture(image, "mask")],
        },
        "settings": {"Attack": {"ratio": 0.1, "classes": (), "alpha": None}},
        "commands": ["bbfast attack badnets"],
        "facts": {"Folder": "runs/demo"},
    }
    return RunPage(**{**parts, **changes})  # type: ignore[arg-type]


def _check(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    assert not checker.open
    return checker


def test_page_is_self_contained_and_wellformed() -> None:
    html = render(_page())
    checker = _check(html)
    assert all(load.startswith(("data:", "#")) for load in checker.loads), checker.loads
    assert not {"script", "iframe", "object"} & set(checker.tags)
    assert (
        "@import" not in html
        and "url(http" not in html
        and "//" not in html.replace("data:image/png;base64,", "").split("<body>")[0]
    )


def test_table_shows_metrics_in_per_cent_and_dashes_for_missing_ones() -> None:
    text = " ".join(_check(render(_page())).text)
    for figure in ("98.76", "100.00", "99.00", "12.3", "8.0 *"):
        assert figure.replace(" ", "") in text.replace(" ", ""), figure
    assert "\N{EN DASH}" in text
    assert "AUROC" not in text and "RIR" not in text, "columns that nobody filled are left out"


def test_both_colour_schemes_are_styled() -> None:
    html = render(_page())
    assert "prefers-color-scheme: dark" in html and 'name="color-scheme" content="light dark"' in html
    for variable in ("--ink-soft", "--line", "--blue", "--orange", "--green"):
        assert html.count(f"{variable}:") == 2, variable


def test_hostile_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"'&"
    page = _page(
        title=evil,
        lead=evil,
        rows=[Row(evil, evil, evil, {"c_acc": 0.5}, 1.0)],
        settings={evil: {evil: evil}},
        commands=[evil],
        facts={evil: evil},
        examples=[Example("data:,", "data:,", evil, evil)],
    )
    checker = _check(render(page))
    assert "script" not in checker.tags
    assert evil in "".join(checker.text)


def test_optional_parts_can_be_absent() -> None:
    html = render(_page(examples=(), charts=(), inversion={}, settings={}, commands=(), facts={}))
    assert _check(html).tags.count("h2") == 1


def test_write_replaces_the_page_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "index.html"
    write(_page(title="first"), path)
    write(_page(title="second"), path)
    assert "<title>second</title>" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = write(_page(title="first"), tmp_path / "index.html")
    with pytest.raises(ValueError, match="format code"):
        write(_page(rows=[Row("x", "x", "x", {"c_acc": "many"}, 1.0)]), path)  # type: ignore[dict-item]
    assert "<title>first</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
