"""What the tests of the defenses share: results made by hand in milliseconds, and one really trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.defenses import Defense, defend
from bbfast.defenses.view import DataFacts, DefenderView, Grants, private_copy
from bbfast.models import build
from bbfast.training import Program, Recipe

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def image_set(n: int, classes: int, size: tuple[int, int, int] = (3, 12, 12), seed: int = 0) -> ImageSet:
    """Random images, labels in turn."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *size), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % classes, mean=MEAN, std=STD)


def made_up_attack(
    model: nn.Module | None = None,
    n: int = 200,
    n_test: int = 96,
    classes: int = 4,
    size: tuple[int, int, int] = (3, 12, 12),
    target: int = 1,
    seed: int = 0,
) -> AttackResult:
    """An attack result with a white 3x3 corner on a tenth of random images; its model is untrained."""
    g = torch.Generator().manual_seed(seed)
    clean, test = image_set(n, classes, size, seed), image_set(n_test, classes, size, seed + 1)
    poisoned = torch.zeros(n, dtype=torch.bool)
    poisoned[torch.randperm(n, generator=g)[: n // 10]] = True
    images, labels = clean.images.clone(), clean.labels.clone()
    images[poisoned, :, -3:, -3:] = 255
    labels[poisoned] = target
    others = test.subset(test.labels != target)
    triggered = others.images.clone()
    triggered[:, :, -3:, -3:] = 255
    if model is None:
        torch.manual_seed(seed)
        model = build("small_cnn", classes, size[1:])
    spec = getattr(model, "bbfast_spec", None)
    return AttackResult(
        model=model.eval(),
        train=ImageSet(images, labels, mean=MEAN, std=STD),
        poisoned=poisoned,
        original_labels=clean.labels,
        role=poisoned.to(torch.int8),
        clean_images=clean.images[poisoned],
        test=test,
        backdoor_test=BackdoorSet(
            triggered,
            torch.full((len(others),), target),
            mean=MEAN,
            std=STD,
            ids=others.ids,
            original_labels=others.labels,
        ),
        metrics={},
        config={
            "attack": "badnets",
            "attack_config": {"target": target},
            "model": {"name": "toy"} if spec is None else spec.to_dict(),
            "recipe": Recipe(epochs=2, batch_size=32, precision="fp32", augment=False).model_dump(mode="json"),
            "data": {
                "name": "toy",
                "fingerprint": "0",
                "num_classes": classes,
                "image_size": list(size),
                "mean": list(MEAN),
                "std": list(STD),
                "flip": False,
                "padding": 2,
            },
            "seed": seed,
        },
    )


def view_of(
    model: nn.Module | None = None,
    needs: tuple[str, ...] = ("model", "clean"),
    clean: ImageSet | None = None,
    classes: int = 4,
    **options: Any,
) -> DefenderView:
    """A view made by hand."""
    size = clean.image_size if clean is not None else (3, 12, 12)
    mean, std = (clean.mean, clean.std) if clean is not None else (MEAN, STD)
    facts = DataFacts("toy", classes, size, mean, std, padding=2)
    held = private_copy(model, "cpu") if model is not None else None
    return DefenderView("test", needs, facts, Grants(model=held, clean=clean), **options)


@pytest.fixture(scope="session")
def toy_attack() -> Callable[..., AttackResult]:
    """Makes attack results, see :func:`made_up_attack`."""
    return made_up_attack


@pytest.fixture
def toy_view() -> Callable[..., DefenderView]:
    """Makes views, see :func:`view_of`."""
    return view_of


@pytest.fixture
def toy_images() -> Callable[..., ImageSet]:
    """Makes random sets, see :func:`image_set`."""
    return image_set


@pytest.fixture(scope="session")
def digits_attack() -> AttackResult:
    """BadNets at 10 % on the handwritten digits, trained in seconds: C-Acc and ASR above 0.95."""
    import bbfast.datasets
    from bbfast.attacks import attack

    data = bbfast.datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits").replace(deterministic=True)
    result = attack("badnets", data, "small_cnn", recipe, seed=0, device="cpu", progress=False)
    assert result.metrics["c_acc"] > 0.95, result.metrics
    assert result.metrics["asr"] > 0.95, result.metrics
    return result


@pytest.fixture(scope="session")
def all_to_all_attack() -> AttackResult:
    """A corner patch on 30 % of made-up images moves each of eight classes to the next; learned in a second or two."""
    from bbfast.evaluation import evaluate
    from bbfast.training import train

    classes, g = 8, torch.Generator().manual_seed(0)
    looks = nn.functional.interpolate(torch.rand(classes, 3, 4, 4, generator=g), size=(12, 12), mode="bilinear")

    def draw(n: int) -> ImageSet:
        labels = torch.arange(n) % classes
        pixels = 150 * looks[labels] + 40 + 45 * torch.randn(n, 3, 12, 12, generator=g)
        return ImageSet(pixels.clamp(0, 255).to(torch.uint8), labels, mean=MEAN, std=STD)

    def stamped(pixels: Tensor) -> Tensor:
        pixels = pixels.clone()
        pixels[:, :, -3:, -3:] = 255
        pixels[:, :, -2, -2] = 0
        return pixels

    clean, test = draw(400), draw(160)
    poisoned = torch.zeros(400, dtype=torch.bool)
    poisoned[torch.randperm(400, generator=g)[:120]] = True
    images, labels = clean.images.clone(), clean.labels.clone()
    images[poisoned], labels[poisoned] = stamped(images[poisoned]), (labels[poisoned] + 1) % classes
    given = ImageSet(images, labels, mean=MEAN, std=STD)
    triggered = BackdoorSet(
        stamped(test.images),
        (test.labels + 1) % classes,
        mean=MEAN,
        std=STD,
        ids=test.ids,
        original_labels=test.labels,
    )
    recipe = Recipe(epochs=12, batch_size=32, lr=0.05, precision="fp32", augment=False, deterministic=True)
    torch.manual_seed(0)
    model = build("small_cnn", classes, (12, 12))
    train(model, given, recipe, seed=0, device="cpu", progress=False)
    metrics = evaluate(model.eval(), test, triggered, device="cpu")
    assert metrics["c_acc"] > 0.9 and metrics["asr"] > 0.9, metrics
    base = made_up_attack(model, n=16, n_test=8, classes=classes)
    config = base.config | {"attack_config": {"label_mode": "all2all"}, "recipe": recipe.model_dump(mode="json")}
    return dataclasses.replace(
        base,
        train=given,
        poisoned=poisoned,
        original_labels=clean.labels,
        role=poisoned.to(torch.int8),
        clean_images=clean.images[poisoned],
        test=test,
        backdoor_test=triggered,
        metrics=metrics,
        config=config,
    )


def gaussian_features(
    seed: int, classes: int = 5, n: int = 500, d: int = 64, contamination: float = 0.1, shift: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, d]``, labels and truth: normal clouds, and in class 0 some samples moved along one direction."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(n)
    features = torch.randn(classes * n, d, generator=g) + 4 * torch.randn(classes, d, generator=g)[labels]
    truth = (labels == 0) & (torch.rand(classes * n, generator=g) < contamination)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    return features + shift * direction * truth[:, None], labels, truth


def view_of_features(
    features: Tensor,
    labels: Tensor,
    classes: int,
    images: Tensor | None = None,
    reserve: tuple[Tensor, Tensor] | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> DefenderView:
    """A view whose model is never run: its penultimate features, of training set and reserve, are given."""

    def made_up(n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=g)

    held = {("poisoned_train", "penultimate"): features}
    clean = None
    if reserve is not None:
        held["reserve", "penultimate"] = reserve[0]
        clean = ImageSet(made_up(len(reserve[1]), 2), reserve[1])
    grants = Grants(
        model=nn.Identity() if model is None else model,
        poisoned_train=ImageSet(made_up(len(labels), 1) if images is None else images, labels),
        reserve=clean,
        features=held,
    )
    facts = DataFacts("toy", classes, (1, 4, 4), (0.5,), (0.5,))
    needs = {"model", "poisoned_train", "fresh_model"} | ({"reserve"} if reserve is not None else set())
    return DefenderView("test", needs, facts, grants, **options)


@pytest.fixture
def gauss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Makes features, see :func:`gaussian_features`."""
    return gaussian_features


@pytest.fixture
def feature_view() -> Callable[..., DefenderView]:
    """Makes views, see :func:`view_of_features`."""
    return view_of_features


@pytest.fixture
def killed_goes_on(tmp_path: Path) -> Callable[..., None]:
    """Checks that a defense killed at the end of its second epoch, and called again, ends as if never killed."""

    def check(defense: Defense, attack: AttackResult, program: type[Program]) -> None:
        attack.config["recipe"]["deterministic"] = True
        whole = defend(defense, attack, 0.2, device="cpu", progress=False)
        plain = program.epoch_end

        def killed(self: Program, epoch: int, model: nn.Module) -> dict[str, float]:
            if epoch == 1:
                raise KeyboardInterrupt
            return plain(self, epoch, model)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(program, "epoch_end", killed)
            defend(defense, attack, 0.2, device="cpu", progress=False, checkpoint=tmp_path / "work")
        again = defend(defense, attack, 0.2, device="cpu", progress=False, checkpoint=tmp_path / "work")
        assert whole.model is not None and again.model is not None
        one, other = whole.model.state_dict(), again.model.state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return check
