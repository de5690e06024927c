"""``bbfast analyze`` on a stored attack and a stored defense: places, files, exit statuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from bbfast.analysis import Numbers
from bbfast.analysis.tools.network_structure import NetworkStructure
from bbfast.cli.app import app
from bbfast.errors import DataRequirementError


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="bbfast")


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


NUMBERS, FIGURES = {"meta.json", "numbers.npz", "table.csv"}, {"figure.png", "figure.pdf"}
TOOL = "network_structure"
"""Looks at weights alone."""


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not trained: what the tools say of it does not matter here."""
    store = tmp_path_factory.mktemp("runs")
    quick = ("--dataset", "digits", "--model", "small_cnn", "--preset", "quick", "--epochs", 0)
    return Path(_json("attack", "badnets", *quick, "--out", store)["folder"])


@pytest.fixture(scope="module")
def defense(attack: Path) -> Path:
    return Path(_json("defend", "clp", "--attack", attack)["folder"])


def test_default_place_json_and_what_is_printed(attack: Path) -> None:
    found = _json("analyze", TOOL, "--attack", attack)
    place = attack.parent / "analysis" / attack.name / TOOL
    assert found["tool"] == TOOL and found["seconds"] > 0 and found["summary"]["parameters"] > 1000
    assert (found["figure"], found["data"]) == (str(place / "figure.png"), str(place / "numbers.npz"))
    assert _names(place) == NUMBERS | FIGURES and Numbers.load(place).meta["result"] == attack.name
    shown = _run("analyze", TOOL, "--attack", attack, "--no-figures")
    assert f"parameters: {found['summary']['parameters']}" in shown.stdout
    assert shown.stdout.splitlines()[-1] == str(place / "numbers.npz")


def test_numbers_and_figure_are_replaced_as_a_set(attack: Path, tmp_path: Path) -> None:
    """An old figure beside new numbers would be shown with them; files of others stay."""
    (tmp_path / "notes.txt").write_text("mine")
    assert _json("analyze", TOOL, "--attack", attack, "--out", tmp_path)["figure"] is not None
    assert _names(tmp_path) == NUMBERS | FIGURES | {"notes.txt"}
    assert _json("analyze", TOOL, "--attack", attack, "--out", tmp_path, "--no-figures")["figure"] is None
    assert _names(tmp_path) == NUMBERS | {"notes.txt"}


