"""DBD: the losses by their formulas, the split, the steps' make-up, and the stages' traps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.bench.stages import defense_stage
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training import _mixmatch
from bbfast.defenses.training._contrastive import SimClr, classifier
from bbfast.defenses.training._mixmatch import MixMatch, clock, cycled, interleaved, lowest, sce, sharpened
from bbfast.errors import ConfigError, DataRequirementError, DivergedError
from bbfast.models import build
from bbfast.store import Store
from bbfast.training import Batch, Recipe

MakeAttack = Callable[..., AttackResult]
TINY: dict[str, Any] = {
    "ssl_epochs": 2,
    "ssl_batch": 50,
    "ssl_lr": 0.05,
    "warmup_epochs": 1,
    "semi_epochs": 2,
    "semi_iters": 3,
    "semi_batch": 20,
}
CPU: dict[str, Any] = {"device": "cpu", "progress": False}


def test_sce_by_its_formula() -> None:
    logits, labels = torch.randn(7, 4, dtype=torch.float64) * 30, torch.tensor([0, 1, 2, 3, 0, 1, 2])
    found = sce(logits, labels, 0.1, 1.0)
    for z, y, value in zip(logits, labels.tolist(), found.tolist(), strict=True):
        p = z.softmax(0)
        q = torch.full((4,), 1e-4, dtype=torch.float64)
        q[y] = 1.0
        reverse = -(p.clamp(1e-7, 1) * q.log()).sum()
        assert value == pytest.approx(float(0.1 * -z.log_softmax(0)[y] + reverse), rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.31, 1.0])
def test_split_is_exact(share: float) -> None:
    losses = torch.randn(99, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    chosen = lowest(losses, share)
    assert int(chosen.sum()) == int(share * 99)
    assert share == 1 or losses[chosen].max() <= losses[~chosen].min()


def test_sharpening_and_steps() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    torch.testing.assert_close(sharpened(p, 0.5), p**2 / (p**2).sum())
    torch.testing.assert_close(sharpened(p, 1.0), p)
    members = torch.arange(100, 147)
    index = cycled(members, 10, 9)
    assert index.shape == (9, 10) and bool(torch.isin(index, members).all())
    # Four batches of ten are one pass, its rest of seven is left out.
    assert all(len(index[i : i + 4].unique()) == 40 for i in (0, 4))


@pytest.mark.parametrize(("groups", "size"), [(3, 64), (3, 20), (1, 5), (2, 7)])
def test_interleaving_mixes_and_undoes_itself(groups: int, size: int) -> None:
    order = interleaved(groups, size)
    assert order.sort().values.tolist() == list(range(groups * size))
    runs = torch.div(order.view(groups, size), size, rounding_mode="floor")
    for run in runs:
        counts = torch.bincount(run, minlength=groups)
        assert int(counts.max() - counts.min()) <= groups


def program_of(attack: AttackResult, **settings: Any) -> tuple[MixMatch, nn.Module]:
    config = defenses.create("dbd", **TINY | settings).config
    program = MixMatch(attack.train, config, 6.0, 80, 2, False)
    torch.manual_seed(1)
    model = build("small_cnn", 4, 12)
    recipe = Recipe(epochs=2, lr=2e-3, optimizer="adam", weight_decay=0.0)
    program.optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    program.start(model, clock(3, attack.train), recipe, 0, torch.device("cpu"))
    return program, model.train()


def test_a_step_term_by_term(toy_attack: MakeAttack) -> None:
    """Against the definition with mixing and guesses written out: labels of the first, guesses of the others."""
    attack = toy_attack()
    program, model = program_of(attack)
    program.epoch_start(0, 3, 2)
    blank = torch.zeros(2, 3, 1, 1)
    batch = program.make_batch(Batch(blank, torch.zeros(2).long(), torch.arange(2), epoch=5, step=1))
    assert len(batch) == 60 and torch.equal(batch.index[20:40], batch.index[40:])
    labelled = lowest(program.losses(model), 0.5)
    assert bool(labelled[batch.index[:20]].all()) and not bool(labelled[batch.index[20:]].any())
    assert not torch.equal(batch.x[20:40], batch.x[40:]), "the two augmentations differ"

    other = copy.deepcopy(model)
    torch.manual_seed(7)
    found, _ = program.loss(model, batch)
    torch.manual_seed(7)
    with torch.no_grad():
        p = other(batch.x[20:]).softmax(1)
        p = (p[:20] + p[20:]) / 2
        p = p**2 / (p**2).sum(1, keepdim=True)
        target = torch.cat([F.one_hot(batch.y[:20], 4).float(), p, p])
        share = float(torch.distributions.Beta(0.75, 0.75).sample())
        share = max(share, 1 - share)
        partner = torch.randperm(60)
        x = share * batch.x + (1 - share) * batch.x[partner]
        target = share * target + (1 - share) * target[partner]
    logits = other(x)
    weight = 6.0 * (1 + 5 + 1 / 3) / 80
    expected = -(target[:20] * logits[:20].log_softmax(1)).sum(1).mean()
    expected = expected + weight * ((logits[20:].softmax(1) - target[20:]) ** 2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_groups_of_their_own_without_batch_norm_change_nothing(toy_attack: MakeAttack) -> None:
    """Parity with the reference's three passes is an order and its undoing; in eval mode nothing else."""
    attack = toy_attack()
    x = torch.randn(60, 3, 12, 12)
    (one, model), (three, _) = program_of(attack), program_of(attack, separate_norm=True)
    model.eval()
    torch.testing.assert_close(one._forward(model, x), three._forward(model, x))
    model.train()
    assert not torch.allclose(one._forward(model, x), three._forward(model, x))


