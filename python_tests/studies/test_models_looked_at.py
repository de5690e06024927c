"""Trigger generalisation, sharpness and representation: their numbers by hand, and their figures from loaded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import Recipe, attack, attacks, datasets, studies
from bbfast.analysis import Numbers, Subject
from bbfast.attacks import AttackResult
from bbfast.data import ImageSet
from bbfast.errors import ConfigError, UnknownNameError
from bbfast.store import Store
from bbfast.studies import Results
from bbfast.studies.perspectives import _depth as depth
from bbfast.studies.perspectives._paths import along, measured
from bbfast.studies.perspectives._sharp import curvature, cuts, half_radius
from bbfast.studies.perspectives._spectrum import trigger_energy
from bbfast.studies.perspectives._trigger_table import radius
from bbfast.studies.perspectives._variants import FAMILIES, families, triggered

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> AttackResult:
    """BadNets after one epoch on a few digits: a real result, a model that knows little."""
    data = datasets.load("digits")
    small = dataclasses.replace(data, train=data.train[:200], test=data.test[:60], fingerprint="")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(
        epochs=1, precision="fp32", eval_every=0
    )
    return attack(attacks.create("badnets", ratio=0.2), small, "small_cnn", recipe, device="cpu", progress=False)


@pytest.fixture(scope="module")
def subject(result: AttackResult) -> Subject:
    return Subject(result, None, CPU)


# Trigger generalisation -------------------------------------------------------------------------------------------


def box(changed: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of where ``[n, C, H, W]`` is not 0."""
    rows, columns = changed.abs().amax((0, 1, 3)).nonzero(), changed.abs().amax((0, 1, 2)).nonzero()
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_variants_of_a_patch(result: AttackResult) -> None:
    method, pairs = result.attack(), Subject(result, None, CPU).pairs(20)
    clean = torch.full_like(pairs.clean, 100)
    height, side = clean.shape[-1], int(FAMILIES["size"].own(method))

    def change(**changes: float) -> Tensor:
        return triggered(result, method, changes, clean, pairs.ids).float() - 100

    own = {name: FAMILIES[name].own(method) for name in families(method, list(FAMILIES))}
    assert set(FAMILIES) - set(own) == {"frequency", "strength"}
    # All at their own value: the backdoor test set's images, bit for bit.
    assert torch.equal(triggered(result, method, own, pairs.clean, pairs.ids), pairs.triggered)
    corner = (height - side, height - 1, height - side, height - 1)
    assert box(change()) == corner and side == max(1, round(3 * height / 32))
    assert box(change(location=2.0)) == tuple(edge - 2 for edge in corner)
    assert box(change(size=side + 1.0)) == (height - side - 1, height - 1, height - side - 1, height - 1)
    full = change()
    torch.testing.assert_close(change(opacity=0.4), (0.4 * full).round())
    assert set(change(colour=0.6)[full != 0].unique().tolist()) == {153.0 - 100}
    half = change(partial=0.5)
    assert (half != 0).sum() == round(0.5 * side**2) * 20 * clean.shape[1] and bool((half[full == 0] == 0).all())
    assert torch.equal(half, change(partial=0.5)) and torch.equal(half != 0, half[:1].ne(0).expand_as(half))
    torch.testing.assert_close(change(instance=1.0), full)  # of a patch on equal images every change is the same
    assert change(size=2.0 * side, opacity=0.5).abs().max() == round(155 / 2)
    blurred = change(blur=1.0)
    assert blurred.sum() == pytest.approx(float(full.sum()), rel=0.3) and (blurred != 0).sum() > (full != 0).sum()
    assert 0 < (triggered(result, method, {"jpeg": 30.0}, clean, pairs.ids).float() - 100 - full).abs().mean() < 30


