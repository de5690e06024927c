"""NAB: who is isolated, what they are called, where the stamp is, and that the model returned stamps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses._content import content_order
from bbfast.defenses.run import build_view
from bbfast.defenses.training import _contrastive, nab
from bbfast.defenses.training._contrastive import SimClr, nt_xent
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.errors import AccessDeniedError, ConfigError, DataRequirementError
from bbfast.models import build, model_state
from bbfast.models.additions.stamp import stamped
from bbfast.training import Batch, train

MakeAttack = Callable[..., AttackResult]
TINY: dict[str, Any] = {"detect_epochs": 2, "ssl_epochs": 2, "ssl_batch": 50, "epochs": 2, "batch_size": 50}
CPU: dict[str, Any] = {"device": "cpu", "progress": False}


def test_nt_xent_by_a_double_loop() -> None:
    g = torch.Generator().manual_seed(0)
    z = nn.functional.normalize(torch.randn(12, 5, generator=g, dtype=torch.float64), dim=1)
    total = 0.0
    for i in range(6):
        below = sum(float((z[i] @ z[j] / 0.5).exp()) for j in range(12) if j != i)
        total -= float(torch.tensor(float((z[i] @ z[6 + i] / 0.5).exp()) / below).log())
    assert float(nt_xent(z[:6], z[6:], 0.5)) == pytest.approx(total / 6, rel=1e-5)


def test_nearest_centre_by_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    read, labels = torch.randn(40, 6, generator=g), torch.randint(0, 5, (40,), generator=g)
    labels[labels == 3] = 2
    trusted = torch.randperm(40, generator=g)[:30]
    found = nab.nearest_centre(read, labels, trusted, 6)
    centres = {c: read[[i for i in trusted.tolist() if labels[i] == c]].mean(0) for c in (0, 1, 2, 4)}
    expected = [min(centres, key=lambda c: float((centres[c] - row).norm())) for row in read]
    assert found.tolist() == expected


def recorded(attack: AttackResult, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[DefenseResult, Any]:
    """The result and what its last training saw: the set it was given, and each batch before and after."""
    seen: dict[str, Any] = {"batches": []}
    plain, plain_batch = nab.train, nab.Stamping.make_batch

    def watch(model: nn.Module, data: ImageSet, recipe: Any, **rest: Any) -> Any:
        seen[rest["description"]] = (data, recipe, rest)
        return plain(model, data, recipe, **rest)

    def batch(self: Any, given: Batch) -> Batch:
        made = plain_batch(self, given)
        seen["batches"].append((given, made))
        return made

    monkeypatch.setattr(nab, "train", watch)
    monkeypatch.setattr(nab.Stamping, "make_batch", batch)
    return defenses.defend(defenses.create("nab", **TINY | settings), attack, 0.2, **CPU), seen


def test_isolated_samples_are_renamed_and_stamped(toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = toy_attack()
    result, seen = recorded(attack, monkeypatch, isolate=0.15, stamp_size=3, stamp_value=0.25)
    assert result.scores is not None and result.flags is not None
    assert int(result.flags.sum()) == 30 == result.info["isolated"]
    assert result.scores[result.flags].min() >= result.scores[~result.flags].max()
    data = seen["nab training"][0]
    order = content_order(attack.train.images, attack.train.labels)
    marked = data.labels != attack.train.labels[order]
    assert int(marked.sum()) == result.info["relabelled"] > 0
    assert not bool((marked & ~result.flags[order]).any()), "only isolated samples get another label"
    for given, made in seen["batches"]:
        ours = marked[given.index]
        assert torch.equal(made.x[~ours], given.x[~ours])
        assert (made.x[ours][:, :, :3, :3] == 0.25).all()
        assert torch.equal(made.x[ours][:, :, 3:], given.x[ours][:, :, 3:])
    recipe = seen["nab training"][1]
    # Regression: the reference steps the scheduler of the self-supervised optimiser, and its own rate never falls.
    assert recipe.schedule == "cosine" and recipe.t_max == 2 + 5
    assert seen["nab detection"][1].t_max == 2 + 80 and not seen["nab detection"][1].augment


def test_the_model_returned_stamps_and_stays_so_when_stored(toy_attack: MakeAttack, tmp_path: Path) -> None:
    """Regression: the reference stores weights that know nothing of the stamp."""
    result = defenses.defend(defenses.create("nab", **TINY), toy_attack(), **CPU)
    result.save(tmp_path / "r")
    again = DefenseResult.load(tmp_path / "r")
    x = torch.randn(6, 3, 12, 12)
    assert again.model is not None and result.model is not None
    bare = build("small_cnn", 4, (12, 12)).eval()
    bare.load_state_dict(model_state(result.model))
    with torch.no_grad():
        assert torch.equal(again.model(x), result.model(x))
        assert torch.equal(bare(stamped(x, torch.zeros(3, 1, 1), 2, 2)), result.model(x))
        assert not torch.equal(bare(x), result.model(x))


def test_without_isolated_samples_it_is_plain_training(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    method = defenses.create("nab", **TINY | {"isolate": 0.001})
    result = defenses.defend(method, attack, **CPU)
    assert result.info["isolated"] == 0 and result.threshold is None
    view, _ = build_view(method, attack, 0.2, 0, torch.device("cpu"))
    model, given = view.fresh_model(), view.poisoned_train
    recipe = sgd_recipe(view, 50, 1e-4).replace(epochs=2, lr=0.01, schedule="cosine", t_max=7)
    data = given.subset(content_order(given.images, given.labels))
    train(model, data, recipe, seed=view.derive_seed("training"), device="cpu", progress=False)
    assert result.model is not None
    pairs = zip(model.state_dict().values(), model_state(result.model).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_clean_data_are_asked_for_only_with_vd(toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "clean" not in defenses.find("nab").card.needs and "clean" not in defenses.create("nab").card.needs
    method = defenses.create("nab", pseudo="vd")
    assert "clean" in method.card.needs and "clean" in method.for_dataset("digits").card.needs
    result, seen = recorded(toy_attack(), monkeypatch, pseudo="vd")
    assert "clean" in result.info["data_used"] and result.config["clean"]["size"] == 40
    assert len(seen["nab clean"][0]) == 40
    view, _ = build_view(defenses.create("nab"), toy_attack(), 0.2, 0, torch.device("cpu"))
    with pytest.raises(AccessDeniedError):
        _ = view.clean


def test_the_encoder_is_read_in_eval_mode(toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the reference computes the centres in train mode, which depends on the batches and moves
    BatchNorm's statistics."""
    plain, modes = nab.predict, []

    def watch(model: nn.Module, data: ImageSet, **rest: Any) -> Tensor:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        read = plain(model, data, **rest)
        modes.append(model.training)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(plain(model, data.subset(torch.tensor([4])), **rest)[0], read[4])
        return read

    monkeypatch.setattr(nab, "predict", watch)
    defenses.defend(defenses.create("nab", **TINY), toy_attack(), **CPU)
    assert modes == [False]


