"""IBD-PSC: shared passes against networks really changed, the choice of layers, and a real backdoor."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection._norm_scaling import ScaledNorms, affine_norms, first_count, scaling_consistency
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build
from bbfast.training.device import Numerics

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FP32 = Numerics(torch.float32, True)
OPTIONS: dict[str, Any] = {"mean": MEAN, "std": STD, "batch_size": 64, "numerics": FP32}


def pictures(n: int, seed: int = 0, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_seen(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def network(name: str = "small_cnn", classes: int = 4, size: int = 12, seed: int = 0) -> nn.Module:
    """With statistics and affine weights that are not those of a new network."""
    torch.manual_seed(seed)
    model = build(name, classes, (size, size)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
    return model


def changed(model: nn.Module, count: int, omega: float, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """The last ``count`` layers really amplified, in a copy."""
    other = copy.deepcopy(model)
    layers = [m for m in other.modules() if isinstance(m, kind)]
    with torch.no_grad():
        for layer in layers[len(layers) - count :]:
            layer.weight.mul_(omega)  # type: ignore[operator, union-attr]
            layer.bias.mul_(omega)  # type: ignore[operator, union-attr]
    return other


def view_with(model: nn.Module, reserve: ImageSet, inspected: Tensor, classes: int = 4) -> DefenderView:
    facts = DataFacts("toy", classes, reserve.image_size, MEAN, STD)
    needs = {"model", "reserve", "stream", "batch_norm"}
    return DefenderView("ibd_psc", needs, facts, Grants(model=model, reserve=reserve, stream=Stream(inspected)))


def reserve_of(n: int, classes: int = 4, seed: int = 100) -> ImageSet:
    return ImageSet(pictures(n, seed), torch.arange(n) % classes, mean=MEAN, std=STD)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


@pytest.mark.parametrize(
    ("name", "counts", "shared"),
    [
        ("small_cnn", [0, 1, 2, 3], "layer3.0"),
        ("small_cnn", [0, 8], "layer1.0"),
        ("small_cnn", [0, 0], ""),
        ("small_cnn", [2], "layer4.0.bn1"),
        ("preactresnet18", [0, 4, 6], "layer3.1"),
    ],
)
@torch.no_grad()
def test_one_pass_is_many_networks(name: str, counts: list[int], shared: str) -> None:
    """The acceptance line: what shares its beginning equals full recomputation, and the network is left as it was."""
    size = 12 if name == "small_cnn" else 32
    model = network(name, size=size)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    x = as_seen(pictures(4, size=size))
    expected = torch.stack([changed(model, count, 1.5)(x) for count in counts]).softmax(2)
    variants = ScaledNorms(model, affine_norms(model, "batch"), counts, 1.5, x[:2])
    assert variants.shared == shared
    for batch in (x, x[:1]):
        torch.testing.assert_close(variants(batch).softmax(2), expected[:, : len(batch)], atol=1e-5, rtol=0)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_network_that_allows_no_sharing() -> None:
    """The first layer's input is used again at the end: images are repeated from the start, and results stay right."""

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.norm(self.conv(x)) + x).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, x = Long().eval(), as_seen(pictures(5))
    variants = ScaledNorms(model, affine_norms(model, "batch"), [0, 1], 3.0, x[:2])
    assert variants.shared == ""
    torch.testing.assert_close(variants(x), torch.stack([model(x), changed(model, 1, 3.0)(x)]))


@torch.no_grad()
def test_layer_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 16),
        nn.LayerNorm(16),
        nn.Tanh(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
    ).eval()
    x = as_seen(pictures(5))
    variants = ScaledNorms(model, affine_norms(model, "layer"), [0, 1, 2], 1.5, x[:2])
    assert variants.shared == "2"
    torch.testing.assert_close(
        variants(x), torch.stack([changed(model, count, 1.5, nn.LayerNorm)(x) for count in range(3)])
    )
    images, reserve = pictures(9), reserve_of(8)
    with pytest.raises(UnsupportedModelError, match=r"no BatchNorm2d layer with weights \(norm='layer' amplifies"):
        defenses.create("ibd_psc").check(view_with(model, reserve, images))
    defense = defenses.create("ibd_psc", norm="layer")
    assert "batch_norm" not in defense.card.needs
    assert rows(defense.run(view_with(model, reserve, images)))[0].shape == (9,)
    with pytest.raises(UnsupportedModelError, match="no LayerNorm layer"):
        defense.check(view_with(network(), reserve, images))


@pytest.mark.parametrize("counts", [[], [1, 0], [0, 9], [-1, 2]])
def test_counts_that_make_no_sense(counts: list[int]) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"counts must ascend within 0\.\.8"):
        ScaledNorms(model, affine_norms(model, "batch"), counts, 1.5, None)


