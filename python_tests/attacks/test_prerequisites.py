"""What attacks need is made by the library, once, and nothing half-made is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bbfast
from bbfast import ops
from bbfast.attacks import Attack, AttackContext, Card, attack, register_attack, registry
from bbfast.attacks.prerequisites import default_context, open_store, seeded_model
from bbfast.attacks.surrogate import (
    Classifier,
    PgdProgram,
    SurrogateConfig,
    clean_surrogate,
    linf_pgd,
    robust_surrogate,
)
from bbfast.data import DataPair, ImageSet
from bbfast.errors import ConfigError
from bbfast.store import Store

TINY = {"surrogate": "small_cnn", "surrogate_preset": "quick", "surrogate_epochs": 1}


@pytest.fixture
def context(tmp_path: Path, make_set) -> AttackContext:
    data = make_set(64, 16)
    return dataclasses.replace(default_context(data, 10), store=Store(tmp_path), progress=False)


def weights(classifier: Classifier) -> Tensor:
    return torch.cat([p.flatten() for p in classifier.network.parameters()])


def test_obtain_makes_once_and_finds_again(context: AttackContext) -> None:
    calls = []

    def make(work: Path) -> dict[str, Tensor]:
        calls.append(work)
        return {"a": torch.arange(3)}

    first, second = (context.obtain("thing", {"x": 1}, make) for _ in range(2))
    context.obtain("thing", {"x": 2}, make)
    context.obtain("thing", {"x": 1}, make, seed=1)
    context.obtain("thing", {"x": 1}, make, version=2)
    assert len(calls) == 4
    assert torch.equal(first["a"], torch.arange(3)) and torch.equal(second["a"], first["a"])


def test_a_failure_keeps_nothing_and_the_next_call_goes_on(context: AttackContext) -> None:
    def fails(work: Path) -> dict[str, Tensor]:
        (work / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        context.obtain("thing", {}, fails)
    assert context.store is not None and not context.store.list()
    seen = []

    def makes(work: Path) -> dict[str, Tensor]:
        seen.append((work / "checkpoint").read_text())
        return {"a": torch.ones(1)}

    context.obtain("thing", {}, makes)
    assert seen == ["half"] and len(context.store.list("prerequisite", "thing")) == 1


def test_a_damaged_one_is_made_again(context: AttackContext) -> None:
    assert context.store is not None
    context.obtain("thing", {}, lambda work: {"a": torch.ones(100)})
    (entry,) = context.store.list()
    file = entry.path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    assert context.obtain("thing", {}, lambda work: {"a": torch.zeros(100)})["a"].sum() == 0


def test_without_a_store_nothing_is_kept(context: AttackContext, tmp_path: Path) -> None:
    alone = dataclasses.replace(context, store=None)
    assert alone.obtain("thing", {}, lambda work: {"a": torch.ones(1)})["a"] == 1
    assert not list(tmp_path.iterdir())


def test_the_default_store_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BBFAST_CACHE", str(tmp_path))
    store = open_store(None)
    assert store is not None and store.root == tmp_path / "prerequisites"
    assert open_store(False) is None
    assert open_store(store) is store


def test_a_surrogate_is_trained_once_for_data_settings_and_seed(context: AttackContext, make_set) -> None:
    config, data = SurrogateConfig(**TINY), make_set(64, 16)
    first = clean_surrogate(context, data, 10, config, 0)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    assert torch.equal(weights(clean_surrogate(context, data, 10, config, 0)), weights(first))
    assert context.store is not None and len(context.store.list()) == 1
    clean_surrogate(context, data, 10, config, 1)
    clean_surrogate(context, make_set(64, 16, seed=1), 10, config, 0)
    robust_surrogate(context, data, 10, config, config.surrogate_recipe(context), 0)
    assert len(context.store.list()) == 4


def test_a_surrogate_takes_images_in_0_to_1(context: AttackContext, make_set) -> None:
    data = dataclasses.replace(make_set(64, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    surrogate = clean_surrogate(context, data, 10, SurrogateConfig(**TINY), 0)
    images = (data.images[:5].float() / 255).requires_grad_()
    expected = bbfast.training.predict(surrogate.network, data[:5], device="cpu")
    torch.testing.assert_close(surrogate(images), expected)
    surrogate(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_a_surrogate_is_known_by_weights_and_normalisation(context: AttackContext, make_set) -> None:
    data = dataclasses.replace(make_set(64, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    config, images = SurrogateConfig(**TINY), data.images[:4].float() / 255
    net = clean_surrogate(context, data, 10, config, 0)
    assert net.describe() == clean_surrogate(context, data, 10, config, 0).describe()
    assert net.describe() != clean_surrogate(context, data, 10, config, 1).describe()
    assert net.describe() != net.unnormalised().describe()
    torch.testing.assert_close(net.unnormalised()(images), net.network(images))


def test_without_a_name_the_surrogate_is_of_the_victims_architecture(context: AttackContext, make_set) -> None:
    victim = bbfast.models.build("small_cnn", 10, 16)
    own = dataclasses.replace(
        context, fresh_model=lambda seed: victim, recipe=bbfast.Recipe.preset("quick", epochs=1, eval_every=0)
    )
    assert type(clean_surrogate(own, make_set(64, 16), 10, SurrogateConfig(), 0).network) is type(victim)


def test_the_surrogate_is_not_the_victims_twin(context: AttackContext, make_set) -> None:
    """With the victim's seed it would start from the same weights and see the same batches."""
    data = make_set(64, 16)
    config, recipe = SurrogateConfig(**TINY), bbfast.Recipe.preset("quick", epochs=1, eval_every=0)
    for other in (SurrogateConfig(surrogate_preset="quick", surrogate_epochs=1), config):
        own = dataclasses.replace(context, fresh_model=lambda seed: seeded_model("small_cnn", 10, (3, 16, 16), seed))
        victim = bbfast.train(own.fresh_model(0), data, recipe, seed=0, device="cpu", progress=False).model
        surrogate = clean_surrogate(own, data, 10, other, 0).network
        assert not torch.allclose(victim.conv1.weight, surrogate.conv1.weight, atol=0.05)


