"""What holds for every study, and what is refused; one real small run through the command."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bbfast import studies
from bbfast.analysis import Numbers
from bbfast.bench.outcomes import Book, Outcome
from bbfast.cli.app import app
from bbfast.errors import ConfigError, DataRequirementError, UnknownNameError
from bbfast.store import Store
from bbfast.studies.base import find
from bbfast.studies.run import command, plans_of

NAMES = studies.available()


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["study", *map(str, arguments)], prog_name="bbfast")


@pytest.mark.parametrize("name", NAMES)
def test_card_config_and_grids(name: str) -> None:
    facts = studies.info(name)
    assert json.loads(json.dumps(facts)) == facts and facts["name"] == name
    assert facts["question"].endswith("?") and facts["reading"].endswith(".") and find(name).__doc__
    study = studies.create(name)
    names = [grid.name for grid in study.grids()]
    assert len(set(names)) == len(names)
    assert command(study, Path("runs"), Path("my out")) == f"bbfast study {name} --store runs --out 'my out'"
    with pytest.raises(ConfigError, match=f"study {name}: unknown setting 'sead'"):
        studies.create(name, sead=1)
    with pytest.raises(ConfigError, match="seeds: Tuple should have at least 1 item"):
        studies.create(name, seeds=[])


def test_the_command_makes_the_same_study() -> None:
    study = studies.create("overview", attacks=["badnets", {"name": "blended", "set": {"alpha": 0.3}}], ratio=0.05)
    line = command(study, Path("runs"), Path("out"))
    assert """--set 'attacks=["badnets", {"name": "blended", "set": {"alpha": 0.3}}]' --set ratio=0.05""" in line


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"attacks": ["badnts"]}, UnknownNameError, "unknown attack 'badnts'; did you mean 'badnets'"),
        ({"defenses": ["fft"]}, UnknownNameError, "unknown defense 'fft'; did you mean"),
        ({"model": "small_cn"}, UnknownNameError, "small_cnn"),
        ({"dataset": "digit"}, UnknownNameError, "digits"),
        ({"recipe": {"epoch": 3}}, ConfigError, "unknown setting 'epoch'"),
        ({"attacks": [{"name": "badnets", "set": {"sizee": 3}}]}, ConfigError, "unknown setting 'sizee'"),
        ({"attacks": []}, ConfigError, "attacks.*at least 1 item"),
        ({"defenses": []}, ConfigError, "defenses.*at least 1 item"),
        ({"ratio": 0.0}, ConfigError, "ratio: Input should be greater than 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    settings: dict[str, Any], error: type, words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        studies.run("overview", tmp_path / "out", store=tmp_path / "runs", device="cpu", **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_a_grid_with_only_failed_cells(tmp_path: Path) -> None:
    study, store = (
        studies.create("overview", attacks=["badnets"], defenses=["clp"], seeds=[0]),
        Store(tmp_path / "runs"),
    )
    store.root.mkdir()
    (plan,) = plans_of(study, "cpu")
    for key in plan.tasks:
        Book(store).write(key, Outcome("failed", reason="RuntimeError: no more paper"))
    with pytest.raises(DataRequirementError, match=r"nothing to measure: of 2 cells 2 failed; .*no more paper"):
        studies.run(study, tmp_path / "out", store=store, device="cpu", workers=1)


def test_wrong_usage_of_the_command(tmp_path: Path) -> None:
    for arguments, words in (
        (("overvew",), "unknown study 'overvew'; did you mean 'overview'"),
        (("overview", "--set", "attack=[badnets]"), "unknown setting 'attack'; did you mean attacks"),
        (("overview", "--executor", "cloud"), "--executor must be one of local, ray, slurm, got 'cloud'"),
    ):
        result = _run(*arguments, "--store", tmp_path / "runs")
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_small_overview_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One thread: on a machine that does other work too, two of them wait for each other.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    sets = ["attacks=[badnets]", "defenses=[clp, {name: abl, set: {isolation_ratio: 0.0005}}]", "seeds=[0]"]
    flags = [part for text in [*sets, "recipe={epochs: 2}", "ratio=0.2"] for part in ("--set", text)]
    places = ["--store", tmp_path / "runs", "--device", "cpu", "--workers", 1]
    result = _run("overview", *flags, *places, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    folder = tmp_path / "runs" / "studies" / "overview"
    assert found["cells"] == {"done": 2, "not_applicable": 1} and found["summary"]["attacks"] == 1
    assert found["figure"] == str(folder / "figure.png") and (folder / "figure.pdf").stat().st_size > 1000
    numbers = Numbers.load(folder)
    assert "of 3 cells 1 not applicable" in numbers.meta["caption"]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["defense"] for row in rows] == ["none", "clp", "abl"] and float(rows[0]["c_acc"]) > 0.1
    reading = (folder / "reading.md").read_text()
    assert find("overview").card.reading in reading and "abl unlearns at least 2" in reading
    assert numbers.meta["command"] in reading

    # Again, without a figure: nothing is trained, the numbers are the same.
    again = _run("overview", *flags, *places, "--out", tmp_path / "again", "--no-figures")
    assert again.exit_code == 0 and not (tmp_path / "again" / "figure.png").exists()
    assert (tmp_path / "again" / "table.csv").read_text() == (folder / "table.csv").read_text()
