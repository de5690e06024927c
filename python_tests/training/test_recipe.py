from __future__ import annotations

import pytest
from pydantic import ValidationError

from bbfast.errors import ConfigError, UnknownNameError
from bbfast.training import Recipe
from bbfast.training.presets import dataset_key


@pytest.mark.parametrize(
    ("dataset", "epochs", "schedule", "flip"),
    [
        ("cifar10", 100, "cosine", True),
        ("cifar100", 100, "cosine", False),
        ("gtsrb", 50, "cosine", False),
        ("tiny_imagenet", 200, "plateau", False),
        (None, 100, "cosine", False),
        ("npz", 100, "cosine", False),
        ("digits", 100, "cosine", False),
    ],
)
def test_paper(dataset: str | None, epochs: int, schedule: str, flip: bool) -> None:
    r = Recipe.preset("paper", dataset=dataset, model="preactresnet18")
    assert (r.epochs, r.schedule, r.flip) == (epochs, schedule, flip)
    assert (r.optimizer, r.lr, r.momentum, r.weight_decay) == ("sgd", 0.01, 0.9, 5e-4)
    assert (r.batch_size, r.padding, r.drop_last, r.augment, r.nesterov) == (128, 4, True, True, False)
    assert r.t_max is None and r.label_smoothing == 0 and r.flooding == 0
    if schedule == "plateau":
        assert (r.gamma, r.patience) == (0.1, 10)


def test_the_reference_ties_cosine_to_100_epochs() -> None:
    assert Recipe.preset("paper", dataset="gtsrb", compat="reference").t_max == 100
    assert Recipe.preset("paper", dataset="cifar10", compat="reference").t_max == 100
    assert Recipe.preset("paper", dataset="tiny_imagenet", compat="reference").t_max is None


@pytest.mark.parametrize("model", ["small_cnn", "preactresnet18", "vit_b_16", None])
@pytest.mark.parametrize("dataset", ["digits", "cifar10_small", "gtsrb", "cifar100", "tiny", "my_folder", None])
def test_quick_is_quicker(dataset: str | None, model: str | None) -> None:
    quick, paper = (Recipe.preset(name, dataset=dataset, model=model) for name in ("quick", "paper"))
    assert quick.epochs <= paper.epochs / 2
    assert quick.flip == paper.flip
    assert not quick.drop_last  # small sets need their last batch


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cifar10_small", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("cifar100_small", "cifar100"),
        ("/data/sets/gtsrb_small.npz", "gtsrb"),
        ("tiny-imagenet-200", "tiny_imagenet"),
        ("tiny", "tiny_imagenet"),
        ("C:\\sets\\cifar10\\", "cifar10"),
        ("digits", "digits"),
        ("cats_and_dogs", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_names_of_data_sets_are_read_freely(name: str | None, key: str) -> None:
    assert dataset_key(name) == key


def test_presets_take_changes() -> None:
    r = Recipe.preset("paper", dataset="cifar10", epochs=2, lr=0.5)
    assert (r.epochs, r.lr, r.flip) == (2, 0.5, True)
    with pytest.raises(ConfigError, match="unknown setting 'epoch'; did you mean epochs"):
        Recipe.preset("paper", epoch=3)


def test_unknown_preset() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe preset 'papper'; did you mean 'paper'"):
        Recipe.preset("papper")
    with pytest.raises(ConfigError, match="compat must be 'paper' or 'reference', got 'exact'"):
        Recipe.preset("paper", compat="exact")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "epochs: .*greater than or equal to 0, got -1"),
        ({"lr": 0}, "lr: .*greater than 0, got 0"),
        ({"lr": float("nan")}, "lr: .*"),
        ({"optimizer": "lion"}, "optimizer: .*'sgd'.*got 'lion'"),
        ({"schedule": "cos"}, "schedule: .*got 'cos'"),
        ({"precision": "int8"}, "precision: .*got 'int8'"),
        ({"momentum": 1.0}, "momentum"),
        ({"optimizer": "adam", "nesterov": True}, "nesterov needs optimizer='sgd'"),
        ({"schedule": "multistep", "milestones": (5, 3)}, "milestones must rise"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"compile": True, "cuda_graphs": True}, "compile and cuda_graphs cannot both be on"),
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate'"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe().replace(**changes)


def test_recipes_are_values() -> None:
    r = Recipe(epochs=7)
    assert r == Recipe(epochs=7) and r != Recipe() and hash(r) == hash(Recipe(epochs=7))
    with pytest.raises(ValidationError):
        r.epochs = 3  # type: ignore[misc]
    assert r.replace(lr=0.5).epochs == 7 and r.lr == 0.01
    assert Recipe(**r.model_dump(mode="json")) == r
