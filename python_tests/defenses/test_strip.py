"""STRIP: the saved outputs of the reference, blends by formula, honest draws and thresholds, and a real backdoor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import golden, small_network
from scipy import stats
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection import _overlays
from bbfast.defenses.detection._overlays import draw_overlays, mean_entropy
from bbfast.defenses.detection.strip import entropy_threshold
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, seed: int = 0, size: int = 6) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def network(seed: int = 0, size: int = 6, classes: int = 5, gain: float = 3.0) -> nn.Module:
    """A fixed random network whose predictions depend on the whole picture."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size * size, classes))
    with torch.no_grad():
        net[3].weight *= gain
    return net.eval()


def view_with(
    model: nn.Module, reserve: ImageSet, inspected: Tensor, stage: str = "inference", seed: int = 0
) -> DefenderView:
    classes = int(reserve.labels.max()) + 1
    facts = DataFacts("toy", classes, reserve.image_size, MEAN, STD)
    if stage == "inference":
        grants = Grants(model=model, reserve=reserve, stream=Stream(inspected))
    else:
        grants = Grants(
            model=model, reserve=reserve, poisoned_train=ImageSet(inspected, torch.zeros(len(inspected)).long())
        )
    return DefenderView("strip", defenses.create("strip", stage=stage).card.needs, facts, grants, seed=seed)


def reserve_of(per_class: int, classes: int = 5, seed: int = 100) -> ImageSet:
    return ImageSet(
        pictures(per_class * classes, seed), torch.arange(per_class * classes) % classes, mean=MEAN, std=STD
    )


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- the reference's saved outputs ------------------------------------------------------------------------------------


def test_golden() -> None:
    stored = golden("strip")
    data = {key: torch.from_numpy(value) for key, value in stored.items()}
    net = small_network(stored)
    torch.testing.assert_close(net(data["inspected"]), data["inspected_logits"], atol=1e-5, rtol=1e-5)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    clean, inspected = (data[name] * std + mean for name in ("clean", "inspected"))

    def entropy(images: Tensor, order: Tensor) -> Tensor:
        # The reference lays the same images over every sample of a batch, and calibrates images with themselves.
        draws = order.expand(len(images), -1)
        options: dict[str, Any] = {"blend": "add_normalised", "alpha": 0.5, "mean": MEAN, "std": STD}
        return mean_entropy(net, images, clean, draws, batch_size=1000, **options)

    calibration = entropy(clean, data["clean_order"])
    found = entropy(inspected, data["inspect_order"])
    torch.testing.assert_close(calibration, data["clean_entropy"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, data["entropy"], atol=1e-4, rtol=0)
    threshold = entropy_threshold(calibration, 0.05)
    assert threshold == pytest.approx(float(data["threshold_low"]), abs=1e-4)
    clear = (found - threshold).abs() > 1e-4
    flagged = torch.zeros(len(found), dtype=torch.bool)
    flagged[data["suspicious"]] = True
    assert torch.equal((found < threshold)[clear], flagged[clear])


# -- entropy over superimposed images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_uniform_logits_have_entropy_ln_k(classes: int) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), classes)

    draws = torch.randint(0, 8, (5, 7), generator=generator(0))
    found = mean_entropy(Flat(), pictures(5), pictures(8, 1), draws, mean=MEAN, std=STD)
    torch.testing.assert_close(found, torch.full((5,), math.log(classes)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("blend", "alpha"), [("add_clip", 1.0), ("add_clip", 0.3), ("add_normalised", 1.0), ("convex", 0.6)]
)
@pytest.mark.parametrize("as_float", [False, True])
def test_blends_by_formula(blend: str, alpha: float, as_float: bool) -> None:
    net, images, overlays = network(), pictures(4), pictures(6, 1)
    draws = torch.randint(0, 6, (4, 3), generator=generator(0))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = []
    for i in range(4):
        x = images[i].double() / 255
        values = []
        for j in draws[i]:
            r = overlays[j].double() / 255
            mixed = {
                "add_clip": ((x + alpha * r).clamp(0, 1) - mean) / std,
                "add_normalised": (x - mean) / std + alpha * (r - mean) / std,
                "convex": (alpha * x + (1 - alpha) * r - mean) / std,
            }[blend]
            p = net(mixed[None].float()).double().softmax(dim=1)
            values.append(-(p * p.log()).sum())
        expected.append(torch.stack(values).mean())
    if as_float:
        images, overlays = images / 255, overlays / 255
    found = mean_entropy(net, images, overlays, draws, blend=blend, alpha=alpha, mean=MEAN, std=STD)
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_the_batch() -> None:
    net, images, overlays = network(), pictures(37), pictures(30, 1)
    draws = draw_overlays(torch.arange(37), torch.arange(30) % 5, 11, seed=3)
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    whole = mean_entropy(net, images, overlays, draws, batch_size=100_000, **options)
    for size in (1, 50, 333):
        torch.testing.assert_close(mean_entropy(net, images, overlays, draws, batch_size=size, **options), whole)
    some = torch.tensor([30, 2, 2, 17])
    torch.testing.assert_close(mean_entropy(net, images[some], overlays, draws[some], **options), whole[some])


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_superimposed_images_never_exist_all_at_once(batch_size: int) -> None:
    net, sizes = network(), []
    net.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape))
    draws = draw_overlays(torch.arange(50), torch.arange(30) % 5, 7, seed=0)
    mean_entropy(net, pictures(50), pictures(30, 1), draws, batch_size=batch_size, mean=MEAN, std=STD)
    assert sum(s[0] for s in sizes) == 350
    assert max(s[0] for s in sizes) <= max(batch_size, 7)


