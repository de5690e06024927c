"""Trigger activation change: against a dense computation, and the planted channel comes first."""

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
from bbfast.analysis import Subject
from bbfast.analysis._change import changes
from bbfast.analysis._layers import channel_layers
from bbfast.attacks import AttackResult
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

CPU = torch.device("cpu")


def identity(attacked: AttackResult) -> AttackResult:
    """The same with a trigger that changes nothing."""
    bad = attacked.backdoor_test
    place = {number: i for i, number in enumerate(attacked.test.ids.tolist())}
    images = attacked.test.images[[place[number] for number in bad.ids.tolist()]]
    return dataclasses.replace(attacked, backdoor_test=dataclasses.replace(bad, images=images))


def test_zero_for_an_identity_trigger(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("tac", identity(badnets), out=tmp_path, device="cpu", n=50)
    assert all((found.numbers.arrays[key] == 0).all() for key in ("l1", "l2", "z"))
    assert found.figure is not None


@pytest.mark.parametrize("name", ["small_cnn", "transformer"])
def test_equals_the_dense_computation(name: str, badnets: AttackResult) -> None:
    tokens = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)
    model = badnets.model if name == "small_cnn" else tokens.eval()
    subject = Subject(dataclasses.replace(badnets, model=model), None, CPU)
    pairs = subject.pairs(64)
    layers = channel_layers(subject.model, "tac")
    found = {sums.name: sums.means() for sums in changes(subject, pairs, layers, "tac")}
    # The attention's output projection is used by its parameters, so no hook sees it: it is left out.
    assert set(layers) - set(found) == {key for key in layers if key.endswith("out_proj")}
    kept: dict[str, torch.Tensor] = {}
    with subject.watching({key: lambda out, key=key: kept.__setitem__(key, out.clone()) for key in found}):  # type: ignore[misc]
        subject.logits(pairs.clean)
        clean = dict(kept)
        subject.logits(pairs.triggered)
    for key, (l1, l2, z) in found.items():
        a, b = clean[key].double(), kept[key].double()
        if a.dim() == 3:
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        a, b = a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)
        for mine, dense in ((l1, (a - b).abs().sum(2).mean(0)), (l2, (a - b).norm(dim=2).mean(0))):
            torch.testing.assert_close(mine.double(), dense, atol=1e-4, rtol=1e-4, msg=key)
        spread = a.transpose(0, 1).flatten(1).std(1)
        wanted = (a - b).square().mean(2).sqrt().mean(0) / spread
        big = spread > 0.02 * spread.square().mean().sqrt()
        torch.testing.assert_close(z.double()[big], wanted[big], atol=1e-3, rtol=1e-3, msg=key)


def test_ranks_the_planted_channel_first(badnets: AttackResult, tmp_path: Path) -> None:
    """Channel 5 of the first convolution of an untrained network becomes a detector of a striped patch."""
    torch.manual_seed(0)
    model = build("small_cnn", 10, 32).eval()
    name, conv = next((key, m) for key, m in model.named_modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        conv.weight[5] = 0
        # White here and black to the left: stripes, which digits have not.
        conv.weight[5, :, 1, 1], conv.weight[5, :, 1, 0] = 5, -5
        images = identity(badnets).backdoor_test.images.clone()
        images[..., 26:, 26::2], images[..., 26:, 27::2] = 255, 0
    planted = dataclasses.replace(
        badnets, model=model, backdoor_test=dataclasses.replace(badnets.backdoor_test, images=images)
    )
    for norm in ("l2", "l1_sum"):
        found = analysis.run("tac", planted, out=tmp_path, device="cpu", figures=False, norm=norm)
        first = [row for row in found.numbers.table if row["layer"] == name]
        assert first[0]["channel"] == 5 and first[0]["rank"] == 0, norm
    assert found.numbers.meta["layers"][0] == name
    z, offsets = found.numbers.arrays["z"], found.numbers.arrays["offsets"]
    assert int(z[: offsets[1]].argmax()) == 5


def test_a_planted_late_channel_is_first_of_the_network(badnets: AttackResult, tmp_path: Path) -> None:
    """One channel that sees nothing but the trigger's corner, beside seven that see the whole image."""

    class Planted(nn.Module):
        def __init__(self, trunk: nn.Module) -> None:
            super().__init__()
            self.trunk, self.extra = trunk, nn.Conv2d(3, 8, 32, bias=False)
            with torch.no_grad():
                self.extra.weight[3] = 0
                self.extra.weight[3, :, -3:, -3:] = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.trunk(x)
            return logits + self.extra(x).mean((1, 2, 3))[:, None]

    torch.manual_seed(1)
    planted = dataclasses.replace(badnets, model=Planted(copy.deepcopy(badnets.model)).eval())
    found = analysis.run("tac", planted, out=tmp_path, device="cpu", figures=False)
    assert (found.summary["top_layer"], found.summary["top_channel"]) == ("extra", 3)


def test_badnets_and_batches(badnets: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("tac", badnets, out=tmp_path, device="cpu", normalize_by_layer=True)
    assert found.summary["top_z"] > 3 * found.summary["median_z"] and found.summary["top_layer"] != "linear"
    arrays = found.numbers.arrays
    assert arrays["offsets"][-1] == len(arrays["l2"]) and (arrays["l1"] >= arrays["l2"] * 0.999).all()
    assert np.isfinite(arrays["z"]).all()


def test_a_dead_layer_and_values_that_are_not_finite(badnets: AttackResult, tmp_path: Path) -> None:
    model = copy.deepcopy(badnets.model)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        conv.weight.zero_()
    dead = analysis.run("tac", dataclasses.replace(badnets, model=model), out=tmp_path, device="cpu", n=20)
    assert np.isfinite(dead.numbers.arrays["z"]).all() and dead.figure is not None
    with torch.no_grad():
        conv.weight.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="layer 'conv1': it puts out values that are not finite"):
        analysis.run("tac", dataclasses.replace(badnets, model=model), out=tmp_path, device="cpu", n=20)
    bare = nn.Sequential(nn.Flatten(), nn.LayerNorm(3072))
    with pytest.raises(UnsupportedModelError, match="no convolution, linear or BatchNorm layer"):
        analysis.run("tac", dataclasses.replace(badnets, model=bare), out=tmp_path, device="cpu")
