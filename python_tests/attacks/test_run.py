"""The whole of an attack on tiny data: mechanics, determinism, resumption, saving; and every bad argument, early."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import attacks
from bbfast.attacks import Attack, AttackContext, AttackResult, Card, attack, register_attack
from bbfast.attacks.base import Stage, registry
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.errors import ArtifactError, ConfigError, CorruptArtifactError, DataRequirementError, UnknownNameError
from bbfast.training import Recipe

MakeSet = Callable[..., ImageSet]
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, augment=True, padding=1, deterministic=True, precision="fp32")
CASES = [
    (name, mode) for name in ("badnets", "blended", "wanet") for mode in registry.get(name).card.label_modes
] + [("wanet-data", "all2one")]  # fmt: skip


class Tiny(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture
def pair(make_set: MakeSet) -> DataPair:
    train, test = make_set(160, size=16, classes=4), make_set(60, size=16, classes=4, seed=1)
    return DataPair(train, test, name="smooth", mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny()


def make(name: str, mode: str) -> Attack:
    settings: dict[str, Any] = {"label_mode": mode, "source_classes": (1, 2) if mode == "one2one" else (), "ratio": 0.1}
    if name == "wanet-data":
        return attacks.create("wanet", mode="data", **settings)
    return attacks.create(name, **settings)


def same(a: AttackResult, b: AttackResult) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    quiet = {"seconds", "seconds_per_epoch"}
    return (
        all(torch.equal(ours[k], theirs[k]) for k in ours)
        and {k: v for k, v in a.metrics.items() if k not in quiet}
        == {k: v for k, v in b.metrics.items() if k not in quiet}
        and torch.equal(a.train.images, b.train.images)
        and torch.equal(a.backdoor_test.images, b.backdoor_test.images)
    )


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_every_attack_runs_saves_and_loads(
    name: str, mode: str, pair: DataPair, tiny: nn.Module, tmp_path: Path
) -> None:
    result = attack(make(name, mode), pair, tiny, RECIPE, device="cpu", progress=False)
    metrics = result.metrics
    assert {"c_acc", "asr", "r_acc", "seconds", "seconds_per_epoch", "poison_ratio"} <= metrics.keys()
    assert all(0 <= metrics[k] <= 1 for k in ("c_acc", "asr", "r_acc")) and metrics["asr"] + metrics["r_acc"] <= 1
    assert ("cross_acc" in metrics) == (name.startswith("wanet")) and ("leak" in metrics) == (mode == "one2one")
    assert metrics["seconds"] > metrics["seconds_per_epoch"] > 0
    assert len(result.history) == 2 and not result.model.training
    assert not any(torch.equal(a, b) for a, b in zip(tiny.parameters(), result.model.parameters(), strict=True))
    assert torch.equal(result.poisoned, result.role == 1) and int(result.poisoned.sum()) == 16
    clean = result.clean_train
    assert torch.equal(clean.images, pair.train.images) and torch.equal(clean.labels, pair.train.labels)
    assert torch.equal(result.trigger(pair.test.images[:4]), make_ready(name, mode, pair).trigger(pair.test.images[:4]))
    assert result.train.mean == pair.mean and result.backdoor_test.std == pair.std

    result.save(tmp_path / "run")
    back = AttackResult.load(tmp_path / "run", model=Tiny())
    assert same(result, back) and back.config == result.config and back.history == result.history
    for field in ("poisoned", "role", "original_labels", "clean_images"):
        assert torch.equal(getattr(back, field), getattr(result, field))
    assert torch.equal(back.backdoor_test.original_labels, result.backdoor_test.original_labels)
    assert torch.equal(back.trigger(pair.test.images), result.trigger(pair.test.images))
    assert back.target == 0 and back.num_classes == 4


def make_ready(name: str, mode: str, pair: DataPair) -> Attack:
    method = make(name, mode)
    method.prepare(pair.train, 4, 0)
    return method


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_same_seed_same_bits(name: str, pair: DataPair, tiny: nn.Module) -> None:
    runs = [attack(make(name, "all2one"), pair, tiny, RECIPE, s, "cpu", progress=False) for s in (3, 3, 4)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_a_killed_run_goes_on(name: str, pair: DataPair, tiny: nn.Module, tmp_path: Path) -> None:
    class Kill:
        def on_epoch_end(self, info: Any) -> None:
            if info.epoch == 2:
                raise Killed

    recipe = RECIPE.replace(epochs=4)
    whole = attack(make(name, "all2one"), pair, tiny, recipe, 0, "cpu", progress=False)
    with pytest.raises(Killed):
        attack(make(name, "all2one"), pair, tiny, recipe, 0, "cpu", checkpoint=tmp_path, callbacks=[Kill()])
    assert any(tmp_path.rglob("*.safetensors"))
    resumed = attack(make(name, "all2one"), pair, tiny, recipe, 0, "cpu", checkpoint=tmp_path, progress=False)
    assert same(whole, resumed) and len(resumed.history) == 4
    assert resumed.metrics["seconds"] > sum(row["seconds"] for row in resumed.history)


def test_models_by_name(pair: DataPair, tmp_path: Path) -> None:
    """A built model is rebuilt when loaded; the caller's random state stays."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    result = attack("badnets", pair, "small_cnn", RECIPE.replace(epochs=1), device="cpu", progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result.config["model"]["name"] == "small_cnn" and result.config["model"]["num_classes"] == 4
    back = AttackResult.load(result.save(tmp_path / "run"))
    assert same(result, back)


