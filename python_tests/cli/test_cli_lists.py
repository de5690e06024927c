"""``bbfast list``, ``info``, ``doctor`` and the command as a whole."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from bbfast import attacks, datasets, defenses, models, studies
from bbfast._version import __version__
from bbfast.cli import doctor
from bbfast.cli.app import app

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="bbfast")


@pytest.mark.parametrize("module", [attacks, defenses, datasets, models, studies], ids=lambda module: module.__name__)
def test_list_prints_every_registered_name(module: object) -> None:
    kind = module.__name__.removeprefix("bbfast.")  # type: ignore[attr-defined]
    names = module.available()  # type: ignore[attr-defined]
    as_json, as_text = _run("list", kind, "--json"), _run("list", kind)
    assert as_json.exit_code == as_text.exit_code == 0
    assert json.loads(as_json.stdout) == names and names
    shown = [line.split()[0] for line in as_text.stdout.splitlines()[1:] if line.strip()]
    assert shown == names


def test_list_without_a_kind_shows_all_kinds() -> None:
    found = json.loads(_run("list", "--json").stdout)
    assert list(found) == ["attacks", "defenses", "datasets", "models", "analysis", "studies"]
    assert found["attacks"] == attacks.available()


def test_a_kind_without_entries_is_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from bbfast.cli import listing

    monkeypatch.setattr(listing, "names", lambda kind: [])
    assert json.loads(_run("list", "analysis", "--json").stdout) == []
    assert _run("list", "analysis").stdout.strip() == "analysis (0)"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("attacks", n) for n in attacks.available()]
    + [("defenses", n) for n in defenses.available()]
    + [("datasets", n) for n in datasets.available()]
    + [("models", n) for n in models.available()]
    + [("studies", n) for n in studies.available()],
)
def test_info_describes_every_entry(kind: str, name: str) -> None:
    as_json, as_text = _run("info", kind, name, "--json"), _run("info", kind, name)
    assert as_json.exit_code == as_text.exit_code == 0, as_text.stderr
    facts = json.loads(as_json.stdout)
    assert facts["name"] == name and as_text.stdout.startswith(name)
    for setting in facts["settings"]:
        assert setting["type"] not in ("", "any"), setting
        assert setting["name"] in as_text.stdout


@pytest.mark.parametrize("kind", ["attacks", "defenses", "datasets", "studies"])
def test_every_built_in_setting_says_what_it_means(kind: str) -> None:
    for name in json.loads(_run("list", kind, "--json").stdout):
        for setting in json.loads(_run("info", kind, name, "--json").stdout)["settings"]:
            assert setting["help"], f"{kind} {name}: {setting['name']} is not explained"


def test_settings_show_type_range_and_default() -> None:
    settings = {s["name"]: s for s in json.loads(_run("info", "attacks", "badnets", "--json").stdout)["settings"]}
    assert settings["ratio"]["default"] == 0.1 and settings["ratio"]["range"] == "> 0, <= 1"
    assert settings["ratio"]["type"] == "float or null"
    assert settings["label_mode"]["type"].startswith("all2one | all2all")
    assert settings["source_classes"]["type"] == "list of int" and settings["source_classes"]["default"] == []
    assert settings["target"]["help"].startswith("Class that triggered images")


def test_info_takes_aliases_and_offers_the_nearest_name() -> None:
    for kind, alias, name in (("attacks", "badnet", "badnets"), ("datasets", "tiny", "tiny_imagenet")):
        assert json.loads(_run("info", kind, alias, "--json").stdout)["name"] == name
    for kind, name, near in (
        ("attacks", "badnts", "badnets"),
        ("defenses", "strp", "strip"),
        ("datasets", "cifar11", "cifar10"),
        ("models", "small_cn", "small_cnn"),
    ):
        result = _run("info", kind, name)
        assert result.exit_code == 2 and result.stdout == ""
        assert name in result.stderr and near in result.stderr and result.stderr.startswith("error: ")
    assert _run("info", "analysis", "nothing_of_that_name").exit_code == 2


def test_wrong_kind_is_wrong_usage() -> None:
    assert _run("list", "apples").exit_code == 2
    assert _run("nonsense").exit_code == 2


@pytest.mark.parametrize("name", ["demo", "attack", "defend", "evaluate", "study", "list", "info", "doctor"])
def test_every_command_has_help_with_examples(name: str) -> None:
    result = _run(name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout and f"bbfast {name}" in result.stdout
    assert "--debug" in result.stdout and "--json" in result.stdout


def test_version() -> None:
    assert _run("--version").stdout == f"bbfast {__version__}\n"


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from bbfast.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_doctor_finds_this_machine_in_order() -> None:
    result = _run("doctor", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0, findings
    assert findings["torch"]["value"] == torch.__version__
    assert {
        "python",
        "torchvision",
        "packages",
        "native operations",
        "CPU",
        "cache",
        "optional parts",
    } <= findings.keys()
    text = _run("doctor").stdout
    assert all(topic in text for topic in findings)


def test_doctor_says_what_to_do_about_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "rich":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = _run("doctor")
    assert result.exit_code == 1
    assert "fail" in result.stdout and "pip install rich" in result.stdout


def test_doctor_survives_a_check_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> object:
        raise RuntimeError("no such thing as free space")

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: explode())
    result = _run("doctor", "--json")
    assert result.exit_code == 1
    broken = [finding for finding in json.loads(result.stdout) if finding["state"] == "fail"]
    assert len(broken) == 1 and "free space" in broken[0]["value"]


def test_doctor_without_the_native_module_warns_and_still_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name.startswith("bbfast._C") else find_spec(name)
    )
    result = _run("doctor", "--json")
    native = next(f for f in json.loads(result.stdout) if f["topic"] == "native operations")
    assert result.exit_code == 0 and native["state"] == "warn" and "pip install" in native["remedy"]