def test_a_drawing_that_fails_leaves_the_new_numbers_and_no_figure(
    attack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn(Figure):
        def savefig(self, path: Any, **more: Any) -> None:
            Path(path).write_bytes(b"half")
            if Path(path).suffix == ".pdf":
                raise OSError("no more paper")

    for name in NUMBERS | FIGURES:
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(NetworkStructure, "draw", staticmethod(lambda numbers: Torn()))
    result = _run("analyze", TOOL, "--attack", attack, "--out", tmp_path)
    assert result.exit_code == 1 and result.stderr == "error: no more paper\n"
    assert _names(tmp_path) == NUMBERS and Numbers.load(tmp_path).meta["tool"] == TOOL


def test_other_settings_have_a_place_of_their_own(attack: Path) -> None:
    places = [
        Path(_json("analyze", "metrics", "--attack", attack, "--no-figures", *flags)["data"]).parent
        for flags in ((), ("--set", "seed=0"), ("--set", "seed=1"), ("--set", "seed=2"), ("--set", "seed=1"))
    ]
    plain, same, one, two, again = places
    assert plain == same == attack.parent / "analysis" / attack.name / "metrics", "defaults, written out or not"
    assert one == again and len({plain, one, two}) == 3 and one.name.startswith("metrics-")
    assert [Numbers.load(place).meta["options"]["seed"] for place in (plain, one, two)] == [0, 1, 2]


def test_a_defenses_model_beside_the_defense(attack: Path, defense: Path) -> None:
    found = _json("analyze", TOOL, "--attack", attack, "--defense", defense, "--no-figures")
    assert Path(found["data"]).parent == defense.parent / "analysis" / defense.name / TOOL
    meta = Numbers.load(Path(found["data"]).parent).meta
    assert meta["caption"].split(", ")[-2] == "clp" and meta["result"] == defense.name


def test_several_tools(attack: Path, tmp_path: Path) -> None:
    shown = _run("analyze", f"{TOOL},metrics", "--attack", attack, "--no-figures", "--set", "metrics.bins=4")
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert shown.exit_code == 0 and [(line[0], line[2]) for line in lines] == [(TOOL, "s"), ("metrics", "s")]
    folders = [Path(line[3]) for line in lines]
    assert folders[0] == attack.parent / "analysis" / attack.name / TOOL
    assert folders[1].parent == folders[0].parent and folders[1].name.startswith("metrics-")
    assert Numbers.load(folders[1]).meta["options"]["bins"] == 4
    _run("analyze", f"{TOOL},metrics", "--attack", attack, "--no-figures", "--out", tmp_path)
    assert _names(tmp_path) == {TOOL, "metrics"} and _names(tmp_path / TOOL) == NUMBERS


def test_side_by_side(attack: Path, defense: Path, tmp_path: Path) -> None:
    flags = ("--attack", attack, "--compare", defense)
    found = json.loads(_run("analyze", TOOL, *flags, "--no-figures", "--json").stdout)
    assert [one["run"] for one in found] == [attack.name, defense.name, None]
    home = attack.parent / "analysis"
    assert Path(found[1]["data"]).parent == home / defense.name / TOOL
    place = Path(found[2]["data"]).parent
    assert place.parent == home / attack.name and place.name.startswith(f"compare-{TOOL}-")
    back = Numbers.load(place)
    assert len(back.summary["parameters"]) == 2 and _names(place) == NUMBERS
    assert [part["result"] for part in back.meta["compared"]] == [attack.name, defense.name]
    shown = _run("analyze", TOOL, *flags, "--compare", attack, "--no-figures", "--out", tmp_path)
    assert shown.exit_code == 0 and shown.stdout.splitlines()[-1].split("  ")[-1] == str(tmp_path / "compare" / TOOL)
    assert _names(tmp_path) == {attack.name, defense.name, "compare"}
    assert len(Numbers.load(tmp_path / "compare" / TOOL).meta["compared"]) == 3
    quick = ("--dataset", "digits", "--model", "small_cnn", "--preset", "quick", "--epochs", 0)
    other = _json("attack", "badnets", *quick, "--ratio", 0.05, "--out", tmp_path / "runs")["folder"]
    strange = _run("analyze", TOOL, "--attack", other, "--compare", defense, "--out", tmp_path / "new")
    assert strange.exit_code == 1 and "clp was run on another attack" in strange.stderr
    assert not (tmp_path / "new").exists()
    missing = _run("analyze", TOOL, "--attack", attack, "--compare", tmp_path / "none")
    assert missing.exit_code == 1 and "none" in missing.stderr


def test_quick_skips_goes_on_and_fails_at_the_end(
    attack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Empty(DataRequirementError):
        pass

    def refuse(error: Exception) -> Any:
        def check(*_: Any) -> None:
            raise error

        return check

    monkeypatch.setattr("bbfast.analysis.several.available", lambda: ["feature_map", "metrics", TOOL, "tsne"])
    monkeypatch.setattr("bbfast.analysis.tools.feature_map.FeatureMap.check", refuse(Empty("there is nothing")))
    flags = ("analyze", "quick", "--attack", attack, "--no-figures", "--out", tmp_path)
    found = _run(*flags, "--json")
    said = json.loads(found.stdout)
    assert found.exit_code == 0 and [(one["tool"], one["status"]) for one in said] == [
        ("feature_map", "skipped"),
        ("metrics", "done"),
        (TOOL, "done"),
    ]
    assert said[0]["why"] == "there is nothing" and said[1]["data"] == str(tmp_path / "metrics" / "numbers.npz")
    monkeypatch.setattr("bbfast.analysis.tools.metrics.Metrics.check", refuse(RuntimeError("a bug")))
    failed = _run(*flags)
    assert failed.exit_code == 1 and "1 of 3 tools failed: metrics" in failed.stderr
    words = [" ".join(line.split()) for line in failed.stdout.splitlines()]
    assert words[:2] == ["feature_map skipped: there is nothing", "metrics failed: RuntimeError: a bug"]
    assert words[2].startswith(TOOL)
    by_name = _run("analyze", f"{TOOL},feature_map", "--attack", attack, "--no-figures", "--out", tmp_path / "b")
    assert by_name.exit_code == 1 and by_name.stderr == "error: there is nothing\n"
    assert _names(tmp_path / "b") == {TOOL}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("confusion_matrx",), 2, "unknown analysis tool 'confusion_matrx'; did you mean 'confusion_matrix'"),
        (("metrics", "--set", "sede=1"), 2, "unknown setting 'sede'; did you mean seed"),
        (("metrics", "--set", "seed=-1"), 2, "seed: "),
        (("metrics", "--device", "toaster"), 2, "toaster"),
        (("metrics,confusion_matrx",), 2, "did you mean 'confusion_matrix'"),
        (("metrics,tsne", "--set", "seed=1"), 2, "--set for several takes NAME.KEY=VALUE, got 'seed'"),
        (("quick", "--set", "tsne.seed=1"), 2, "settings of tsne, which is not among the tools"),
        (
            ("grad_cam", "--set", "layer=layer9"),
            1,
            "unknown layer 'layer9'; did you mean one of the closest",
        ),
    ],
)
def test_wrong_usage_is_refused_before_work(
    arguments: tuple[str, ...], status: int, message: str, attack: Path, tmp_path: Path
) -> None:
    result = _run("analyze", *arguments, "--attack", attack, "--out", tmp_path / "out")
    assert result.exit_code == status and message in result.stderr and result.stdout == "", result.stderr
    assert not (tmp_path / "out").exists()


def test_results_that_are_not_there(attack: Path, tmp_path: Path) -> None:
    for flags in (("--attack", tmp_path / "none"), ("--attack", attack, "--defense", tmp_path / "none")):
        result = _run("analyze", TOOL, *flags)
        assert result.exit_code == 1 and f"{tmp_path / 'none'}" in result.stderr
    assert _run("analyze", TOOL).exit_code == 2


def test_a_missing_extra_says_what_to_install(attack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    result = _run("analyze", "umap", "--attack", attack, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "pip install 'bbfast[analysis]'" in result.stderr
    assert not (tmp_path / "out").exists()
