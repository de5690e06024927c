"""TrojanNN: the neurons, the search, both ways of putting the patch on, a picture of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks.prerequisites import default_context
from bbfast.attacks.surrogate import Classifier
from bbfast.attacks.trojannn import TrojanNN, drive_neurons, square_picture, strongest_neurons
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError
from bbfast.store import Store

MakeSet = Callable[..., ImageSet]


class Net(nn.Module):
    """Eight non-linear features, of which 5 and 2 weigh most."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.head = nn.Linear(768, 8), nn.Linear(8, 4)
        with torch.no_grad():
            weight, square = torch.randn(8, 768, generator=generator), square_picture((3, 16, 16)).flatten()
            # Even grey, the start of the search, leaves every feature near its bias.
            self.body.weight.copy_(weight - (weight @ square / square.sum())[:, None])
            self.body.bias.fill_(0.5)
            self.head.weight.copy_(torch.randn(4, 8, generator=generator) * 0.01)
            self.head.weight[:, 5], self.head.weight[:, 2] = -3.0, 2.0
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


@pytest.fixture
def context(tmp_path: Path, make_set: MakeSet) -> AttackContext:
    plain = default_context(make_set(20, 16), 4, 0)
    recipe = bbfast.Recipe(epochs=0)
    return dataclasses.replace(
        plain, fresh_model=lambda seed: Net(), recipe=recipe, store=Store(tmp_path), progress=False
    )


@pytest.fixture
def surrogate() -> Classifier:
    return Classifier(Net(), (0.0,) * 3, (0.5,) * 3)


def test_the_neurons_of_the_largest_weights(surrogate: Classifier) -> None:
    assert strongest_neurons(surrogate.network, 2).tolist() == [5, 2]
    model = bbfast.models.build("small_cnn", 10, 32)
    assert torch.equal(strongest_neurons(model, 3), model.linear.weight.abs().sum(0).argsort(descending=True)[:3])
    with pytest.raises(ValueError, match="neurons must be at most 8, the inputs of the last layer, got 9"):
        strongest_neurons(surrogate.network, 9)


def test_the_built_in_picture() -> None:
    picture = square_picture((3, 32, 32))
    rows = picture[0].any(1).nonzero().flatten()
    assert rows.tolist() == list(range(21, 29)) and picture.unique().tolist() == [0, 0.5]
    for size in (16, 64, 224):
        assert float((square_picture((1, size, size)) > 0).double().mean()) == pytest.approx(0.068, abs=0.035)
    assert bool(square_picture((1, 3, 3)).any())


def test_the_search_drives_the_neurons(surrogate: Classifier) -> None:
    """spec/attacks section 8, 'Acceptance': the activations grow at least fivefold, nothing changes outside."""
    picture, config = square_picture((3, 16, 16)), TrojanNN.Config(iterations=60)
    patch, activation = drive_neurons(surrogate, picture, config, 0)
    assert float(activation[1].sum()) >= 5 * float(activation[0].abs().sum())
    assert float(patch[picture == 0].abs().max()) == 0
    assert float((patch - picture).abs().max()) <= 0.3 + 1e-6 and patch.min() >= 0 and patch.max() <= 1
    found = surrogate.network.body(patch[None].flatten(1) / 0.5)[0, [5, 2]]
    torch.testing.assert_close(activation[1], found)
    # A goal that lies within reach is met, and the search ends there.
    goal = float(activation[0].mean()) + 1
    near, reached = drive_neurons(surrogate, picture, TrojanNN.Config(goal=goal, step=0.001, neurons=1), 0)
    assert float((reached[1] - goal).abs().max()) < 0.2 and not torch.equal(near, patch)
    # Restarts cannot make it worse: the first one is the picture itself.
    more = drive_neurons(surrogate, picture, TrojanNN.Config(iterations=60, restarts=4), 0)[1]
    assert float((more[1] - 100).square().sum()) <= float((activation[1] - 100).square().sum()) + 1e-3


def test_the_best_patch_or_the_last_one(surrogate: Classifier) -> None:
    """A step too large leads away from the goal; only reference mode ends where it happens to be."""
    picture = square_picture((3, 16, 16))
    start = float(drive_neurons(surrogate, picture, TrojanNN.Config(neurons=1), 0)[1][0])
    config = TrojanNN.Config(goal=start + 0.1, iterations=1, step=0.3, neurons=1)
    best, last = (drive_neurons(surrogate, picture, config, 0, keep_best=keep)[0] for keep in (True, False))
    assert torch.equal(best, picture) and not torch.equal(last, picture)


