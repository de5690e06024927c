"""AGPD: gradients against autograd, gaps and rounds by formula, its acceptance on rotated gradients, bad input."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from bbfast import defenses, metrics, ops
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection._gradients import gradient_layers, layer_gradients
from bbfast.defenses.detection.agpd import absorb, class_gaps, find_targets, stop_round
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.models import build

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, seed: int = 0, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def network(classes: int = 4, name: str = "small_cnn", size: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return build(name, classes, size).eval()


def view_with(
    model: nn.Module, train: tuple[Tensor, Tensor], reserve: tuple[Tensor, Tensor], classes: int = 4
) -> DefenderView:
    size = tuple(train[0].shape[1:])
    grants = Grants(
        model=model,
        poisoned_train=ImageSet(*train, mean=MEAN, std=STD),
        reserve=ImageSet(*reserve, mean=MEAN, std=STD),
    )
    facts = DataFacts("toy", classes, size, MEAN, STD)  # type: ignore[arg-type]
    return DefenderView("agpd", defenses.find("agpd").card.needs, facts, grants)


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ops.gather_augment(images, torch.arange(len(images)), mean=MEAN, std=STD)).argmax(1)


def toy_view(n: int = 60, classes: int = 4) -> DefenderView:
    """Random images, labelled in turn; the reserve labelled as the model predicts."""
    net, known = network(classes), pictures(40, 7)
    return view_with(net, (pictures(n), torch.arange(n) % classes), (known, predictions(net, known)), classes)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("small_cnn", 12, 8),
        ("preactresnet18", 32, 16),
        pytest.param("vgg19_bn", 32, 16, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 32, 18, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 32, 12, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_autograds(name: str, size: int, count: int) -> None:
    net, images, labels = network(4, name, size), pictures(3, 0, size), torch.tensor([2, 0, 2])
    view = view_with(net, (images, labels), (images, labels))
    layers = gradient_layers(view)
    assert len(layers) == count
    order = torch.tensor([2, 0, 1])
    found, predicted = layer_gradients(view, images, labels, order, layers, batch_size=2)
    outputs: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    handles = [
        modules[layer].register_forward_hook(lambda m, a, out, layer=layer: outputs.__setitem__(layer, out))
        for layer in layers
    ]
    logits = net(ops.gather_augment(images, order, mean=MEAN, std=STD))
    expected = torch.autograd.grad(logits.gather(1, labels[order, None]).sum(), [outputs[layer] for layer in layers])
    for handle in handles:
        handle.remove()
    for mine, theirs in zip(found, expected, strict=True):
        theirs = theirs.mean(dim=(2, 3)) if theirs.dim() == 4 else theirs.mean(dim=1)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert torch.equal(predicted, logits.argmax(1))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_layers_that_an_activation_overwrites() -> None:
    """Regression: the reference's hooks fail on modules that work in place."""
    torch.manual_seed(0)
    plain, overwriting = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(400, 4))
        for inplace in (False, True)
    )
    overwriting.load_state_dict(plain.state_dict())
    images, labels = pictures(5), torch.arange(5) % 4
    one, other = (
        layer_gradients(view_with(net, (images, labels), (images, labels)), images, labels, torch.arange(5), ["0"], 5)[
            0
        ]
        for net in (plain, overwriting)
    )
    assert float(one[0].abs().max()) > 0
    assert torch.equal(one[0], other[0])


def test_a_layer_that_the_logits_do_not_use() -> None:
    net = network()
    net.spare = nn.Conv2d(3, 3, 3)
    images, labels = pictures(4), torch.arange(4)
    view = view_with(net, (images, labels), (images, labels))
    with pytest.raises(UnsupportedModelError, match="do not depend on layer 'spare'"):
        layer_gradients(view, images, labels, torch.arange(4), ["layer1.0.conv1", "spare"], 4)


# -- the pieces by formula --------------------------------------------------------------------------------------------


