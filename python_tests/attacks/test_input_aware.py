"""Input-Aware: golden networks and composition; the two stages; gradients; the exported set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import Recipe, attacks, datasets, models
from bbfast.attacks._batches import other_rows
from bbfast.attacks._input_aware_nets import Generator, blend_in, distance, threshold, widths_for
from bbfast.attacks._networks import apply_network
from bbfast.attacks.input_aware import InputAware, InputAwareProgram
from bbfast.attacks.poisoning import LabelRule
from bbfast.attacks.randomness import make_key
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.errors import ConfigError
from bbfast.training import train

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.02, precision="fp32", deterministic=True, eval_every=0)


def started(attack: InputAware, data: ImageSet, **recipe: Any) -> tuple[InputAwareProgram, nn.Module]:
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    program.start(nn.Identity(), data, RECIPE.replace(**recipe), 0, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return program, models.build("small_cnn", 10, data.image_size)


def steps(program: InputAwareProgram, model: nn.Module, epoch: int, most: int = 99) -> list[tuple[Tensor, Any, Any]]:
    """Loss, logits and batch of the steps of an epoch, gradients included, as the engine takes them."""
    loader = BatchLoader(program.train, 16, augment=False)
    program.epoch_start(epoch, len(loader), 16)
    seen = []
    for batch in loader.epoch(epoch):
        if len(seen) < most:
            with torch.no_grad():
                batch = program.make_batch(batch)
            loss, logits = program.loss(model, batch)
            loss.backward()
            program.after_step(model)
            seen.append((loss.detach(), logits, batch))
    return seen


@pytest.mark.parametrize(("name", "outputs"), [("G", 3), ("M", 1)])
def test_golden_networks(golden: Golden, name: str, outputs: int) -> None:
    stored = golden("inputaware")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(12)
        net = Generator(3, outputs, widths_for(3)).eval()
        sums = [float(p.double().sum()) for p in net.parameters()]
        out = net(torch.from_numpy(stored["x_normalised"])[:4])
    assert np.allclose(sums, stored[f"net{name}_param_sums"], rtol=0, atol=1e-9)
    assert np.allclose(out, stored[f"net{name}_out"], rtol=0, atol=1e-4)


def test_golden_composition(golden: Golden) -> None:
    stored = {key: torch.from_numpy(value) for key, value in golden("inputaware").items()}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)))
    x, mask = stored["x_normalised"], threshold(stored["masks"])
    pattern = (stored["patterns"] - mean) / std
    assert torch.allclose(mask, stored["mask_thresholded"], rtol=0, atol=1e-5)
    assert torch.allclose(pattern, stored["patterns_normalised"], rtol=0, atol=1e-5)
    assert torch.allclose(blend_in(x, pattern, mask), stored["bd"], rtol=0, atol=1e-5)
    # The stored cross samples were given the same pattern and mask.
    assert torch.allclose(blend_in(x, pattern, mask), stored["cross"], rtol=0, atol=1e-5)
    for mode in ("all2one", "all2all"):
        rule = LabelRule(mode, 10, 3)  # type: ignore[arg-type]
        assert torch.equal(rule.given(stored["targets"]), stored[f"targets_{mode}"])


def test_networks_of_grey_images_and_odd_sizes() -> None:
    assert widths_for(1) == (16, 32) and widths_for(3) == (32, 64, 128)
    net = Generator(1, 1, widths_for(1)).eval()
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 1, 28, 28)
    assert net(torch.zeros(1, 1, 21, 30)).shape == (1, 1, 21, 30)
    once, twice = (Generator(3, 3, (4, 8), double).eval() for double in (False, True))
    twice.load_state_dict(once.state_dict())
    x = torch.randn(1, 3, 16, 16)
    z = torch.atanh(((once(x) - 0.5) * 2).double())
    assert torch.allclose(twice(x).double(), z.tanh().tanh() / 2 + 0.5, atol=1e-5)


def test_mask_stage(make_set: MakeSet) -> None:
    """Only the mask network moves; the loss is the paper's; the rate falls after two and four fifths."""
    data = make_set(32, size=16)
    attack = InputAware(clean_train_epochs=5)
    program, model = started(attack, data, epochs=8)
    pattern = {k: v.clone() for k, v in program.pattern.tensors().items()}
    mask = {k: v.clone() for k, v in program.mask.tensors().items()}
    program.epoch_start(0, 2, 16)
    batch = next(iter(BatchLoader(data, 16, augment=False).epoch(0)))
    with torch.no_grad():
        assert program.make_batch(batch) is batch
    other = program.other
    assert other.shape == batch.x.shape and not torch.equal(other, batch.x)
    a, b = (threshold(program.mask.network(v)).detach() for v in (batch.x, other))
    expected = 100 * (a - 0.032).relu().mean() + (distance(batch.x, other) / (distance(a, b) + 1e-7)).mean()
    [(loss, logits, _), *_] = steps(program, model, 0)
    assert logits is None and float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, pattern[k]) for k, v in program.pattern.tensors().items())
    assert not torch.equal(program.mask.tensors()["mask.middle.0.weight"], mask["mask.middle.0.weight"])
    assert 0 < program.epoch_end(0, model)["mask_density"] < 1
    rates = []
    for epoch in range(5):
        program.epoch_start(epoch, 2, 16)
        rates.append(program.mask.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])
    old, _ = started(InputAware(clean_train_epochs=5, compat="reference", lambda_div=3.0), data, epochs=8)
    [(loss, _, _), *_] = steps(old, model, 0)
    diversity = float(expected) - 100 * float((a - 0.032).relu().mean())
    assert float(loss) == pytest.approx(float(expected) + 8 * diversity, rel=1e-5)  # lambda_div applied twice