def test_variants_of_other_triggers() -> None:
    images = torch.full((3, 3, 16, 16), 90, dtype=torch.uint8)
    data = ImageSet(images, torch.tensor([0, 1, 2]))
    blended, sig = attacks.create("blended"), attacks.create("sig", label_mode="all2one")
    for method in (blended, sig):
        method.prepare(data, 3)
    assert {"location", "frequency"} & set(families(blended, list(FAMILIES))) == {"location"}
    assert {"location", "frequency", "size"} & set(families(sig, list(FAMILIES))) == {"frequency"}
    made = AttackResult(
        nn.Identity(), data, torch.zeros(3, dtype=torch.bool), data.labels, torch.zeros(3, dtype=torch.int8),
        images[:0], data, None, {}, {"attack_config": sig.config.model_dump(), "data": {"num_classes": 3}},  # type: ignore[arg-type]
    )  # fmt: skip
    found = triggered(made, sig, {"frequency": 3.0}, images, torch.arange(3))
    wave = attacks.create("sig", label_mode="all2one", frequency=3.0)
    assert torch.equal(found, wave.trigger(images)) and not torch.equal(found, sig.trigger(images))
    moved = triggered(made, blended, {"location": 2.0}, images, torch.arange(3))
    assert torch.equal(moved, blended.trigger(images).roll((-2, -2), (-2, -1)))
    mixed = triggered(made, blended, {"opacity": 0.5}, images, torch.arange(3)).float()
    expected = attacks.create("blended", test_alpha=0.1).trigger(images).float()
    assert (mixed - expected).abs().max() <= 1  # rounded twice


def test_radius() -> None:
    values = np.array([1.0, 2, 3, 4, 6])
    assert radius(values, np.array([0.1, 0.6, 1, 0.9, 0.2]), 3.0) == 2.0
    assert np.isnan(radius(values, np.ones(5), 3.0))


# Sharpness --------------------------------------------------------------------------------------------------------


def test_half_radius() -> None:
    steps = np.linspace(-1, 1, 5)
    shares = np.array([[0.0, 0.8, 1.0, 0.75, 0.25], [1.0, 0.9, 1.0, 0.6, 0.1]])
    # Ways: right 0.75 -> 0.25 at 0.75; left 0.8 -> 0 at 0.5 + 0.5 * 0.3 / 0.8; right 0.6 -> 0.1 at 0.6; left never.
    ways = sorted([0.75, 0.5 + 0.5 * 0.3 / 0.8, 0.5 + 0.5 * 0.1 / 0.5, np.inf])
    assert half_radius(steps, shares) == pytest.approx(ways[1])
    assert half_radius(steps, np.ones((2, 5))) == np.inf


def test_curvature_is_that_of_the_dense_hessian(result: AttackResult) -> None:
    images = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    torch.manual_seed(0)
    linear = dataclasses.replace(result, model=nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    look = Subject(linear, None, CPU)
    largest, spread, trace = curvature(look, [(images, labels)], 3, 39)
    x = look.pixels(images)
    weights = torch.cat([p.detach().flatten() for p in look.model.parameters()]).double()

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x.flatten(1).double() @ flat[:36].view(3, 12).T + flat[36:], labels)

    dense = torch.func.hessian(loss)(weights)
    values = torch.linalg.eigvalsh(dense)
    assert largest == pytest.approx(float(values[-1]), rel=1e-3) and spread < 1e-3 * largest
    assert trace == pytest.approx(float(values.sum()), rel=0.6)  # three probes


def test_cuts_pass_through_the_model_and_put_it_back(subject: Subject, result: AttackResult) -> None:
    pairs = subject.pairs(30)
    sides = ((pairs.clean, pairs.labels), (pairs.triggered, pairs.targets))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = cuts(subject, sides, np.array([-0.5, 0.0, 0.5]), 3)
    assert found.shape == (3, 3, 4)
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    logits = [subject.logits(images) for images, _ in sides]
    middle = [float(nn.functional.cross_entropy(z, y)) for z, (_, y) in zip(logits, sides, strict=True)]
    middle += [float((z.argmax(1) == y).float().mean()) for z, (_, y) in zip(logits, sides, strict=True)]
    np.testing.assert_allclose(found[:, 1], [middle] * 3, rtol=1e-5)
    np.testing.assert_array_equal(found, cuts(subject, sides, np.array([-0.5, 0.0, 0.5]), 3))


