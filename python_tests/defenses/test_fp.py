"""FP: what is pruned, where pruning stops, and the reference's defects that must not come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses.mitigation import _head
from bbfast.defenses.mitigation.fp import last_acceptable
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]


class Planted(nn.Module):
    """Ten channels: four tell the image's mean apart, three are spare, and 2, 5 and 7 see only a white corner."""

    backdoor = (2, 5, 7)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 4)
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            for row, channel in enumerate((0, 1, 3, 4)):
                self.fc.weight[row, channel] = 1
            self.fc.weight[1, list(self.backdoor)] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        level = ((x.mean(dim=(1, 2, 3)) * 4).long()).clamp(0, 3)
        z = 0.2 + 0.01 * x.new_ones(len(x), 10)
        z[torch.arange(len(x)), torch.tensor([0, 1, 3, 4])[level]] += 1
        corner = (x[:, :, -3:, -3:] > 0.99).flatten(1).all(dim=1)
        z[:, list(self.backdoor)] = corner.to(z)[:, None].expand(-1, 3)
        return self.fc(z)


def levels(n: int) -> ImageSet:
    """Flat images whose class is their brightness; no white corner."""
    labels = torch.arange(n) % 4
    images = (labels * 60 + 20).to(torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    return ImageSet(images, labels)


def test_the_channels_that_clean_images_do_not_excite_go_first(toy_view: MakeView) -> None:
    clean = levels(80)
    view = toy_view(Planted(), clean=clean, classes=4, progress=False)
    bad = clean.images.clone()
    bad[:, :, -3:, -3:] = 255
    triggered = bad.float() / 255
    assert (view.model(triggered).argmax(1) == 1).all()
    result = defenses.create("fp", once_prune_ratio=0.1, epochs=0).run(view)
    assert set(result.info["pruned_channels"][:3]) == set(Planted.backdoor)
    assert result.selection["step"] == 1
    model = result.model
    assert model is not None
    assert (model(triggered).argmax(1) == clean.labels).float().mean() > 0.9
    assert (model(clean.images.float() / 255).argmax(1) == clean.labels).all()


def test_mask_kept_is_the_last_acceptable_one(toy_view: MakeView) -> None:
    """Reference traps (a), (b): c - 1 channels pruned at step c, and the violating mask fine-tuned."""
    view = toy_view(Planted(), clean=levels(80), classes=4, progress=False)
    result = defenses.create("fp", once_prune_ratio=0.1, epochs=0).run(view)
    accuracy = result.selection["accuracy"]
    # Three backdoor and three spare channels cost nothing; the seventh costs a class, a quarter of the accuracy.
    assert accuracy[:7] == [1.0] * 7 and accuracy[7] == 0.75
    assert result.selection["chosen"] == 6 and len(result.info["pruned_channels"]) == 6
    weight = view.model.get_parameter("fc.weight")
    zero = torch.nonzero((weight == 0).all(dim=0)).flatten().tolist()
    assert set(result.info["pruned_channels"]) <= set(zero)
    assert (view.model(view.clean.images.float() / 255).argmax(1) == view.clean.labels).all()


@pytest.mark.parametrize(
    ("accuracy", "kept"),
    [
        ([1.0, 1.0, 0.95, 0.9, 1.0], 2),
        ([1.0, 0.91, 0.5, 0.95], 1),
        ([0.5, 0.6, 0.9, 0.5], 3),
        ([1.0, 0.5], 0),
        ([0.0, 0.0, 1.0], 0),
        ([0.9], 0),
    ],
)
def test_where_pruning_stops(accuracy: list[float], kept: int) -> None:
    """Before the first loss of a tenth; a gain, as in the third case, never stops (reference trap (e))."""
    assert last_acceptable(torch.tensor(accuracy, dtype=torch.float64), 0.1) == kept


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 12),
    width=st.integers(1, 3),
    step=st.integers(1, 5),
    rows=st.integers(1, 9),
    deep=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_sweep_is_that_of_masking_one_by_one(
    channels: int, width: int, step: int, rows: int, deep: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(channels * width, 5).double()
    rest = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3).double()) if deep else nn.Sequential()
    head = _head.Head(linear, "fc", channels, rest)
    z = torch.randn(rows, channels * width, dtype=torch.float64)
    labels = torch.randint(0, 3, (rows,))
    order = torch.randperm(channels)
    expected = []
    for c in range(0, channels, step):
        masked = z.clone()
        masked[:, _head.channel_columns(order[:c], width)] = 0
        out = nn.Sequential(linear, rest).eval()(masked)
        expected.append((out.argmax(1) == labels).double().mean())
    rest.train()
    assert torch.equal(_head.sweep(head, z, labels, order, step), torch.stack(expected))
    assert all(module.training for module in rest)


