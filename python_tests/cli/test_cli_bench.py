"""``bbfast bench``: a small grid from plan to comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bbfast.bench import Outcome, load_grid, make_plan
from bbfast.bench.failures import recorded
from bbfast.bench.outcomes import Book
from bbfast.cli.app import app
from bbfast.store import Store

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
    unknown = dict.fromkeys(("seconds", "wall_seconds", "disk_bytes"))
    assert found["estimate"] == {"left": 3, "unmeasured": 3, "workers": 1, **unknown}
    shown = _run("plan", ran[0], "--store", ran[1].with_name("none")).stdout
    assert "left: 3 stages; how long they take is not known" in shown and "0 s" not in shown
    more = _json(_run("plan", ran[0], "--store", ran[1], "--set", "seeds=[0, 1]", "--json"))["estimate"]
    assert more["left"] == 3 and more["unmeasured"] == 1 and more["seconds"] > 0 and more["disk_bytes"] > 1e6
    half = ("plan", ran[0], "--store", ran[1], "--set", "seeds=[0, 1]", "--workers", 2)
    assert _json(_run(*half, "--json"))["estimate"]["wall_seconds"] == more["seconds"] / 2
    said = _run(*half).stdout
    assert "on 2 workers" in said and "that leaves out 1 stages whose methods have not been measured" in said
    shown = _run("plan", ran[0], "--store", ran[1], "--set", "ratios=[0.05, 0.1]", "--set", "attacks=[sig]")
    assert "6 cells; 3 stages (1 attacks, 2 defenses)" in shown.stdout
    assert "3  ratio 0.1: sig: label_mode 'clean_label' asks for 144" in " ".join(shown.stdout.split("\n"))


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
    done = _run("results", ran[0], "--store", ran[1], "--pivot", "c_acc", "--csv", tmp_path / "p.csv")
    (line,) = csv.DictReader((tmp_path / "p.csv").read_text().splitlines())
    assert line["attack"] == "badnets" and float(line["clp"]) == rows[1]["c_acc"] and "abl" not in line
    axes = ("--pivot", "seconds", "--rows", "defense", "--columns", "seed", "--json")
    assert [row["defense"] for row in _json(_run("results", ran[0], "--store", ran[1], *axes))] == ["none", "clp"]
    (row,) = _json(_run("results", ran[0], "--store", ran[1], "--costs", "--where", "defense=clp", "--json"))
    assert row["device"] == "cpu" and row["protocol"] >= 1 and row["version"] >= 1 and row["peak_memory_bytes"] > 0
    assert "GiB" in _run("results", ran[0], "--store", ran[1], "--costs").stdout
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
    shown = _run("compare", ran[0], tmp_path / "p.csv", "--store", ran[1], "--csv", tmp_path / "both.csv")
    assert "0 cells in" in shown.stderr and (tmp_path / "both.csv").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plan", "smokey"), 2, "unknown grid preset 'smokey'; did you mean 'smoke'"),
        (("plan", "smoke", "--set", "attack=[badnets]"), 2, "unknown setting 'attack'; did you mean attacks"),
        (("status", "smoke", "--store", "/nowhere"), 1, "there is no store at /nowhere"),
        (("run", "smoke", "--gpus", 1), 2, "gpus is for ray and slurm, got 1 with local"),
        (("results", "smoke", "--rows", "seed"), 2, "--rows and --columns are the axes of --pivot"),
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


def test_what_failed_is_shown_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GRID.replace("[badnets]", "[{name: badnets, label: 'mine, 1'}]"))
    grid = load_grid(tmp_path / "mine.yaml", seeds=[3])
    made, book = make_plan(grid), Book(Store(tmp_path / "my runs"))
    attack = next(task for task in made.tasks.values() if task.kind == "attack")
    outcome = Outcome(
        "failed", reason="ValueError: no", traceback="Traceback:\n  line [1]\nValueError: no", seconds=2.0
    )
    book.write(attack.key, recorded(outcome, attack.spec))
    grid_and_store = (tmp_path / "mine.yaml", "--store", tmp_path / "my runs", "--set", "seeds=[3]")
    (failed,) = _json(_run("status", *grid_and_store, "--json"))["failed"]
    assert failed["stage"] == "digits small_cnn mine, 1 0.1, seed 3" and failed["waiting"] == 2
    assert failed["traceback"] == outcome.traceback and failed["record"]["spec"]["device"] == "cpu"
    assert (
        failed["record"]["spec"]["seed"] == 3 and failed["record"]["versions"]["bbfast"] and failed["record"]["ended"]
    )
    shown = _run("status", *grid_and_store)
    assert "3 cells: 2 blocked, 1 failed" in shown.stdout and "mine, 1 0.1, seed 3: ValueError: no" in shown.stdout
    again = f"run {tmp_path}/mine.yaml --store '{tmp_path}/my runs' --set 'seeds=[3]' --retry-failed tries them again"
    assert again in shown.stderr and "goes on" not in shown.stderr
    shown = _run("status", *grid_and_store, "--failed")
    assert "    line [1]" in shown.stdout and "device cpu, ended 20" in shown.stdout
    only = _run("results", *grid_and_store, "--where", "status=blocked")
    assert only.exit_code == 0 and "clp" in only.stdout
