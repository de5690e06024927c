"""The site of a store: what its tables and pages hold. How it behaves in a browser: test_site_browser.py."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_kit import HOSTILE, PNG, analysed, fabricate

from bbfast import analysis
from bbfast.bench import Plan, kept_grids, load_grid
from bbfast.cli.app import main
from bbfast.errors import ArtifactError
from bbfast.report.commands import attack_command, changed_settings, defense_command
from bbfast.report.site import write_site
from bbfast.report.site.analyses import copy_analyses
from bbfast.report.site.board import board_lines, coverage, per_run_rows
from bbfast.report.site.records import read_records
from bbfast.store import Store

Ran = tuple[Store, Plan]


def _lines(ran: Ran, **more: Any) -> list[dict[str, Any]]:
    records, damaged = read_records(ran[0])
    assert not damaged
    return board_lines([ran[1]], ran[0], records, **more)


def test_every_cell_is_accounted_for(ran: Ran) -> None:
    found = {(line["attack"], line["defense"]): line for line in _lines(ran)}
    assert len(found) == 2 * 5
    status = {place: line["status"] for place, line in found.items()}
    assert status["badnets", "none"] == status["badnets", "clp"] == status["badnets", "ss"] == "done"
    assert status["badnets", "ft"] == "failed" and status["badnets", "nc"] == "missing"
    assert {status["sig", name] for name in ("none", "clp", "ss", "ft", "nc")} == {"not_applicable"}
    assert found["badnets", "ft"]["reason"] == HOSTILE and "class" in found["sig", "nc"]["reason"]
    (counts,) = coverage(found.values())
    assert (counts["total"], counts["done"], counts["failed"], counts["missing"]) == (10, 3, 1, 1)


def test_lines_are_means_over_seeds(ran: Ran) -> None:
    records, _ = read_records(ran[0])
    line = next(line for line in _lines(ran) if line["defense"] == "clp" and line["status"] == "done")
    each = [records[run["folder"]].row["c_acc"] for run in line["runs"]]
    assert [run["seed"] for run in line["runs"]] == [0, 1] and line["n"] == 2
    assert line["metrics"]["c_acc"] == pytest.approx(sum(each) / 2)
    assert line["spread"]["c_acc"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    rows = per_run_rows([line], records)
    assert [row["c_acc"] for row in rows] == each and [row["seed"] for row in rows] == [0, 1]


def test_a_shared_cell_is_shown_once_and_a_result_of_no_grid_as_well(ran: Ran, tmp_path: Path) -> None:
    store, plan = Store(shutil.copytree(ran[0].root, tmp_path / "runs")), ran[1]
    fabricate(store, "wanet", c_acc=0.5, asr=0.25)
    records, _ = read_records(store)
    lines = board_lines([plan, dataclasses.replace(plan)], store, records)
    folders = [run["folder"] for line in lines for run in line["runs"]]
    assert sorted(folders) == sorted(records), "each result once"
    (alone,) = (line for line in lines if line["attack"] == "wanet")
    assert alone["status"] == "done" and alone["metrics"] == {"c_acc": 0.5, "asr": 0.25}


def test_settings_tell_apart_what_has_the_same_place(ran: Ran) -> None:
    records, _ = read_records(ran[0])
    by_defense = {record.row["defense"]: record for record in records.values()}
    assert by_defense["none"].changed == "epochs = 1" and by_defense["clp"].changed == "badnets: epochs = 1"
    assert by_defense["ss"].changed == "badnets: epochs = 1; ss: retrain = false"
    assert changed_settings({"attack": "gone", "attack_config": {"ratio": 0.1, "size": 3}}) == {"size": 3}


def test_published_figures_stand_beside_ours(ran: Ran, published: Path) -> None:
    from bbfast.bench import read_published

    lines = _lines(ran, published=read_published(published))
    ours = next(line for line in lines if line["attack"] == "badnets" and line["defense"] == "none")
    assert ours["published"] == {"c_acc": 0.91, "asr": 0.88, "r_acc": 0.05}
    rest = [line for line in lines if line["status"] == "published"]
    assert [(line["attack"], line["defense"], line["published"]["asr"]) for line in rest] == [("wanet", "nc", 0.1)]


def test_the_site_holds_a_page_for_each_run(ran: Ran, tmp_path: Path, published: Path) -> None:
    site = write_site(ran[0], tmp_path / "site", published=published, progress=False)
    records, _ = read_records(ran[0])
    assert site.runs == len(records) == 6 and not site.broken
    assert {path.stem for path in (tmp_path / "site" / "runs").iterdir()} == set(records)
    index = site.index.read_text(encoding="utf-8")
    assert re.findall(r"[\"'(](?:https?:)?//[^\"')]+", index) == [], "nothing is fetched"
    data = json.loads(re.search(r'id="data">(.*?)</script>', index, re.S)[1])  # type: ignore[index]
    assert len(data["lines"]) == 10 + 1 and data["titles"]["clp"] == "Channel-Lipschitzness Pruning"
    with (tmp_path / "site" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["status"] == "done" for row in rows) == 6 and len(rows) == 6 + 2 + 5
    assert json.loads((tmp_path / "site" / "results.json").read_text()) is not None
    detector = next(record for record in records.values() if record.row["defense"] == "ss")
    page = (tmp_path / "site" / "runs" / f"{detector.folder}.html").read_text(encoding="utf-8")
    assert "Histogram of the detector" in page and f'href="{detector.attack}.html"' in page


def test_commands_give_the_same_result_again(ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The commands on the pages are read by the command line, and it finds the stored results by them."""
    store = ran[0]
    monkeypatch.chdir(store.root.parent)
    for record in read_records(store)[0].values():
        if record.attack is None:
            line = attack_command(record.config, store.root.name)
        else:
            line = defense_command(record.config, f"{store.root.name}/{record.attack}")
        assert line is not None
        with pytest.raises(SystemExit) as end:
            main([*shlex.split(line)[1:], "--json"])
        said = json.loads(capsys.readouterr().out)
        assert end.value.code == 0 and said["reused"] is True and Path(said["folder"]).name == record.folder


