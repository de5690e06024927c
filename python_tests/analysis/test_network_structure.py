"""Network structure: totals against PyTorch's own, known work, and a difference with itself of nothing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from bbfast import analysis
from bbfast.analysis.tools.network_structure import layers_of
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.models import build

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny", "small_cnn"])
def test_parameters_add_up(name: str) -> None:
    model = build(name, 10, 32).eval()
    rows = layers_of(model, (3, 32, 32), CPU)
    assert sum(row["params"] for row in rows) == sum(p.numel() for p in model.parameters())
    if name == "preactresnet18":
        assert sum(row["macs"] for row in rows) == pytest.approx(0.56e9, rel=0.01)
        first = rows[0]
        assert first == {
            "layer": "conv1",
            "type": "Conv2d",
            "shape": "64x32x32",
            "params": 1728,
            "macs": 1728 * 1024,
        }


def test_attention_by_hand() -> None:
    model = VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10).eval()
    rows = {row["layer"]: row for row in layers_of(model, (3, 32, 32), CPU)}
    assert sum(row["params"] for row in rows.values()) == sum(p.numel() for p in model.parameters())
    attention = rows["encoder.layers.encoder_layer_0.self_attention"]
    assert attention["macs"] == 4 * 17 * 16 * 16 + 2 * 17 * 17 * 16
    assert rows["(model)"]["params"] == 16  # the class token
    assert rows["heads.head"]["macs"] == 160 and rows["conv_proj"]["macs"] == 16 * 16 * 192


def test_shared_parameters_count_once() -> None:
    one = nn.Linear(12, 12)
    model = nn.Sequential(nn.Flatten(), one, nn.ReLU(), one)
    rows = layers_of(model, (3, 2, 2), CPU)
    assert [(row["params"], row["macs"]) for row in rows] == [(156, 288)]


def test_differences(badnets: AttackResult, tmp_path: Path) -> None:
    def against(model: nn.Module) -> analysis.AnalysisResult:
        defended = DefenseResult(kind="mitigation", model=model, config={"defense": "by hand"})
        return analysis.run("network_structure", badnets, defended, tmp_path, device="cpu")

    same = against(copy.deepcopy(badnets.model))
    changes = same.numbers.arrays["rel_change"]
    assert (changes == 0).all() and same.summary["pruned"] == same.summary["replaced"] == 0
    model = copy.deepcopy(badnets.model)
    with torch.no_grad():
        model.get_submodule("conv1").get_parameter("weight")[[2, 5]] = 0
        model.get_submodule("linear").get_parameter("weight").mul_(1.5)
        model.get_submodule("linear").get_parameter("bias").mul_(1.5)
        model.get_submodule("layer1.0.bn1").get_buffer("running_mean").mul_(2)
    found = against(model)
    rows = {row["layer"]: row for row in found.numbers.table}
    assert rows["conv1"]["pruned"] == found.summary["pruned"] == 2
    assert rows["linear"]["rel_change"] == pytest.approx(0.5, abs=1e-6) == found.summary["largest_change"] or (
        rows["conv1"]["rel_change"] == found.summary["largest_change"]
    )
    assert rows["layer1.0.bn1"]["rel_change"] == 0 and rows["layer1.0.bn1"]["stats_change"] > 0


def test_replaced_layers(badnets: AttackResult, tmp_path: Path) -> None:
    model = copy.deepcopy(badnets.model)
    old = model.get_submodule("linear")
    model.linear = nn.Sequential(nn.Linear(old.get_parameter("weight").shape[1], 4), nn.Linear(4, 10))
    defended = DefenseResult(kind="mitigation", model=model.eval(), config={"defense": "by hand"})
    found = analysis.run("network_structure", badnets, defended, tmp_path, device="cpu")
    assert found.summary["replaced"] == 2 and found.summary["removed"] == 1
    assert int(np.isnan(found.numbers.arrays["rel_change"]).sum()) == 2 and found.figure is not None


def test_an_attacked_model_has_no_differences(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("network_structure", badnets, out=tmp_path, device="cpu")
    assert set(found.numbers.arrays) == {"params", "macs"}
    other = dataclasses.replace(badnets, model=build("vgg19_bn", 10, 32).eval())
    assert analysis.run("network_structure", other, out=tmp_path, device="cpu").summary["parameters"] > 1e7