def test_result_without_the_clean_images(pair: DataPair, tiny: nn.Module, tmp_path: Path) -> None:
    result = attack(make("wanet", "all2one"), pair, tiny, RECIPE, device="cpu", progress=False)
    result.save(tmp_path / "all")
    result.save(tmp_path / "few", images=False)
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).iterdir() if f.stem != "model") for d in ("all", "few")]
    assert sizes[1] < 0.6 * sizes[0]
    back = AttackResult.load(tmp_path / "few", model=Tiny(), data=pair)
    assert same(result, back) and torch.equal(back.clean_images, result.clean_images)
    assert torch.equal(back.test.images, pair.test.images)
    with pytest.raises(DataRequirementError, match="saved without the clean images of 'smooth'"):
        AttackResult.load(tmp_path / "few", model=Tiny())
    other = DataPair(pair.test, pair.train, name="swapped")
    with pytest.raises(DataRequirementError, match=r"made from 'smooth' with fingerprint \w{12}, the data given"):
        AttackResult.load(tmp_path / "few", model=Tiny(), data=other)
    with pytest.raises(DataRequirementError, match="weights of a Tiny, which bbfast cannot build"):
        AttackResult.load(tmp_path / "all")


def test_damaged_results(pair: DataPair, tiny: nn.Module, tmp_path: Path) -> None:
    result = attack(make("badnets", "all2one"), pair, tiny, RECIPE.replace(epochs=1), device="cpu", progress=False)
    result.save(tmp_path / "run")
    with pytest.raises(ArtifactError, match="already"):
        result.save(tmp_path / "run")
    result.save(tmp_path / "run", overwrite=True)
    with pytest.raises(ArtifactError, match="no result at"):
        AttackResult.load(tmp_path / "none")
    file = tmp_path / "run" / "train.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=r"train\.safetensors"):
        AttackResult.load(tmp_path / "run", model=Tiny())