def test_results_that_another_program_made_have_no_command() -> None:
    config = {"attack": "badnets", "attack_config": {}, "recipe": None, "data": {}, "model": {"name": "x"}}
    assert attack_command(config, "runs") is None
    assert attack_command({**config, "attack": "gone", "recipe": {"epochs": 1}}, "runs") is None
    assert attack_command({**config, "attack_config": {"ratio": 0.0}, "recipe": {"epochs": 1}}, "runs") is None


def test_broken_results_are_named_and_left_out(ran: Ran, tmp_path: Path) -> None:
    store = Store(shutil.copytree(ran[0].root, tmp_path / "runs"))
    defense = next(store.root.glob("defense-clp-*"))
    (defense / "manifest.json").write_text("{", encoding="utf-8")
    flipped = next(store.root.glob("defense-ss-*/scores.safetensors"))
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    fabricate(store, "gone", "ft", c_acc=0.5)
    (store.root / ".bench" / "grids" / "bad.json").write_text('{"attacks": ["no_such"]}', encoding="utf-8")
    site = write_site(store, tmp_path / "site", progress=False)
    assert {defense.name, flipped.parent.name, "grid bad.json"} < set(site.broken)
    assert "checksum" in site.broken[flipped.parent.name] or "damaged" in site.broken[flipped.parent.name]
    (alone,) = (name for name in site.broken if name.startswith("defense-ft"))
    assert "is not in the store" in site.broken[alone]
    assert site.runs == 4 and len(site.broken) == 4
    assert "4 could not be read" in site.index.read_text(encoding="utf-8")


def test_grids_that_were_run_are_remembered(ran: Ran) -> None:
    grids, damaged = kept_grids(ran[0])
    assert grids == [ran[1].grid] and not damaged