def test_paper_replaces_and_reference_wraps(context: AttackContext, make_set: MakeSet) -> None:
    data = dataclasses.replace(make_set(40, 16, classes=4), mean=(0.4,) * 3, std=(0.5,) * 3)
    paper, reference, faint = (
        attacks.create("trojannn", iterations=20, **more) for more in ({}, {"compat": "reference"}, {"opacity": 0.5})
    )
    for attack in (paper, reference, faint):
        attack.prepare(data, 4, 0, context)
    inside = paper.tensors["mask"].bool()
    out = paper.trigger(data.images)
    assert torch.equal(out[..., inside], paper.tensors["pattern"][:, inside].expand_as(out[..., inside]))
    assert torch.equal(out[..., ~inside], data.images[..., ~inside])
    half = 0.5 * data.images.double() + 0.5 * paper.tensors["pattern"].double()
    assert float((faint.trigger(data.images).double() - half)[..., inside].abs().max()) <= 0.5
    wrapped = reference.trigger(data.images)
    expected = (data.images.int() + reference.tensors["pattern"].int()) % 256
    assert torch.equal(wrapped.int(), expected) and bool((wrapped < data.images).any())
    # The two surrogates differ in what they are fed, so the patches do.
    assert not torch.equal(paper.tensors["pattern"], reference.tensors["pattern"])
    floats = reference.trigger(data.images.float() / 255)
    assert float((floats * 255 - wrapped.float()).abs().max()) < 1e-3
    x = (data.images[:2].float() / 255).requires_grad_()
    paper.trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (~inside).float().expand_as(x))


def test_the_patch_is_kept_for_all_ratios(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(40, 16, classes=4)
    for more in ({}, {"ratio": 0.5}, {"label_mode": "all2all"}, {"opacity": 0.5}):
        attacks.create("trojannn", iterations=5, **more).prepare(data, 4, 0, context)
    assert context.store is not None and len(context.store.list("prerequisite", "trojannn_patch")) == 1
    attacks.create("trojannn", iterations=6).prepare(data, 4, 0, context)
    assert len(context.store.list("prerequisite", "trojannn_patch")) == 2


def test_a_picture_of_ones_own(context: AttackContext, make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set(20, 16, classes=4)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[2:5, 3:6, 1] = 200
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    attack = attacks.create("trojannn", iterations=5, mask_path=tmp_path / "logo.png")
    attack.prepare(data, 4, 0, context)
    assert attack.tensors["mask"].nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (3, 4, 5)]
    pattern = attack.tensors["pattern"]
    assert not pattern[[0, 2]].any() and int(pattern[1, 2:5, 3:6].min()) >= 200 - 77
    assert not attack.files().keys() ^ {str(tmp_path / "logo.png")}
    Image.fromarray(pixels * 0).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="is black everywhere: it has no trigger"):
        attacks.create("trojannn", mask_path=tmp_path / "black.png").prepare(data, 4, 0, context)


@pytest.mark.parametrize(("setting", "value"), [("neurons", 0), ("iterations", 0), ("eps", 0), ("opacity", 1.5)])
def test_bad_settings(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"trojannn: {setting}: .*got {value!r}"):
        attacks.create("trojannn", **{setting: value})
    with pytest.raises(ConfigError, match="adds one patch: opacity and restarts must be 1"):
        attacks.create("trojannn", compat="reference", opacity=0.5)


@pytest.mark.slow
def test_works_on_digits(tmp_path: Path) -> None:
    data = bbfast.datasets.load("digits")
    recipe = bbfast.Recipe.preset("quick", dataset="digits", model="small_cnn", epochs=8)
    attack = attacks.create("trojannn", iterations=50, surrogate_epochs=2)
    result = attacks.attack(attack, data, "small_cnn", recipe, device="cpu", store=tmp_path, progress=False)
    assert result.metrics["c_acc"] >= 0.9 and result.metrics["asr"] >= 0.8
    result.save(tmp_path / "run")
    back = AttackResult.load(tmp_path / "run")
    assert torch.equal(back.trigger(data.test.images[:3]), result.trigger(data.test.images[:3]))
