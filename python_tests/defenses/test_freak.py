"""FREAK: sensitivity against the derivative by frequency, sets against a plain loop, honest thresholds, a sinusoid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection._spectrum import conjugate_pairs, sensitive_frequencies, sensitivity
from bbfast.defenses.detection.freak import atypical_counts, count_threshold, typical_frequencies
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build
from bbfast.training.device import Numerics

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
SIZE = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def network(seed: int = 0, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIZE**2, classes))
    return net.eval()


def view_with(
    model: nn.Module,
    reserve: Tensor,
    inspected: Tensor,
    stage: str = "train",
    seed: int = 0,
    order: Tensor | None = None,
) -> DefenderView:
    labels = torch.arange(len(reserve)) % 5
    if order is not None:
        reserve, labels = reserve[order], labels[order]
    facts = DataFacts("toy", 5, (3, *inspected.shape[2:]), MEAN, STD)
    grants = Grants(
        model=model,
        reserve=ImageSet(reserve, labels, mean=MEAN, std=STD),
        stream=Stream(inspected),
        poisoned_train=ImageSet(inspected, torch.arange(len(inspected)) % 5, mean=MEAN, std=STD),
    )
    needs = defenses.create("freak", stage=stage).card.needs
    return DefenderView("freak", needs, facts, grants, seed=seed, progress=False)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


def sets_of(model: nn.Module, images: Tensor, topk: int, batch_size: int = 64) -> Tensor:
    options: dict[str, Any] = {"numerics": Numerics(torch.float32, False), "batch_size": batch_size}
    found, finite = sensitive_frequencies(model, images, mean=MEAN, std=STD, topk=topk, **options)
    assert bool(finite.all())
    return found


# -- sensitivity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (6, 9), (1, 4), (3, 2)])
def test_pairs_cover_the_grid_once(height: int, width: int) -> None:
    places, weights = conjugate_pairs(height, width)
    assert int(weights.sum()) == height * width
    half = width // 2 + 1
    covered = torch.zeros(height, width, dtype=torch.int64)
    for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
        u, v = divmod(place, half)
        both = {(u, v), (-u % height, -v % width)}
        assert len(both) == weight
        for one in both:
            covered[one] += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_sensitivity_is_the_derivative_by_frequency(height: int, width: int) -> None:
    """And it is symmetric: what the half spectrum leaves out is the same again."""
    x = torch.randn(2, 3, height, width, generator=generator(0), dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    spectrum = torch.fft.fft2(x).detach().requires_grad_()
    (by_frequency,) = torch.autograd.grad(net(torch.fft.ifft2(spectrum).real).sum(), spectrum)
    expected = by_frequency.abs().mean(dim=1)
    mirrored = expected.flip(1, 2).roll((1, 1), (1, 2))
    torch.testing.assert_close(mirrored, expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x)
    places, _ = conjugate_pairs(height, width)
    u, v = places // (width // 2 + 1), places % (width // 2 + 1)
    torch.testing.assert_close(sensitivity(gradient) / (height * width), expected[:, u, v])


@pytest.mark.parametrize("topk", [1, 2, 10, 32, 64])
def test_sets_by_a_plain_loop(topk: int) -> None:
    net, images = network(), pictures(9)
    found = sets_of(net, images, topk)
    places, weights = conjugate_pairs(SIZE, SIZE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for i, image in enumerate(images):
        pixels = (image.float() / 255)[None].requires_grad_()
        logits = net((pixels - mean) / std)[0]
        (gradient,) = torch.autograd.grad(logits[logits.argmax()], pixels)
        grid = np.abs(np.fft.fft2(gradient[0].numpy())).mean(axis=0).flatten()
        largest = set(np.argsort(-grid, kind="stable")[:topk].tolist())
        u, v = (places // (SIZE // 2 + 1)).tolist(), (places % (SIZE // 2 + 1)).tolist()
        pairs = [{a * SIZE + b, (-a % SIZE) * SIZE + (-b % SIZE)} for a, b in zip(u, v, strict=True)]
        taken: set[int] = set().union(*(pair for pair, inside in zip(pairs, found[i].tolist(), strict=True) if inside))
        # A pair cut in two by the limit is taken whole.
        assert len(taken) - topk in (0, 1)
        assert len(largest - taken) <= 1
    assert topk <= int((found * weights).sum(dim=1).min())
    assert int((found * weights).sum(dim=1).max()) <= min(topk + 1, SIZE**2)


def test_batch_and_order() -> None:
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 5)), pictures(40)
    whole = sets_of(net, images, 20)
    assert not torch.equal(whole[0], whole[1]) or not torch.equal(whole[0], whole[2])
    order = torch.randperm(40, generator=generator(0))
    assert torch.equal(sets_of(net, images, 20, batch_size=7), whole)
    assert torch.equal(sets_of(net, images[order], 20), whole[order])
    assert sets_of(net, images[:0], 20).shape == (0, whole.shape[1])


# -- counts and thresholds --------------------------------------------------------------------------------------------


def test_typical_and_atypical_by_hand() -> None:
    weights = torch.tensor([1, 2, 2, 1])
    members = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    # Counts 3, 2, 1, 0; over the grid of six frequencies 3 + 4 + 2 + 0 = 9, mean 1.5.
    assert typical_frequencies(members, weights, 1.0).tolist() == [True, True, False, False]
    assert typical_frequencies(members, weights, 0.5).tolist() == [True, True, True, False]
    assert typical_frequencies(members, weights, 0.0).all()
    typical = torch.tensor([True, True, False, False])
    inspected = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert atypical_counts(inspected, typical, weights).tolist() == [0.0, 3.0, 2.0, 0.0]


@given(st.integers(1, 200), st.floats(0.001, 0.999), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_quantile_flags_no_more_than_allowed(n: int, fpr: float, seed: int) -> None:
    counts = torch.rand(n, generator=generator(seed)).mul(10).round()
    assert int((counts > count_threshold(counts, "quantile", fpr, 0)).sum()) <= fpr * n
    distinct = torch.randperm(n, generator=generator(seed)).float()
    assert int((distinct > count_threshold(distinct, "quantile", fpr, 0)).sum()) == int(fpr * n)


def test_mean_plus() -> None:
    assert count_threshold(torch.tensor([1.0, 2.0, 6.0]), "mean_plus", 0.05, 9.0) == pytest.approx(12.0)


# -- the defense ------------------------------------------------------------------------------------------------------


class Waves(nn.Module):
    """A linear model: four classes of low frequencies, and a fifth that looks for one high frequency."""

    def __init__(self) -> None:
        super().__init__()
        spectrum = torch.fft.rfft2(torch.randn(4, 3, 16, 16, generator=generator(3)))
        spectrum[:, :, 4:13] *= 0.05
        spectrum[..., 4:] *= 0.05
        low = torch.fft.irfft2(spectrum, s=(16, 16))
        noise = 0.01 * torch.randn(1, 3, 16, 16, generator=generator(4))
        self.register_buffer("weights", torch.cat([low, wave().expand(1, 3, 16, 16) + noise]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weights.flatten(1).T


def wave() -> Tensor:
    grid = torch.arange(16.0)
    return torch.cos(2 * math.pi * (7 * grid[:, None] + 6 * grid) / 16)


def smooth(n: int, seed: int) -> Tensor:
    coarse = torch.randint(40, 216, (n, 3, 4, 4), generator=generator(seed)).float()
    return nn.functional.interpolate(coarse, size=16, mode="bilinear").byte()


def test_a_sinusoidal_trigger() -> None:
    clean, poisoned = smooth(150, 0), smooth(50, 1)
    poisoned = (poisoned.float() + 40 * wave()).clamp(0, 255).byte()
    result = defenses.create("freak").run(view_with(Waves(), smooth(100, 2), torch.cat([clean, poisoned])))
    scores, flags = rows(result)
    truth = torch.arange(200) >= 150
    from bbfast.metrics import detection

    metrics = detection(scores, truth, flags)
    assert metrics["auroc"] > 0.95
    assert metrics["tpr"] > 0.95
    assert metrics["fpr"] < 0.15


def test_threshold_is_from_clean_images_that_defined_nothing() -> None:
    result = defenses.create("freak", hold_samples=12, fpr=0.1).run(view_with(network(), pictures(40, 9), pictures(30)))
    scores, flags = rows(result)
    calibration = torch.as_tensor(result.info["calibration"]["scores"])
    assert len(calibration) == 28
    assert result.info["calibration"]["held"] == 12
    assert result.threshold == float(calibration.sort(descending=True).values[2])
    assert torch.equal(flags, scores > result.threshold)
    assert result.info["reconstruction"] is True
    few = defenses.create("freak").run(view_with(network(), pictures(9, 9), pictures(5)))
    assert (few.info["calibration"]["held"], few.info["calibration"]["samples"]) == (4, 5)


def test_scores_depend_on_the_image_and_the_reserve_alone() -> None:
    freak, inspected, reserve = defenses.create("freak"), pictures(30), pictures(60, 9)
    one = freak.run(view_with(network(), reserve, inspected))
    order = torch.randperm(30, generator=generator(0))
    assert torch.equal(rows(freak.run(view_with(network(), reserve, inspected[order])))[0], rows(one)[0][order])
    moved = torch.randperm(60, generator=generator(1))
    again = freak.run(view_with(network(), reserve, inspected, order=moved))
    assert torch.equal(rows(again)[0], rows(one)[0])
    assert again.threshold == one.threshold
    assert len(rows(one)[0].unique()) > 3


def test_stages_ask_for_what_they_inspect() -> None:
    assert defenses.create("freak").card.needs == {"model", "reserve", "poisoned_train"}
    stream = defenses.create("freak", stage="inference")
    assert stream.card.needs == {"model", "reserve", "stream"}
    one = defenses.create("freak").run(view_with(network(), pictures(20, 9), pictures(12)))
    other = stream.run(view_with(network(), pictures(20, 9), pictures(12), "inference"))
    assert (one.kind, other.kind) == ("detection", "inference")
    assert torch.equal(rows(one)[0], rows(other)[0])
    assert {"freak"} <= set(defenses.available("detection")) & set(defenses.available("inference"))


def test_model_that_has_diverged() -> None:
    net = network()
    with torch.no_grad():
        net[3].bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="4 of 4 clean images"):
        defenses.create("freak").run(view_with(net, pictures(4, 9), pictures(3)))


def test_too_little() -> None:
    with pytest.raises(DataRequirementError, match="at least 2 clean images"):
        defenses.create("freak").check(view_with(network(), pictures(1), pictures(3)))
    with pytest.raises(ConfigError, match=r"topk must lie in 1\.\.64"):
        defenses.create("freak", topk=65).check(view_with(network(), pictures(10), pictures(3)))
    whole = defenses.create("freak", topk=64).run(view_with(network(), pictures(10, 9), pictures(3)))
    assert rows(whole)[0].tolist() == [0.0, 0.0, 0.0]
    assert not bool(rows(whole)[1].any())


@pytest.mark.parametrize(
    ("config", "text"),
    [({"topk": 0}, "topk"), ({"fpr": 1.0}, "fpr"), ({"hold_samples": 0}, "hold_samples"), ({"beta": -1.0}, "beta")],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("freak", **config)


SMALL = ("small_cnn", "preactresnet18")
LARGE = ("vgg19_bn", "convnext_tiny", "vit_b_16")


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 5, (32, 32)).eval()
    scores, _ = rows(defenses.create("freak").run(view_with(model, pictures(4, 9, 32), pictures(3, 0, 32))))
    assert bool(scores.isfinite().all())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_real_backdoor(digits_attack: AttackResult) -> None:
    result = defenses.defend("freak", digits_attack, device="cpu", progress=False)
    assert result.metrics["auroc"] > 0.55
    assert result.metrics["fpr"] < 0.15
