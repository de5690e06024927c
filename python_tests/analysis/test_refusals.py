"""What no tool can look at is refused, and as far as it can be known before any work."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis._named import find_layer, usable_layer
from bbfast.analysis.base import find
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.errors import BBFastError, DataRequirementError, UnknownNameError, UnsupportedModelError

CPU = torch.device("cpu")
OF_A_LAYER = ("activated_images", "feature_map", "feature_visualization", "grad_cam", "neuron_activation", "tsne")


class Odd(nn.Module):
    """Layers of every kind: in use, never called, called twice, giving a pair, or channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.relu = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(3, 4, 3), nn.ReLU()
        self.pair, self.mixed, self.head = Pair(), nn.Linear(6, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(self.relu(self.first(x)))
        return self.head(self.relu(self.mixed(x.permute(0, 2, 3, 1))).mean((1, 2)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def looked_at(attacked: AttackResult, model: nn.Module) -> Subject:
    stand_in: Any = SimpleNamespace(model=model)
    return Subject(attacked, stand_in, CPU)


@pytest.mark.parametrize("name", OF_A_LAYER)
@pytest.mark.parametrize(
    ("layer", "why"),
    [("spare", "the model never calls it"), ("relu", "calls it 2 times"), ("pair", "does not put out one tensor")],
)
def test_layers_that_will_not_do(name: str, layer: str, why: str, badnets: AttackResult) -> None:
    torch.manual_seed(0)
    tool = analysis.create(name, layer=layer)
    with pytest.raises(UnsupportedModelError, match=rf"{name} cannot work on layer '{layer}': .*{why}.*can use: first"):
        tool.check(looked_at(badnets, Odd()))


def test_channels_last(badnets: AttackResult) -> None:
    """Of a linear layer over maps the last axis is channels: five of them, and 4 x 4 places."""
    torch.manual_seed(0)
    subject = looked_at(badnets, Odd())
    cam = analysis.create("grad_cam", layer="mixed", shown=1, n_stat=3)
    cam.check(subject)
    images = subject.pairs(1).clean
    with torch.no_grad():
        x = subject.model.relu(subject.model.first(subject.pixels(images))).permute(0, 2, 3, 1)
        maps = subject.model.mixed(x)[0]
        best = int(subject.logits(images).argmax())
        # The logit is linear behind the ReLU: the slope is the head's weight where a channel is on.
        weight = (subject.model.head.weight[best] * (maps > 0)).mean((0, 1))
        wanted = (maps * weight).sum(2).relu()
    got = cam._cams(subject, "mixed", images)[0][0]
    wanted = torch.nn.functional.interpolate(wanted[None, None], (32, 32), mode="bilinear")[0, 0]
    torch.testing.assert_close(got, (wanted - wanted.min()) / (wanted.max() - wanted.min()), rtol=1e-3, atol=1e-4)
    painted = analysis.create("feature_visualization", layer="mixed", steps=1, n_stat=3).measure(subject)
    assert len(painted.arrays["img"]) == 5


def test_unknown_layers(badnets: AttackResult) -> None:
    with pytest.raises(UnknownNameError, match=r"closest of \d+: 'linear', .*roles that name one: .*last_conv") as info:
        Subject(badnets, None, CPU).layer("linaer")
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    names = "it has 'first', 'spare', 'relu', 'pair', 'mixed', 'head'; roles that name one: classifier, penultimate"
    for wrong in ("frist", "", "last_conv"):
        with pytest.raises(UnknownNameError, match=names):
            find_layer(Odd(), wrong)
    # A model with a single layer of channels has no other to name.
    single = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"has no channels of maps \(layers that it can use: 1\)"):
        analysis.create("feature_visualization", layer="2").check(looked_at(badnets, single))
    assert usable_layer(looked_at(badnets, single), "any", "2")[0] == "2"


def test_a_defense_of_another_attack(badnets: AttackResult, tuned: DefenseResult, tmp_path: Path) -> None:
    settings = {**badnets.config["attack_config"], "ratio": 0.2}
    other = dataclasses.replace(badnets, config={**badnets.config, "attack_config": settings, "seed": 7})
    said = "ft was run on another attack: on badnets digits small_cnn ratio 0.1 seed 0, and this is .* ratio 0.2 seed 7"
    with pytest.raises(DataRequirementError, match=rf"{said}; they differ in .*attack_config, .*seed"):
        analysis.run("confusion_matrix", other, tuned, tmp_path, device="cpu")
    assert not any(tmp_path.iterdir())
    elsewhere = dataclasses.replace(badnets, config={**badnets.config, "device": "cuda", "versions": {}})
    by_hand = dataclasses.replace(tuned, config={"defense": "mine"})
    for attacked, defended in ((elsewhere, tuned), (other, by_hand)):
        assert analysis.run("confusion_matrix", attacked, defended, tmp_path, device="cpu", figures=False).summary


WITHOUT_TRIGGER = ("network_structure", "lipschitz")
"""Tools that can do without triggered images."""


@pytest.mark.parametrize("name", [name for name in analysis.available() if name not in WITHOUT_TRIGGER])
def test_no_triggered_images(name: str, badnets: AttackResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    none = badnets.backdoor_test.subset(torch.zeros(0, dtype=torch.int64))
    monkeypatch.setattr(find(name), "measure", lambda *_: pytest.fail("work was begun"))
    if name == "umap" and importlib.util.find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    with pytest.raises(DataRequirementError, match="empty"):
        analysis.run(name, dataclasses.replace(badnets, backdoor_test=none), None, tmp_path, device="cpu")


NO_NUMBERS_OF_THE_MODEL = ("image_quality", "network_structure")
"""They look at images alone, or count parameters."""


@pytest.mark.parametrize("name", [name for name in analysis.available() if name not in NO_NUMBERS_OF_THE_MODEL])
def test_a_model_that_is_not_finite(name: str, badnets: AttackResult, tmp_path: Path) -> None:
    if name == "umap" and importlib.util.find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    model = copy.deepcopy(badnets.model)
    with torch.no_grad():
        next(model.parameters())[0].fill_(torch.nan)
    small = {"hessian": {"n": 4, "probes": 1, "m": 2, "trace_probes": 1}}.get(name, {})
    with pytest.raises(BBFastError, match="not finite"):
        analysis.run(name, dataclasses.replace(badnets, model=model), None, tmp_path, device="cpu", **small)
    assert not any(tmp_path.iterdir())
