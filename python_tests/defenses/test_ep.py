"""EP: the entropy of standardised maxima, and what is pruned by it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses.mitigation import ep
from bbfast.defenses.mitigation._norms import Norms, some
from bbfast.defenses.mitigation.ep import EPConfig, histogram_entropy, standardised
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeImages = Callable[..., ImageSet]


def by_loops(values: Tensor, width: float, strict: bool) -> list[float]:
    """The histogram written out value by value."""
    low, high = float(values.min()), float(values.max())
    bars = int((high - low) / width)
    out = []
    for row in values.tolist():
        counts = [0] * (bars + 1)
        for value in row:
            position = (value - low) / width
            i = math.floor(position)
            if strict and (i >= bars or position == i):
                continue
            counts[min(i, bars)] += 1
        out.append(-sum(c / len(row) * math.log(c / len(row)) for c in counts if c))
    return out


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("width", [0.1, 0.73])
def test_entropy_is_that_of_counting(width: float, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = standardised(torch.randn(9, 50) ** 3)
    expected = torch.tensor(by_loops(values, width, strict), dtype=torch.float64)
    whole = histogram_entropy(values, width, strict)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(ep, "_BUDGET", 1)  # one channel at a time
    assert torch.equal(histogram_entropy(values, width, strict), whole)


def test_strict_bins_drop_the_edges() -> None:
    """Four values on edges and one above the last whole bin: the reference counts the one left."""
    values = torch.tensor([[0.0, 0.25, 1.0, 1.0, 2.0, 2.25]], dtype=torch.float64)
    assert float(histogram_entropy(values, 1.0, strict=True)) == pytest.approx(-math.log(1 / 6) / 6)
    thirds = [2 / 6, 2 / 6, 2 / 6]
    assert float(histogram_entropy(values, 1.0)) == pytest.approx(-sum(p * math.log(p) for p in thirds))


@pytest.mark.parametrize("seed", range(20))
def test_the_channel_with_two_heaps_is_flagged(seed: int) -> None:
    """Spec's acceptance: 64 Gaussian channels, 2,048 samples, one with a tenth of them at +8."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(64, 2048, generator=g)
    values[17, torch.rand(2048, generator=g) < 0.1] += 8
    norms = Norms(nn.Identity(), ("only",), (64,))
    flagged = norms.outliers(histogram_entropy(standardised(values), 0.1), 3.0, "low")
    assert torch.nonzero(flagged).flatten().tolist() == [17]


def test_a_constant_channel_is_not_nan() -> None:
    values = torch.full((2, 30), 0.1)
    values[1] = torch.arange(30)
    z = standardised(values)
    assert torch.equal(z[0], torch.zeros(30, dtype=torch.float64))
    torch.testing.assert_close(z[1].std(), torch.tensor(1.0, dtype=torch.float64))
    assert float(histogram_entropy(z, 0.1)[0]) == 0 and bool(histogram_entropy(z, 0.1).isfinite().all())
    broken = histogram_entropy(torch.tensor([[1.0, torch.nan], [0.0, 3.0]], dtype=torch.float64), 1.0)
    assert broken[0].isnan() and broken[1].isfinite()


class Heaps(nn.Module):
    """The first BatchNorm's channel 5 sees the white corner; the others see noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.conv.weight[5] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


def view_of(model: nn.Module, train: ImageSet, **options: object) -> DefenderView:
    facts = DataFacts("toy", 4, train.image_size, train.mean, train.std)
    return DefenderView("ep", ("model", "poisoned_train"), facts, Grants(model=model, poisoned_train=train))


def triggered(images: ImageSet, part: float = 0.15) -> ImageSet:
    changed = images.images.clone()
    changed[: int(part * len(images)), :, -5:, -5:] = 255
    return ImageSet(changed, images.labels, mean=images.mean, std=images.std)


def test_the_channel_the_trigger_drives_is_pruned(toy_images: MakeImages) -> None:
    train = triggered(toy_images(400, 4))
    result = defenses.create("ep", u=2.5).run(view_of(Heaps(), train))
    assert result.info["pruned_channels"] == {"norm": [5]} and result.info["samples"] == 400
    model = result.model
    assert isinstance(model, Heaps)
    assert model.norm.weight[5] == 0 == model.norm.bias[5] and int((model.norm.weight == 0).sum()) == 1
    kept = defenses.create("ep", u=2.5, prune_bias=False).run(view_of(Heaps(), train)).model
    assert isinstance(kept, Heaps) and kept.norm.weight[5] == 0
    assert torch.equal(kept.norm.bias, Heaps().norm.bias)


@pytest.mark.parametrize("num_samples", [2048, 64])  # all of them, and some
def test_the_order_of_the_training_set_does_not_matter(toy_images: MakeImages, num_samples: int) -> None:
    train = triggered(toy_images(200, 4))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    ep = defenses.create("ep", u=1.0, num_samples=num_samples)
    a, b = (ep.run(view_of(Heaps(), t)).info for t in (train, train.subset(order)))
    assert a == b and a["pruned"] > 0 and a["samples"] == min(num_samples, 200)


def test_some_samples_are_those_of_any_order(toy_images: MakeImages) -> None:
    """Regression: they were drawn by position, so that above the cap another storage order was another sample."""
    train = toy_images(50, 4)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    one, other = (some(t, 20, torch.Generator().manual_seed(1)) for t in (train, train.subset(order)))
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and len(one) == 20
    assert some(train, 50, torch.Generator()) is train and some(train, None, torch.Generator()) is train


def test_some_samples_are_the_same_each_time(toy_images: MakeImages) -> None:
    train = triggered(toy_images(200, 4))
    runs = [defenses.create("ep", u=1.0, num_samples=64).run(view_of(Heaps(), train)).info for _ in range(2)]
    assert runs[0] == runs[1] and runs[0]["samples"] == 64


def test_it_sees_the_training_set_only(digits_attack: AttackResult) -> None:
    result = defenses.defend("ep", digits_attack, device="cpu", progress=False)
    assert result.info["data_used"] == ["model", "poisoned_train"] and "clean" not in result.config
    assert defenses.create("dde").name == "ep"


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny"])
def test_models(toy_attack: MakeAttack, name: str) -> None:
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, 32), n=40, n_test=8, size=(3, 32, 32))
    if name != "convnext_tiny":
        result = defenses.defend("ep", attack, device="cpu", progress=False)
        assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()
        return
    with pytest.raises(UnsupportedModelError, match=r"ep cannot work on convnext_tiny.*norm='layernorm'"):
        defenses.defend("ep", attack, device="cpu")
    result = defenses.defend(defenses.create("ep", norm="layernorm", u=1.0), attack, device="cpu", progress=False)
    assert result.info["pruned"] > 0 and result.info["channels"] == sum(
        m.weight.numel() for m in attack.model.modules() if isinstance(m, nn.LayerNorm)
    )


def test_settings() -> None:
    reference, official = EPConfig(preset="reference"), EPConfig(preset="official")
    assert (reference.num_samples, reference.strict_bins, reference.bin_width) == (256, True, 0.1)
    assert (official.num_samples, official.bin_width, official.prune_bias) == (500, 0.01, False)
    assert EPConfig().num_samples == 2048 and EPConfig().for_dataset("tiny_imagenet").u == 4.0
