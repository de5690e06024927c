"""CLP: the bounds, which convolution belongs to which BatchNorm, and what is pruned."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses.mitigation._norms import Norms
from bbfast.defenses.mitigation._pairs import by_dataflow, by_registration
from bbfast.defenses.mitigation.clp import CLPConfig, channel_bounds
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "clp.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip(f"the golden files are not here ({GOLDEN}); set BBFAST_SHARED")
    with np.load(GOLDEN) as stored:
        return dict(stored)


class Net(nn.Module):
    """Conv, BN, ReLU twice and a linear layer."""

    def __init__(self, widths: tuple[int, int] = (24, 40)) -> None:
        super().__init__()
        a, b = widths
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        )
        self.head = nn.Linear(b, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


def net(seed: int = 0, widths: tuple[int, int] = (24, 40)) -> Net:
    torch.manual_seed(seed)
    model = Net(widths).eval()
    for layer in (model.body[1], model.body[4]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.running_var, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return model


def run(view: DefenderView, **config: object) -> defenses.DefenseResult:
    defense = defenses.create("clp", **config)
    defense.check(view)
    return defense.run(view)


def test_the_bound_is_each_channels_singular_value(toy_view: MakeView) -> None:
    model = net()
    bounds = channel_bounds(Norms.find(model, "clp"), by_registration(model, ["body.1", "body.4"]))
    expected = []
    for conv, norm in ((model.body[0], model.body[1]), (model.body[3], model.body[4])):
        for j in range(conv.out_channels):
            kernel = conv.weight[j].detach().double().reshape(conv.in_channels, -1)
            factor = norm.weight[j].double().abs() / (norm.running_var[j].double() + norm.eps).sqrt()
            expected.append(torch.linalg.svdvals(kernel)[0] * factor)
    torch.testing.assert_close(bounds, torch.stack(expected).detach(), rtol=1e-6, atol=0)


def test_one_loud_channel_is_the_one_pruned(toy_view: MakeView) -> None:
    model = net(widths=(16, 40))
    with torch.no_grad():
        model.body[1].weight[7] *= 100
    result = run(toy_view(model, ("model",)))
    assert result.info["pruned_channels"] == {"body.1": [7]} and result.info["pruned"] == 1
    repaired = result.model
    assert repaired is not None
    assert repaired.body[1].weight[7] == 0 == repaired.body[1].bias[7]  # type: ignore[index, union-attr]
    assert int((repaired.body[1].weight == 0).sum()) == 1  # type: ignore[union-attr, index]
    assert repaired.state_dict().keys() == model.state_dict().keys()


def test_ten_channels_cannot_have_an_outlier_at_three(toy_view: MakeView) -> None:
    """A single outlier's z-score is (n - 1) / sqrt(n) at most: 2.85 for ten channels, 3.02 for eleven."""
    for width, expected in ((10, 0), (11, 1)):
        model = net(widths=(width, 40))
        with torch.no_grad():
            model.body[1].weight[3] *= 1e6
        assert len(run(toy_view(model, ("model",))).info["pruned_channels"].get("body.1", [])) == expected


def test_a_huge_u_changes_nothing_and_zero_prunes_half(toy_view: MakeView) -> None:
    model = net()
    result = run(toy_view(model, ("model",)), u=1e9)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in result.model.state_dict().items())  # type: ignore[union-attr]
    assert 20 <= run(toy_view(model, ("model",)), u=0.0).info["pruned"] <= 44


def test_two_runs_are_the_same_bits(toy_view: MakeView) -> None:
    a, b = (run(toy_view(net(), ("model",)), u=1.0) for _ in range(2))
    assert a.info == b.info and a.info["pruned"] > 0
    other = b.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(v, other[k]) for k, v in a.model.state_dict().items())  # type: ignore[union-attr]


def test_a_variance_of_zero_does_not_hide_the_others(toy_view: MakeView, caplog: pytest.LogCaptureFixture) -> None:
    """Reference: no eps under the root, so that one dead channel makes mean and deviation NaN and nothing is pruned."""
    model = net()
    with torch.no_grad():
        model.body[1].running_var[0] = 0
        model.body[1].weight[7] *= 100
    result = run(toy_view(copy.deepcopy(model), ("model",)), eps=0)
    assert result.info["pruned_channels"]["body.1"] == [7] and result.info["not_finite"] == 1
    assert "1 channels have no finite bound" in caplog.text
    with torch.no_grad():
        model.body[1].running_var[0] = 1e-20  # with BatchNorm's eps it has a large, finite bound
    assert run(toy_view(model, ("model",))).info["not_finite"] == 0


def test_golden_small_net(golden: dict[str, np.ndarray]) -> None:
    model = Net()
    for i in (0, 1, 3, 4):
        for name, tensor in model.body[i].state_dict().items():
            if f"small_w/{i}.{name}" in golden:
                tensor.copy_(torch.from_numpy(golden[f"small_w/{i}.{name}"]).view_as(tensor))
    norms = Norms.find(model, "clp")
    with torch.no_grad():
        model.body[0].weight.copy_(torch.from_numpy(golden["small_w/0.weight"]))
    assert norms.sizes == (24, 40)
    check_golden(golden, norms, by_registration(model, norms.names), "small")