def test_paths_begin_and_end_at_the_models() -> None:
    torch.manual_seed(0)
    near, far = (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)) for _ in range(2))
    images = torch.randint(0, 256, (32, 3, 2, 2), dtype=torch.uint8)
    data = ImageSet(images, (images.flatten(1).float().mean(1) > 127).long())
    other = data.with_labels(1 - data.labels)
    found = along(near, far, data, [data, other], points=5, epochs=8, lr=0.1, seed=0, device=CPU)
    assert found.shape == (2, 5, 4)
    for path in found:  # neither has BatchNorm statistics
        np.testing.assert_allclose(path[0], measured(near, [data, other], CPU), rtol=1e-5)
        np.testing.assert_allclose(path[-1], measured(far, [data, other], CPU), rtol=1e-5)
    with torch.no_grad():
        middle = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        for p, a, b in zip(middle.parameters(), near.parameters(), far.parameters(), strict=True):
            p.copy_((a + b) / 2)
    np.testing.assert_allclose(found[0, 2], measured(middle, [data, other], CPU), rtol=1e-4)
    assert found[1, 2, 0] < found[0, 2, 0]  # the curve was trained to lower the loss
    np.testing.assert_allclose(found[:, :, 2] + found[:, :, 3], 1)


# Representation ---------------------------------------------------------------------------------------------------


def test_gini() -> None:
    assert depth.gini([2.0, 2.0, 2.0]) == pytest.approx(0) and depth.gini([0, 0, 0, 5.0]) == pytest.approx(0.75)
    x = np.array([1.0, 5.0, 2.0, 7.0])
    assert depth.gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()))
    assert np.isnan(depth.gini([0.0, 0.0]))


def test_probe_tells_what_can_be_told() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 2 == 0
    noise = rng.normal(size=(60, 4))
    assert depth.probe_auroc(noise + 8 * truth[:, None] * [0, 1, 0, 0], truth)[0] == pytest.approx(1)
    assert 0.2 < depth.probe_auroc(noise, truth)[0] < 0.8
    assert np.isnan(depth.probe_auroc(noise[:8], truth[:8])[0])