def test_bfloat16_keeps_the_ranks() -> None:
    net, images, overlays = network(gain=1.0), pictures(200), pictures(50, 1)
    draws = draw_overlays(torch.arange(200), torch.arange(50) % 5, 40, seed=0)
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    exact = mean_entropy(net, images, overlays, draws, **options)
    half = mean_entropy(net, images, overlays, draws, dtype=torch.bfloat16, **options)
    assert not torch.equal(half, exact)
    assert stats.spearmanr(exact, half).statistic > 0.999


def test_unknown_blend_and_empty_sets() -> None:
    draws = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="blend must be one of"):
        mean_entropy(network(), pictures(0), pictures(3), draws, blend="multiply", mean=MEAN, std=STD)
    assert mean_entropy(network(), pictures(0), pictures(3), draws, mean=MEAN, std=STD).shape == (0,)


# -- draws ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=40),
    st.integers(0, 2**62),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_draws(classes: list[int], seed: int, leave_out: bool, data: st.DataObject) -> None:
    labels = torch.tensor(classes)
    size = len(labels)
    count = data.draw(st.integers(1, size - leave_out))
    keys = torch.randint(-(2**62), 2**62, (9,), generator=generator(seed % 1000))
    exclude = torch.arange(9) % size if leave_out else None
    drawn = draw_overlays(keys, labels, count, seed, exclude)
    assert drawn.shape == (9, count)
    for i, row in enumerate(drawn):
        assert len(row.unique()) == count
        left = torch.ones(size, dtype=torch.bool)
        if exclude is not None:
            assert int(exclude[i]) not in row.tolist()
            left[exclude[i]] = False
        # Classes take turns: one is ahead of another by more than one only if the other has run out.
        taken = torch.bincount(labels[row], minlength=5)
        there = torch.bincount(labels[left], minlength=5)
        for c in range(5):
            if taken[c] < there[c]:
                assert int(taken.max()) - int(taken[c]) <= 1


