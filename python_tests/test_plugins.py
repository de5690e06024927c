"""A package that bbfast has never heard of adds an attack and a defense by its entry points alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = '''
"""One attack and one defense of a third party."""

import torch

from bbfast.attacks import Attack, Card, register_attack
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.defenses import Defense, DefenseCard, DefenseResult, register_defense


@register_attack("acme_stripe")
class Stripe(Attack):
    """A white row at the top."""

    card = Card(title="Stripe", paper="Acme tests", year=2030, threat="poison-only", label_modes=LABEL_MODES)

    def fit(self, data, num_classes, seed, context):
        return {}

    def apply(self, images, index, stage):
        out = images.clone()
        out[:, :, :2] = 255
        return out


@register_defense("acme_bright")
class Bright(Defense):
    """Flags images whose first row is white."""

    card = DefenseCard(
        title="Bright", paper="Acme tests", year=2030, arxiv="", kinds=("detection",),
        needs=frozenset({"poisoned_train"}), summary="Looks at the first row.",
    )

    def run(self, view):
        scores = view.poisoned_train.images[:, :, 0].float().mean(dim=(1, 2))
        return DefenseResult(kind="detection", scores=scores, flags=scores > 254)
'''


def _install(folder: Path, module: str = MODULE) -> Path:
    """What an installer leaves behind: the module, and beside it the metadata that names its entry points."""
    folder.mkdir()
    (folder / "acme_backdoors.py").write_text(module)
    info = folder / "acme_backdoors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-backdoors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bbfast.attacks]\nacme_stripe = acme_backdoors:Stripe\n"
        "[bbfast.defenses]\nacme_bright = acme_backdoors:Bright\n"
    )
    return folder


def _bbfast(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(Path(__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-m", "bbfast.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _install(tmp_path_factory.mktemp("third-party") / "site")


def test_it_is_listed_and_described(site: Path) -> None:
    everything = _bbfast(site, "list", "--json")
    assert everything.returncode == 0, everything.stderr
    names = json.loads(everything.stdout)
    assert "acme_stripe" in names["attacks"] and "badnets" in names["attacks"]
    assert "acme_bright" in names["defenses"]
    described = _bbfast(site, "info", "attacks", "acme_stripe", "--json")
    assert json.loads(described.stdout)["title"] == "Stripe"


def test_it_runs(site: Path, tmp_path: Path) -> None:
    quick = (
        "--dataset",
        "digits",
        "--model",
        "small_cnn",
        "--preset",
        "quick",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    )
    attack = _bbfast(site, "attack", "acme_stripe", *quick, "--json")
    assert attack.returncode == 0, attack.stderr
    attacked = json.loads(attack.stdout)
    assert attacked["attack"] == "acme_stripe" and 0 <= attacked["asr"] <= 1
    defense = _bbfast(site, "defend", "acme_bright", "--attack", attacked["folder"], "--json")
    assert defense.returncode == 0, defense.stderr
    figures = json.loads(defense.stdout)
    assert figures["tpr"] == 1.0 and figures["fpr"] < 0.5
    again = _bbfast(site, "evaluate", figures["folder"], "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["same"] is True


def test_a_broken_one_is_reported_and_left_out(tmp_path: Path) -> None:
    site = _install(tmp_path / "site", "raise ImportError('acme needs a licence')")
    listed = _bbfast(site, "list", "attacks", "--json")
    assert listed.returncode == 0
    assert "badnets" in json.loads(listed.stdout) and "acme_stripe" not in listed.stdout
    assert "acme_stripe" in listed.stderr and "acme needs a licence" in listed.stderr
