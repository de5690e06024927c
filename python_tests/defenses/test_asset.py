"""ASSET: medcouple and outlyingness by loops, stacked discriminators, the threshold's formula, order of storage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection import _outlyingness
from bbfast.defenses.detection import asset as module
from bbfast.defenses.detection._outlyingness import adjusted_outlyingness, discriminate, medcouple
from bbfast.defenses.detection.asset import tail_threshold
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import ConfigError, DataRequirementError, DivergedError, UnsupportedModelError
from bbfast.metrics import detection
from bbfast.models import build
from bbfast.training import Recipe

MakeImages = Callable[..., ImageSet]
TINY: dict[str, Any] = {"epochs": 1, "batch_size": 30, "discriminator_steps": 3, "precision": "fp32"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_with(
    data: ImageSet,
    reserve: ImageSet,
    classes: int = 4,
    features: tuple[Tensor, Tensor] | None = None,
    architecture: str = "small_cnn",
    **options: Any,
) -> DefenderView:
    torch.manual_seed(0)
    model = build(architecture, classes, data.image_size[1:]).eval()
    held = {}
    if features is not None:
        held = {("poisoned_train", "penultimate"): features[0], ("reserve", "penultimate"): features[1]}
    grants = Grants(model=model, model_spec=model.bbfast_spec, poisoned_train=data, reserve=reserve, features=held)
    facts = DataFacts("toy", classes, data.image_size, data.mean, data.std, padding=2)
    recipe = Recipe(precision="fp32", deterministic=True)
    needs = defenses.find("asset").card.needs
    return DefenderView("asset", needs, facts, grants, recipe=recipe, progress=False, **options)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- outlyingness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "n", "expected"),
    [
        (0, 5, -0.4819019613804735),
        (1, 8, 0.82081675862102),
        (2, 50, -0.021520127195273558),
        (3, 101, 0.2776423967367408),
        (4, 256, -0.00972036967719225),
    ],
)
def test_medcouple_is_that_of_statsmodels(seed: int, n: int, expected: float) -> None:
    """Five random vectors; the values are of statsmodels 0.15.0."""
    g = np.random.RandomState(seed)
    x = g.gamma(1.5, size=n) if seed % 2 else g.standard_normal(n)
    assert float(medcouple(torch.from_numpy(x)[None])) == pytest.approx(expected, abs=1e-12)


def slow_medcouple(x: list[float]) -> float:
    middle = float(np.median(x))
    above, below = sorted(v for v in x if v >= middle), sorted(v for v in x if v <= middle)
    p = sum(v == middle for v in x)
    # The tied ones are first among those above and last among those below.
    kernel = []
    for i, a in enumerate(above):
        for j, b in enumerate(below):
            if a > b:
                kernel.append(((a - middle) - (middle - b)) / (a - b))
            else:
                kernel.append(float(np.sign(i + (j - (len(below) - p)) - (p - 1))))
    return float(np.median(kernel))


@pytest.mark.parametrize("x", [[1, 2, 2, 2, 3, 9], [0, 0, 0, 1], [5, 5, 5], [4], [1, 2, 3], [3, 3, 1, 7, 7, 3, 2, 10]])
def test_medcouple_of_ties(x: list[float]) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    assert float(medcouple(values[None])) == pytest.approx(slow_medcouple(x))
    assert float(medcouple(-values[None])) == pytest.approx(-slow_medcouple(x))


def test_outlyingness_by_formula() -> None:
    x = np.concatenate([np.random.RandomState(0).gamma(1.0, size=60), [25.0]])
    both = torch.from_numpy(np.stack([x, -x]))
    found = adjusted_outlyingness(both)
    q1, median, q3 = np.percentile(x, [25, 50, 75])
    mc = slow_medcouple(x.tolist())
    assert mc > 0
    low, high = q1 - 1.5 * math.exp(-4 * mc) * (q3 - q1), q3 + 1.5 * math.exp(3 * mc) * (q3 - q1)
    expected = [(v - median) / (high - median) if v >= median else (median - v) / (median - low) for v in x]
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)
    # Mirrored values are as far out: the exponents change sides with the skew.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)


def test_outlyingness_without_spread() -> None:
    assert torch.equal(adjusted_outlyingness(torch.full((2, 9), 0.3)), torch.zeros(2, 9).double())
    lone = torch.full((1, 9), 0.25)
    lone[0, 4] = 1
    found = adjusted_outlyingness(lone)
    assert bool(found[0, 4] > 2)
    assert int((found > 0).sum()) == 1


def test_stacked_discriminators_are_those_alone() -> None:
    g = generator(0)
    inspected, clean = torch.randn(3, 20, 6, generator=g) + 1, torch.randn(3, 12, 6, generator=g)
    settings: dict[str, Any] = {"steps": 20, "lr": 1e-2}
    found = discriminate(inspected, clean, generator=generator(1), **settings)
    weights = []
    draw = generator(1)
    for i, o in ((6, 128), (128, 128), (128, 1)):
        for shape in ((3, i, o), (3, 1, o)):
            weights.append(torch.rand(shape, generator=draw).mul(2).sub(1) / math.sqrt(i))
    for k in range(3):
        net = nn.Sequential(
            nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1), nn.Sigmoid()
        )
        with torch.no_grad():
            for layer, w, b in zip((net[0], net[2], net[4]), weights[::2], weights[1::2], strict=True):
                layer.weight.copy_(w[k].T)
                layer.bias.copy_(b[k, 0])
        up, down = (torch.optim.Adam(net.parameters(), lr=1e-2) for _ in range(2))
        for _ in range(20):
            for optimizer, x, target in ((up, inspected[k], 1.0), (down, clean[k], 0.0)):
                loss = (net(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(found[k], net(inspected[k])[:, 0].detach(), atol=1e-4, rtol=1e-3)


# -- threshold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "deviation"), [(2.3, 0.01), (2.3, 0.4), (-1.0, 50.0)])
def test_threshold_is_where_the_density_has_fallen(mean: float, deviation: float) -> None:
    """Regression: the reference takes a product where the logarithm of a product belongs."""
    scores = mean + deviation * torch.randn(1001, generator=generator(0))
    limit, mu, sd = tail_threshold(scores, 1e-6)
    low = np.sort(scores.double().numpy())[:501]
    assert (mu, sd) == (pytest.approx(low.mean()), pytest.approx(low.std()))
    pdf = math.exp(-0.5 * ((limit - mu) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    assert abs(pdf - 1e-6) < 1e-9
    assert limit > mu


def test_threshold_of_flat_densities() -> None:
    assert tail_threshold(torch.full((6,), 2.0), 1e-6)[0] == 2.0
    limit, mu, _ = tail_threshold(torch.randn(50, generator=generator(0)) * 10, 1.0)
    assert limit == mu


# -- the defense ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_suspects_end_with_high_losses(toy_images: MakeImages) -> None:
    """The sign: what stands out in the features is pushed up, and flagged."""
    data, reserve = toy_images(240, 4), toy_images(60, 4, seed=5)
    truth = torch.arange(240) % 20 == 3
    images = data.images.clone()
    images[truth, :, -4:, -4:] = 255
    labels = data.labels.masked_fill(truth, 1)
    read, clean = torch.randn(240, 16, generator=generator(0)), torch.randn(60, 16, generator=generator(1))
    read[truth] += 40
    view = view_with(ImageSet(images, labels, data.mean, data.std), reserve, features=(read, clean))
    result = defenses.create("asset", epochs=30, batch_size=60, precision="fp32").run(view)
    scores, flags = rows(result)
    assert detection(scores, truth)["auroc"] > 0.95
    assert bool(flags[truth].double().mean() > 0.5)
    # Noise has no classes: clean samples of the pushed label may be carried along, others are not.
    assert not bool(flags[~truth & (labels != 1)].any())
    assert torch.equal(flags, scores > result.threshold)
    assert sum(row["suspects"] for row in result.history) >= 0.9 * 30 * 12
    assert len(result.history) == 30 * 4


def test_the_offset_falls(toy_images: MakeImages) -> None:
    """The spread of clean logits over classes, smoothed, falls over the run; nothing stands out, nothing is pushed."""
    view = view_with(toy_images(240, 4), toy_images(60, 4, seed=5), features=(torch.ones(240, 5), torch.ones(60, 5)))
    result = defenses.create("asset", epochs=5, batch_size=60, precision="fp32").run(view)
    smooth = np.array([row["clean_variance"] for row in result.history]).reshape(5, 4).mean(axis=1)
    assert bool((np.diff(smooth) < 0).all())


def test_features_are_read_once_and_the_model_is_left_alone(
    toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the reference makes features anew at each step, in train mode, which moves BatchNorm."""
    view = view_with(toy_images(70, 4), toy_images(20, 4, seed=5))
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    calls: list[int] = []
    view.model.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))
    defenses.create("asset", **TINY).run(view)
    assert sum(calls) == 70 + 20
    assert not view.model.training
    for name, value in view.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_storage_order_does_not_matter(toy_images: MakeImages) -> None:
    data, reserve = toy_images(100, 4), toy_images(24, 4, seed=5)
    order = torch.randperm(100, generator=generator(0))
    mixed = torch.randperm(24, generator=generator(1))
    one = defenses.create("asset", **TINY).run(view_with(data, reserve))
    other = defenses.create("asset", **TINY).run(
        view_with(
            ImageSet(data.images[order], data.labels[order], data.mean, data.std),
            ImageSet(reserve.images[mixed], reserve.labels[mixed], data.mean, data.std),
        )
    )
    # Features are read in stored batches, whose products round differently.
    torch.testing.assert_close(rows(other)[0], rows(one)[0][order], atol=1e-4, rtol=1e-4)
    again = defenses.create("asset", **TINY).run(view_with(data, reserve))
    assert torch.equal(rows(again)[0], rows(one)[0])
    seeded = defenses.create("asset", **TINY).run(view_with(data, reserve, seed=3))
    assert not torch.equal(rows(seeded)[0], rows(one)[0])


