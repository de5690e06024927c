"""Sample sensitivity: turns against torchvision, the loss by a loop, exact shares, independence of storage order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import functional as tv

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses import DefenseResult, _fct
from bbfast.defenses._content import content_keys, content_order
from bbfast.defenses._draws import Draws
from bbfast.defenses._fct import Separation, feature_changes, sensitivity, separation_loss, turned
from bbfast.defenses.detection import d_br
from bbfast.defenses.features import extract_features
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import ConfigError, DataRequirementError, DivergedError, UnsupportedModelError
from bbfast.models import build
from bbfast.training import Recipe, train

TINY: dict[str, Any] = {"train_epochs": 1, "sep_epochs": 1, "batch_size": 50, "views": 2, "rounds": 0}
REMOVING: dict[str, Any] = TINY | {"rounds": 3, "alpha_poison": 0.2, "alpha_clean": 0.4, "lr": 0.01}
MakeImages = Callable[..., ImageSet]


def view_with(
    data: ImageSet, classes: int = 4, seed: int = 0, architecture: str = "small_cnn", **options: Any
) -> DefenderView:
    spec = build(architecture, classes, data.image_size[1:]).bbfast_spec
    facts = DataFacts("toy", classes, data.image_size, data.mean, data.std, padding=2)
    recipe = Recipe(precision="fp32", deterministic=True)
    grants = Grants(poisoned_train=data, model_spec=spec)
    return DefenderView("d_br", {"poisoned_train", "fresh_model"}, facts, grants, recipe=recipe, seed=seed, **options)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 12), (11, 16)])
def test_turns_against_torchvision(size: tuple[int, int]) -> None:
    """A rotation and a shift one after the other; nearest pixel, black where there is none."""
    images = torch.randint(1, 256, (40, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = Draws(content_keys(images), 5)
    found = turned(images, draws, "t", 180.0, 0.2)
    u = draws.uniform("t", 3).double() * 2 - 1
    same = []
    for image, (angle, right, down), ours in zip(images, u.tolist(), found, strict=True):
        shift = [round(right * 0.2 * size[1]), round(down * 0.2 * size[0])]
        rotated = tv.rotate(image, angle * 180, tv.InterpolationMode.NEAREST)
        expected = tv.affine(rotated, 0.0, shift, 1.0, [0.0, 0.0], tv.InterpolationMode.NEAREST)
        same.append(float((expected == ours).double().mean()))
    # Pixels half-way between two may fall on either side.
    assert min(same) > 0.9 and np.mean(same) > 0.99


def test_turns_of_nothing_and_of_a_quarter() -> None:
    images = torch.randint(0, 256, (6, 2, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = Draws(content_keys(images), 5)
    assert torch.equal(turned(images, draws, "t", 0.0, 0.0), images)
    shifted = turned(images, draws, "t", 0.0, 1.0)
    assert not torch.equal(shifted, images)

    class Quarter(Draws):
        def uniform(self, tag: str, *shape: int) -> Tensor:
            return torch.tensor([[1.0, 0.5, 0.5]]).expand(len(self.keys), 3)

    assert torch.equal(turned(images, Quarter(draws.keys, 0), "t", 90.0, 0.2), images.rot90(1, (2, 3)))


def test_turns_belong_to_the_image() -> None:
    images = torch.randint(0, 256, (20, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = turned(images, Draws(content_keys(images), 5), "t", 180.0, 0.2)
    part = images[[7, 3]]
    assert torch.equal(turned(part, Draws(content_keys(part), 5), "t", 180.0, 0.2), whole[[7, 3]])
    assert not torch.equal(turned(images, Draws(content_keys(images), 5), "u", 180.0, 0.2), whole)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_separation_loss_by_a_loop_over_classes() -> None:
    g = torch.Generator().manual_seed(0)
    read = torch.randn(30, 7, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (30,), generator=g)
    centres = [read[labels == k].mean(dim=0) for k in labels.unique()]
    unit = torch.stack([c / c.norm() for c in centres])
    alike = unit @ unit.T
    expected = (alike - torch.diag(alike.diagonal())).mean()
    # Classes without a sample, before, between and after, change nothing.
    loss = separation_loss(read, labels * 2 + 1, 11)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    torch.testing.assert_close(torch.autograd.grad(loss, read)[0], torch.autograd.grad(expected, read)[0])
    assert torch.autograd.gradcheck(lambda r: separation_loss(r, labels * 2 + 1, 11), read)


def test_one_class_and_dead_features_have_no_gradient() -> None:
    for read, labels in ((torch.randn(5, 3), torch.zeros(5).long()), (torch.zeros(4, 3), torch.arange(4))):
        read.requires_grad_()
        loss = separation_loss(read, labels, 4)
        (grad,) = torch.autograd.grad(loss, read)
        assert float(loss.detach()) == 0
        assert bool(grad.isfinite().all())


def test_the_classifier_rests_while_classes_are_separated(toy_images: MakeImages) -> None:
    data = toy_images(60, 4)
    model = build("small_cnn", 4, 12)
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    recipe = Recipe(
        epochs=3, batch_size=20, lr=0.05, precision="fp32", augment=False, schedule="constant", momentum=0.9
    )
    before = head.weight.clone()
    done = train(model, data, recipe, program=Separation(0, 4), device="cpu")
    assert torch.equal(head.weight, before)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    # After an epoch of cross-entropy the optimiser goes on with its momentum, but the head has no gradient.
    train(model, data, recipe, program=Separation(3, 4), device="cpu")
    assert not torch.equal(head.weight, before)


# -- the scores -------------------------------------------------------------------------------------------------------


def test_scores_are_mean_squared_changes(toy_images: MakeImages) -> None:
    data, model = toy_images(40, 4), build("small_cnn", 4, 12).eval()
    view, config = view_with(data), defenses.create("d_br", views=3).config
    found = feature_changes(model, data, view, config)
    draws, plain = Draws(content_keys(data.images), view.derive_seed("fct")), None
    total = np.zeros(40)
    plain = extract_features(model, data.images, "penultimate", data.mean, data.std, "cpu").numpy()
    for i in range(3):
        images = turned(data.images, draws, f"view {i}", 180.0, 0.2)
        other = extract_features(model, images, "penultimate", data.mean, data.std, "cpu").numpy()
        total += ((plain - other) ** 2).mean(axis=1)
    np.testing.assert_allclose(found.numpy(), total / 3, rtol=1e-4)


@pytest.mark.parametrize("n", [99, 200])
def test_shares_are_exact(toy_images: MakeImages, n: int) -> None:
    """Regression: BackdoorBench draws new turns between thresholds and split, so the sets have other sizes, and sets
    the shares to constants."""
    data = toy_images(n, 4)
    config = defenses.create("d_br", alpha_clean=0.3, alpha_poison=0.11, **TINY).config
    found = sensitivity(view_with(data), config)
    assert int(found.clean.sum()) == int(0.3 * n)
    assert int(found.poisoned.sum()) == int(0.11 * n)
    assert not bool((found.clean & found.poisoned).any())
    rest = ~(found.clean | found.poisoned)
    assert found.scores[found.clean].max() <= found.scores[rest].min()
    assert found.scores[rest].max() <= found.scores[found.poisoned].min()
    result = defenses.create("d_br", alpha_clean=0.3, alpha_poison=0.11, **TINY).run(view_with(data))
    scores, flags = rows(result)
    assert torch.equal(scores, found.scores)
    assert torch.equal(flags, found.poisoned)
    assert result.threshold == float(scores[flags].min())
    assert result.kind == "detection"


def test_ties_keep_the_shares(toy_images: MakeImages) -> None:
    one = toy_images(1, 1).images.repeat(100, 1, 1, 1)
    data = ImageSet(one, torch.arange(100) % 4)
    scores, flags = rows(defenses.create("d_br", **TINY).run(view_with(data)))
    assert scores.max() - scores.min() < 1e-6
    assert int(flags.sum()) == 5


def test_storage_order_does_not_matter(toy_images: MakeImages) -> None:
    data, order = toy_images(120, 4), torch.randperm(120, generator=torch.Generator().manual_seed(0))
    method = defenses.create("d_br", **TINY)
    one = method.run(view_with(data))
    other = method.run(view_with(ImageSet(data.images[order], data.labels[order], data.mean, data.std)))
    assert torch.equal(rows(one)[0][order], rows(other)[0])
    assert torch.equal(rows(one)[1][order], rows(other)[1])
    again = method.run(view_with(data, seed=1))
    assert not torch.equal(rows(again)[0], rows(one)[0])


def test_interrupted_run_goes_on(toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, method = toy_images(120, 4), defenses.create("d_br", **TINY)
    whole = method.run(view_with(data))

    def stop(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_fct, "feature_changes", stop)
        method.run(view_with(data, checkpoint=tmp_path))
    assert torch.equal(rows(method.run(view_with(data, checkpoint=tmp_path)))[0], rows(whole)[0])


def test_diverged_model_is_named(toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fct, "feature_changes", lambda *args: torch.tensor([0.0, math.nan]).repeat(60))
    with pytest.raises(DivergedError, match="features of 60 of 120 samples are NaN"):
        defenses.create("d_br", **TINY).run(view_with(toy_images(120, 4)))


def test_bad_input(toy_images: MakeImages) -> None:
    with pytest.raises(DataRequirementError, match=r"0\.05 .* of 19 training samples is none"):
        defenses.create("d_br").check(view_with(toy_images(19, 4)))
    defenses.create("d_br", rounds=0).check(view_with(toy_images(20, 4)))
    facts = DataFacts("toy", 4, (3, 12, 12), (0.5,) * 3, (0.5,) * 3)
    grants = Grants(poisoned_train=toy_images(40, 4))
    view = DefenderView("d_br", {"poisoned_train", "fresh_model"}, facts, grants)
    with pytest.raises(UnsupportedModelError):
        defenses.create("d_br").check(view)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"alpha_poison": 0}, "alpha_poison"),
        ({"alpha_clean": 0.7, "alpha_poison": 0.4}, "at most 1"),
        ({"rotate": 200}, "rotate"),
        ({"translate": -0.1}, "translate"),
        ({"views": 0}, "views"),
        ({"rounds": -1}, "rounds"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("d_br", **config)


def test_settings() -> None:
    config = defenses.create("d-br").config
    assert (config.train_epochs, config.sep_epochs, config.sd_lr, config.batch_size) == (2, 10, 0.01, 128)
    assert (config.alpha_clean, config.alpha_poison, config.rotate, config.translate) == (0.2, 0.05, 180, 0.2)
    assert config.for_dataset("digits").train_epochs == 20
    assert defenses.create("d_br", preset="paper").config.views == 1


def removal_view(data: ImageSet, seed: int = 0, **options: Any) -> DefenderView:
    torch.manual_seed(3)
    model = build("small_cnn", 4, data.image_size[1:])
    facts = DataFacts("toy", 4, data.image_size, data.mean, data.std, padding=2)
    grants = Grants(model=model.eval(), poisoned_train=data, model_spec=model.bbfast_spec)
    recipe = Recipe(precision="fp32", deterministic=True)
    return DefenderView("d_br", defenses.find("d_br").card.needs, facts, grants, recipe=recipe, seed=seed, **options)


def weights(result: DefenseResult) -> dict[str, Tensor]:
    assert result.model is not None
    return result.model.state_dict()


# -- the removal ------------------------------------------------------------------------------------------------------


def test_removal_is_ascent_then_descent_by_one_optimiser(toy_images: MakeImages) -> None:
    """Against a plain loop: passes over the flagged samples uphill and over the clean ones downhill, one momentum.

    Regression: BackdoorBench normalises here by other deviations than the model was trained and is tested with.
    """
    data = toy_images(120, 4)
    view = removal_view(data)
    expected = copy.deepcopy(view.model)
    result = defenses.create("d_br", **REMOVING).run(view)
    config = defenses.create("d_br", **REMOVING).config
    found = sensitivity(removal_view(data), config)
    assert torch.equal(rows(result)[0], found.scores) and torch.equal(rows(result)[1], found.poisoned)
    assert result.info["clean_idx"] == found.clean.nonzero()[:, 0].tolist()

    order = content_order(data.images, data.labels)
    sets = [data.subset(order).subset(mask[order]) for mask in (found.poisoned, found.clean)]
    seed = view.derive_seed("removal")
    loaders = [
        BatchLoader(part, 50, seed=seed + own, padding=2, merge_single=True)
        for part, own in zip(sets, (1, 0), strict=True)
    ]
    sgd = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    expected.train()
    for epoch in range(3):
        for loader, sign in zip(loaders, (-1, 1), strict=True):
            for batch in loader.epoch(epoch):
                sgd.zero_grad()
                (sign * nn.functional.cross_entropy(expected(batch.x), batch.y)).backward()
                sgd.step()
    for name, value in weights(result).items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    phases = [row["phase"] for row in result.history]
    assert phases == ["sensitivity"] * 2 + ["removal"] * 3


def test_removal_does_not_depend_on_storage_order(toy_images: MakeImages) -> None:
    data, order = toy_images(120, 4), torch.randperm(120, generator=torch.Generator().manual_seed(0))
    method = defenses.create("d_br", **REMOVING)
    one = weights(method.run(removal_view(data)))
    other = method.run(removal_view(ImageSet(data.images[order], data.labels[order], data.mean, data.std)))
    assert all(torch.equal(one[name], value) for name, value in weights(other).items())


def test_the_same_flags_with_and_without_removal(toy_images: MakeImages) -> None:
    """What ``detect_only`` finds is what the removal unlearns, and without it the model is not looked at."""
    data = toy_images(120, 4)
    view = removal_view(data)
    alone = defenses.create("d_br", **REMOVING | defenses.find("d_br").Config.detect_only).run(view)
    both = defenses.create("d_br", **REMOVING).run(removal_view(data))
    assert alone.model is None and "model" not in view.used
    assert torch.equal(rows(alone)[0], rows(both)[0]) and torch.equal(rows(alone)[1], rows(both)[1])


def test_killed_removal_goes_on(toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, method = toy_images(120, 4), defenses.create("d_br", **REMOVING)
    whole = weights(method.run(removal_view(data)))
    plain = d_br.Removal.epoch_end

    def killed(self: Any, epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == 1:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(d_br.Removal, "epoch_end", killed)
        method.run(removal_view(data, checkpoint=tmp_path))
    again = weights(method.run(removal_view(data, checkpoint=tmp_path)))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_ascent_that_runs_away_is_named(toy_images: MakeImages) -> None:
    method = defenses.create("d_br", **REMOVING | {"lr": 1e18})
    with pytest.raises(DivergedError, match=r"d_br, removal: .*lower lr .* or rounds"):
        method.run(removal_view(toy_images(120, 4)))


def test_nothing_is_unlearned_that_is_forgotten(toy_images: MakeImages) -> None:
    data = toy_images(120, 4)
    never = defenses.create("d_br", **REMOVING | {"ascent_stop": 1e-9}).run(removal_view(data))
    always = defenses.create("d_br", **REMOVING | {"ascent_stop": 1e9}).run(removal_view(data))
    assert not any("ascent_loss" in row for row in never.history)
    # The untrained model may be right on fewer than chance, once it has learned the clean part it is not.
    assert any("ascent_loss" in row for row in always.history)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_repairs_the_digits(digits_attack: AttackResult) -> None:
    metrics = defenses.defend("d_br", digits_attack, device="cpu", progress=False).metrics
    assert metrics["asr"] <= 0.15 and metrics["c_acc"] >= metrics["c_acc_before"] - 0.05, metrics


def test_removal_needs_two_of_each(toy_images: MakeImages) -> None:
    with pytest.raises(DataRequirementError, match=r"at least 2 samples of each kind.* of 39 are 7 and 1"):
        defenses.create("d_br").check(removal_view(toy_images(39, 4)))
    defenses.create("d_br").check(removal_view(toy_images(40, 4)))


LARGE = ("vgg19_bn", "convnext_tiny", "vit_b_16")


@pytest.mark.parametrize("name", ["preactresnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_architectures(toy_images: MakeImages, name: str) -> None:
    data = toy_images(24, 4, (3, 32, 32))
    method = defenses.create("d_br", train_epochs=0, sep_epochs=1, batch_size=12, views=1, rounds=0)
    scores, _ = rows(method.run(view_with(data, architecture=name)))
    assert bool(scores.isfinite().all())


# -- on a real backdoor -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_digits(digits_attack: AttackResult) -> None:
    """AUROC above 0.8; ranks settle as turns are added (0.95 of the acceptance takes more than four)."""
    method = defenses.create("d_br", rounds=0)
    result = defenses.defend(method, digits_attack, seed=0, device="cpu", progress=False)
    assert result.model is None
    assert result.metrics["auroc"] > 0.8
    assert result.metrics["precision"] > 0.5
    assert int(rows(result)[1].sum()) == int(0.05 * len(digits_attack.train))
    data = digits_attack.train[:300]
    one, four, sixteen = (
        feature_changes(digits_attack.model, data, view_with(data, 10), defenses.create("d_br", views=views).config)
        for views in (1, 4, 16)
    )
    assert stats.spearmanr(four, sixteen).statistic > max(0.7, stats.spearmanr(one, sixteen).statistic + 0.1)