def test_joint_stage(make_set: MakeSet) -> None:
    data = make_set(32, size=16)
    for mode in ("all2one", "all2all"):
        attack = InputAware(clean_train_epochs=1, ratio=0.25, label_mode=mode)
        program, model = started(attack, data)
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].detach()))
        mask = {k: v.clone() for k, v in program.mask.tensors().items()}
        pattern = program.pattern.tensors()["pattern.middle.0.weight"].clone()
        [(loss, logits, batch)] = steps(program, model, 1, most=1)
        assert batch.role.tolist() == [1] * 4 + [2] * 4 + [0] * 8 and torch.isfinite(loss)
        truth = data.labels[batch.index]
        given = torch.zeros(4, dtype=torch.int64) if mode == "all2one" else (truth[:4] + 1) % 10
        assert torch.equal(batch.y[:4], given) and torch.equal(batch.y[4:], truth[4:])
        # The classifier saw triggered, crossed and clean images; clean ones as they came.
        assert torch.equal(seen[0][8:], batch.x[8:]) and program.other.shape == (4, 3, 16, 16)
        changed = (seen[0] - batch.x).flatten(1).abs().amax(1)
        assert bool((changed[:8] > 0.01).all()) and not bool(changed[8:].any())
        cross_entropy = float(nn.functional.cross_entropy(logits.detach(), batch.y))
        assert float(loss) > cross_entropy  # the diversity of patterns
        # The pattern network moves, the frozen mask does not, not even its running statistics.
        assert not torch.equal(program.pattern.tensors()["pattern.middle.0.weight"], pattern)
        assert all(torch.equal(v, mask[k]) for k, v in program.mask.tensors().items())
        assert all(p.grad is not None for p in model.parameters())


def test_reference_mode_never_clears_the_gradients(make_set: MakeSet) -> None:
    data = make_set(32, size=16)
    for compat in ("paper", "reference"):
        program, model = started(InputAware(clean_train_epochs=1, ratio=0.25, compat=compat), data)
        steps(program, model, 1)
        gradients = [p.grad for p in program.pattern.network.parameters()]
        assert all((g is not None) == (compat == "reference") for g in gradients)
        assert any(k.startswith("pattern/grad.") for k in program.state()) == (compat == "reference")


def test_batch_without_poison(make_set: MakeSet) -> None:
    data = make_set(16, size=16)
    program, model = started(InputAware(clean_train_epochs=1, ratio=0.01), data)
    before = program.pattern.tensors()["pattern.middle.0.weight"].clone()
    program.epoch_start(1, 1, 16)
    program.draws = [0.99]
    batch = program.make_batch(next(iter(BatchLoader(data, 16, augment=False).epoch(1))))
    loss, logits = program.loss(model, batch)
    assert logits is not None and torch.equal(loss, nn.functional.cross_entropy(logits, batch.y))
    loss.backward()
    program.after_step(model)
    assert torch.equal(program.pattern.tensors()["pattern.middle.0.weight"], before)


def test_second_images_are_augmented_as_the_first(make_set: MakeSet) -> None:
    data = make_set(64, size=16)
    plain, _ = started(InputAware(clean_train_epochs=1), data, augment=False)
    moved, _ = started(InputAware(clean_train_epochs=1), data, augment=True, padding=2, flip=True)
    batch = next(iter(BatchLoader(data, 16, augment=False).epoch(0)))
    for program in (plain, moved):
        program.epoch_start(0, 4, 16)
        program.make_batch(batch)
    assert plain.other.shape == moved.other.shape and not torch.equal(plain.other, moved.other)
    row = data.images[plain.order[:16]].float() / 255
    assert torch.allclose(plain.other, row, atol=1e-6)
    zeros = (moved.other == 0).all(1)[:, [0, -1]].all(-1).any()
    assert bool(zeros)  # some rows were moved in from the padding