@pytest.mark.parametrize("batch_size", [1, 64, 10_000])
@torch.no_grad()
def test_consistency_by_formula(batch_size: int) -> None:
    model, images = network(), pictures(23)
    own = model(as_seen(images)).argmax(1)
    each = [changed(model, k, 1.5)(as_seen(images)).softmax(1)[torch.arange(23), own] for k in (4, 5, 6)]
    options = {**OPTIONS, "batch_size": batch_size}
    psc, shared = scaling_consistency(model, affine_norms(model, "batch"), images, [4, 5, 6], 1.5, **options)
    assert shared == "layer2.0.bn1"
    torch.testing.assert_close(psc, torch.stack(each).mean(dim=0), atol=1e-5, rtol=0)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    again, _ = scaling_consistency(model, affine_norms(model, "batch"), images[order], [4, 5, 6], 1.5, **options)
    torch.testing.assert_close(again, psc[order], atol=1e-6, rtol=0)


@torch.no_grad()
def test_factor_one_gives_the_models_own_confidence() -> None:
    model, images = network(), pictures(12)
    psc, _ = scaling_consistency(model, affine_norms(model, "batch"), images, [1, 2, 3], 1.0, **OPTIONS)
    torch.testing.assert_close(psc, model(as_seen(images)).softmax(1).amax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("together", [1, 2, 5, 20])
@torch.no_grad()
def test_first_count(together: int) -> None:
    """Regression: the reference's test amplifies one layer more than its search found."""
    model, images = network(), pictures(80)
    # Labels that the model predicts itself: the error is 0 without amplification and grows with it.
    labels = model(as_seen(images)).argmax(1)
    expected = [float((changed(model, k, 3.0)(as_seen(images)).argmax(1) != labels).double().mean()) for k in range(9)]
    assert expected[0] == 0
    assert max(expected) > 0.3
    for bound in (0.0, 0.1, 0.25):
        first = next(k for k in range(1, 9) if expected[k] > bound)
        found, errors = first_count(
            model, affine_norms(model, "batch"), images, labels, 3.0, bound, together, **OPTIONS
        )
        assert found == first
        assert errors == pytest.approx(expected[: first + 1], abs=0.026)
    result = defenses.create("ibd_psc", omega=3.0, error_rate=0.1, precision="fp32").run(
        view_with(model, ImageSet(images, labels, mean=MEAN, std=STD), images[:9])
    )
    start = next(k for k in range(1, 9) if expected[k] > 0.1)
    assert result.info["counts"] == [k for k in range(start, start + 5) if k <= 8]


def test_error_that_is_never_reached(caplog: pytest.LogCaptureFixture) -> None:
    """Regression: the reference returns nothing, and repeats the first layer's variant beyond the network's start."""
    model, images = network(), pictures(40)
    with torch.no_grad():
        labels = model(as_seen(images)).argmax(1)
    reserve = ImageSet(images, labels, mean=MEAN, std=STD)
    defense = defenses.create("ibd_psc", omega=1.0, precision="fp32", threshold=0.3)
    with caplog.at_level(logging.WARNING, logger="bbfast.defenses.detection.ibd_psc"):
        result = defense.run(view_with(model, reserve, pictures(11, 3)))
    assert "no number of layers gives a clean error above 0.6" in caplog.text
    assert result.info["error_reached"] is False
    assert result.info["counts"] == [8]
    scores, flags = rows(result)
    with torch.no_grad():
        torch.testing.assert_close(scores, model(as_seen(pictures(11, 3))).softmax(1).amax(1), atol=1e-5, rtol=0)
    assert torch.equal(flags, scores > 0.3)
    assert result.threshold == 0.3


def test_overflow_is_no_consistency() -> None:
    result = defenses.create("ibd_psc", omega=1e30, precision="fp32").run(
        view_with(network(), reserve_of(40), pictures(11, 3))
    )
    scores, _ = rows(result)
    assert bool(scores.isfinite().all())


def test_bad_input() -> None:
    model, reserve = network(), reserve_of(8)
    assert rows(defenses.create("ibd_psc").run(view_with(model, reserve, pictures(0))))[0].shape == (0,)
    with pytest.raises(DataRequirementError, match="the reserve has none"):
        defenses.create("ibd_psc").check(view_with(model, reserve_of(0), pictures(3)))
    one = network(classes=1)
    scores, _ = rows(defenses.create("ibd_psc").run(view_with(one, reserve_of(4, 1), pictures(5), classes=1)))
    assert torch.equal(scores, torch.ones(5))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="its training diverged"):
        defenses.create("ibd_psc").run(view_with(model, reserve, pictures(3)))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"omega": 0}, "omega"),
        ({"variants": 0}, "variants"),
        ({"error_rate": 1.0}, "error_rate"),
        ({"threshold": 1.0}, "threshold"),
        ({"norm": "group"}, "norm"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("ibd_psc", **config)


def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    result = defenses.defend("ibd_psc", digits_attack, seed=0, device="cpu", progress=False)
    assert result.metrics["auroc"] > 0.6
    assert result.metrics["tpr"] > 0.5
