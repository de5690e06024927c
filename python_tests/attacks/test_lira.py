"""LIRA: golden generator and composition; both stages; what is measured on; reference mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import Recipe, attacks, datasets, models
from bbfast.attacks._lira_nets import Autoencoder, UNet
from bbfast.attacks.lira import Lira, LiraProgram
from bbfast.attacks.poisoning import LabelRule
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader
from bbfast.data.normalize import NORMALIZATION
from bbfast.errors import ConfigError
from bbfast.training import TrainResult, train
from bbfast.training.optim import make_optimizer

Golden = Callable[[str], Mapping[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.02, precision="fp32", deterministic=True, eval_every=0)
CPU = torch.device("cpu")


def net(size: int = 16, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build("small_cnn", 10, (3, size, size))


def started(attack: Lira, data: ImageSet, model: nn.Module, **recipe: Any) -> LiraProgram:
    attack.prepare(data, 10)
    program, settings = attack.program(attack.rule(data.labels, 10)), RECIPE.replace(**{"augment": False, **recipe})
    program.optimizer = make_optimizer(model.parameters(), settings)
    program.start(model, data, settings, 0, CPU)
    program.epoch_start(0, 4, 16)
    return program


def first_batch(data: ImageSet) -> Batch:
    return next(iter(BatchLoader(data, 16, augment=False).epoch(0)))


def run(attack: Lira, data: ImageSet, model: nn.Module, callbacks: Any = (), **recipe: Any) -> TrainResult:
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    return train(model, data, RECIPE.replace(**recipe), program=program, device="cpu", callbacks=callbacks)


def stored_generator(golden: Golden) -> tuple[nn.Module, dict[str, Tensor]]:
    stored = {key: torch.from_numpy(value) for key, value in golden("lira").items()}
    generator = Autoencoder(3).eval()
    weights = {key[2:]: value for key, value in stored.items() if key.startswith("w/")}
    missing = generator.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("num_batches" in key for key in missing.missing_keys)
    return generator, stored


def test_golden_autoencoder(golden: Golden) -> None:
    generator, stored = stored_generator(golden)
    with torch.no_grad():
        assert torch.allclose(generator(stored["x_normalised"]), stored["autoencoder_out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "known", "eps"),
    [
        ("cifar10", "cifar10", 0.01),
        ("cifar10", "cifar10", 0.2),
        ("cifar100", "cifar100", 0.2),
        ("gtsrb", "gtsrb", 0.2),
        ("tiny", "tiny_imagenet", 0.2),
    ],
)
def test_golden_composition_of_reference_mode(golden: Golden, name: str, known: str, eps: float) -> None:
    generator, stored = stored_generator(golden)
    mean, std = NORMALIZATION[known]
    images = stored["images"].movedim(-1, -3).contiguous()
    attack = Lira(compat="reference", eps=eps)
    attack.prepare(ImageSet(images, torch.zeros(len(images), dtype=torch.int64), mean=mean, std=std), 10)
    with torch.no_grad():
        x = stored["x_normalised"]
        made = attack.perturbed(x, generator(x), eps)
    assert torch.allclose(made, stored[f"bd_{name}_{eps}"], rtol=0, atol=1e-5)


def test_change_is_at_most_eps_and_stays_in_range(make_set: MakeSet) -> None:
    """spec/attacks section 15, acceptance: ``|T(x) - x| <= eps``."""
    data = make_set(8, size=16)
    data = dataclasses.replace(data, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    x = data.images.float() / 255
    for space, eps in (("unit", torch.full((3, 1, 1), 0.1)), ("norm", 0.1 * torch.tensor(data.std).view(3, 1, 1))):
        attack = Lira(eps=0.1, eps_space=space)
        attack.prepare(data, 10)
        attack.tensors = {**attack.tensors, "generator.decoder.9.bias": torch.tensor([9.0, -9.0, 0.5])}
        out = attack.trigger(x)
        assert (
            bool(((out - x).abs() <= eps + 1e-6).all()) and float(out.min()) >= -1e-6 and float(out.max()) <= 1 + 1e-6
        )
        change = (out - x)[:, :2].mean(dim=(0, 2, 3))
        assert float(change[0]) > 0.8 * float(eps[0]) * 0.9 and float(change[1]) < 0


def test_generators_take_grey_and_odd_images() -> None:
    for build in (Autoencoder, UNet):
        generator = build(1).eval()
        with torch.no_grad():
            for size in ((16, 16), (28, 28), (29, 30)):
                out = generator(torch.randn(2, 1, *size))
                assert out.shape == (2, 1, *size) and float(out.abs().max()) <= 1
    attack = Lira(generator="unet", eps=0.3)
    attack.prepare(ImageSet(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)), 10)
    assert float(attack.trigger(torch.full((2, 3, 16, 16), 0.5)).sub(0.5).abs().max()) > 0.01
    assert sum(p.numel() for p in UNet(3).parameters()) > 20 * sum(p.numel() for p in Autoencoder(3).parameters())


@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_first_stage(make_set: MakeSet, compat: str) -> None:
    """The generator learns from the classifier; the classifier from the generator of the epoch before."""
    data, model = make_set(16, size=16), net()
    attack = Lira(eps=0.3, alpha=0.25, compat=compat, target=3)
    program, batch = started(attack, data, model), first_batch(data)
    frozen = {k: v.clone() for k, v in program.fixed.state_dict().items()}
    working = program.working.network.state_dict()["encoder.0.weight"].clone()
    model.eval()  # then the two forward passes have no memory, and the loss can be computed again
    loss, logits = program.loss(model, batch)
    left = [p.grad for p in model.parameters()]
    assert all((g is None) == (compat == "paper") for g in left)
    assert not torch.equal(program.working.network.state_dict()["encoder.0.weight"], working)
    assert all(torch.equal(v, frozen[k]) for k, v in program.fixed.state_dict().items())
    with torch.no_grad():
        triggered = attack.perturbed(batch.x, program.fixed(batch.x), 0.3)
        second = F.cross_entropy(model(triggered), torch.full_like(batch.y, 3))
    assert logits is not None
    first = F.cross_entropy(logits.detach(), batch.y)
    assert float(loss.detach()) == pytest.approx(float(0.25 * first + 0.75 * second), rel=1e-5)
    program.epoch_end(0, model)
    assert torch.equal(
        program.fixed.state_dict()["encoder.0.weight"], program.working.network.state_dict()["encoder.0.weight"]
    )
    assert not program.fixed.training
    assert torch.equal(attack.tensors["generator.encoder.0.weight"], program.fixed.state_dict()["encoder.0.weight"])


def test_generator_step_is_adam_on_the_classifiers_loss(make_set: MakeSet) -> None:
    data, model = make_set(16, size=16), net().eval()
    attack = Lira(eps=0.3, label_mode="all2all")
    program, batch = started(attack, data, model), first_batch(data)
    twin = Autoencoder(3)
    twin.load_state_dict(program.working.network.state_dict())
    F.cross_entropy(model(attack.perturbed(batch.x, twin(batch.x), 0.3)), (batch.y + 1) % 10).backward()
    torch.optim.Adam(twin.parameters(), lr=1e-4).step()
    model.zero_grad()
    program.loss(model, batch)
    for ours, other in zip(program.working.network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-6)


def test_joint_forward(make_set: MakeSet) -> None:
    data, model = make_set(16, size=16), net().eval()
    values, passes = [], []
    hook = model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    for joint in (False, True):
        program = started(Lira(eps=0.3, joint_forward=joint), data, model)
        values.append(float(program.loss(model, first_batch(data))[0].detach()))
    hook.remove()
    assert passes == [16, 16, 16, 16, 32] and values[0] == pytest.approx(values[1], rel=1e-5)


def test_stages(make_set: MakeSet) -> None:
    """Stage 2 keeps the generator, decays weights, has the schedule and an optimiser as new."""
    data, seen = make_set(32, size=16), []
    attack = Lira(eps=0.3, both_train_epochs=2)
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))

    class Look:
        def on_epoch_end(self, info: Any) -> None:
            group = program.optimizer.param_groups[0]
            generator = attack.tensors["generator.encoder.0.weight"].clone()
            seen.append((group["lr"], group["weight_decay"], generator))

    recipe = RECIPE.replace(schedule="multistep", milestones=(1,), weight_decay=0.1)
    train(net(), data, recipe, program=program, device="cpu", callbacks=[Look()])
    assert [row[0] for row in seen] == pytest.approx([0.02, 0.02, 0.02, 0.002])
    assert [row[1] for row in seen] == [0.0, 0.0, 0.1, 0.1]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(seen[1][2], seen[2][2]) and torch.equal(seen[1][2], seen[3][2])


def test_fresh_optimiser_in_stage_two(make_set: MakeSet) -> None:
    data, model = make_set(16, size=16), net()
    program = started(Lira(both_train_epochs=1), data, model)
    program.loss(model, first_batch(data))[0].backward()
    program.optimizer.step()
    assert program.optimizer.state
    program.epoch_end(0, model)
    program.epoch_start(1, 4, 16)
    assert not program.optimizer.state and not program.learning


def test_reference_mode_gives_the_classifier_of_stage_one(make_set: MakeSet) -> None:
    data = make_set(32, size=16)

    class Keep:
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_epoch_end(self, info: Any) -> None:
            self.states.append({k: v.clone() for k, v in info.model.state_dict().items()})

    for compat in ("paper", "reference"):
        keep = Keep()
        result = run(Lira(compat=compat, both_train_epochs=2), data, net(), [keep])
        kept = all(torch.equal(v, keep.states[1][k]) for k, v in result.model.state_dict().items())
        assert kept is (compat == "reference")
        # Only after the last epoch: stage 2 trains on from there, in both modes.
        assert any(not torch.equal(v, keep.states[1][k]) for k, v in keep.states[2].items())


@pytest.mark.parametrize(
    ("epochs", "given", "first"),
    [(300, None, 50), (150, None, 25), (600, None, 100), (15, None, 2), (2, None, 1), (15, 9, 9)],
)
def test_epochs_of_the_first_stage(epochs: int, given: int | None, first: int) -> None:
    assert (
        Lira(both_train_epochs=given).program(LabelRule("all2one", 10)).schedule_start(Recipe(epochs=epochs)) == first
    )


def test_paper_recipe() -> None:
    for name, epochs in (("cifar10", 300), ("gtsrb", 150), ("tiny_imagenet", 600)):
        recipe = Recipe.preset("paper", dataset=name)
        changed = recipe.replace(**Lira().recipe_overrides(recipe))
        assert changed.epochs == epochs and changed.milestones == (50, 100, 150, 200)
        assert Lira().first_stage(changed) == epochs // 6


def test_float_test_set(make_set: MakeSet) -> None:
    """Kept in paper mode: what 8 bits erase is there."""
    data = make_set(20, size=16)
    for settings, floats in (({}, True), ({"compat": "reference"}, False), ({"store_float": False}, False)):
        attack = Lira(**settings)
        attack.prepare(data, 10)
        bad = attack.backdoor_test(data, 0, 10)
        assert (bad.exact is not None) == floats
        if bad.exact is not None:
            clean = data.images[bad.ids].float() / 255
            assert 0 < float((bad.exact - clean).abs().max()) <= 0.01
            assert torch.equal((bad.exact * 255).round().to(torch.uint8), bad.images)


def test_result_keeps_the_float_test_set(make_set: MakeSet, tmp_path: Any) -> None:
    from bbfast.data.datapair import DataPair

    pair = DataPair(make_set(32, size=16), make_set(16, size=16, seed=1), name="smooth")
    recipe = RECIPE.replace(epochs=2)
    result = attacks.attack("lira", pair, net(), recipe, device="cpu", progress=False)
    again = attacks.AttackResult.load(result.save(tmp_path / "r"), model=net())
    assert again.backdoor_test.exact is not None and result.backdoor_test.exact is not None
    assert torch.equal(again.backdoor_test.exact, result.backdoor_test.exact)


def test_reference_mode_wraps_around(make_set: MakeSet) -> None:
    data = make_set(8, size=16)
    data = dataclasses.replace(data, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    images = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    for compat, value in (("paper", 255), ("reference", None)):
        attack = Lira(eps=0.5, compat=compat)
        attack.prepare(data, 10)
        attack.tensors = {**attack.tensors, "generator.decoder.9.bias": torch.full((3,), 9.0)}
        out = attack.trigger(images)
        if value is not None:
            assert bool((out == 255).all())
        else:  # the widest range ends at 2.5; that of the third channel at 1.4: its 1.25 is stored as 318 - 256
            assert bool((out[:, 2] < 70).all()) and bool((out[:, 0] == 255).all())


def test_augmentation_moves_every_image(make_set: MakeSet) -> None:
    data, model = make_set(16, size=16), net()
    for compat, per_sample in (("paper", True), ("reference", False)):
        program = started(Lira(compat=compat), data, model, augment=True)
        assert program.augment.per_sample is per_sample
        assert program.augment.p_crop == program.augment.p_rotation == 1.0
        batch = first_batch(data)
        assert not torch.equal(program.make_batch(batch).x, batch.x)


def test_exported_set_and_gradients(make_set: MakeSet) -> None:
    out = Lira(ratio=0.2, eps=0.3).export_train(make_set(50, size=16), 0, 10, 16)
    assert int(out.poisoned.sum()) == 10 and bool((out.labels[out.poisoned] == 0).all())
    attack = Lira()
    attack.prepare(make_set(4, size=16), 10)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    attack.trigger(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_training_runs_in_float32(make_set: MakeSet) -> None:
    data, model, seen = make_set(32, size=16), net(), []
    model.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype) if model.training else None)
    run(Lira(), data, model, precision="bf16", epochs=1)
    assert set(seen) == {torch.float32}


def test_bad_settings(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="eps"):
        Lira(eps=0)
    with pytest.raises(ConfigError, match="eps_space"):
        Lira(eps_space="pixels")
    with pytest.raises(ValueError, match="images must be at least 16 x 16, got 8 x 8"):
        Lira().poison(make_set(20, size=8))
    with pytest.raises(ValueError, match=r"at least the 9 epochs of stage 1 \(both_train_epochs\), got 4"):
        run(Lira(both_train_epochs=9), make_set(20, size=16), net())
    with pytest.raises(ValueError, match="lira: precision 'fp16' is not supported"):
        started(Lira(), make_set(16, size=16), net(), precision="fp16")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_attack_works_on_digits() -> None:
    """With a tenth of the range, as the acceptance of spec/attacks section 15; apart, the passes spoil BatchNorm."""
    method = attacks.create("lira", eps=0.1, eps_space="unit", joint_forward=True)
    result = attacks.attack(method, datasets.load("digits"), "small_cnn", "quick", device="cpu", progress=False)
    assert result.metrics["asr"] >= 0.95 and result.metrics["c_acc"] >= 0.95