def test_the_encoder_is_made_once(toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again by images and settings, whatever the labels; another seed makes its own."""
    attack, steps = toy_attack(n=100), []
    plain = SimClr.loss

    def count(self: Any, model: nn.Module, batch: Batch) -> Any:
        steps.append(1)
        return plain(self, model, batch)

    monkeypatch.setattr(_contrastive.SimClr, "loss", count)
    method = defenses.create("nab", **TINY)
    counts = []
    for other in (method, defenses.create("nab", **TINY | {"lr": 0.02})):
        defenses.defend(other, attack, store=tmp_path, **CPU)
        counts.append(len(steps))
    assert counts == [4, 4]
    defenses.defend(method, attack, seed=1, store=tmp_path, **CPU)
    assert len(steps) == 8
    defenses.defend(method, attack, **CPU)
    assert len(steps) == 12


@pytest.mark.parametrize("program", [SimClr, nab.Stamping])
def test_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None], program: type[Any]) -> None:
    killed_goes_on(defenses.create("nab", **TINY | {"isolate": 0.3}), toy_attack(n=100), program)


def test_storage_order_does_not_matter(toy_attack: MakeAttack) -> None:
    attack = toy_attack(n=100)
    attack.config["recipe"]["deterministic"] = True
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    changed = dataclasses.replace(
        attack,
        train=attack.train.subset(order),
        poisoned=attack.poisoned[order],
        original_labels=attack.original_labels[order],
        role=None,
    )
    one, other = (defenses.defend(defenses.create("nab", **TINY), each, **CPU) for each in (attack, changed))
    assert one.scores is not None and other.scores is not None and one.model is not None and other.model is not None
    assert torch.equal(one.scores[order], other.scores)
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_holes_are_of_two_pixels() -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 3, 8, 6)
    holes = (nab.cut(x) == 0)[:, 0]
    assert bool((x == 1).all()) and torch.equal(nab.cut(x)[:, 0], nab.cut(x)[:, 0]) is False
    area = holes.flatten(1).sum(1)
    assert set(area.tolist()) <= {1, 2, 4} and float((area == 4).float().mean()) > 0.6
    assert bool(holes.any(0).all())


def test_bad_input(toy_attack: MakeAttack) -> None:
    with pytest.raises(ConfigError, match="stamp_size must be at most 12, got 13"):
        defenses.defend(defenses.create("nab", stamp_size=13), toy_attack(), **CPU)
    with pytest.raises(DataRequirementError, match=r"isolate=0\.05 and centre_exclude=0\.999"):
        defenses.defend(defenses.create("nab", centre_exclude=0.999), toy_attack(), **CPU)
    with pytest.raises(ConfigError, match="isolate"):
        defenses.create("nab", isolate=0)


def test_settings() -> None:
    config = defenses.create("nab").config
    assert (config.detect_epochs, config.detect_lr, config.isolate, config.flood) == (20, 0.01, 0.05, 0.5)
    assert (config.epochs, config.lr, config.weight_decay, config.batch_size) == (100, 0.01, 1e-4, 256)
    assert (config.stamp_size, config.stamp_value, config.centre_exclude, config.pseudo) == (2, 0.0, 0.2, "nc")
    assert defenses.create("nab", preset="reference").config.isolate == 0.1
    assert defenses.create("nab", preset="official").config.cutout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"])
def test_architectures(toy_attack: MakeAttack, name: str) -> None:
    attack = toy_attack(build(name, 4, 32), n=20, n_test=8, size=(3, 32, 32))
    attack.metrics = {"c_acc": 0.25, "asr": 0.25, "r_acc": 0.25}
    small = {"detect_epochs": 1, "ssl_epochs": 1, "epochs": 1, "detect_batch": 10, "ssl_batch": 10, "batch_size": 10}
    result = defenses.defend(defenses.create("nab", **small), attack, **CPU)
    assert result.model is not None
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_repairs_the_digits(digits_attack: AttackResult) -> None:
    metrics = defenses.defend("nab", digits_attack, **CPU).metrics
    assert metrics["asr"] <= 0.15 and metrics["c_acc"] >= metrics["c_acc_before"] - 0.05, metrics