@pytest.mark.parametrize("values", [1, 1 << 30])
def test_groups_of_batches(toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    """Every sample once an epoch, batches of one length together, whatever fits."""
    monkeypatch.setattr(module, "_GROUP_VALUES", values)
    sizes: list[tuple[int, ...]] = []
    plain = _outlyingness.discriminate

    def spy(inspected: Tensor, clean: Tensor, **settings: Any) -> Tensor:
        sizes.append(tuple(inspected.shape[:2]))
        return plain(inspected, clean, **settings)

    monkeypatch.setattr(module, "discriminate", spy)
    view = view_with(toy_images(70, 4), toy_images(20, 4, seed=5))
    defenses.create("asset", **{**TINY, "epochs": 2}).run(view)
    expected = [(1, 30), (1, 30), (1, 10)] if values == 1 else [(2, 30), (1, 10)]
    assert sizes == expected * 2


def test_bad_input(toy_images: MakeImages) -> None:
    data, reserve = toy_images(40, 4), toy_images(8, 4, seed=5)
    asset = defenses.create("asset", **TINY)
    with pytest.raises(DataRequirementError, match="at least 2 clean images, the reserve has 1"):
        asset.check(view_with(data, reserve[:1]))
    with pytest.raises(DataRequirementError, match="at least 4, there are 3"):
        asset.check(view_with(data[:3], reserve))
    broken = torch.zeros(40, 5)
    broken[7, 2] = torch.nan
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 1 of 40 training samples"):
        asset.run(view_with(data, reserve, features=(broken, torch.zeros(8, 5))))
    with pytest.raises(DivergedError, match="lower lr"):
        defenses.create("asset", **{**TINY, "lr": 1e30}).run(view_with(data, reserve))
    one = torch.zeros(40, dtype=torch.int64)
    alone = asset.run(view_with(data.with_labels(one), reserve.with_labels(one[:8]), classes=1))
    assert torch.equal(rows(alone)[0], torch.zeros(40))
    same = asset.run(view_with(data, reserve, features=(torch.ones(40, 5), torch.ones(8, 5))))
    assert all(row["suspects"] == 0 for row in same.history)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 3}, "batch_size"),
        ({"density": 0}, "density"),
        ({"outlyingness": float("inf")}, "outlyingness"),
        ({"reserve_per_class": 0}, "reserve_per_class"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("asset", **config)


def test_settings() -> None:
    config = defenses.create("asset").config
    assert (config.lr, config.batch_size, config.epochs, config.discriminator_steps) == (1e-4, 256, 1, 100)
    assert config.for_dataset("cifar10").reserve_per_class == 100
    assert config.for_dataset("tiny_imagenet").reserve_per_class == 5


LARGE = ("vgg19_bn", "convnext_tiny", "vit_b_16")


@pytest.mark.parametrize("name", ["preactresnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_architectures(toy_images: MakeImages, name: str) -> None:
    data, reserve = toy_images(12, 4, (3, 32, 32)), toy_images(4, 4, (3, 32, 32), seed=5)
    scores, _ = rows(defenses.create("asset", **TINY).run(view_with(data, reserve, architecture=name)))
    assert bool(scores.isfinite().all())


@pytest.mark.slow
def test_on_digits(digits_attack: AttackResult) -> None:
    """The sign holds; the acceptance's 0.95 does not (docs/deviations_detection.md has the measurements)."""
    result = defenses.defend("asset", digits_attack, seed=0, device="cpu", progress=False)
    assert result.metrics["fpr"] < 0.05
    assert result.metrics["auroc"] > 0.5
