"""``bbfast attack``, ``defend`` and ``evaluate`` on a store, from the command line to the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import bbfast
from bbfast.cli.app import app
from bbfast.cli.evaluate import TOLERANCE, compare

QUICK = ("--dataset", "digits", "--model", "small_cnn", "--preset", "quick", "--epochs", "2")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="bbfast")


def _json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def attacked(store: Path) -> dict[str, Any]:
    return _json(_run("attack", "badnets", *QUICK, "--ratio", 0.1, "--target", 3, "--out", store, "--json"))


@pytest.fixture(scope="module")
def defended(attacked: Mapping[str, Any]) -> dict[str, Any]:
    return _json(_run("defend", "ft", "--attack", attacked["folder"], "--set", "epochs=1", "--json"))


def test_attack_stores_what_it_prints(attacked: Mapping[str, Any], store: Path) -> None:
    folder = Path(attacked["folder"])
    assert folder.parent == store and folder.name.startswith("attack-badnets-") and attacked["reused"] is False
    result = bbfast.AttackResult.load(folder)
    assert {key: result.metrics[key] for key in ("c_acc", "asr", "r_acc")} == {
        key: attacked[key] for key in ("c_acc", "asr", "r_acc")
    }
    assert result.config["attack_config"]["target"] == 3 and result.config["recipe"]["epochs"] == 2


def test_attack_is_what_the_library_gives(attacked: Mapping[str, Any]) -> None:
    recipe = bbfast.Recipe.preset("quick", dataset="digits", model="small_cnn").replace(epochs=2)
    attack = bbfast.attacks.create("badnets", ratio=0.1, target=3)
    result = bbfast.attack(attack, bbfast.datasets.load("digits"), "small_cnn", recipe, progress=False)
    stored = bbfast.AttackResult.load(attacked["folder"])
    assert {k: v for k, v in result.config.items() if k != "versions"} == {
        k: v for k, v in stored.config.items() if k != "versions"
    } | {"model": result.config["model"]}
    assert result.poisoned.equal(stored.poisoned) and result.train.images.equal(stored.train.images)


def test_the_same_attack_is_not_run_again_and_says_so(attacked: Mapping[str, Any], store: Path) -> None:
    again = _run("attack", "badnet", *QUICK, "--set", "ratio=0.1", "--set", "target=3", "--out", store, "--json")
    assert _json(again) == {**attacked, "reused": True}
    assert "not run again" in again.stderr and attacked["folder"] in again.stderr


@pytest.mark.parametrize("change", [("--seed", "1"), ("--lr", "0.05"), ("--set", "square_size=2")])
def test_another_setting_is_another_result(change: tuple[str, ...], attacked: Mapping[str, Any], store: Path) -> None:
    arguments = [*QUICK[:-1], "0", "--ratio", 0.1, "--target", 3, "--out", store, "--json", *change]
    other = _json(_run("attack", "badnets", *arguments))
    assert other["folder"] != attacked["folder"] and other["reused"] is False


def test_table_shows_figures_and_folder(attacked: Mapping[str, Any], store: Path) -> None:
    shown = _run("attack", "badnets", *QUICK, "--ratio", 0.1, "--target", 3, "--out", store).stdout
    for text in ("C-Acc", "ASR", "R-Acc", "Sec.", f"{100 * attacked['c_acc']:.2f}", attacked["folder"]):
        assert text in shown


def test_fresh_makes_it_again_in_the_same_place(tmp_path: Path) -> None:
    arguments = ["attack", "badnets", *QUICK[:-1], "0", "--out", tmp_path, "--json"]
    first, again = _json(_run(*arguments)), _json(_run(*arguments, "--fresh"))
    assert again["folder"] == first["folder"] and again["reused"] is False
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [Path(first["folder"]).name]


def test_defend_stores_beside_the_attack_what_it_prints(
    defended: Mapping[str, Any], attacked: Mapping[str, Any]
) -> None:
    folder = Path(defended["folder"])
    assert folder.parent == Path(attacked["folder"]).parent and folder.name.startswith("defense-ft-")
    result = bbfast.DefenseResult.load(folder)
    for key in ("c_acc", "asr", "r_acc", "der", "rir"):
        assert result.metrics[key] == defended[key]
    again = _run("defend", "ft", "--attack", attacked["folder"], "--set", "epochs=1", "--json")
    assert _json(again) == {**defended, "reused": True} and "not run again" in again.stderr


def test_defend_takes_the_beginning_of_a_folders_name(attacked: Mapping[str, Any], defended: Mapping[str, Any]) -> None:
    short = attacked["folder"][:-4]
    found = _json(_run("defend", "ft", "--attack", short, "--set", "epochs=1", "--json"))
    assert found["folder"] == defended["folder"]


def test_defend_into_another_store(attacked: Mapping[str, Any], tmp_path: Path) -> None:
    found = _json(
        _run("defend", "ac", "--attack", attacked["folder"], "--set", "retrain=false", "--out", tmp_path, "--json")
    )
    assert Path(found["folder"]).parent == tmp_path and 0 <= found["tpr"] <= 1
    assert "c_acc" not in found, "without retraining there is no model to measure"
    lost = _run("evaluate", found["folder"])
    assert lost.exit_code == 1 and "--attack" in lost.stderr
    assert _json(_run("evaluate", found["folder"], "--attack", attacked["folder"], "--json"))["same"] is True


def test_defense_table_compares_with_the_undefended_model(
    attacked: Mapping[str, Any], defended: Mapping[str, Any]
) -> None:
    shown = _run("defend", "ft", "--attack", attacked["folder"], "--set", "epochs=1").stdout
    for text in ("badnets", "ft", "DER", "RIR", f"{100 * attacked['asr']:.2f}", f"{100 * defended['der']:.2f}"):
        assert text in shown


@pytest.mark.parametrize("which", ["attacked", "defended"])
def test_evaluate_finds_the_recorded_figures(which: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(which)
    found = _json(_run("evaluate", made["folder"], "--json"))
    assert found["same"] is True
    assert found["metrics"]["c_acc"] == pytest.approx(made["c_acc"], abs=TOLERANCE)
    assert "c_acc" in _run("evaluate", made["folder"]).stdout


def test_a_wrong_device_is_refused_though_the_result_is_there(attacked: Mapping[str, Any]) -> None:
    for command in (("defend", "ft", "--attack"), ("evaluate",)):
        result = _run(*command, attacked["folder"], "--device", "toaster")
        assert result.exit_code == 2 and "toaster" in result.stderr


def test_evaluate_refuses_another_attack(defended: Mapping[str, Any], tmp_path: Path) -> None:
    other = _json(_run("attack", "badnets", *QUICK[:-1], "0", "--out", tmp_path, "--json"))
    result = _run("evaluate", defended["folder"], "--attack", other["folder"])
    assert result.exit_code == 1 and "was run on another attack" in result.stderr and result.stdout == ""


def test_evaluate_fails_when_the_figures_are_others(
    attacked: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbfast import evaluation

    measured = {"c_acc": attacked["c_acc"] - 0.1, "asr": attacked["asr"], "r_acc": attacked["r_acc"]}
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: measured)
    result = _run("evaluate", attacked["folder"], "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["same"] is False and "differ" in result.stderr


def test_comparison() -> None:
    nan = float("nan")
    recorded = {"a": 0.5, "b": nan, "c": 0.5, "d": "text", "f": 1.0}
    rows = compare(recorded, {"a": 0.5 + TOLERANCE / 2, "b": nan, "c": nan, "d": 1.0, "e": 1.0, "f": 0.99})
    assert {key: row["same"] for key, row in rows.items()} == {"a": True, "b": True, "c": False, "f": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("badnts",), "unknown attack 'badnts'; did you mean 'badnets'"),
        (("badnets", "--dataset", "digit"), "unknown data set 'digit'; did you mean 'digits'"),
        (("badnets", "--model", "smal_cnn"), "unknown model 'smal_cnn'; did you mean 'small_cnn'"),
        (("badnets", "--preset", "papr"), "unknown recipe preset 'papr'; did you mean 'paper'"),
        (("badnets", "--set", "sqare_size=2"), "unknown setting 'sqare_size'; did you mean square_size"),
        (("badnets", "--ratio", "2"), "ratio: "),
        (("badnets", "--ratio", "0"), "ratio: "),
        (("badnets", "--ratio", "0.1", "--set", "ratio=0.2"), "ratio is given twice"),
        (("badnets", "--label-mode", "all2some"), "label_mode: "),
        (("badnets", "--recipe", "epoch=3"), "unknown setting 'epoch'; did you mean epochs"),
        (("badnets", "--epochs", "-1"), "epochs: "),
        (("badnets", "--seed", "-1"), "--seed"),
        (("badnets", "--epochs", "many"), "--epochs"),
        (("badnets", "--device", "toaster"), "toaster"),
        (("badnets", "--device", "meta"), "meta"),
        (("badnets", "--data", "paddin=1"), "unknown setting 'paddin'; did you mean padding"),
        ((), "Missing argument"),
    ],
)
def test_wrong_usage_of_attack(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _run("attack", *arguments, "--out", tmp_path / "store")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr and result.stdout == ""
    assert not (tmp_path / "store").exists(), "nothing is made before the command is understood"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "10"), "target"),
        (("--ratio", "0.0001"), "ratio"),
        (("--label-mode", "clean_label", "--ratio", "0.5"), "clip_to_class"),
        (("--dataset", "cifar10", "--root", "nowhere"), "nowhere"),
        (("--dataset", "npz", "--root", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_what_does_not_fit_fails_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _run("attack", "badnets", *QUICK, *arguments, "--out", tmp_path / "store")
    assert result.exit_code == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last, result.stderr


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = _run("attack", "badnets", *QUICK, "--out", tmp_path / "file")
    assert result.exit_code == 1 and str(tmp_path / "file") in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [("defend", "nc", "--attack"), ("evaluate",)])
def test_a_folder_that_is_no_result(command: tuple[str, ...], tmp_path: Path) -> None:
    missing = _run(*command, tmp_path / "nothing-here")
    empty = _run(*command, tmp_path)
    assert "nothing-here: there is no such folder" in missing.stderr
    for result in (missing, empty):
        assert result.exit_code == 1 and str(tmp_path) in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ncc",), "unknown defense 'ncc'"),
        (("nc", "--set", "epohs=1"), "unknown setting 'epohs'"),
        (("nc", "--clean-fraction", "0"), "--clean-fraction must lie in (0, 1], got 0"),
        (("nc", "--clean-fraction", "2"), "--clean-fraction must lie in (0, 1], got 2"),
    ],
)
def test_wrong_usage_of_defend(arguments: tuple[str, ...], message: str, attacked: Mapping[str, Any]) -> None:
    result = _run("defend", *arguments, "--attack", attacked["folder"])
    assert result.exit_code == 2 and message in result.stderr


def test_a_damaged_result_is_named_and_made_again(tmp_path: Path) -> None:
    arguments = ["attack", "badnets", *QUICK[:-1], "1", "--out", tmp_path, "--json"]
    made = _json(_run(*arguments))
    weights = Path(made["folder"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (("defend", "ft", "--attack"), ("evaluate",)):
        result = _run(*command, made["folder"])
        assert result.exit_code == 1 and str(weights) in result.stderr and "damaged" in result.stderr
    again = _run(*arguments)
    assert _json(again)["reused"] is False and "warning: " in again.stderr and "quarantine" in again.stderr
    assert _json(_run("evaluate", made["folder"], "--json"))["same"] is True


def test_a_result_of_a_newer_bbfast_is_refused(tmp_path: Path) -> None:
    from bbfast.artifact import FORMAT_VERSION

    made = _json(_run("attack", "badnets", *QUICK[:-1], "0", "--out", tmp_path, "--json"))
    manifest = Path(made["folder"]) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["format_version"] = FORMAT_VERSION + 1
    manifest.write_text(json.dumps(content))
    result = _run("evaluate", made["folder"])
    assert result.exit_code == 1 and "update bbfast" in result.stderr


def test_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bbfast.attacks.attack", interrupted)
    result = _run("attack", "badnets", *QUICK, "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted: attack was stopped; run the same command again")