def test_an_unknown_surrogate_is_refused_when_the_attack_is_made() -> None:
    with pytest.raises(ConfigError, match=r"surrogate: unknown model 'smal_cnn'; did you mean .*'small_cnn'"):
        SurrogateConfig(surrogate="smal_cnn")


def test_a_preset_goes_by_the_model_that_is_trained(context: AttackContext) -> None:
    config = SurrogateConfig(surrogate_preset="quick")
    rates = {
        name: config.surrogate_recipe(dataclasses.replace(context, model=name)).lr
        for name in ("vgg19_bn", "preactresnet18")
    }
    assert rates == {"vgg19_bn": 0.01, "preactresnet18": 0.05}
    named = SurrogateConfig(surrogate_preset="quick", surrogate="preactresnet18")
    assert named.surrogate_recipe(dataclasses.replace(context, model="vgg19_bn")).lr == 0.05


def test_pgd_stays_in_its_ball_and_raises_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images, labels = torch.rand(20, 3, 4, 4), torch.randint(5, (20,))
    attacked = linf_pgd(model, images, labels, 0.1, 0.03, 20)
    assert (attacked - images).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(model(attacked), labels) > loss(model(images), labels) + 0.05
    # A linear model's best answer is known: every pixel as far as it may go against its label.
    one = torch.tensor([[0.5, 0.5]]).view(1, 1, 1, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    net[1].weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert torch.allclose(linf_pgd(net, one, torch.tensor([0]), 0.1, 0.02, 10).flatten(), torch.tensor([0.4, 0.6]))


def test_adversarial_training_leaves_batchnorm_to_the_training_step(make_set) -> None:
    seen = []
    model = bbfast.models.build("small_cnn", 10, 16)
    forward = model.forward
    model.forward = lambda x: (seen.append((model.training, x.detach().clone())), forward(x))[1]  # type: ignore[method-assign]
    data = make_set(8, 16)
    # In bf16 too the attack must see whole pixels: half a step of it would be lost to rounding.
    recipe = bbfast.Recipe(epochs=1, batch_size=8, augment=False, eval_every=0, precision="bf16")
    bbfast.train(model, data, recipe, program=PgdProgram(steps=3), device="cpu", progress=False)
    modes = [mode for mode, x in seen if len(x) == 8]
    assert modes[-4:] == [False, False, False, True]
    attacked = next(x for mode, x in seen if mode)
    clean = {tuple(image.flatten().tolist()) for image in data.images}
    assert all(tuple((255 * image).flatten().tolist()) not in clean for image in attacked)
    assert attacked.min() >= 0 and attacked.max() <= 1 and attacked.dtype == torch.float32


class NeedyConfig(SurrogateConfig):
    """Settings of the attack below."""


@pytest.fixture
def needy():
    @register_attack("needy")
    class Needy(Attack):
        """A picture made with a surrogate."""

        card = Card("Needy", "none", 2026, "poison-only", ("all2one",), needs=("surrogate",))
        Config = NeedyConfig
        needs_context = True

        def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
            assert context is not None
            net = clean_surrogate(context, data, num_classes, self.config, seed)  # type: ignore[arg-type]
            return {"delta": net(data.images[:1].float() / 255).sum().expand(data.image_size).clone()}

        def apply(self, images: Tensor, index: Tensor, stage: str) -> Tensor:
            return ops.add(images, self.tensor("delta", images))

    yield Needy
    registry._entries.pop("needy")


def test_an_attack_with_prerequisites_works_alone_and_as_a_whole(needy, make_set, tmp_path: Path) -> None:
    data = DataPair(make_set(64, 16), make_set(32, 16, seed=1), num_classes=10)
    alone = needy(**TINY)
    poisoned = alone.poison(data.train)
    assert poisoned.poisoned.sum() == 6
    recipe = bbfast.Recipe.preset("quick", epochs=1)
    result = attack(needy(**TINY), data, "small_cnn", recipe, device="cpu", store=tmp_path / "store")
    assert torch.equal(result.trigger_state["delta"], alone.tensors["delta"])
    (entry,) = Store(tmp_path / "store").list("prerequisite", "surrogate")
    again = attack(needy(**TINY, ratio=0.2), data, "small_cnn", recipe, device="cpu", store=tmp_path / "store")
    assert torch.equal(again.trigger_state["delta"], result.trigger_state["delta"])
    assert [e.path for e in Store(tmp_path / "store").list()] == [entry.path]