@pytest.mark.parametrize(
    ("epochs", "given", "mask"), [(100, None, 25), (50, None, 25), (15, None, 4), (2, None, 1), (15, 5, 5)]
)
def test_epochs_of_the_mask(epochs: int, given: int | None, mask: int) -> None:
    recipe = Recipe(epochs=epochs)
    attack = InputAware(clean_train_epochs=given)
    assert attack.mask_epochs(recipe) == mask == attack.program(LabelRule("all2one", 10)).schedule_start(recipe)


def test_trained_networks_replace_the_untrained_ones(make_set: MakeSet) -> None:
    data = make_set(32, size=16)
    attack = InputAware()
    attack.prepare(data, 10)
    before = attack.trigger(data.images)
    train(models.build("small_cnn", 10, (3, 16, 16)), data, RECIPE.replace(epochs=2), device="cpu",
          program=attack.program(attack.rule(data.labels, 10)))  # fmt: skip
    after = attack.trigger(data.images)
    assert not torch.equal(before, after)
    other = attacks.create("input_aware")
    other.load_state(attack.state())
    assert torch.equal(other.trigger(data.images), after)
    # A new run of the same attack begins anew.
    attack.program(attack.rule(data.labels, 10)).start(nn.Identity(), data, RECIPE, 0, torch.device("cpu"))
    assert torch.equal(attack.trigger(data.images), before)


def test_cross_samples_carry_the_trigger_of_another_image(make_set: MakeSet) -> None:
    data = make_set(40, size=16)
    attack = InputAware()
    attack.prepare(data, 10)
    # Untrained, the networks give nearly the same for every image: make them livelier.
    attack.tensors = {k: v * (3 if v.dim() == 4 else 1) for k, v in attack.tensors.items()}
    out = attack.export_train(data, 0, 10, 16)
    assert [int((out.role == r).sum()) for r in (0, 1, 2)] == [32, 4, 4]
    cross = (out.role == 2).nonzero().flatten()
    assert torch.equal(out.labels[cross], data.labels[cross])
    assert torch.equal(out.images[cross], attack.cover_rows(data, cross, "train"))
    others = other_rows(cross, 40, make_key("input_aware", 0, "train"), cross)
    assert torch.equal(out.images[cross], attack._put(data.images[cross], data.images[others]))
    assert not torch.equal(out.images[cross], attack.trigger(data.images[cross]))
    old = InputAware(compat="reference").export_train(data, 0, 10, 16)
    assert old.role.nonzero().flatten()[:4].tolist() == [0, 1, 16, 17]  # one poisoned, one cross of each 16
    assert attack.extra_tests(data, 0, 10)["cross_acc"].images.shape == data.images.shape


def test_reference_mode_truncates(make_set: MakeSet) -> None:
    data = make_set(8, size=16)
    new, old = (InputAware(compat=c) for c in ("paper", "reference"))
    for attack in (new, old):
        attack.prepare(data, 10)
    difference = new.trigger(data.images).int() - old.trigger(data.images).int()
    assert set(difference.unique().tolist()) == {0, 1}


def test_gradients_reach_the_image(make_set: MakeSet) -> None:
    attack = InputAware()
    attack.prepare(make_set(4, size=16), 10)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    attack.trigger(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_bad_settings(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="give ratio, not count"):
        InputAware(count=10)
    with pytest.raises(ConfigError, match=r"ratio \* \(1 \+ cross_ratio\) must be at most 1, got 1.2"):
        InputAware(ratio=0.6)
    with pytest.raises(ValueError, match="images must be at least 16 x 16, got 8 x 8"):
        InputAware().poison(make_set(20, size=8))
    data, model = make_set(20, size=16), models.build("small_cnn", 10, (3, 16, 16))
    attack = InputAware(clean_train_epochs=5)
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    with pytest.raises(ValueError, match=r"more epochs than the 5 of the mask network \(clean_train_epochs\), got 4"):
        train(model, data, RECIPE, program=program, device="cpu")
    with pytest.raises(ValueError, match="input_aware: precision 'fp16' is not supported; use 'bf16'"):
        started(InputAware(), data, precision="fp16")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attack_works_on_digits() -> None:
    """Sparse masks, patterns that differ, and a trigger that works on its own image rather than on others."""
    data = datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(
        epochs=60, optimizer="adam", lr=3e-3, weight_decay=0.0, schedule="cosine"
    )
    method = attacks.create("input_aware", clean_train_epochs=12)
    result = attacks.attack(method, data, "small_cnn", recipe, device="cpu", progress=False)
    assert result.metrics["asr"] >= 0.85 and result.metrics["c_acc"] >= 0.96 and result.metrics["cross_acc"] >= 0.75
    assert result.history[11]["mask_density"] <= 0.05
    trained = result.attack()
    x = (data.test.images[:32].float() / 255 - data.mean[0]) / data.std[0]
    pattern = apply_network(trained.networks(3)["pattern"], trained.tensors, "pattern", x)  # type: ignore[attr-defined]
    assert float(distance(pattern[:16], pattern[16:]).mean()) > 0.05
