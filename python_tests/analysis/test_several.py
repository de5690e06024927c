"""Several tools on one result: what is run, what is skipped, and that each finds what it finds alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bbfast import analysis
from bbfast.analysis.base import find
from bbfast.analysis.several import planned
from bbfast.attacks import AttackResult
from bbfast.errors import ConfigError, DataRequirementError, MissingExtraError, UnknownNameError, UnsupportedModelError

SLOW = {"feature_visualization", "hessian", "loss_landscape", "shapley", "tsne", "umap"}


def test_groups_and_names() -> None:
    assert [tool.name for tool in planned("all")] == analysis.available()
    assert {tool.name for tool in planned("quick")} == set(analysis.available()) - SLOW
    made = planned("tac, gradcam", {"grad_cam": {"layer": "stage2"}, "gradcam": {"n_stat": 3}})
    assert [tool.name for tool in made] == ["trigger_activation_change", "grad_cam"]
    assert (made[1].config.layer, made[1].config.n_stat, made[0].config.seed) == ("stage2", 3, 0)


@pytest.mark.parametrize(
    ("names", "settings", "error", "said"),
    [
        ("metrics,tsn", {}, UnknownNameError, "unknown analysis tool 'tsn'; did you mean 'tsne'"),
        ("metrics,", {}, UnknownNameError, "unknown analysis tool ''"),
        ("tac,trigger_activation_change", {}, ConfigError, "trigger_activation_change is named twice"),
        ([], {}, ConfigError, "no analysis tool is named"),
        ("metrics,tsne", {"umap": {"seed": 1}}, ConfigError, "settings of umap, which is not among .*: metrics, tsne"),
        ("metrics,tsne", {"tsne": {"sead": 1}}, ConfigError, "tsne: unknown setting 'sead'"),
    ],
)
def test_wrong_names_and_settings_before_anything_is_read(
    names: Any, settings: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        analysis.run_all(names, tmp_path / "no such attack", out=tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_each_finds_what_it_finds_alone(badnets: AttackResult, tmp_path: Path) -> None:
    names = ["grad_cam", "metrics", "neuron_activation"]
    together = analysis.run_all(names, badnets, out=tmp_path / "all", device="cpu", figures=False)
    assert [found.status for found in together] == ["done"] * 3
    for name, found in zip(names, together, strict=True):
        alone = analysis.run(name, badnets, out=tmp_path / "one", device="cpu", figures=False)
        assert found.result is not None and found.result.data == tmp_path / "all" / name / "numbers.npz"
        for key, array in alone.numbers.arrays.items():
            np.testing.assert_array_equal(array, found.result.numbers.arrays[key], err_msg=key)


def _refuse(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def check(*_: Any) -> None:
        raise error

    monkeypatch.setattr(find(name), "check", check)


def test_what_does_not_apply_is_skipped_in_a_group_and_an_error_by_name(
    badnets: AttackResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bbfast.analysis.several.available", lambda: ["grad_cam", "metrics", "network_structure", "umap"]
    )
    _refuse(monkeypatch, "umap", MissingExtraError("umap", "umap-learn", "analysis"))
    _refuse(monkeypatch, "grad_cam", UnsupportedModelError("grad_cam", "a perceptron", "it has no maps"))
    _refuse(monkeypatch, "metrics", RuntimeError("a bug"))
    told: list[str] = []

    def go(names: Any, **more: Any) -> list[analysis.Outcome]:
        return analysis.run_all(names, badnets, out=tmp_path, device="cpu", figures=False, **more)

    found = go("all", say=lambda outcome: told.append(outcome.tool.name))
    assert [(one.tool.name, one.status) for one in found] == [
        ("grad_cam", "skipped"),
        ("metrics", "failed"),
        ("network_structure", "done"),
        ("umap", "skipped"),
    ]
    assert told == [one.tool.name for one in found]
    assert "it has no maps" in found[0].why and "bbfast[analysis]" in found[3].why
    assert found[1].why == "RuntimeError: a bug" and found[1].result is None
    _refuse(monkeypatch, "network_structure", DataRequirementError("no images"))
    assert go("quick", settings={"metrics": {"seed": 1}})[-1].status == "skipped"
    # A layer that the model lacks: the tool's own choice is skipped, the user's is an error.
    _refuse(monkeypatch, "grad_cam", UnknownNameError("layer", "last_conv", ["first"]))
    assert [go("quick", settings=own)[0].status for own in ({}, {"grad_cam": {"layer": "last_conv"}})] == [
        "skipped",
        "failed",
    ]
    with pytest.raises(UnknownNameError, match="last_conv"):
        go(["grad_cam", "metrics"])
    with pytest.raises(RuntimeError, match="a bug"):
        go("metrics,grad_cam")