def test_gap_by_formula() -> None:
    g, r = torch.randn(9, 5, generator=generator(0)), torch.randn(5, generator=generator(1)).double()
    u = cosine_similarity(g.double(), r[None])
    a = int(u.argmin())
    v = cosine_similarity(g.double(), g[a].double()[None])
    others = torch.arange(9) != a
    expected = float((u - v)[others].square().sum().sqrt()) / 3
    assert class_gaps(g, r) == (pytest.approx(expected), a)


def test_targets() -> None:
    gaps = torch.tensor([[0.1, 0.12, 0.11, 0.1, 0.9], [0.5, 0.4, 0.5, 0.41, 0.45], [0.1, 0.1, 0.1, 0.2, 0.1]]).double()
    layer, anomaly, targets = find_targets(gaps[:2])
    assert (layer, targets) == (0, [4])
    assert float(anomaly[4]) == pytest.approx((0.9 - 0.11) / (1.4826 * (0.01 + 1e-6)))
    assert float(anomaly.min()) == 0
    assert find_targets(gaps[1:2])[2] == []
    # No outlier in the middle layers: the absolute gap in the second to fourth last ones.
    flat = torch.full((5, 4), 0.1, dtype=torch.float64) + torch.linspace(0, 0.01, 4).double()
    flat[4] = 0.9
    assert find_targets(flat)[2] == []
    flat[2, 1:3] += 0.3
    flat[3, 1] += 0.3
    layer, _, targets = find_targets(flat, anomaly_threshold=1e9)
    assert (layer, targets) == (2, [2, 1])
    flat[0] += 0.5
    assert find_targets(flat, anomaly_threshold=1e9)[0] == 2
    one = torch.tensor([[0.5], [0.5]]).double()
    assert find_targets(one, gap_threshold=1.0)[2] == []


def test_stop_round_agrees_with_scipy() -> None:
    histograms = torch.rand(30, 99, generator=generator(0)).double()
    histograms[12:24] = histograms[12] + 0.01 * torch.rand(12, 99, generator=generator(1))
    histograms /= histograms.sum(dim=1, keepdim=True)
    distance = [jensenshannon(p, q) for p, q in zip(histograms[:-1].numpy(), histograms[1:].numpy(), strict=True)]
    cost = [np.mean(distance[i : i + 10]) + 5 * np.std(distance[i : i + 10]) for i in range(20)]
    assert stop_round(histograms) == int(np.argmin(cost))
    assert 12 <= stop_round(histograms) <= 13
    assert stop_round(histograms[:1]) == 0  # regression: the reference crashes
    assert stop_round(histograms[:5]) == 0


@pytest.mark.parametrize("histogram", ["scaled", "raw"])
def test_rounds_by_a_slow_loop(histogram: Any) -> None:
    g = torch.randn(40, 6, generator=generator(0)).double() + 1
    r = torch.ones(6).double()
    _, anchor = class_gaps(g, r)
    found = absorb(g, r, anchor, tau=0.2, histogram=histogram)
    group, joined, number, histograms = [anchor], {anchor: 0}, 0, []
    while len(group) < 40:
        number += 1
        c = g[group].mean(dim=0)
        rates = {}
        for i in set(range(40)) - set(group):
            near, far = (1 - float(cosine_similarity(g[i], x, dim=0)) for x in (c, r))
            rates[i] = near / (near + far)
        low, high = min(rates.values()), max(rates.values())
        shift, span = (0.0, 1.0) if histogram == "raw" else (low, high - low or 1.0)
        histograms.append(np.histogram([(x - shift) / span for x in rates.values()], 99, (0, 1))[0] / len(rates))
        new = [i for i, rate in rates.items() if high == low or (rate - low) / (high - low) <= 0.2]
        group += new
        joined.update(dict.fromkeys(new, number))
    assert found.rounds == number
    assert found.stop == stop_round(torch.from_numpy(np.stack(histograms)))
    assert found.joined.tolist() == [joined[i] for i in range(40)]
    assert found.scores.argmax() == anchor
    assert float(found.scores[anchor]) == 0
    assert float(found.scores.min()) > -1
    earlier = found.joined[:, None] < found.joined
    assert bool((found.scores[:, None] > found.scores)[earlier].all())