def test_blocks_and_their_features(subject: Subject, result: AttackResult) -> None:
    found = depth.blocks(subject.model)
    assert list(found) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    view = depth.probe_view(subject, 1000)
    bad = int(view.poisoned.sum())
    assert bad == len(view) - bad > 0 and bool((view.given == result.target).all())
    features = depth.pooled(subject, view.images, found)
    kept: list[Tensor] = []
    handle = subject.model.get_submodule("layer3").register_forward_hook(lambda m, i, out: kept.append(out))
    subject.logits(view.images)
    handle.remove()
    np.testing.assert_allclose(features["layer3"], torch.cat(kept).mean((2, 3)).numpy(), rtol=1e-4, atol=1e-6)
    from bbfast.models import build

    names = list(depth.blocks(build("preactresnet18", 10, (3, 32, 32))))
    assert names == ["conv1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]


def test_channels_agree_with_the_tools(subject: Subject, result: AttackResult, tmp_path: Path) -> None:
    from bbfast import analysis

    tool = analysis.run("trigger_activation_change", result, out=tmp_path / "tac", device="cpu", figures=False, n=60)
    layers, offsets = tool.numbers.meta["layers"], tool.numbers.arrays["offsets"]
    moved = depth.channel_changes(subject, 60)
    assert "linear" not in moved and "layer1.0.bn1" not in moved
    for name, (l2, z) in moved.items():
        part = slice(*offsets[layers.index(name) : layers.index(name) + 2])
        np.testing.assert_allclose(l2, tool.numbers.arrays["l2"][part], rtol=1e-5)
        np.testing.assert_allclose(z, tool.numbers.arrays["z"][part], rtol=1e-5)
    shares = analysis.run("activation_distribution", result, out=tmp_path / "ad", device="cpu", figures=False, n=60)
    rows = {row["layer"]: (row["n_above_half"], row["neurons"]) for row in shares.numbers.table}
    neurons = depth.trigger_neurons(subject, 60)
    assert neurons == {name: rows[name] for name in neurons} and set(neurons) == set(moved)
    both = depth.overlap(subject, {name: l2 for name, (l2, _) in moved.items()})
    assert 0 <= both["jaccard_top_5_percent"] <= 1 and -1 <= both["spearman_tac_within_layers"] <= 1


# Figures and settings ---------------------------------------------------------------------------------------------


Figures = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@pytest.fixture
def looked_at(
    hand_made: Callable[[studies.Study, Figures], Results], result: AttackResult, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Numbers]:
    """Measures a study on a grid whose every cell is the tiny result; the defended ones have an untrained model."""
    from bbfast.defenses import DefenseResult
    from bbfast.models import build

    torch.manual_seed(1)
    other = DefenseResult(kind="mitigation", model=build("small_cnn", 10, result.test.image_size).eval())
    other.config = {"defense": "ft"}

    def measure(study: studies.Study) -> Numbers:
        results = hand_made(
            study,
            lambda place: (
                {"status": "failed", "reason": "no luck"}
                if place["attack"] == "blended"
                else {"c_acc": 0.9, "asr": 0.9 if place["defense"] == "none" else 0.4}
            ),
        )
        monkeypatch.setattr(Results, "attack", lambda self, row: result)
        monkeypatch.setattr(Results, "defense", lambda self, row: None if row["defense"] == "none" else other)
        return study.measure(results)

    return measure


TWO: dict[str, Any] = {"attacks": ["badnets", "blended"], "defenses": ["ft"]}


def drawn(study: studies.Study, numbers: Numbers, folder: Path) -> Any:
    numbers.meta["caption"] = "caption"
    numbers.save(folder)
    return study.draw(Numbers.load(folder))


def test_trigger_generalisation(looked_at: Callable[..., Numbers], tmp_path: Path) -> None:
    own = {
        "families": ["size", "opacity", "jpeg", "frequency"],
        "values": {"size": [1], "opacity": [0.5], "jpeg": [50]},
    }
    study = studies.create("trigger_generalisation", n=40, **TWO, **own)
    numbers = looked_at(study)
    assert [row["family"] for row in numbers.table] == ["size", "size", "opacity", "opacity", "jpeg", "jpeg"]
    assert numbers.arrays["asr_size_0"].shape == (2, 2) and numbers.arrays["map_0"].shape == (2, 2)
    trained = numbers.arrays["values_size_0"].tolist().index(numbers.meta["own"][0]["size"])
    assert numbers.arrays["asr_size_0"][0, trained] == numbers.arrays["asr_opacity_0"][0, -1]
    assert numbers.meta["maps"] == [["size", "opacity"], []] and numbers.meta["findings"][-1] == "blended: no figures."
    assert len(drawn(study, numbers, tmp_path).axes) >= 5


def test_sharpness(looked_at: Callable[..., Numbers], tmp_path: Path) -> None:
    small = {"n": 20, "m": 2, "probes": 1, "directions": 1, "points": 3, "path_points": 3, "path_epochs": 1}
    study = studies.create("sharpness", benign=False, **TWO, **small)
    numbers = looked_at(study)
    assert [(row["attack"], row["defense"]) for row in numbers.table] == [("badnets", "none"), ("badnets", "ft")]
    assert numbers.table[0]["asr_after"] == 0.4 and np.isnan(numbers.table[0]["barrier_line"])
    path = numbers.arrays["paths"][1]
    assert np.isfinite(path).all() and np.isnan(numbers.arrays["paths"][0]).all()
    barrier = path[0, :, 0].max() - max(path[0, 0, 0], path[0, -1, 0])
    assert numbers.table[1]["barrier_line"] == pytest.approx(barrier)
    drawn(study, numbers, tmp_path)


def test_representation(looked_at: Callable[..., Numbers], tmp_path: Path) -> None:
    study = studies.create("representation", probe=30, n=40, **TWO)
    numbers = looked_at(study)
    assert [row["defense"] for row in numbers.table] == ["none", "ft"]
    assert numbers.arrays["auroc"].shape == (2, 5) and numbers.arrays["z_top"].shape == (2, 20)
    assert (np.diff(numbers.arrays["z_top"][0]) <= 0).all()  # the attacked model's own order
    side = numbers.arrays["energy"].shape[1]
    assert numbers.arrays["radial"].shape == (2, 2, side) and (numbers.arrays["radial"] > 0).all()
    assert numbers.arrays["energy"].sum(1) == pytest.approx(1)
    # BadNets' square of a few pixels has fine edges; whatever the model, it is the same square.
    assert numbers.table[0]["trigger_high"] == numbers.table[1]["trigger_high"] > 0.1
    drawn(study, numbers, tmp_path)


def test_energy_of_a_wave(result: AttackResult) -> None:
    """All of a wave of six cycles lies on the sixth ring."""
    test = result.test
    wave = 20 * torch.cos(2 * torch.pi * 6 * torch.arange(test.images.shape[3]) / test.images.shape[3])
    images = (torch.full_like(test.images, 100).float() + wave).round().to(torch.uint8)
    grey = ImageSet(torch.full_like(test.images, 100), test.labels, ids=test.ids)
    rows = torch.isin(test.ids, result.backdoor_test.ids)
    bad = dataclasses.replace(result.backdoor_test, images=images[rows])
    made = Subject(dataclasses.replace(result, test=grey, backdoor_test=bad), None, CPU)
    share, high = trigger_energy(made, 10)
    assert share[6] > 0.98 and share.sum() == pytest.approx(1) and high < 0.02
    same = dataclasses.replace(result.backdoor_test, images=grey.images[rows])
    none = trigger_energy(Subject(dataclasses.replace(result, test=grey, backdoor_test=same), None, CPU), 10)
    assert np.isnan(none[0]).all() and np.isnan(none[1])


def test_bad_settings() -> None:
    for name in ("trigger_generalisation", "sharpness", "representation"):
        with pytest.raises(UnknownNameError, match="did you mean 'badnets'"):
            studies.create(name, attacks=["badnts"]).grids()
    with pytest.raises((ConfigError, UnknownNameError), match="location"):
        studies.create("trigger_generalisation", families=["lcation"])
    with pytest.raises(ConfigError, match="after must be one of none, ft, ft_sam, got 'clp'"):
        studies.create("sharpness", after="clp").grids()
    with pytest.raises(ConfigError, match=r"points: .*must be odd"):
        studies.create("sharpness", points=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trigger_generalisation", "sharpness", "representation"])
def test_from_training_to_figure(name: str, tmp_path: Path) -> None:
    own: dict[str, dict[str, Any]] = {
        "trigger_generalisation": {"n": 60},
        "sharpness": {"n": 32, "m": 3, "directions": 1, "points": 5, "path_points": 3, "path_epochs": 1},
        "representation": {"probe": 40, "n": 60},
    }
    quick = {"name": "ft", "set": {"epochs": 1}}
    made = studies.run(
        name, tmp_path / name, store=Store(tmp_path / "runs"), device="cpu", workers=1, recipe={"epochs": 2},
        attacks=["badnets"], defenses=[quick], **own[name],
    )  # fmt: skip
    assert made.figure is not None and made.figure.stat().st_size > 10_000 and made.cells == {"done": 2}
    assert "badnets" in made.reading