def test_draws_are_a_function_of_seed_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, labels = torch.randint(-(2**62), 2**62, (50,), generator=generator(0)), torch.arange(40) % 4
    one = draw_overlays(keys, labels, 10, seed=1)
    order = torch.randperm(50, generator=generator(1))
    assert torch.equal(draw_overlays(keys[order], labels, 10, seed=1), one[order])
    assert torch.equal(draw_overlays(keys[:3], labels, 10, seed=1), one[:3])
    assert not torch.equal(draw_overlays(keys, labels, 10, seed=2), one)
    assert len({tuple(sorted(row.tolist())) for row in one}) == 50
    own = torch.arange(50) % 40
    spared = draw_overlays(keys, labels, 10, 1, own)
    monkeypatch.setattr(_overlays, "_LOTTERY", 100)
    assert torch.equal(draw_overlays(keys, labels, 10, seed=1), one)
    assert torch.equal(draw_overlays(keys, labels, 10, 1, own), spared)


def test_draws_are_even() -> None:
    drawn = draw_overlays(torch.arange(4000), torch.arange(20) % 4, 5, seed=0)
    counts = torch.bincount(drawn.flatten(), minlength=20).double()
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    first = torch.bincount(drawn[:, 0], minlength=20).double()
    assert stats.chisquare(first.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("count", "exclude"), [(0, False), (11, False), (10, True)])
def test_too_many_overlays(count: int, exclude: bool) -> None:
    with pytest.raises(ValueError, match=r"count must lie in 1\.\."):
        draw_overlays(torch.arange(2), torch.arange(10) % 2, count, 0, torch.arange(2) if exclude else None)


# -- threshold --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.floats(0.001, 0.999), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_quantile_rejects_no_more_than_allowed(n: int, frr: float, seed: int) -> None:
    entropies = torch.rand(n, generator=generator(seed)).mul(10).round()  # with ties
    threshold = entropy_threshold(entropies, frr)
    assert int((entropies < threshold).sum()) <= frr * n
    distinct = torch.randperm(n, generator=generator(seed)).float()
    assert int((distinct < entropy_threshold(distinct, frr)).sum()) == int(frr * n)


def test_normal_fit_is_the_quantile_of_a_normal_distribution() -> None:
    entropies = torch.rand(50, generator=generator(0))
    expected = stats.norm.ppf(0.02, entropies.double().mean(), entropies.double().std())
    assert entropy_threshold(entropies, 0.02, "normal_fit") == pytest.approx(expected)
    assert entropy_threshold(torch.tensor([0.5]), 0.02, "normal_fit") == 0.5


@pytest.mark.parametrize("entropies", [torch.zeros(0), torch.tensor([1.0, torch.nan])])
def test_threshold_of_nothing(entropies: Tensor) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        entropy_threshold(entropies, 0.05)


@pytest.mark.parametrize("frr", [0.05, 0.2])
def test_rejection_rate_holds_on_unseen_images(frr: float) -> None:
    view = view_with(network(gain=0.5), reserve_of(200), pictures(1500, 7))
    result = defenses.create("strip", frr=frr, overlays=20).run(view)
    assert float(rows(result)[1].double().mean()) == pytest.approx(frr, abs=0.03)
    assert result.info["calibration"]["samples"] == 1000


# -- the defense ------------------------------------------------------------------------------------------------------


def test_result() -> None:
    inspected = pictures(23, 5)
    view = view_with(network(), reserve_of(4), inspected)
    result = defenses.create("strip", precision="fp32").run(view)
    scores, flags = rows(result)
    assert result.kind == "inference"
    assert result.model is None
    assert result.info["overlays"] == 19
    assert result.info["forwards"] == 19 * (20 + 23)
    assert isinstance(result.threshold, float)
    assert torch.equal(flags, scores > result.threshold)
    assert (scores <= 0).all()
    # Nineteen of twenty overlays are all but one, so the mean over all twenty is near.
    every = mean_entropy(
        view.model, inspected, view.reserve.images, torch.arange(20).expand(23, 20), mean=MEAN, std=STD
    )
    torch.testing.assert_close(-scores, every, atol=0.15, rtol=0)