def test_golden_preactresnet18_and_its_time(golden: dict[str, np.ndarray], toy_view: MakeView) -> None:
    torch.manual_seed(0)
    model = build("preactresnet18", 10, 32).eval()
    sums = [m.weight.detach().double().sum() for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not np.allclose(sums, golden["preactresnet18_conv_sums"], rtol=1e-5):
        pytest.skip("seed 0 gives other weights with this torch")
    norms = Norms.find(model, "clp")
    with torch.no_grad():
        for i, layer in enumerate(norms.layers):
            layer.weight.copy_(torch.from_numpy(golden[f"preactresnet18_bn{i}_weight"]))  # type: ignore[operator]
            layer.running_var.copy_(torch.from_numpy(golden[f"preactresnet18_bn{i}_var"]))  # type: ignore[operator]
    pairs = by_registration(model, norms.names)
    check_golden(golden, norms, pairs, "preactresnet18")
    start = time.perf_counter()
    result = run(toy_view(model, ("model",)), preset="reference")
    assert time.perf_counter() - start < 2
    expected = {n: golden[f"preactresnet18_bn{i}_pruned"].tolist() for i, n in enumerate(norms.names)}
    assert result.info["pruned_channels"] == {n: c for n, c in expected.items() if c}


def check_golden(golden: dict[str, np.ndarray], norms: Norms, pairs: dict[str, str], stem: str) -> None:
    bounds = channel_bounds(norms, pairs, eps=0.0)
    pruned = norms.outliers(bounds, 3.0, "high")
    for i, (bound, mask) in enumerate(zip(norms.split(bounds), norms.split(pruned), strict=True)):
        np.testing.assert_allclose(bound.numpy(), golden[f"{stem}_bn{i}_lips"], rtol=1e-4)
        assert torch.nonzero(mask).flatten().tolist() == golden[f"{stem}_bn{i}_pruned"].tolist()


def test_pairs_of_the_pre_activation_network() -> None:
    """The shortcut is registered after conv2, so registration gives it to the next block; the data flow does not."""
    model = build("preactresnet18", 4, 32).eval()
    names = Norms.find(model, "clp").names
    registered, flowing = by_registration(model, names), by_dataflow(model, names, (3, 32, 32))
    assert len(registered) == len(flowing) == 16
    assert registered["layer1.0.bn1"] == flowing["layer1.0.bn1"] == "conv1"
    for stage in ("layer2", "layer3", "layer4"):
        assert registered[f"{stage}.1.bn1"] == f"{stage}.0.shortcut.0"
        assert flowing[f"{stage}.1.bn1"] == f"{stage}.0.conv2"
        assert registered[f"{stage}.0.bn2"] == flowing[f"{stage}.0.bn2"] == f"{stage}.0.conv1"
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pairs_of_vgg() -> None:
    model = build("vgg19_bn", 4, 32).eval()
    names = Norms.find(model, "clp").names
    pairs = by_registration(model, names)
    assert len(pairs) == 16 and pairs == by_dataflow(model, names, (3, 32, 32))
    assert all(int(conv.split(".")[1]) + 1 == int(norm.split(".")[1]) for norm, conv in pairs.items())


class Shuffled(nn.Module):
    """Layers registered in another order than they run, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.BatchNorm2d(8)
        self.q = nn.Conv2d(3, 8, 3)
        self.r = nn.Conv2d(8, 8, 3)
        self.s = nn.BatchNorm2d(8)
        self.t = nn.BatchNorm2d(16)
        self.u = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.p(self.q(x)))
        second = self.s(self.r(first))
        both = self.t(torch.cat([first[:, :, 1:-1, 1:-1], second], dim=1))
        out: Tensor = self.u(both.mean((2, 3)))
        return out


def test_dataflow_does_not_go_by_names_or_registration(toy_view: MakeView) -> None:
    model = Shuffled().eval()
    assert by_dataflow(model, ["p", "s", "t"], (3, 12, 12)) == {"p": "q", "s": "r"}
    assert by_registration(model, ["p", "s", "t"]) == {"s": "r"}
    result = run(toy_view(model, ("model",)), pairing="dataflow")
    assert result.info["unpaired"] == ["t"] and result.info["not_finite"] == 0


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_16"])
def test_models_without_batch_norm_are_refused(toy_attack: MakeAttack, name: str) -> None:
    """The reference returns them unchanged."""
    attack = toy_attack(model=build(name, 4, 32), n=20, n_test=8, size=(3, 32, 32))
    with pytest.raises(UnsupportedModelError, match=f"clp cannot work on {name}: it has no BatchNorm2d"):
        defenses.defend("clp", attack, device="cpu")


def test_other_refusals(toy_view: MakeView) -> None:
    alone = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 144, 4))
    for pairing in ("registration", "dataflow"):
        with pytest.raises(UnsupportedModelError, match="no BatchNorm2d layer has a convolution of its width"):
            run(toy_view(alone, ("model",)), pairing=pairing)
    forgetful = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(UnsupportedModelError, match="'1' keeps no running statistics"):
        defenses.create("clp").check(toy_view(forgetful, ("model",)))


def test_settings() -> None:
    assert CLPConfig().u == 3.0 and CLPConfig().for_dataset("tiny_imagenet").u == 5.0
    assert CLPConfig(u=2.0).for_dataset("tiny_imagenet").u == 2.0
    assert CLPConfig().eps == "bn" and CLPConfig(preset="reference").eps == 0


def test_it_needs_no_data(digits_attack: AttackResult) -> None:
    result = defenses.defend("clp", digits_attack, device="cpu", progress=False)
    assert result.info["data_used"] == ["model"] and "clean" not in result.config
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.05
