"""D-ST: the contrastive loss by a loop, the classifier's terms, the schedule, one model in the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult, _fct
from bbfast.defenses.training import d_st
from bbfast.defenses.training._contrastive import Encoder, Rate, SupCon, supcon
from bbfast.defenses.training._views import Views
from bbfast.errors import ConfigError, DivergedError
from bbfast.models import build, features
from bbfast.training import Batch, Recipe

MakeImages = Callable[..., ImageSet]
MakeAttack = Callable[..., AttackResult]
TINY: dict[str, Any] = {
    "train_epochs": 1,
    "sep_epochs": 1,
    "batch_size": 50,
    "views": 1,
    "ssl_epochs": 2,
    "ssl_batch": 50,
    "ssl_lr": 0.05,
    "warmup_epochs": 1,
    "cls_epochs": 2,
    "cls_lr": 0.5,
}


def by_loop(z: Tensor, labels: Tensor, clean: Tensor, t: float, base: float, strict: bool) -> Tensor:
    n, total = len(labels), z.new_zeros(())
    for a in range(2 * n):
        others = [b for b in range(2 * n) if b != a]
        below = torch.stack([(z[a] @ z[b] / t).exp() for b in others]).sum()
        positives = [
            b
            for b in others
            if b % n == a % n or (clean[a % n] and labels[b % n] == labels[a % n] and (clean[b % n] or not strict))
        ]
        total = total - sum(((z[a] @ z[b] / t).exp() / below).log() for b in positives) / len(positives)
    return t / base * total / (2 * n)


@pytest.mark.parametrize("strict", [False, True])
def test_supcon_by_a_loop(strict: bool) -> None:
    """A clean anchor has suspicious samples of its label among its positives (the reference's mask) unless strict; a
    suspicious one has nobody but its own other view."""
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(14, 5, generator=g, dtype=torch.float64), dim=1).requires_grad_()
    labels, clean = torch.tensor([0, 0, 0, 1, 1, 2, 0]), torch.tensor([1, 1, 0, 1, 0, 0, 0]).bool()
    found, expected = supcon(z, labels, clean, 0.1, 0.07, strict), by_loop(z, labels, clean, 0.1, 0.07, strict)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0])


def test_without_clean_samples_it_is_contrast_of_views() -> None:
    z = F.normalize(torch.randn(12, 5), dim=1)
    labels, none = torch.zeros(6).long(), torch.zeros(6).bool()
    each = [by_loop(z, labels, none, 0.2, 0.2, False), supcon(z, torch.arange(6), ~none, 0.2, 0.2)]
    for expected in each:
        torch.testing.assert_close(supcon(z, labels, none, 0.2, 0.2), expected)


def test_rates_rise_and_fall() -> None:
    rate = Rate(0.5, 200, 0.5e-3, 10, 0.01)
    top = 0.5e-3 + 0.4995 * (1 + math.cos(math.pi * 10 / 200)) / 2
    assert rate(0, 0.0) == 0.01
    assert rate(4, 0.5) == pytest.approx(0.01 + 0.45 * (top - 0.01))
    assert rate(10, 0.7) == pytest.approx(top)
    assert rate(200, 0.0) == pytest.approx(0.5e-3)
    assert [Rate(0.4, 100)(epoch, 0.3) for epoch in (0, 50)] == pytest.approx([0.4, 0.2])


def readout(data: ImageSet, clean: Tensor, poisoned: Tensor, **settings: Any) -> tuple[Any, nn.Module]:
    config = defenses.create("d_st", **settings).config
    program = d_st.Readout(Views(), clean, poisoned, config)
    model = build("small_cnn", 4, 12)
    program.start(model, data, Recipe(epochs=10, lr=5.0), 0, torch.device("cpu"))
    program.epoch_start(0, 4, 10)
    return program, model


@pytest.mark.parametrize(("clean", "poisoned"), [((0, 1, 2), (5, 6)), ((), (0, 5)), ((3,), ()), ((), ())])
def test_classifier_loss_term_by_term(
    toy_images: MakeImages, clean: tuple[int, ...], poisoned: tuple[int, ...]
) -> None:
    """Regression: the reference's cross-entropy of no sample is NaN. Uncertain samples have no part."""
    data = toy_images(10, 4)
    masks = [torch.tensor([i in chosen for i in range(10)]) for chosen in (clean, poisoned)]
    program, model = readout(data, *masks, poison_weight=0.25, cls_augment=False)
    index = torch.arange(10)
    batch = program.make_batch(Batch(torch.zeros(10, 3, 12, 12), data.labels, index))
    loss, _ = program.loss(model, batch)
    assert len(batch) == len(clean) + len(poisoned)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = model((data.images / 255 - mean) / std)
    expected = torch.zeros(())
    for chosen, weight in zip(masks, (1.0, -0.25), strict=True):
        if chosen.any():
            expected = expected + weight * F.cross_entropy(logits[chosen], data.labels[chosen])
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None or bool(g.isfinite().all()) for g in gradients.values())
    assert sum(g is not None for g in gradients.values()) <= 2, "the encoder is frozen"


