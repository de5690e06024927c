"""Tables: index, means, pivots, export, and a published table beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_workers
import pytest

from bbfast._version import commit
from bbfast.bench import (
    Index,
    Plan,
    aggregate,
    compare,
    grid_rows,
    pivot,
    pivot_rows,
    read_published,
    run_plan,
    select,
    to_csv,
    to_json,
    write_parquet,
)
from bbfast.bench.compare import COMPARED
from bbfast.errors import ArtifactError, MissingExtraError, UnknownNameError
from bbfast.store import Content, Store

MakePlan = Callable[..., Plan]


@pytest.fixture
def ran(plan: MakePlan, tmp_path: Path) -> tuple[Plan, Store]:
    made = plan(seeds=[0, 11])
    run_plan(made, Store(tmp_path), bench_workers.Inline(tmp_path), progress=False)
    return made, Store(tmp_path)


def test_the_index_is_a_copy_of_the_folders(ran: tuple[Plan, Store], tmp_path: Path) -> None:
    with Index(ran[1]) as index:
        assert index.refresh() == {}
        rows = index.rows()
        assert len(rows) == 12 and {row["stage"] for row in rows} == {"attack", "defense"}
        assert index.rows({"attack": "badnets", "seed": [0, 3]}) == [
            row for row in rows if row["attack"] == "badnets" and row["seed"] == 0
        ]
        with pytest.raises(ValueError, match=r"where must name columns .* got \['colour'\]"):
            index.rows({"colour": 1})
    mode = sqlite3.connect(tmp_path / "index.sqlite").execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)
    (tmp_path / "index.sqlite").unlink()
    gone = next(tmp_path.glob("defense-nc-*"))
    broken = next(tmp_path.glob("defense-ft-*"))
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    (broken / "metrics.json").write_text('{"c_acc": 1.0}')
    with Index(ran[1]) as index:
        damaged = index.refresh()
        assert list(damaged) == [broken.name] and "metrics.json" in damaged[broken.name]
        assert len(index.rows()) == 10
    with pytest.raises(ArtifactError, match="there is no store at"):
        Index(Store(tmp_path / "none"))


def test_an_index_of_another_version_is_made_anew(ran: tuple[Plan, Store], tmp_path: Path) -> None:
    with Index(ran[1]) as index:
        index.refresh()
    db = sqlite3.connect(tmp_path / "index.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.execute("DELETE FROM records")
    db.commit()
    db.close()
    with Index(ran[1]) as index:
        index.refresh()
        assert len(index.rows()) == 12


def test_means_over_seeds(ran: tuple[Plan, Store]) -> None:
    rows = aggregate(grid_rows(*ran))
    assert len(rows) == 6 and "seed" not in rows[0]
    (cell,) = [row for row in rows if row["attack"] == "badnets" and row["defense"] == "nc"]
    # The workers' figure is the length of the stage's name, whose seeds are "0" and "11".
    first = len("badnets-0.05-0-nc") / 100
    assert cell["n"] == 2 and cell["c_acc"] == pytest.approx(first + 0.005)
    assert cell["c_acc_std"] == pytest.approx(0.01 / math.sqrt(2)) and cell["tpr"] is None
    assert aggregate(rows[:0]) == []
    (half,) = aggregate([{**row, "status": "missing" if row["seed"] else "done"} for row in grid_rows(*ran)][:1])
    assert half["n"] == 1 and half["c_acc"] is not None


def test_rows_by_what_they_have(ran: tuple[Plan, Store]) -> None:
    rows = grid_rows(*ran)
    assert len(select(rows, {"attack": "sig", "defense": ["nc", "ft"], "seed": 11, "ratio": 0.05})) == 2
    assert select(rows, {}) == rows and len(select(rows, {"status": "done"})) == 12
    with pytest.raises(ValueError, match=r"where takes dataset, .* and status, got 'colour'"):
        select(rows, {"colour": "red"})
    with pytest.raises(UnknownNameError, match="unknown attack 'badnet'; did you mean 'badnets'"):
        select(rows, {"attack": "badnet"})
    assert select(rows, {"status": ["failed", "blocked"]}) == []
    with pytest.raises(UnknownNameError, match="unknown status 'fialed'; did you mean 'failed'"):
        select(rows, {"status": "fialed"})


def test_pivots(ran: tuple[Plan, Store]) -> None:
    down, across, cells = pivot(grid_rows(*ran), "asr")
    assert (down, across) == (["badnets", "sig"], ["none", "ft", "nc"]) and set(cells.values()) == {0.5}
    with pytest.raises(ValueError, match="the results have no 'acc'; they have dataset"):
        pivot(grid_rows(*ran), "acc")


def test_a_pivot_as_rows(ran: tuple[Plan, Store]) -> None:
    rows = grid_rows(*ran)
    first, second = pivot_rows(rows, "c_acc")
    assert list(first) == ["dataset", "model", "ratio", "attack", "none", "ft", "nc"]
    assert (first["attack"], second["attack"], first["ratio"]) == ("badnets", "sig", 0.05)
    mean = {row["defense"]: row["c_acc"] for row in aggregate(rows) if row["attack"] == "sig"}
    assert {key: second[key] for key in mean} == mean
    other = pivot_rows([row for row in rows if row["defense"] == "nc"], "asr", "seed", "ratio")
    assert [(row["attack"], row["seed"], row["0.05"]) for row in other] == [
        (attack, seed, 0.5) for attack in ("badnets", "sig") for seed in (0, 11)
    ]
    for wrong, words in (
        (("asr", "colour"), "rows must be one of dataset, .* got 'colour'"),
        (("asr", "attack", "attack"), "rows and columns must differ, got 'attack' for both"),
        (("reason",), "'reason' is no figure; a pivot takes c_acc"),
    ):
        with pytest.raises(ValueError, match=words):
            pivot_rows(rows, *wrong)
    with pytest.raises(ValueError, match="a column cannot be called 'model'; give that defense another label"):
        pivot_rows([{**rows[0], "defense": "model"}], "asr")


def test_records_name_what_made_them(ran: tuple[Plan, Store]) -> None:
    row = grid_rows(*ran, records=True)[0]
    assert list(row)[-4:] == ["protocol", "version", "commit", "device"]
    assert row["commit"] == (commit() or None) and row["device"] is None  # the workers here record neither


def test_what_is_written_can_be_read(ran: tuple[Plan, Store]) -> None:
    rows = grid_rows(*ran, costs=True)
    back = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [float(row["c_acc"]) for row in back] == [row["c_acc"] for row in rows] and back[0]["tpr"] == ""
    assert json.loads(to_json(rows)) == rows
    assert to_csv([]).startswith("folder,stage,dataset")


def test_parquet(ran: tuple[Plan, Store], tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    rows = grid_rows(*ran, costs=True, records=True)
    rows[1] |= {"protocol": 1, "version": 2, "commit": "c0ffee", "device": "cuda:0"}
    rows[0] = {**rows[0], "asr": 0.1 + 0.2, "reason": 'it\'s "quoted", 1\n2', "tpr": None, "c_acc": 1e-300}
    path = write_parquet(rows, tmp_path / "it's a table.parquet")
    with duckdb.connect() as db:
        found = db.execute("SELECT * FROM read_parquet(?)", [str(path)])
        names, kinds = [column[0] for column in found.description], {c[0]: str(c[1]) for c in found.description}
        assert [dict(zip(names, row, strict=True)) for row in found.fetchall()] == rows
    assert (kinds["reason"], kinds["seed"], kinds["tpr"]) == ("VARCHAR", "BIGINT", "DOUBLE")
    assert (kinds["commit"], kinds["protocol"]) == ("VARCHAR", "BIGINT")
    write_parquet(aggregate(rows), path)
    assert sorted(p.name for p in tmp_path.glob("*parquet*")) == ["it's a table.parquet"]
    with pytest.raises(ValueError, match="there are no rows to write"):
        write_parquet([], path)
    with pytest.raises(OSError, match="No such file"):
        write_parquet(rows, tmp_path / "none" / "t.parquet")


def test_parquet_without_duckdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingExtraError, match=r"writing Parquet needs DuckDB, .* pip install 'bbfast\[query\]'"):
        write_parquet([{"n": 1}], tmp_path / "t.parquet")


def test_cells_that_are_missing(plan: MakePlan, ran: tuple[Plan, Store], tmp_path: Path) -> None:
    for path in tmp_path.glob("attack-sig-*"):
        (path / "manifest.json").unlink()
    status = {(row["attack"], row["defense"]): row["status"] for row in grid_rows(*ran)}
    assert status["sig", "none"] == "missing" and status["sig", "nc"] == "done"
    more = plan(defenses=["none", "fp"])
    assert {row["status"] for row in grid_rows(more, ran[1]) if row["defense"] == "fp"} == {"missing"}


PUBLISHED = """,dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra
0,tiny,preactresnet18,badnet,no defense,0.1,0.5,0.9,0.1
1,tiny,preactresnet18,inputaware,i-bau,0.1,0.4,0.2,
2,tiny,preactresnet18,badnet,dde,0.1,,,
3,tiny,preactresnet18,badnet,spectral,0.05,0.3,0.8,0.2
"""


def test_beside_a_published_table(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    published = read_published(path)
    assert set(published) == {
        ("tiny_imagenet", "preactresnet18", attack, ratio, defense)
        for attack, ratio, defense in (
            ("badnets", 0.1, "none"),
            ("input_aware", 0.1, "i_bau"),
            ("badnets", 0.1, "ep"),
            ("badnets", 0.05, "ss"),
        )
    }

    def row(attack: str, defense: str, c_acc: float, asr: float | None) -> dict[str, Any]:
        place = {"dataset": "tiny_imagenet", "model": "preactresnet18", "ratio": 0.1}
        return {**place, "attack": attack, "defense": defense, "c_acc": c_acc, "asr": asr, "r_acc": 0.3}

    found = compare(
        [
            row("badnets", "none", 0.6, 0.8),
            row("badnets", "none", 0.8, 1.0),
            row("input_aware", "i_bau", 0.4, None),
            row("badnets", "ep", 0.4, 0.1),
            row("lf", "ep", 0.4, 0.1),
        ],
        published,
    )
    assert found["coverage"] == {"published": 3, "published_empty": 1, "ours": 4, "matched": 2, "ours_only": 2}
    first, second = found["cells"]
    assert first["n"] == 2 and first["c_acc_difference"] == pytest.approx(0.2) and first["asr"] == pytest.approx(0.9)
    assert second["asr_difference"] is None and second["r_acc_published"] is None
    assert found["summary"]["c_acc"] == {
        "n": 2,
        "mean_difference": pytest.approx(0.1),
        "mean_absolute_difference": pytest.approx(0.1),
    }
    assert found["summary"]["asr"]["n"] == 1 and found["apart"] == {}
    other = compare([{**row("lf", "nc", 0.6, 0.8), "dataset": "digits"}], published)
    assert other["apart"] == {
        "dataset": (["digits"], ["tiny_imagenet"]),
        "attack": (["lf"], ["badnets", "input_aware"]),
        "defense": (["nc"], ["i_bau", "none", "ss"]),
    }


def test_what_is_no_number_is_not_compared() -> None:
    place = ("cifar10", "preactresnet18")
    published = {
        (*place, "badnets", 0.1, "ft"): {"c_acc": 0.5, "asr": math.nan, "r_acc": 0.1},
        (*place, "lf", 0.1, "ft"): {"c_acc": 0.4, "asr": 0.25, "r_acc": 0.1},
        (*place, "sig", 0.1, "ft"): {"c_acc": math.nan, "asr": 0.25, "r_acc": 0.1},
    }
    row = {"dataset": place[0], "model": place[1], "ratio": 0.1, "defense": "ft", "c_acc": 0.5, "asr": 0.75}
    found = compare([{**row, "attack": name, "r_acc": math.inf} for name in ("badnets", "lf", "sig")], published)
    assert found["coverage"]["published"] == found["coverage"]["matched"] == 2
    assert found["summary"]["asr"] == {"n": 1, "mean_difference": 0.5, "mean_absolute_difference": 0.5}
    assert found["summary"]["r_acc"]["n"] == 0 and found["cells"][0]["asr_published"] is None
    assert all(tuple(cell) == COMPARED for cell in found["cells"])


def test_a_record_without_all_facts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("attack", "badnets", "0" * 64, Content("attack", _config(), {"c_acc": 0.5}))
    with Index(store) as index:
        index.refresh()
        (row,) = index.rows()
        assert row["ratio"] == 0.1 and row["c_acc"] == 0.5 and row["epochs"] is None


def _config() -> dict[str, Any]:
    return {
        "attack": "badnets",
        "attack_config": {"ratio": 0.1},
        "data": {"name": "digits"},
        "model": {"name": "small_cnn"},
        "seed": 0,
    }