def test_presets_and_overrides(pair: DataPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """WaNet's own schedule applies to the paper preset, and to nothing else."""
    from bbfast.attacks import run

    used: list[Recipe] = []

    def instead(model: nn.Module, train: ImageSet, recipe: Recipe, **_: Any) -> Any:
        used.append(recipe)
        raise Killed

    monkeypatch.setattr(run, "train", instead)
    for name, recipe in (("wanet", None), ("wanet", "paper"), ("wanet", "quick"), ("wanet", RECIPE), ("badnets", None)):
        with pytest.raises(Killed):
            attack(name, pair, "small_cnn", recipe, device="cpu")
    paper, quick = Recipe.preset("paper", dataset="smooth"), Recipe.preset("quick", dataset="smooth")
    constant = paper.replace(schedule="multistep", milestones=(100, 200, 300, 400), gamma=0.1)
    assert used == [constant, constant, quick, RECIPE, paper]


def test_the_callers_attack_stays_as_it_is(pair: DataPair, tiny: nn.Module) -> None:
    method = attacks.create("wanet")
    method.prepare(pair.train, 4, seed=9)
    before = copy.deepcopy(method.tensors)
    attack(method, pair, tiny, RECIPE.replace(epochs=1), seed=0, device="cpu", progress=False)
    assert method.seed == 9 and torch.equal(method.tensors["grid"], before["grid"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attack": "badnett"}, UnknownNameError, r"did you mean .*'badnets'"),
        ({"attack": attacks.create("badnets", target=4)}, ValueError, r"target must be a class in 0\.\.3, got 4"),
        ({"attack": attacks.create("badnets", ratio=0.001)}, ValueError, "poisons none"),
        ({"attack": attacks.create("badnets", label_mode="clean_label", ratio=0.5)}, ValueError, "asks for 80 of 160"),
        ({"attack": attacks.create("badnets", square_size=17)}, ValueError, "does not fit into 16 x 16"),
        ({"model": "small_cnm"}, UnknownNameError, "small_cnn"),
        ({"model": 3}, TypeError, "model must be a name or a torch.nn.Module, got int"),
        ({"recipe": "papers"}, UnknownNameError, "paper"),
        ({"recipe": 3}, TypeError, "recipe must be a Recipe"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"data": "digits"}, TypeError, "data must be a DataPair, from bbfast.datasets.load, got str"),
        ({"device": "quantum"}, Exception, "quantum"),
    ],
)
def test_bad_arguments_fail_before_training(
    arguments: dict[str, Any], error: type[Exception], message: str, pair: DataPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbfast.attacks import run

    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(error, match=message):
        attack(**{"attack": "badnets", "data": pair, "model": "small_cnn", "device": "cpu", **arguments})


def test_config_objects(make_set: MakeSet) -> None:
    cls = registry.get("badnets")
    config = cls.Config(ratio=0.2)
    assert cls(config).config is config
    with pytest.raises(ConfigError, match="not both"):
        cls(config, ratio=0.1)
    with pytest.raises(ConfigError, match=r"config must be a BadNets\.Config"):
        cls(registry.get("wanet").Config())
    assert repr(cls(ratio=0.2)) == "BadNets(ratio=0.2)"


@pytest.fixture
def surrogate_attack() -> Any:
    """An attack that makes its trigger with a surrogate, as a third party would write it."""

    @register_attack("surrogate_toy")
    class SurrogateToy(Attack):
        """Adds the sign of the surrogate's mean input gradient."""

        card = Card("Toy", "None", 2024, "poison-only", ("all2one",), needs=("surrogate",), summary="A toy.")
        fits_data = True

        def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
            if context is None:
                raise DataRequirementError(f"{self.name} needs a surrogate; use bbfast.attack")
            model = context.fresh_model(seed).to(context.device)
            x = (data.images[:16].float() / 255).requires_grad_()
            model(x)[:, 0].sum().backward()
            assert x.grad is not None
            return {"delta": (x.grad.mean(0).sign() * 8).to(torch.int16)}

        def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
            moved = images.to(torch.int16) + self.tensor("delta", images)
            return moved.clamp(0, 255).to(torch.uint8)

    yield SurrogateToy
    registry._entries.pop("surrogate_toy")


def test_an_attack_with_a_prerequisite(surrogate_attack: Any, pair: DataPair, tiny: nn.Module, tmp_path: Path) -> None:
    assert "surrogate_toy" in attacks.available()
    result = attack("surrogate_toy", pair, tiny, RECIPE, device="cpu", progress=False)
    assert result.trigger_state["delta"].unique().numel() > 1
    back = AttackResult.load(result.save(tmp_path / "run"), model=Tiny())
    assert torch.equal(back.trigger(pair.test.images), result.trigger(pair.test.images))
    bare = surrogate_attack()
    for call in (lambda: bare.trigger(pair.test.images), lambda: bare.backdoor_test(pair.test), bare.state):
        with pytest.raises(DataRequirementError, match="the trigger is not made yet; call prepare"):
            call()
    with pytest.raises(DataRequirementError, match="needs a surrogate"):
        bare.poison(pair.train)
    with pytest.raises(ValueError, match="attack name 'surrogate_toy' is taken"):
        register_attack("surrogate_toy")(surrogate_attack)


def test_a_result_of_an_attack_that_is_gone(surrogate_attack: Any, pair: DataPair, tiny: nn.Module) -> None:
    result = attack("surrogate_toy", pair, tiny, RECIPE.replace(epochs=1), device="cpu", progress=False)
    entry = registry._entries.pop("surrogate_toy")
    try:
        with pytest.raises(UnknownNameError, match="unknown attack 'surrogate_toy'"):
            result.trigger(pair.test.images)
    finally:
        registry._entries["surrogate_toy"] = entry