def test_classifier_rate_rises_to_the_end(toy_images: MakeImages) -> None:
    data = toy_images(10, 4)
    program, _ = readout(data, torch.ones(10).bool(), torch.zeros(10).bool(), cls_augment=False)
    rates = []
    for epoch, step in ((0, 0), (5, 0), (9, 3)):
        program.make_batch(Batch(torch.zeros(2, 3, 12, 12), data.labels[:2], torch.arange(2), epoch=epoch, step=step))
        rates.append(program._lr)
    assert rates == pytest.approx([0.01, 0.01 + 0.5 * 4.99, 0.01 + 0.975 * 4.99])


def test_only_the_last_layer_moves_and_the_model_is_a_plain_one(
    toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder that contrast left, its statistics included, with a new last layer: in the standard architecture."""
    attack, kept = toy_attack(), {}
    plain = d_st.pretrain

    def watch(view: Any, encoder: Encoder, *rest: Any) -> Any:
        done = plain(view, encoder, *rest)
        kept.update({name: value.clone() for name, value in encoder.model.state_dict().items()})
        kept["x"] = torch.randn(6, 3, 12, 12)
        kept["read"] = features(encoder.model.eval(), kept["x"], "penultimate")
        return done

    monkeypatch.setattr(d_st, "pretrain", watch)
    result = defenses.defend(defenses.create("d_st", **TINY), attack, device="cpu", progress=False)
    assert result.model is not None and result.scores is not None and result.flags is not None
    x, read = kept.pop("x"), kept.pop("read")
    after = result.model.state_dict()
    assert after.keys() == attack.model.state_dict().keys() == kept.keys()
    moved = [name for name in after if not torch.equal(after[name], kept[name])]
    last = d_st.classifier(result.model, "d_st")
    names = {id(p): name for name, p in result.model.named_parameters()}
    assert set(moved) == {names[id(last.weight)], names[id(last.bias)]}
    torch.testing.assert_close(result.model(x), last(read), rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad for p in result.model.parameters())
    assert [row["phase"] for row in result.history] == ["sensitivity"] * 2 + ["contrast"] * 2 + ["classifier"] * 2
    assert int(result.flags.sum()) == result.info["flagged"] == 10


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
    one, other = (
        defenses.defend(defenses.create("d_st", **TINY), each, device="cpu", progress=False)
        for each in (attack, changed)
    )
    assert one.scores is not None and other.scores is not None and one.model is not None and other.model is not None
    assert torch.equal(one.scores[order], other.scores)
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("program", [SupCon, d_st.Readout])
def test_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None], program: type[Any]) -> None:
    killed_goes_on(defenses.create("d_st", **TINY), toy_attack(n=100), program)


def test_divergence_is_named(toy_attack: MakeAttack) -> None:
    with pytest.raises(DivergedError, match="lower ssl_lr"):
        defenses.defend(defenses.create("d_st", **TINY | {"ssl_lr": 1e30}), toy_attack(n=100), device="cpu")


def test_settings() -> None:
    config = defenses.create("d-st").config
    assert (config.ssl_epochs, config.ssl_lr, config.ssl_batch, config.warmup_epochs) == (200, 0.5, 128, 10)
    assert (config.temperature, config.base_temperature, config.poison_weight) == (0.1, 0.07, 1e-3)
    assert (config.cls_epochs, config.cls_lr, config.strict_positives) == (10, 5.0, False)
    with pytest.raises(ConfigError, match="temperature"):
        defenses.create("d_st", temperature=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"])
def test_architectures(toy_attack: MakeAttack, name: str) -> None:
    attack = toy_attack(build(name, 4, 32), n=20, n_test=8, size=(3, 32, 32))
    attack.metrics = {"c_acc": 0.25, "asr": 0.25, "r_acc": 0.25}
    small = TINY | {"ssl_epochs": 1, "cls_epochs": 1, "ssl_batch": 10, "batch_size": 10}
    result = defenses.defend(defenses.create("d_st", **small), attack, device="cpu", progress=False)
    assert result.model is not None
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_repairs_the_digits(digits_attack: AttackResult) -> None:
    metrics = defenses.defend("d_st", digits_attack, device="cpu", progress=False).metrics
    assert metrics["asr"] <= 0.15 and metrics["c_acc"] >= metrics["c_acc_before"] - 0.05, metrics


def test_d_br_and_d_st_share_what_they_make_alike(
    toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One store, the same settings: D-ST finds how sensitive D-BR found the samples, and ends as it does by itself."""
    attack = toy_attack(n=100)
    attack.config["recipe"]["deterministic"] = True
    method, same = defenses.create("d_st", **TINY), ("train_epochs", "sep_epochs", "batch_size", "views")
    alone = defenses.defend(method, attack, device="cpu", progress=False)
    other = defenses.create("d_br", rounds=0, **{key: TINY[key] for key in same})
    first = defenses.defend(other, attack, device="cpu", progress=False, store=tmp_path)

    def refuse(*_: Any) -> Any:
        raise AssertionError("it was made again")

    monkeypatch.setattr(_fct, "feature_changes", refuse)
    shared = defenses.defend(method, attack, device="cpu", progress=False, store=tmp_path)
    assert shared.scores is not None and alone.scores is not None and first.scores is not None
    assert torch.equal(shared.scores, alone.scores) and torch.equal(shared.scores, first.scores)
    assert shared.model is not None and alone.model is not None

    def timeless(result: DefenseResult) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]

    assert timeless(shared) == timeless(alone)
    state = alone.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in shared.model.state_dict().items())
    with pytest.raises(AssertionError, match="made again"):
        defenses.defend(method, attack, seed=1, device="cpu", progress=False, store=tmp_path)