def test_calibration_leaves_the_image_itself_out() -> None:
    """Regression: the reference lays calibration images over themselves."""
    reserve, net = reserve_of(2), network()
    strip = defenses.create("strip", frr=0.01, blend="add_normalised", precision="fp32")
    result = strip.run(view_with(net, reserve, pictures(3)))
    others = torch.stack([torch.tensor([j for j in range(10) if j != i]) for i in range(10)])
    expected = mean_entropy(net, reserve.images, reserve.images, others, blend="add_normalised", mean=MEAN, std=STD)
    found = torch.as_tensor(result.info["calibration"]["scores"])
    torch.testing.assert_close(-found, expected)
    assert result.threshold == pytest.approx(-float(expected.min()))


def test_scores_follow_the_image_not_its_place() -> None:
    """Regression: the reference draws overlays for each batch, so a score depends on what else is in it."""
    inspected, order = pictures(40, 5), torch.randperm(40, generator=generator(0))
    strip, net, reserve = defenses.create("strip", overlays=6, precision="fp32"), network(), reserve_of(4)
    one = rows(strip.run(view_with(net, reserve, inspected)))[0]
    torch.testing.assert_close(rows(strip.run(view_with(net, reserve, inspected[order])))[0], one[order])
    torch.testing.assert_close(rows(strip.run(view_with(net, reserve, inspected[:5])))[0], one[:5])
    torch.testing.assert_close(
        rows(strip.run(view_with(net, reserve, inspected, "inference", seed=1)))[0], one, atol=1, rtol=0
    )
    assert not torch.equal(rows(strip.run(view_with(net, reserve, inspected, seed=1)))[0], one)


def test_stages_ask_for_what_they_inspect() -> None:
    assert defenses.create("strip").card.needs == {"model", "reserve", "stream"}
    train = defenses.create("strip", stage="train")
    assert train.card.needs == {"model", "reserve", "poisoned_train"}
    assert defenses.find("strip").card.needs == {"model", "reserve", "stream", "poisoned_train"}
    inspected = pictures(9)
    result = train.run(view_with(network(), reserve_of(3), inspected, "train"))
    assert result.kind == "detection"
    torch.testing.assert_close(
        rows(result)[0], rows(defenses.create("strip").run(view_with(network(), reserve_of(3), inspected)))[0]
    )


def test_model_that_has_diverged() -> None:
    net = network()
    with torch.no_grad():
        net[3].bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="its training diverged"):
        defenses.create("strip").run(view_with(net, reserve_of(2), pictures(3)))


def test_reserve_of_one() -> None:
    view = view_with(network(), reserve_of(1, classes=1), pictures(3))
    with pytest.raises(DataRequirementError, match="at least 2 clean images, the reserve has 1"):
        defenses.create("strip").check(view)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"blend": "convex"}, "alpha must be below 1"),
        ({"frr": 0.0}, "frr"),
        ({"overlays": 0}, "overlays"),
        ({"stage": "test"}, "stage"),
        ({"overlay": 10}, "overlays"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("strip", **config)


# -- on a trained model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["inference", "train"])
def test_a_real_backdoor(digits_attack: AttackResult, stage: str, tmp_path: Path) -> None:
    """Regression: the reference ranks by entropy with poison as the positive class, so its AUROC is upside down."""
    strip = defenses.create("strip", stage=stage, overlays=16)
    result = defenses.defend(strip, digits_attack, seed=0, device="cpu", progress=False)
    assert result.metrics["auroc"] > 0.8
    result.save(tmp_path / "strip")
    again = DefenseResult.load(tmp_path / "strip")
    assert torch.equal(rows(again)[0], rows(result)[0])
    assert again.threshold == pytest.approx(result.threshold)


def test_no_backdoor_no_alarm(toy_attack: Callable[..., AttackResult]) -> None:
    """On an untrained model a trigger means nothing: few images are flagged, triggered or not."""
    result = defenses.defend(
        defenses.create("strip", overlays=20), toy_attack(n_test=400), device="cpu", progress=False
    )
    assert float(rows(result)[1].double().mean()) < 0.2
    assert 0.2 < result.metrics["auroc"] < 0.8