def test_with_all_labels_there_is_no_unlabelled_term(toy_attack: MakeAttack) -> None:
    result = defenses.defend(defenses.create("dbd", **TINY | {"label_fraction": 1.0}), toy_attack(), **CPU)
    assert result.model is not None and result.flags is not None
    assert not bool(result.flags.any()) and result.threshold is None


def test_warm_up_moves_the_classifier_alone(toy_attack: MakeAttack) -> None:
    """Regression: in the reference BatchNorm's statistics move while the backbone is said to be frozen."""
    attack = toy_attack()
    program, model = program_of(attack, warmup_epochs=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program._warm_up()
    last = classifier(model, "dbd")
    names = {name for name, p in model.named_parameters() if p is last.weight or p is last.bias}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names and model.training


def test_the_split_is_of_images_as_stored(toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the reference ranks losses of augmented images. The same model gives the same split twice."""
    program, model = program_of(toy_attack())
    assert torch.equal(program.losses(model), program.losses(model))
    plain = _mixmatch.predict
    seen: list[bool] = []

    def watch(net: nn.Module, data: Any, **rest: Any) -> Tensor:
        seen.append(True)
        assert torch.equal(data.images, program._data.images)
        return plain(net, data, **rest)

    monkeypatch.setattr(_mixmatch, "predict", watch)
    program.epoch_start(1, 3, 2)
    assert seen


def test_result(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    result = defenses.defend(defenses.create("dbd", **TINY), attack, **CPU)
    assert result.model is not None and result.scores is not None and result.flags is not None
    assert int((~result.flags).sum()) == int(0.5 * 200) == result.info["labelled"]
    assert result.scores[~result.flags].max() <= result.scores[result.flags].min()
    assert result.model.state_dict().keys() == attack.model.state_dict().keys()
    assert [row["phase"] for row in result.history] == ["ssl"] * 2 + ["semi"] * 2
    assert (result.info["lambda_u"], result.info["rampup"]) == (6.0, 80)
    attack.config["data"]["name"] = "cifar10_small"
    info = defenses.defend(defenses.create("dbd", **TINY | {"ssl_epochs": 0, "semi_epochs": 1}), attack, **CPU).info
    assert (info["lambda_u"], info["rampup"]) == (15.0, 190)


@pytest.mark.parametrize(("preset", "rates"), [("bbfast", [0.4, 0.2]), ("reference", [0.4, 0.4])])
def test_the_rate_of_the_first_stage_falls_with_its_epochs(
    toy_attack: MakeAttack, preset: str, rates: list[float]
) -> None:
    """Regression: the reference's half period is 1000 epochs, with 100 epochs the rate stays where it was."""
    method = defenses.create("dbd", preset=preset, **TINY | {"ssl_lr": 0.4, "semi_epochs": 1, "semi_iters": 1})
    result = defenses.defend(method, toy_attack(n=100), **CPU)
    assert [row["lr"] for row in result.history if row["phase"] == "ssl"] == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize("program", [SimClr, MixMatch])
def test_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None], program: type[Any]) -> None:
    killed_goes_on(defenses.create("dbd", **TINY), toy_attack(n=100), program)


