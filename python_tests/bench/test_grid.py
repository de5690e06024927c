"""Grids: presets, files, and everything that can be wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bbfast import attacks, defenses
from bbfast.bench import GRIDS, load_grid
from bbfast.errors import ConfigError, UnknownNameError

OWN: dict[str, Any] = {"datasets": ["digits"], "models": ["small_cnn"], "attacks": ["badnets"]}


@pytest.mark.parametrize("name", GRIDS)
def test_presets_are_valid(name: str) -> None:
    grid = load_grid(name)
    assert grid.name == name and load_grid(name) == grid


def test_the_paper_is_the_published_table() -> None:
    grid = load_grid("paper")
    sizes = [len(part) for part in (grid.datasets, grid.models, grid.attacks, grid.ratios, grid.defenses)]
    assert sizes == [4, 4, 12, 5, 16] and grid.preset == "paper"


def test_all_is_everything_registered() -> None:
    grid = load_grid({**OWN, "attacks": "all", "defenses": "all"})
    assert [entry.name for entry in grid.attacks] == attacks.available()
    assert [entry.name for entry in grid.defenses] == ["none", *defenses.available()]


def test_files_bases_and_aliases(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: smoke\n"
        "attacks: [badnet, {name: wanet, label: 'wanet, s 1', set: {s: 1.0}, recipe: {epochs: 3}}]\n"
        "defenses: [no defense, spectral]\n"
        "datasets: [{name: npz, root: images.npz, options: {flip: true}, label: mine}]\n"
    )
    grid = load_grid(path, seeds=[0, 1])
    assert grid.name == "mine" and grid.recipe == {"epochs": 2} and grid.seeds == (0, 1)
    assert [(e.name, e.label) for e in grid.attacks] == [("badnets", "badnets"), ("wanet", "wanet, s 1")]
    assert [(e.name, e.label) for e in grid.defenses] == [("none", "none"), ("ss", "ss")]
    assert grid.datasets[0].label == "mine" and grid.datasets[0].options == {"flip": True}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"atacks": ["badnets"]}, ConfigError, "unknown setting 'atacks'; did you mean attacks"),
        ({"attacks": ["badnetz"]}, UnknownNameError, "did you mean .*'badnets'"),
        ({"defenses": ["nq"]}, UnknownNameError, "unknown defense 'nq'"),
        ({"models": ["small_cn"]}, UnknownNameError, "small_cnn"),
        ({"datasets": ["digit"]}, UnknownNameError, "digits"),
        ({"attacks": []}, ConfigError, "attacks: .*at least 1 item"),
        ({"ratios": [0.1, 1.5]}, ConfigError, r"every ratio must lie in \[0, 1\], not \[1.5\]"),
        ({"seeds": [-1]}, ConfigError, r"seeds must be at least 0, not \[-1\]"),
        ({"attacks": [{"name": "badnets", "set": {"ratio": 0.2}}]}, ConfigError, "ratio is what ratios lists"),
        ({"attacks": [{"name": "badnets", "set": {"tarjet": 1}}]}, ConfigError, "did you mean target"),
        ({"attacks": ["badnets", "badnet"]}, ConfigError, r"attacks must differ, but has \['badnets'\] twice"),
        ({"attacks": [{"name": "badnets", "label": "../up"}]}, ConfigError, "label must match"),
        ({"datasets": [{"name": "digits", "label": "a/b"}]}, ConfigError, "label must match"),
        ({"defenses": [{"name": "nc", "label": "a\\b"}]}, ConfigError, "label must match"),
        ({"attacks": ["../badnets"]}, UnknownNameError, "unknown attack '../badnets'; did you mean .*'badnets'"),
        ({"models": ["/small_cnn"]}, UnknownNameError, "unknown model '/small_cnn'; did you mean .*'small_cnn'"),
        ({"defenses": [{"name": "none", "set": {"x": 1}}]}, ConfigError, "'none' has no settings"),
        ({"defenses": [{"name": "nc", "recipe": {"lr": 1}}]}, ConfigError, "recipe belongs to attacks"),
        ({"recipe": {"epoch": 3}}, ConfigError, "did you mean epochs"),
        ({"clean_fraction": 0}, ConfigError, "clean_fraction: .*got 0"),
        ({"limits": {"seconds": -1}}, ConfigError, "seconds: .*got -1"),
        ({"preset": "papper"}, ConfigError, "preset: .*'paper' or 'quick'.*got 'papper'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_grid({**OWN, **changes})


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the grid .*none\.yaml: No such file"):
        load_grid(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- badnets\n")
    with pytest.raises(ConfigError, match="expected keys such as attacks and datasets, got list"):
        load_grid(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("attacks: [badnets\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml is no YAML"):
        load_grid(tmp_path / "bad.yaml")
    with pytest.raises(UnknownNameError, match="unknown grid preset 'papers'; did you mean 'paper'"):
        load_grid("papers")
    (tmp_path / "smoke").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert load_grid("smoke").name == "smoke", "a folder of results of that name is no grid"
    (tmp_path / "base.yaml").write_text("base: nothing\n")
    with pytest.raises(UnknownNameError, match="unknown grid preset 'nothing'"):
        load_grid(tmp_path / "base.yaml")
