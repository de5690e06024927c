"""The main job, end to end, as a user starts it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DEFENSES = ["nc", "fp", "ft", "ac", "strip"]


def _demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bbfast.cli", "demo", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(out: Path) -> dict[str, Any]:
    value = json.loads(_demo(out, "--json").stdout)
    assert isinstance(value, dict)
    return value


def test_figures_meet_the_issue(first: dict[str, Any]) -> None:
    attack, nc = first["attack"], first["defenses"]["nc"]
    assert attack["c_acc"] >= 0.96 and attack["asr"] >= 0.95
    assert nc["asr"] <= 0.10 and attack["c_acc"] - nc["c_acc"] <= 0.03


def test_json_has_the_agreed_shape(first: dict[str, Any], out: Path) -> None:
    assert {"attack", "defenses", "seconds", "out"} <= first.keys()
    assert {"c_acc", "asr", "r_acc"} <= first["attack"].keys()
    assert list(first["defenses"]) == DEFENSES
    for name in ("nc", "fp", "ft"):
        assert {"c_acc", "asr", "r_acc", "der", "rir", "seconds"} <= first["defenses"][name].keys()
    for name in ("ac", "strip"):
        assert {"tpr", "fpr", "auroc", "seconds"} <= first["defenses"][name].keys()
    figures = [v for d in (first["attack"], *first["defenses"].values()) for k, v in d.items() if k != "seconds"]
    assert all(0 <= value <= 1 for value in figures)
    assert first["out"] == str(out) and first["attack"]["reused"] is False


def test_page_is_whole_and_asks_for_nothing(first: dict[str, Any], out: Path) -> None:
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "<script" not in html
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', html))
    for text in (f"{100 * first['attack']['c_acc']:.2f}", f"{100 * first['defenses']['nc']['der']:.2f}", str(out)):
        assert text in html
    assert html.count('class="chart"') == 3
    images = [
        Image.open(BytesIO(base64.b64decode(b))) for b in re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    ]
    assert len(images) == 15 and all(image.size == (32, 32) for image in images)
    clean, poisoned = images[0].convert("RGB"), images[1].convert("RGB")
    assert clean.tobytes() != poisoned.tobytes(), "the second of a pair carries the trigger"


def test_again_is_quick_and_the_same(first: dict[str, Any], out: Path) -> None:
    done = _demo(out)
    assert done.stderr.count("not run again") == 6
    for text in ("badnets", *DEFENSES, "C-Acc", "AUROC", f"{100 * first['attack']['asr']:.2f}", str(out)):
        assert text in done.stdout
    again = json.loads(_demo(out, "--json").stdout)
    assert again["attack"] == {**first["attack"], "reused": True}
    assert again["defenses"] == {k: {**v, "reused": True} for k, v in first["defenses"].items()}


def test_the_pages_commands_find_the_same_results(first: dict[str, Any], out: Path) -> None:
    html = (out / "index.html").read_text(encoding="utf-8")
    block = re.search(r"<pre[^>]*><code>(.*?)</code></pre>", html, re.S)
    assert block is not None
    lines = [line.split() for line in block[1].strip().splitlines()]
    assert [line[:3] for line in lines[1:]] == [
        ["bbfast", "attack", "badnets"],
        *(["bbfast", "defend", n] for n in DEFENSES),
    ]
    for line in lines[1:3]:
        command = [sys.executable, "-m", "bbfast.cli", *line[1:], "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert json.loads(done.stdout)["reused"] is True, done.stderr
