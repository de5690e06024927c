"""PDB: the model stamps, undoes the label map, and is whole again after it was stored."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from bbfast import defenses
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.defenses.training import pdb
from bbfast.errors import ConfigError
from bbfast.models import add, build, model_state
from bbfast.models.additions.stamp import stamped

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Seeing(nn.Module):
    """Its logits are what the corner holds, then four numbers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1, 0, 0], torch.arange(1.0, 4).expand(len(x), 3)], dim=1)


def test_stamp_and_label_map() -> None:
    x = torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)
    before = x.clone()
    value = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)
    out = stamped(x, value, 2, 3)
    assert torch.equal(x, before) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out[:, :, :2, :3], value.expand(5, 3, 2, 3))
    assert torch.equal(out[:, :, 2:], x[:, :, 2:]) and torch.equal(out[:, :, :, 3:], x[:, :, :, 3:])
    for shift, expected in ((0, [7.0, 1.0, 2.0, 3.0]), (1, [1.0, 2.0, 3.0, 7.0]), (3, [3.0, 7.0, 1.0, 2.0])):
        model = Seeing()
        add(model, "stamp", value=(7.0, 8.0, 9.0), height=2, width=3, shift=shift)
        assert isinstance(model, Seeing) and not model.state_dict()
        # Class y is what the network calls y + shift: a bijection.
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x)[0], torch.tensor(expected))
    with pytest.raises(ValueError, match="has a stamp already"):
        add(model, "stamp", value=(0.0,) * 3, height=1, width=1)


def test_jitter_turns_and_dims_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 12, 20, generator=g)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    # Rows: bright?, how bright, turned?, how far.
    draws = torch.tensor([[0.9, 0.1, 0.9, 0.1], [0.0, 0.5, 0.0, 0.5], [0.9, 0.9, 0.1, 0.1], [0.0, 0.0, 1.0, 0.25]])
    monkeypatch.setattr(pdb.torch, "rand", lambda *shape: draws)
    out = pdb.jitter((pixels - mean) / std, MEAN, STD) * std + mean
    torch.testing.assert_close(out[0], pixels[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1], 0.75 * pixels[1], rtol=0, atol=1e-6)
    for i, (angle, dim) in {2: (10.0, 1.0), 3: (-5.0, 0.75)}.items():
        ours, theirs = out[i], dim * V.rotate(pixels[i], angle, interpolation=V.InterpolationMode.NEAREST)
        # Nearest pixels may fall either way where a line runs between two.
        assert float(((ours - theirs).abs() < 1e-5).float().mean()) > 0.98, i


def test_jitter_as_often_as_said() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 1, 6, 6)
    out = pdb.jitter(x, (0.0,), (1.0,))
    dimmed = out[:, 0, 3, 3] < 1
    assert abs(float(dimmed.float().mean()) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4000)
    assert float(out[:, 0, 3, 3].min()) >= 0.5


def test_training_set_and_storage(toy_attack: Callable[..., AttackResult], tmp_path: Path) -> None:
    attack = toy_attack()
    seen: list[Any] = []
    plain = pdb._Stamping.make_batch

    def watch(self: Any, batch: Any) -> Any:
        made = plain(self, batch)
        seen.append((batch, made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdb._Stamping, "make_batch", watch)
        method = defenses.create("pdb", epochs=2, batch_size=64, patch_size=3, copies=2)
        result = defenses.defend(method, attack, 0.2, device="cpu", progress=False)
    total, clean = len(attack.train), 40
    assert result.info["stamped"] == 2 * clean
    index = torch.cat([batch.index for batch, _ in seen])
    assert len(index) == 2 * (total + 2 * clean) and int(index.max()) == total + 2 * clean - 1
    corner = (torch.full((3,), 2.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    for batch, made in seen:
        ours = batch.index >= total
        assert torch.equal(made.x[~ours], batch.x[~ours]) and torch.equal(made.y, batch.y)
        torch.testing.assert_close(made.x[ours][:, :, :3, :3], corner.view(3, 1, 1).expand(int(ours.sum()), 3, 3, 3))

    result.save(tmp_path / "r")
    again = DefenseResult.load(tmp_path / "r")
    x = torch.randn(6, 3, 12, 12)
    assert again.model is not None and result.model is not None
    bare = build("small_cnn", 4, (12, 12)).eval()
    bare.load_state_dict(model_state(result.model))
    with torch.no_grad():
        assert torch.equal(again.model(x), result.model(x))
        # The stored weights alone must not pass for the defense's model.
        assert not torch.equal(bare(x), result.model(x))
        seen = stamped(x, corner.view(3, 1, 1), 3, 3)
        torch.testing.assert_close(bare(seen).roll(-1, 1), result.model(x), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_repairs_the_digits(digits_attack: AttackResult) -> None:
    """A quarter of the epochs: the attacker's trigger is overridden, accuracy stays within 5 points."""
    result = defenses.defend(defenses.create("pdb", epochs=25), digits_attack, 0.05, device="cpu", progress=False)
    assert result.metrics["asr"] < 0.15, result.metrics
    assert result.metrics["c_acc"] > result.metrics["c_acc_before"] - 0.05, result.metrics


def test_bad_settings(toy_attack: Callable[..., AttackResult]) -> None:
    with pytest.raises(ConfigError, match=r"patch_size must be at most 12, got 13"):
        defenses.defend(defenses.create("pdb", patch_size=13), toy_attack(), 0.2, device="cpu")
    with pytest.raises(ConfigError, match="multiple of the 4 classes"):
        defenses.defend(defenses.create("pdb", shift=8), toy_attack(), 0.2, device="cpu")
