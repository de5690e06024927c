"""Lipschitz bounds: which convolution feeds which BatchNorm, and singular values one by one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import analysis
from bbfast.analysis._lipschitz import channel_bounds, operator_norm, paired
from bbfast.attacks import AttackResult
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

SIZE = (3, 32, 32)


def test_each_channel_by_numpy(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("lipschitz", badnets, out=tmp_path, device="cpu", u=2)
    names, arrays = found.numbers.meta["layers"], found.numbers.arrays
    at = dict(zip(names, np.split(np.arange(arrays["offsets"][-1]), arrays["offsets"][1:-1]), strict=True))
    for name in names:
        layer = badnets.model.get_submodule(name)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_var is not None
            wanted = (layer.weight.abs() / (layer.running_var + layer.eps).sqrt()).detach().numpy()
        else:
            kernels = layer.get_parameter("weight").detach().numpy()
            wanted = [np.linalg.norm(k.reshape(len(k), -1) if k.ndim > 1 else k, 2) for k in kernels]
        np.testing.assert_allclose(arrays["L"][at[name]], wanted, rtol=1e-5, err_msg=name)
    for norm, conv in found.numbers.meta["pairs"].items():
        together = arrays["L"][at[norm]] * arrays["L"][at[conv]]
        for name in (norm, conv):
            np.testing.assert_allclose(arrays["L_bn"][at[name]], together, rtol=1e-5)
    row = next(row for row in found.numbers.table if row["layer"] == "layer3.0.bn2")
    values = arrays["L_bn"][at["layer3.0.bn2"]].astype(float)
    assert row["outliers"] == int((values > values.mean() + 2 * values.std(ddof=1)).sum())
    assert row["convolution"] == "layer3.0.conv1" and 0 <= found.summary["jaccard_top_5_percent"] <= 1


def test_pre_activation_networks_pair_what_is_fed() -> None:
    """The reference pairs layer2.0.bn1, behind a sum, with a convolution of layer1 or a shortcut."""
    pairs = paired(build("preactresnet18", 10, 32).eval(), SIZE)
    assert pairs.how == "fx" and len(pairs.convs) == 9
    assert pairs.convs.pop("layer1.0.bn1") == "conv1"  # the stem, with nothing between
    assert pairs.convs == {f"layer{i}.{j}.bn2": f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)}


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("vgg19_bn", 16), ("convnext_tiny", 0)])
def test_post_activation_networks_are_paired_throughout(name: str, count: int) -> None:
    model = build(name, 10, 32).eval()
    pairs = paired(model, SIZE)
    assert pairs.how == "fx" and len(pairs.convs) == count
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Branching(nn.Module):
    """Cannot be traced; its layers are registered in an order that misleads, and one BatchNorm follows a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.bn_first, self.bn_second, self.bn_sum = (nn.BatchNorm2d(4) for _ in range(3))
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 10)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = -x
        a = self.relu(self.bn_first(self.drop(self.first(x))))
        b = self.relu(self.bn_second(self.second(a)))
        logits: Tensor = self.head(self.bn_sum(a + b).mean((2, 3)))
        return logits


def test_the_order_of_execution_where_there_is_no_graph(badnets: AttackResult, tmp_path: Path) -> None:
    model = Branching().eval()
    pairs = paired(model, SIZE)
    assert pairs.how == "hook" and pairs.convs == {"bn_first": "first", "bn_second": "second"}
    found = analysis.run("lipschitz", dataclasses.replace(badnets, model=model), out=tmp_path, device="cpu", n=0)
    assert found.numbers.meta["pairing"] == "hook" and np.isnan(found.numbers.arrays["tac"]).all()
    assert found.figure is not None


def test_scaling_gamma_scales_the_bound(badnets: AttackResult) -> None:
    model = copy.deepcopy(badnets.model)
    norm, conv = model.get_submodule("layer2.0.bn2"), model.get_submodule("layer2.0.conv1")
    before = channel_bounds(norm, conv)
    with torch.no_grad():
        norm.get_parameter("weight").mul_(-3)
    torch.testing.assert_close(channel_bounds(norm, conv), 3 * before, rtol=1e-6, atol=0)


def test_norm_of_a_whole_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).requires_grad_(False)
    basis = torch.eye(2 * 6 * 6).view(-1, 2, 6, 6)
    dense = torch.nn.functional.conv2d(basis, conv.weight, None, 2, 1).flatten(1)
    norm = operator_norm(conv, (1, 2, 6, 6), 200, torch.Generator().manual_seed(1))
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-4)
    linear = nn.Linear(5, 4)
    assert operator_norm(linear, (1, 5), 0, torch.Generator()) == pytest.approx(
        float(torch.linalg.svdvals(linear.weight.detach())[0]), rel=1e-5
    )


def test_norm_of_a_large_matrix() -> None:
    linear = nn.Linear(900, 600)
    norm = operator_norm(linear, (1, 900), 0, torch.Generator().manual_seed(0))
    assert norm == pytest.approx(float(torch.linalg.svdvals(linear.weight.detach().double())[0]), rel=1e-5)
    assert norm == operator_norm(linear, (1, 900), 0, torch.Generator().manual_seed(0))


def test_without_layers(badnets: AttackResult, tmp_path: Path) -> None:
    bare = nn.Sequential(nn.Flatten(), nn.LayerNorm(3072))
    with pytest.raises(UnsupportedModelError, match="lipschitz cannot work on Sequential"):
        analysis.run("lipschitz", dataclasses.replace(badnets, model=bare), out=tmp_path, device="cpu")