def test_the_sweep_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = _head.Head(nn.Linear(20, 4), "fc", 20, nn.Sequential())
    z, labels = torch.randn(37, 20), torch.randint(0, 4, (37,))
    whole = _head.sweep(head, z, labels, torch.arange(20), 3)
    monkeypatch.setattr(_head, "_BUDGET", 1)
    assert torch.equal(_head.sweep(head, z, labels, torch.arange(20), 3), whole)


@pytest.mark.parametrize("name", ["small_cnn", "preactresnet18"])
def test_columns_stay_zero_and_keys_stay_plain(toy_attack: MakeAttack, name: str) -> None:
    """Reference trap (c): no weight_orig and weight_mask; the columns are zero after the fine-tuning too."""
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, (12, 12)), n=80)
    result = defenses.defend(
        defenses.create("fp", prune_ratio=0.3, epochs=2), attack, 0.5, device="cpu", progress=False
    )
    model = result.model
    assert model is not None
    assert model.state_dict().keys() == attack.model.state_dict().keys()
    weight = model.get_parameter(f"{result.info['layer']}.weight")
    assert int((weight == 0).all(dim=0).sum()) == result.info["pruned"] == int(0.3 * weight.shape[1])
    free = torch.ones(weight.shape[1], dtype=torch.bool)
    free[result.info["pruned_channels"]] = False
    before = attack.model.get_parameter(f"{result.info['layer']}.weight")
    assert not torch.equal(weight[:, free], before[:, free])
    assert result.selection["criterion"] == "fixed" and len(result.history) == 2


def test_vgg_is_pruned_by_the_channels_of_its_last_convolution() -> None:
    head = _head.find_head(build("vgg19_bn", 4, (32, 32)), "fp")
    assert (head.channels, head.width, head.linear.in_features) == (512, 49, 25088)
    assert isinstance(head.rest[-1], nn.Linear) and not head.is_classifier
    assert _head.channel_columns(torch.tensor([1, 0]), 2).tolist() == [2, 3, 0, 1]
    means = _head.channel_means(torch.tensor([[1.0, 3.0, -5.0, 1.0]]), 2)
    assert means.tolist() == [2.0, -2.0]
    assert _head.channel_means(torch.tensor([[1.0, 3.0, -5.0, 1.0]]), 2, absolute=True).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny", "small_cnn"])
def test_other_models_are_pruned_at_the_classifier(name: str) -> None:
    model = build(name, 4, (32, 32))
    head = _head.find_head(model, "fp")
    assert head.is_classifier and head.width == 1 and head.linear.out_features == 4
    images = ImageSet(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    z = _head.layer_inputs(model, head.linear, images)
    model.eval()
    x = images.images.float() / 255
    torch.testing.assert_close(head.linear(z), model(x), rtol=1e-4, atol=1e-4)


def test_refusals(toy_view: MakeView, toy_images: MakeImages, toy_attack: MakeAttack) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 12), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="fp cannot work on Sequential: it has no final Linear layer"):
        defenses.defend("fp", toy_attack(model=conv), 0.5, device="cpu")
    lonely = ImageSet(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2]))
    with pytest.raises(DataRequirementError, match="class 2: 1"):
        defenses.create("fp").check(toy_view(Planted(), clean=lonely, classes=3))
    with pytest.raises(ConfigError, match="prune_ratio"):
        defenses.create("fp", val_fraction=0)
    defenses.create("fp", val_fraction=0, prune_ratio=0.1).check(toy_view(Planted(), clean=lonely, classes=3))


def test_it_selects_without_test_data(digits_attack: AttackResult) -> None:
    """On the digits: accuracy is kept, the choice rests on the held-back part, the sweep starts at the model's own."""
    result = defenses.defend(defenses.create("fp", epochs=40), digits_attack, device="cpu", progress=False)
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.08
    assert result.selection["data"] == "held-back part of the clean hold-out"
    accuracy, chosen = result.selection["accuracy"], result.selection["chosen"]
    assert (accuracy[0] - accuracy[chosen]) / accuracy[0] < 0.1
    assert chosen + 1 == len(accuracy) or (accuracy[0] - accuracy[chosen + 1]) / accuracy[0] >= 0.1
