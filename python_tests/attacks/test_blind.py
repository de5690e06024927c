"""Blind: the pattern, when the second loss is on, its weights, MGDA; a real run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import Recipe, attacks, datasets, models
from bbfast.attacks.blind import Blind, BlindProgram, mgda_weight
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader
from bbfast.errors import ConfigError
from bbfast.training import train

MakeSet = Callable[..., ImageSet]
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05, precision="fp32", deterministic=True, eval_every=0)
CPU = torch.device("cpu")


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build("small_cnn", 10, (3, 32, 32))


def started(attack: Blind, data: ImageSet, **recipe: Any) -> BlindProgram:
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    program.start(nn.Identity(), data, RECIPE.replace(**recipe), 0, CPU)
    program.epoch_start(0, 4, 16)
    return program


def first_batch(data: ImageSet) -> Batch:
    return next(iter(BatchLoader(data, 16, augment=False).epoch(0)))


def test_pattern_replaces_nine_pixels() -> None:
    grey = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    out = Blind().trigger(grey)
    expected = torch.tensor([[255, 0, 255], [77, 255, 77], [77, 77, 0], [77, 255, 77], [255, 0, 255]])
    for channel in out[0]:
        assert torch.equal(channel[3:8, 23:26].int(), expected.int())
    assert int((out != grey).any(1).sum()) == 9
    wide = Blind().trigger(torch.full((1, 3, 64, 64), 77, dtype=torch.uint8))
    assert torch.equal(wide[..., 3:8, 23:26], out[..., 3:8, 23:26]) and int((wide != 77).any(1).sum()) == 9
    small = Blind().trigger(torch.full((1, 1, 16, 16), 77, dtype=torch.uint8))
    assert torch.equal(small[0, 0, 3:8, 13:16].int(), expected.int())


def test_float_trigger_has_gradients_where_the_image_shows() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    Blind().trigger(x).sum().backward()
    assert x.grad is not None and float(x.grad.sum()) == 2 * 3 * (1024 - 9)


def test_pattern_is_normalised_as_the_data(make_set: MakeSet) -> None:
    data = make_set(16)
    data = ImageSet(data.images, data.labels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    white = [
        program.pattern[:, 3, 23] for program in (started(Blind(), data), started(Blind(compat="reference"), data))
    ]
    assert white[0].tolist() == pytest.approx([2.5, 2.4, 1.4])
    assert white[1].tolist() == pytest.approx([(1 - 0.4914) / 0.247, (1 - 0.4822) / 0.243, (1 - 0.4465) / 0.261])


def test_the_second_loss_begins_with_a_full_history_of_small_losses(make_set: MakeSet) -> None:
    program = started(Blind(history=3), make_set(16))
    on = []
    for loss in (0.2, 0.2, 0.2, 0.2, 2.9, 0.2, 0.2, 0.2):
        on.append(program._is_on())
        program._remember(torch.tensor(loss))
    # 2.9 among the last three: off, although it was on before; latch keeps it on.
    assert on == [False, False, False, True, True, False, False, False] and program._is_on()
    program = started(Blind(history=3, latch=True), make_set(16))
    for loss in (0.2, 0.2, 0.2):
        assert not program._is_on()
        program._remember(torch.tensor(loss))
    assert program._is_on()
    program._remember(torch.tensor(9.0))
    assert program._is_on()
    high = started(Blind(history=3), make_set(16))
    for _ in range(5):
        high._remember(torch.tensor(1.0))  # at the threshold: not below it
    assert not high._is_on()
    assert Blind().config.history == 1000


@pytest.mark.parametrize("mode", ["all2one", "all2all"])
def test_loss_is_the_weighted_sum(make_set: MakeSet, net: nn.Module, mode: str) -> None:
    data = make_set(16)
    attack = Blind(history=1, threshold=100.0, label_mode=mode, target=0 if mode == "all2all" else 3)
    program, batch = started(attack, data), first_batch(data)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    first, _ = program.loss(net, batch)
    assert len(seen) == 1 and float(first.detach()) == pytest.approx(float(program.losses[0]))
    both, logits = program.loss(net, batch)
    # The triggered batch goes first; the pattern is on every image of it.
    assert len(seen) == 3 and torch.equal(seen[2], batch.x)
    assert torch.allclose(seen[1], attack.trigger(batch.x), atol=1e-6)  # mean 0, std 1: as unit images
    wanted = torch.full_like(batch.y, 3) if mode == "all2one" else (batch.y + 1) % 10
    with torch.no_grad():
        second = F.cross_entropy(net(seen[1]), wanted)
    assert logits is not None
    normal = F.cross_entropy(logits.detach(), batch.y)
    assert float(both.detach()) == pytest.approx(float(0.9 * second + normal), rel=1e-4)
    assert program.epoch_end(0, net) == {"backdoored": 0.25}


@pytest.mark.parametrize(("a", "b", "c", "weight"), [(4, 1, 2, 0.25), (1, 2, 9, 0.999), (9, 2, 1, 0.001)])
def test_mgda_weight(a: float, b: float, c: float, weight: float) -> None:
    """The vectors of spec/attacks section 30."""
    assert float(mgda_weight(*(torch.tensor(float(v)) for v in (a, b, c)))) == pytest.approx(weight)


@pytest.mark.parametrize("normaliser", ["none", "l2", "loss", "loss+"])
def test_mgda_gradients(make_set: MakeSet, net: nn.Module, normaliser: str) -> None:
    """Against three plain backward passes, weights by hand."""
    data = make_set(16)
    attack = Blind(balance="mgda", normaliser=normaliser, history=1, threshold=100.0)
    program, batch = started(attack, data), first_batch(data)
    program._remember(torch.tensor(0.0))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    loss, _ = program.loss(net, batch)
    loss.backward()
    ours = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.load_state_dict(state)
    parts = []
    for x, y in ((attack.trigger(batch.x), torch.zeros_like(batch.y)), (batch.x, batch.y)):
        net.zero_grad()
        value = F.cross_entropy(net(x), y)
        value.backward()
        parts.append((float(value.detach()), [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    lengths = [float(torch.cat([g.flatten() for g in grads]).norm()) for _, grads in parts]
    norms = {
        "none": [1.0, 1.0],
        "l2": lengths,
        "loss": [min(v, 10) for v, _ in parts],
        "loss+": [min(v * n, 10) for (v, _), n in zip(parts, lengths, strict=True)],
    }[normaliser]
    flat = [torch.cat([g.flatten() for g in grads]) / (n + 1e-5) for (_, grads), n in zip(parts, norms, strict=True)]
    w = float(mgda_weight(flat[0] @ flat[0], flat[0] @ flat[1], flat[1] @ flat[1]))
    assert 0 < w < 1
    assert float(loss.detach()) == pytest.approx(w * parts[0][0] + (1 - w) * parts[1][0], rel=1e-4)
    for mine, one, other in zip(ours, parts[0][1], parts[1][1], strict=True):
        assert torch.allclose(mine, w * one + (1 - w) * other, atol=1e-5)


@pytest.mark.parametrize("balance", ["fixed", "mgda"])
def test_joint_forward(make_set: MakeSet, net: nn.Module, balance: str) -> None:
    """One pass, the same loss and gradients where BatchNorm does not see the batch."""
    data, found = make_set(16), []
    net.eval()
    for joint in (False, True):
        program = started(Blind(balance=balance, history=1, threshold=100.0, joint_forward=joint), data)
        program._remember(torch.tensor(0.0))
        net.zero_grad()
        loss, logits = program.loss(net, first_batch(data))
        loss.backward()
        assert logits is not None and logits.shape == (16, 10)
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    for apart, together in zip(*found, strict=True):
        assert torch.allclose(apart, together, atol=1e-5)
    passes: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    program.loss(net, first_batch(data))
    assert passes == [32]


def test_exported_set_has_the_ratio(make_set: MakeSet) -> None:
    out = Blind(ratio=0.2).export_train(make_set(50), 0, 10, 16)
    assert int(out.poisoned.sum()) == 10 and bool((out.labels[out.poisoned] == 0).all())


def test_bad_settings(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="normaliser"):
        Blind(normaliser="l1")
    with pytest.raises(ConfigError, match="history"):
        Blind(history=0)
    with pytest.raises(ValueError, match=r"blind: images must be at least 5 x 3, got 4 x 4"):
        Blind().poison(make_set(20, size=4))
    with pytest.raises(ValueError, match=r"compat='reference' has CIFAR-10's constants: 3 channels, got 1"):
        Blind(compat="reference").poison(make_set(20, channels=1))
    with pytest.raises(ValueError, match="blind: precision 'fp16' is not supported"):
        started(Blind(balance="mgda"), make_set(16), precision="fp16")


def test_mgda_trains_through_the_engine(make_set: MakeSet, net: nn.Module) -> None:
    data = make_set(48)
    attack = Blind(balance="mgda", history=2, threshold=100.0)
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    result = train(net, data, RECIPE, program=program, device="cpu")
    assert [row["backdoored"] for row in result.history] == pytest.approx([1 / 3, 1.0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_attack_works_on_digits() -> None:
    """With a history that ends within the quick preset's 345 batches.

    Apart, the two forward passes leave BatchNorm with a mixture: ASR 0.98, but C-Acc 0.90 after 30 epochs.
    """
    method = attacks.create("blind", history=50, joint_forward=True)
    result = attacks.attack(method, datasets.load("digits"), "small_cnn", "quick", device="cpu", progress=False)
    assert result.metrics["asr"] >= 0.95 and result.metrics["c_acc"] >= 0.96
    on = [row["backdoored"] for row in result.history]
    assert on[0] == on[1] == 0 and on[-1] == 1