def test_the_encoder_is_nabs(toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One store, the same settings: NAB finds what DBD made, and its result is the one it has by itself."""
    own = {"ssl_epochs": 2, "ssl_batch": 50}
    nab = defenses.create("nab", detect_epochs=1, epochs=1, isolate=0.3, **own)
    attack, store = toy_attack(n=100), Store(tmp_path)
    attack.config["recipe"]["deterministic"] = True
    alone = defenses.defend(nab, attack, **CPU)
    defense_stage(store, defenses.create("dbd", **TINY | own | {"ssl_lr": 0.4}), attack, device="cpu")

    def never(self: Any, model: nn.Module, batch: Batch) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(SimClr, "loss", never)
    made = defense_stage(store, nab, attack, device="cpu").result
    assert [entry.name for entry in Store(tmp_path / ".shared").list()] == ["simclr"]
    assert made.model is not None and alone.model is not None
    pairs = zip(made.model.state_dict().values(), alone.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    def timeless(result: DefenseResult) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]

    assert timeless(made) == timeless(alone) and timeless(made)[0].keys() > {"phase", "epoch", "loss", "lr"}


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
    one, other = (defenses.defend(defenses.create("dbd", **TINY), each, **CPU) for each in (attack, changed))
    assert one.scores is not None and other.scores is not None and one.model is not None and other.model is not None
    assert torch.equal(one.scores[order], other.scores)
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bad_input(toy_attack: MakeAttack) -> None:
    with pytest.raises(DataRequirementError, match="semi_batch=64 samples with what keeps its label, but of 100"):
        defenses.defend(defenses.create("dbd"), toy_attack(n=100), **CPU)
    with pytest.raises(DataRequirementError, match="what loses it"):
        defenses.defend(defenses.create("dbd", label_fraction=0.9), toy_attack(n=200), **CPU)
    with pytest.raises(ConfigError, match="label_fraction"):
        defenses.create("dbd", label_fraction=1.1)
    with pytest.raises(DivergedError, match=r"dbd, .*: .*lower (ssl_)?lr"):
        defenses.defend(defenses.create("dbd", **TINY | {"lr": 1e30}), toy_attack(n=100), **CPU)


def test_settings() -> None:
    config = defenses.create("dbd").config
    assert (config.ssl_epochs, config.ssl_lr, config.ssl_batch, config.temperature) == (100, 0.4, 512, 0.5)
    assert (config.warmup_epochs, config.semi_epochs, config.semi_iters, config.semi_batch) == (10, 100, 1024, 64)
    assert (config.sharpen, config.mixup_alpha, config.lr, config.label_fraction) == (0.5, 0.75, 2e-3, 0.5)
    assert (config.sce_alpha, config.sce_beta) == (0.1, 1.0)
    assert defenses.create("dbd", preset="reference").config.ssl_t_max == 1000
    paper = defenses.create("dbd", preset="paper").config
    assert (paper.ssl_epochs, paper.semi_epochs) == (1000, 190)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"])
def test_architectures(toy_attack: MakeAttack, name: str) -> None:
    attack = toy_attack(build(name, 4, 32), n=20, n_test=8, size=(3, 32, 32))
    attack.metrics = {"c_acc": 0.25, "asr": 0.25, "r_acc": 0.25}
    small = TINY | {"ssl_epochs": 1, "ssl_batch": 10, "semi_epochs": 1, "semi_iters": 1, "semi_batch": 4}
    result = defenses.defend(defenses.create("dbd", **small), attack, **CPU)
    assert result.model is not None
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_costs_the_digits_little(digits_attack: AttackResult) -> None:
    metrics = defenses.defend("dbd", digits_attack, **CPU).metrics
    assert metrics["c_acc"] >= metrics["c_acc_before"] - 0.10, metrics