# -- the acceptance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tenth_of_a_class_rotated_by_60_degrees(seed: int) -> None:
    """The rotated class is the only target; TPR above 0.95, FPR below 0.02."""
    g, classes, n, d = generator(seed), 10, 300, 64
    centres = normalize(torch.randn(classes, d, generator=g), dim=1)
    clean = centres[:, None] + 0.02 * torch.randn(classes, n, d, generator=g)
    side = torch.randn(d, generator=g)
    side = normalize(side - side @ centres[3] * centres[3], dim=0)
    truth = torch.zeros(n, dtype=torch.bool)
    truth[torch.randperm(n, generator=g)[: n // 10]] = True
    turned = math.cos(math.pi / 3) * centres[3] + math.sin(math.pi / 3) * side
    clean[3][truth] += turned - centres[3]
    reference = (centres + 0.02 * torch.randn(10, classes, d, generator=g).mean(dim=0)).double()
    pairs = [class_gaps(clean[c], reference[c]) for c in range(classes)]
    _, _, targets = find_targets(torch.tensor([[gap for gap, _ in pairs]]).double())
    assert targets == [3]
    found = absorb(clean[3], reference[3], pairs[3][1])
    outcome = metrics.detection(found.scores, truth, found.joined <= found.stop)
    assert outcome["tpr"] > 0.95
    assert outcome["fpr"] < 0.02
    assert outcome["auroc"] > 0.99


# -- the defense ------------------------------------------------------------------------------------------------------


def test_result_and_storage_order() -> None:
    net, known, images = network(), pictures(40, 7), pictures(60)
    labels, truth = torch.arange(60) % 4, predictions(net, known)
    agpd = defenses.create("agpd", gap_threshold=1e-6, tau=0.2)
    result = agpd.run(view_with(net, (images, labels), (known, truth)))
    scores, flags = rows(result)
    unscored = torch.tensor([c in result.info["unscored"] for c in range(4)])
    assert torch.equal(scores.isnan(), unscored[labels])
    assert result.verdict["targets"]
    assert isinstance(result.threshold, Tensor)
    assert torch.equal(flags, scores > result.threshold[labels])
    for c in result.verdict["targets"]:
        assert float(scores[labels == c].max()) == 0
        assert flags[labels == c].any()
    order = torch.randperm(60, generator=generator(1))
    mixed = torch.randperm(40, generator=generator(2))
    other = agpd.run(view_with(net, (images[order], labels[order]), (known[mixed], truth[mixed])))
    assert torch.equal(rows(other)[0].nan_to_num(9), scores[order].nan_to_num(9))
    assert torch.equal(rows(other)[1], flags[order])


def test_classes_alike_have_no_target() -> None:
    """Spec's acceptance of a clean model, at the default thresholds: classes whose gradients all go their own way."""
    calls = []
    for seed in range(3):
        g, classes, n, d = generator(seed), 10, 300, 64
        centres = normalize(torch.randn(classes, d, generator=g), dim=1)
        layers = []
        for spread in (0.02, 0.03, 0.02, 0.01):  # early to late; the last but one are where gap_threshold looks
            clean = centres[:, None] + spread * torch.randn(classes, n, d, generator=g)
            reference = (centres + spread * torch.randn(10, classes, d, generator=g).mean(dim=0)).double()
            layers.append([class_gaps(clean[c], reference[c])[0] for c in range(classes)])
        calls.append(find_targets(torch.tensor(layers).double())[2])
    assert calls.count([]) >= 2, calls


def even_view() -> DefenderView:
    """As :func:`toy_view`, of a network that predicts every class."""
    net, known, images = network(), pictures(40, 7), pictures(60)
    with torch.no_grad():
        index = torch.arange(len(known))
        net.linear.bias -= net(ops.gather_augment(known, index, mean=MEAN, std=STD)).mean(dim=0)  # type: ignore[operator, union-attr]
    truth = predictions(net, known)
    assert len(truth.unique()) == 4
    return view_with(net, (images, torch.arange(60) % 4), (known, truth))


def test_no_target_no_flag(caplog: pytest.LogCaptureFixture) -> None:
    """A threshold just above what the classes show flags nobody; just below it, the first of them is the target."""

    def at(threshold: float) -> DefenseResult:
        return defenses.create("agpd", anomaly_threshold=threshold, gap_threshold=2).run(even_view())

    with caplog.at_level(logging.WARNING, "bbfast.defenses.detection.agpd"):
        anomaly = at(1e9).verdict["anomaly"]
    assert "outliers among fewer than 8" in caplog.text
    top = max(anomaly, key=anomaly.get)
    above, below = at(anomaly[top] * 1.001), at(anomaly[top] * 0.999)
    assert not rows(above)[1].any()
    assert (above.verdict["backdoored"], above.verdict["targets"]) == (False, [])
    assert set(rows(above)[0].tolist()) == {-1.0}
    assert (below.verdict["backdoored"], below.verdict["targets"]) == (True, [top])
    flags = rows(below)[1]
    assert flags.any()
    assert not flags[torch.arange(60) % 4 != top].any()


def test_small_missing_constant_and_unknown_classes() -> None:
    net, known = network(5), pictures(60, 7)
    truth = predictions(net, known)
    some = int(truth.bincount(minlength=5).argmax())
    images = torch.cat([pictures(30), pictures(1).expand(20, -1, -1, -1), pictures(1, 3)])
    # One class of random images and one that the reserve does not know; one class of a single sample, one of none.
    other = [c for c in range(5) if c != some]
    labels = torch.tensor([some] * 30 + [other[0]] * 20 + [other[1]])
    keep = truth == some
    view = view_with(net, (images, labels), (known[keep], truth[keep]), 5)
    result = defenses.create("agpd").run(view)
    assert result.info["unscored"] == sorted(other[:2])
    assert torch.equal(rows(result)[0].isnan(), labels != some)
    # Twenty times one image: all gradients are the same, so there is no gap.
    constant = (images[30:50], torch.full((20,), some))
    found = defenses.create("agpd").run(view_with(net, constant, (known[keep], truth[keep]), 5))
    assert rows(found)[0].tolist() == [-1.0] * 20
    assert found.info["gap"][some] < 1e-3 or not rows(found)[1].any()


def test_models_and_reserves_that_do_not_serve() -> None:
    agpd = defenses.create("agpd")
    net, images, labels = network(), pictures(20), torch.arange(20) % 4
    with pytest.raises(DataRequirementError, match="the reserve has none"):
        agpd.check(view_with(net, (images, labels), (images[:0], labels[:0])))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 4))
    with pytest.raises(UnsupportedModelError, match="neither convolutions wider than 1x1 nor stages"):
        agpd.check(view_with(flat, (images, labels), (images, labels)))
    with pytest.raises(UnsupportedModelError, match="predicts none of 20 clean images correctly"):
        agpd.run(view_with(net, (images, labels), (images, (predictions(net, images) + 1) % 4)))
    with torch.no_grad():
        net.linear.weight[:, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="NaN or infinite on 20 of 20 images"):
        agpd.run(view_with(net, (images, labels), (images, labels)))


def test_a_model_with_one_class() -> None:
    net = network(1)
    zeros = torch.zeros(20, dtype=torch.int64)
    result = defenses.create("agpd", gap_threshold=2).run(
        view_with(net, (pictures(20), zeros), (pictures(20, 1), zeros), 1)
    )
    assert result.verdict["anomaly"] == {0: 0.0}
    assert not rows(result)[1].any()


@pytest.mark.parametrize(
    "config",
    [
        {"reserve_per_class": 0},
        {"anomaly_threshold": 0},
        {"gap_threshold": 2.5},
        {"tau": 0},
        {"tau": 1},
        {"histogram": "log"},
        {"min_samples": 1},
        {"batch_size": 0},
    ],
)
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        defenses.create("agpd", **config)
