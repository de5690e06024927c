"""A defense's result survives the disk, whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bbfast import artifact
from bbfast.defenses import DefenseResult
from bbfast.errors import ArtifactError, CorruptArtifactError
from bbfast.models import build


def full_result() -> DefenseResult:
    torch.manual_seed(0)
    model = build("small_cnn", 4, (12, 12)).eval()
    return DefenseResult(
        kind="mitigation",
        model=model,
        scores=torch.tensor([0.5, math.nan, -math.inf]),
        flags=torch.tensor([True, False, False]),
        threshold=torch.tensor([0.1, 0.2]),
        trigger={
            k: {"mask": torch.rand(1, 12, 12), "pattern": torch.rand(3, 12, 12), "norm": 1.5 * k, "success": 0.99}
            for k in (0, 3)
        },
        verdict={"backdoored": True, "targets": [3], "anomaly": {0: 0.5, 3: math.inf}},
        metrics={"c_acc": 0.9, "asr": math.nan, "population": "train"},
        seconds=1.25,
        config={"defense": "nc", "defense_config": {"classes": [0, 3]}, "seed": 1},
        history=[{"epoch": 0, "loss": 0.5}],
        selection={"criterion": "val", "accuracy": [0.5, 0.25]},
        info={"passes": {0: 3, 3: 4}, "data_used": ["clean"]},
    )


def test_round_trip(tmp_path: Path) -> None:
    result = full_result()
    again = DefenseResult.load(result.save(tmp_path / "r"))
    assert again.kind == "mitigation" and again.seconds == 1.25
    assert again.model is not None and result.model is not None and not again.model.training
    for key, value in result.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)
    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(again.model(x), result.model(x))
    assert torch.equal(again.scores.nan_to_num(7), result.scores.nan_to_num(7))  # type: ignore[union-attr]
    assert torch.equal(again.flags, result.flags)  # type: ignore[arg-type]
    assert torch.equal(again.threshold, result.threshold)  # type: ignore[arg-type]
    assert set(again.trigger) == {0, 3}
    for k, one in result.trigger.items():
        assert torch.equal(again.trigger[k]["mask"], one["mask"])
        assert torch.equal(again.trigger[k]["pattern"], one["pattern"])
        assert again.trigger[k]["norm"] == one["norm"] and again.trigger[k]["success"] == one["success"]
    assert again.verdict == result.verdict
    assert again.metrics["c_acc"] == 0.9 and math.isnan(again.metrics["asr"])
    assert again.config == result.config and again.history == result.history
    assert again.selection == result.selection
    assert again.info == {"passes": {"0": 3, "3": 4}, "data_used": ["clean"]}


def test_a_bare_result(tmp_path: Path) -> None:
    again = DefenseResult.load(DefenseResult("detection", threshold=0.5).save(tmp_path / "r"))
    assert again.model is None and again.scores is None and again.flags is None and again.threshold == 0.5
    assert again.trigger == {} and again.verdict == {}


def test_a_model_of_unknown_architecture(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    folder = DefenseResult("mitigation", model=net).save(tmp_path / "r")
    with pytest.raises(ArtifactError, match="model="):
        DefenseResult.load(folder)
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    again = DefenseResult.load(folder, model=other)
    assert again.model is other
    assert torch.equal(other.state_dict()["1.weight"], net.state_dict()["1.weight"])


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    folder = full_result().save(tmp_path / "r")
    state = torch.get_rng_state()
    DefenseResult.load(folder)
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_places_and_damage(tmp_path: Path) -> None:
    folder = full_result().save(tmp_path / "r")
    with pytest.raises(ArtifactError, match="there already"):
        full_result().save(folder)
    full_result().save(folder, overwrite=True)
    artifact.write(tmp_path / "other", "attack", config={})
    with pytest.raises(ArtifactError, match="'attack'"):
        DefenseResult.load(tmp_path / "other")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        DefenseResult.load(folder)
