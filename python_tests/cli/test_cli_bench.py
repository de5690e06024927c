"""``bbfast bench``: a small grid from plan to comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bbfast.cli.app import app

GRID = """
base: smoke
attacks: [badnets]
defenses: [none, clp, {name: abl, set: {isolation_ratio: 0.0005}}]
recipe: {epochs: 1}
device: cpu
"""


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="bbfast")


def _json(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mine.yaml").write_text(GRID)
    done = _json(_run("run", folder / "mine.yaml", "--store", folder / "runs", "--workers", 1, "--json"))
    assert (done["done"], done["not_applicable"], done["failed"]) == (2, 1, 0)
    return folder / "mine.yaml", folder / "runs"


def test_plan(ran: tuple[Path, Path]) -> None:
    found = _json(_run("plan", ran[0], "--store", ran[1].with_name("none"), "--json"))
    assert found["cells"] == 3 and found["stages"]["total"] == 3 and found["not_applicable"] == 0
    assert found["estimate"] == {"left": 3, "seconds": 0, "disk_bytes": 0, "unmeasured": 3}
    more = _json(_run("plan", ran[0], "--store", ran[1], "--set", "seeds=[0, 1]", "--json"))["estimate"]
    assert more["left"] == 3 and more["unmeasured"] == 1 and more["seconds"] > 0 and more["disk_bytes"] > 1e6
    shown = _run("plan", ran[0], "--store", ran[1], "--set", "ratios=[0.05, 0.1]", "--set", "attacks=[sig]")
    assert "6 cells; 3 stages (1 attacks, 2 defenses)" in shown.stdout
    assert "3  sig: label_mode 'clean_label' asks for 144" in " ".join(shown.stdout.split("\n"))


def test_status_and_results(ran: tuple[Path, Path], tmp_path: Path) -> None:
    assert _json(_run("status", ran[0], "--store", ran[1], "--json"))["status"] == {"done": 2, "not_applicable": 1}
    rows = _json(_run("results", ran[0], "--store", ran[1], "--json"))
    assert [row["defense"] for row in rows] == ["none", "clp", "abl"] and rows[1]["der"] is not None
    assert "abl unlearns at least 2 isolated samples" in rows[2]["reason"]
    only = _json(_run("results", ran[0], "--store", ran[1], "--where", "defense=clp", "--mean", "--json"))
    assert len(only) == 1 and only[0]["n"] == 1 and only[0]["c_acc"] == rows[1]["c_acc"]
    pivoted = _run("results", ran[0], "--store", ran[1], "--pivot", "c_acc")
    assert f"{100 * rows[0]['c_acc']:.1f}" in pivoted.stdout and "abl" not in pivoted.stdout
    assert "c_acc, %: digits, small_cnn, ratio 0.1" in pivoted.stdout
    assert "1 of the cells have no figures" in pivoted.stderr
    shown = _run("status", ran[0], "--store", ran[1])
    assert "2 done, 1 not applicable" in shown.stdout and "abl unlearns at least 2" in shown.stdout
    done = _run("results", ran[0], "--store", ran[1], "--csv", tmp_path / "t.csv")
    assert done.exit_code == 0 and len(list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))) == 3


def test_compare(ran: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
        "digits,small_cnn,badnet,no defense,0.1,0,0,0\ndigits,small_cnn,badnet,nc,0.1,,,\n"
    )
    found = _json(_run("compare", ran[0], tmp_path / "p.csv", "--store", ran[1], "--json"))
    assert found["coverage"]["matched"] == 1 and found["cells"][0]["c_acc_difference"] == found["cells"][0]["c_acc"]
    shown = _run("compare", ran[0], tmp_path / "p.csv", "--store", ran[1], "--csv", tmp_path / "both.csv")
    assert "1 cells in both; 1 only ours" in shown.stdout and "the largest differences" in shown.stdout
    assert len(list(csv.DictReader((tmp_path / "both.csv").read_text().splitlines()))) == 1
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace("digits", "cifar10"))
    shown = _run("compare", ran[0], tmp_path / "p.csv", "--store", ran[1])
    assert "no dataset in both: ours ['digits'], theirs ['cifar10']" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plan", "smokey"), 2, "unknown grid preset 'smokey'; did you mean 'smoke'"),
        (("plan", "smoke", "--set", "attack=[badnets]"), 2, "unknown setting 'attack'; did you mean attacks"),
        (("status", "smoke", "--store", "/nowhere"), 1, "there is no store at /nowhere"),
        (("run", "smoke", "--workers", 0), 2, "greater than or equal to 1"),
    ],
)
def test_wrong_usage(arguments: tuple[object, ...], status: int, words: str) -> None:
    done = _run(*arguments)
    assert done.exit_code == status and words in done.stderr


def test_results_takes_known_names_only(ran: tuple[Path, Path]) -> None:
    done = _run("results", ran[0], "--store", ran[1], "--where", "colour=red")
    assert done.exit_code == 2 and "where takes dataset, model, attack" in done.stderr
    done = _run("results", ran[0], "--store", ran[1], "--where", "defense=cpl")
    assert done.exit_code == 2 and "did you mean 'clp'" in done.stderr
    done = _run("results", ran[0], "--store", ran[1], "--pivot", "acc")
    assert done.exit_code == 2 and "the results have no 'acc'" in done.stderr