def test_only_a_report_is_replaced(ran: Ran, tmp_path: Path) -> None:
    out = tmp_path / "site"
    write_site(ran[0], out, progress=False)
    (out / "stale.html").write_text("x", encoding="utf-8")
    write_site(ran[0], out, progress=False)
    assert not (out / "stale.html").exists()
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "index.html").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else"):
        write_site(ran[0], theirs, progress=False)
    assert (theirs / "index.html").read_text(encoding="utf-8") == "years of work"
    with pytest.raises(ArtifactError, match="no store at"):
        write_site(tmp_path / "none", tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_what_analysis_found_is_on_the_page(ran: Ran, tmp_path: Path) -> None:
    store = Store(shutil.copytree(ran[0].root, tmp_path / "runs"))
    attack = next(store.root.glob("attack-*"))
    home = store.root / "analysis" / attack.name
    whole = analysed(home / "confusion_matrix", {"c_acc": 0.5, "asr": float("nan"), "note": HOSTILE})
    options = {**analysis.create("grad_cam").config.model_dump(mode="json"), "layer": HOSTILE[:20]}
    analysed(home / "grad_cam-0123abcd", {"inside": 0.25}, tool="grad_cam", options=options, figure=False)
    (home / "notes").mkdir()
    (home / ".bbfast-tmp-x").mkdir()
    site = write_site(store, tmp_path / "site", progress=False)
    page = (tmp_path / "site" / "runs" / f"{attack.name}.html").read_text(encoding="utf-8")
    assert not site.broken and "Confusion" in page and " c acc 0.5 " in page and "nan" not in page
    assert f"({html.escape(f'layer = {HOSTILE[:20]}')})" in page.replace("&#39;", "&#x27;") and "inside 0.25" in page
    assert page.count("<img src=") == page.count("/confusion_matrix/figure.png") - 1 == 1
    assert f'href="../analysis/{attack.name}/grad_cam-0123abcd/numbers.npz"' in page
    copied = site.index.parent / "analysis" / attack.name
    assert (copied / whole.name / "numbers.npz").read_bytes() == (whole / "numbers.npz").read_bytes()
    assert not (copied / "grad_cam-0123abcd" / "figure.png").exists()


META_THAT_IS_NONE = (
    *("{", "null", "[]", '"x"', "{}"),
    *('{"summary": null}', '{"summary": [1]}', '{"summary": {}, "meta": 1}'),
)


def test_a_comparison_says_of_what(tmp_path: Path) -> None:
    parts = [{"caption": HOSTILE, "result": None}, {"caption": "digits, ft"}]
    for name, more in (
        ("compare", {"compared": parts}),
        ("other", {"compared": ["no", {}, 3]}),
        ("odd", {"compared": 1}),
    ):
        analysed(tmp_path / "store" / "analysis" / "run" / name, {"asr": 0.5}, tool="metrics", **more)
    found, broken = copy_analyses(tmp_path / "store", "run", tmp_path / "site")
    assert not broken and [(one.title, one.said) for one in found] == [
        ("Metrics, side by side", f"{HOSTILE}; digits, ft"),
        ("Metrics", "asr 0.5"),
        ("Metrics", "asr 0.5"),
    ]


def test_a_broken_analysis_costs_its_figure_alone(ran: Ran, tmp_path: Path) -> None:
    store = Store(shutil.copytree(ran[0].root, tmp_path / "runs"))
    attack = next(store.root.glob("attack-*"))
    home = store.root / "analysis" / attack.name
    analysed(home / "metrics", {"c_acc": 0.125})
    for i, text in enumerate(META_THAT_IS_NONE):
        (analysed(home / f"meta{i}", {}) / "meta.json").write_text(text, encoding="utf-8")
    (analysed(home / "half", {}) / "meta.json").unlink()
    (analysed(home / "cut", {}) / "figure.png").write_bytes(PNG[:-1])
    (analysed(home / "empty", {}) / "numbers.npz").write_bytes(b"")
    (analysed(home / "deep", {}) / "meta.json").write_text("[" * 100_000, encoding="utf-8")
    site = write_site(store, tmp_path / "site", progress=False)
    names = [*(f"meta{i}" for i in range(len(META_THAT_IS_NONE))), "half", "cut", "empty", "deep"]
    assert set(site.broken) == {f"analysis/{attack.name}/{name}" for name in names}
    said = {place.rsplit("/", 1)[1]: why for place, why in site.broken.items()}
    assert "half written: meta.json missing" in said["half"] and "no whole PNG" in said["cut"]
    assert "meta.json: summary must be an object, got [1]" in said["meta6"] and "what it holds" in said["meta1"]
    assert site.runs == 6
    page = (tmp_path / "site" / "runs" / f"{attack.name}.html").read_text(encoding="utf-8")
    assert "c acc 0.125" in page and page.count('class="card"><a href="../analysis/') == 1
    assert {path.name for path in (site.index.parent / "analysis" / attack.name).iterdir()} == {"metrics"}
    assert f"{len(names)} could not be read" in site.index.read_text(encoding="utf-8")


def test_whatever_a_result_raises_the_others_are_written(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbfast.report.site import write

    errors = [AttributeError("no luck"), IndexError("no luck"), RuntimeError("no luck"), AssertionError("no luck")]
    words = sorted(f"{type(error).__name__}: no luck" for error in errors)

    def page(*_: Any) -> Any:
        raise errors.pop()

    monkeypatch.setattr(write, "defense_page", page)
    site = write_site(ran[0], tmp_path / "site", progress=False)
    assert site.runs == 2 and sorted(site.broken.values()) == words


def test_a_published_table_that_cannot_be_read_is_refused(
    ran: Ran, tmp_path: Path, published: Path, capsys: Any
) -> None:
    published.write_text(published.read_text().replace("0.88", "nan"), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["report", str(ran[0].root), "--out", str(tmp_path / "site"), "--published", str(published)])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "published.csv, line 2, column test_asr" in said and not (tmp_path / "site").exists()


def test_an_empty_store_and_a_grid_that_never_ran(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    grid = load_grid("smoke", seeds=[0])
    site = write_site(tmp_path / "runs", tmp_path / "site", grids=[grid], progress=False)
    assert site.runs == 0 and "<td>8</td>" in site.index.read_text(encoding="utf-8")


def test_hostile_text_stays_text(ran: Ran, tmp_path: Path) -> None:
    """In a traceback's last line, a title, and the names of a result that cannot be shown."""
    store = Store(shutil.copytree(ran[0].root, tmp_path / "runs"))
    fabricate(store, HOSTILE, data=HOSTILE, c_acc=0.5)
    site = write_site(store, tmp_path / "site", title=HOSTILE, progress=False)
    text = site.index.read_text(encoding="utf-8")
    assert "<img" not in text and len(site.broken) == 1
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert HOSTILE in {line["reason"] for line in data["lines"]}


def test_the_command(ran: Ran, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", str(ran[0].root), "--out", str(tmp_path / "site"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and said["runs"] == 6 and Path(said["index"]).is_file()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "none")])
    assert end.value.code == 1 and "no store" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["report", str(ran[0].root), "--grid", "smok"])
    assert end.value.code == 2 and "smoke" in capsys.readouterr().err
