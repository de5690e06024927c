"""NAD: attention maps that say something, one pass of each network a step, and the reference's defects."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._attention import Tap, attention_loss, attention_map, default_taps, named_taps
from bbfast.defenses.mitigation.nad import Distillation, NADConfig
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, UnsupportedModelError
from bbfast.models import build
from bbfast.training import Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_attention_map(power: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4)
    expected = torch.empty(2, 12)
    for b in range(2):
        a = [sum(abs(float(x[b, c, i, j])) ** power for c in range(5)) for i in range(3) for j in range(4)]
        size = math.sqrt(sum(v * v for v in a)) + 1e-6
        expected[b] = torch.tensor([v / size for v in a])
    torch.testing.assert_close(attention_map(x, power), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_map(37 * x, power), attention_map(x, power), rtol=1e-4, atol=1e-5)


def test_tokens_leave_out_the_class_token() -> None:
    x = torch.randn(2, 10, 6)
    without = x[:, 1:].transpose(1, 2).reshape(2, 6, 3, 3)
    torch.testing.assert_close(attention_map(x), attention_map(without))
    assert attention_map(torch.randn(2, 9, 6)).shape == (2, 9)


def test_a_dead_map_gives_no_nan() -> None:
    """Regression: without the epsilon a map of zeros divides by zero."""
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss(dead, torch.randn(2, 3, 4, 4))
    loss.backward()
    assert loss.isfinite() and dead.grad is not None and dead.grad.isfinite().all()


def test_equal_maps_cost_nothing_and_teach_nothing() -> None:
    x = torch.randn(2, 3, 4, 4)
    teacher = x.clone().requires_grad_()
    student = x.clone().requires_grad_()
    loss = attention_loss(student, teacher)
    loss.backward()
    assert float(loss.detach()) == 0.0 and teacher.grad is None
    assert student.grad is not None and float(student.grad.abs().max()) == 0.0


PLACES = {
    "preactresnet18": [("layer2", False, 256), ("layer3", False, 64), ("layer4", False, 16)],
    "small_cnn": [("layer2", False, 64), ("layer3", False, 16), ("layer4", False, 16)],
    "vgg19_bn": [("features.13", True, 256), ("features.26", True, 64), ("features.39", True, 16)],
    "convnext_tiny": [("features.1", False, 64), ("features.3", False, 16), ("features.5", False, 4)],
    "vit_b_16": [(f"1.encoder.layers.encoder_layer_{i}", False, 196) for i in (3, 7, 11)],
}


@pytest.mark.parametrize("architecture", list(PLACES))
def test_every_term_is_above_zero(architecture: str) -> None:
    """Regression: in the reference the last map of PreAct-ResNet18, the only ones of ConvNeXt and VGG, and the input
    image of ViT give terms that are zero for any two networks."""
    torch.manual_seed(0)
    model = build(architecture, 4, (32, 32)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * p.std(correction=0) * torch.randn_like(p)
    taps = default_taps(model, (3, 32, 32), "nad")
    assert [(tap.module, tap.of_input) for tap in taps] == [place[:2] for place in PLACES[architecture]]
    maps: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    handles = [tap.listen(net, kept) for net, kept in ((model, maps[0]), (other, maps[1])) for tap in taps]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
        other(x)
    for handle in handles:
        handle.remove()
    for tap, (_, _, positions) in zip(taps, PLACES[architecture], strict=True):
        assert attention_map(maps[0][tap.label]).shape == (2, positions)
        assert float(attention_loss(maps[0][tap.label], maps[1][tap.label])) > 0
        assert float(attention_loss(maps[0][tap.label], maps[0][tap.label])) == 0


def test_small_images_leave_stages_out() -> None:
    taps = default_taps(build("small_cnn", 4, (8, 8)), (3, 8, 8), "nad")
    assert [tap.label for tap in taps] == ["stage1", "stage2"]
    with pytest.raises(UnsupportedModelError, match="more than one position"):
        default_taps(build("small_cnn", 4, (2, 2)), (3, 2, 2), "nad")


def test_it_is_the_plain_loop(toy_images: MakeImages) -> None:
    """The program against a step written out, with the running statistics of one pass a batch."""
    torch.manual_seed(1)
    student, teacher = build("small_cnn", 4, (12, 12)), build("small_cnn", 4, (12, 12)).eval()
    images, other = toy_images(40, 4), copy.deepcopy(student)
    config = NADConfig(betas=(5.0, 7.0), lr=0.05, lr_later=((1, 0.02),))
    recipe = Recipe(epochs=2, batch_size=16, lr=0.05, precision="fp32", padding=2, channels_last=False, eval_every=0)
    taps = [Tap("stage1", "layer1"), Tap("stage2", "layer2")]
    before = copy.deepcopy(teacher)
    program = Distillation(teacher, taps, config)
    done = train(student, images, recipe, program=program, device="cpu", progress=False)
    program.release()
    assert same_state(teacher, before)

    optimizer = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, weight_decay=recipe.weight_decay)
    maps: dict[str, list[Tensor]] = {"layer1": [], "layer2": []}
    for net in (other, teacher):
        for name, kept in maps.items():
            net.get_submodule(name).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    other.train()
    passes = 0
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = (0.05, 0.02)[epoch]
        for batch in BatchLoader(images, 16, padding=2, merge_single=True).epoch(epoch):
            for kept in maps.values():
                kept.clear()
            loss = F.cross_entropy(other(batch.x), batch.y)
            teacher(batch.x)
            for beta, (ours, theirs) in zip((5.0, 7.0), maps.values(), strict=True):
                a, b = ours.square().sum(1).flatten(1), theirs.detach().square().sum(1).flatten(1)
                a, b = a / (a.norm(dim=1, keepdim=True) + 1e-6), b / (b.norm(dim=1, keepdim=True) + 1e-6)
                loss = loss + beta * (a - b).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            passes += 1
    for (name, a), b in zip(student.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert int(student.state_dict()["layer1.0.bn1.num_batches_tracked"]) == passes
    assert [row["lr"] for row in done.history] == [0.05, 0.02]
    assert done.history[0]["attention_stage1"] > 0


def test_the_result(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    """Regression: the reference gives the teacher's number of epochs to both phases."""
    view = toy_view(toy_attack().model, clean=toy_images(40, 4), progress=False)
    result = defenses.create("nad", teacher_epochs=1, epochs=3).run(view)
    assert [row["phase"] for row in result.history] == ["teacher"] + ["student"] * 3
    assert result.info["layers"] == {f"stage{i}": f"layer{i}" for i in (2, 3, 4)}
    assert all(not m._forward_hooks for m in result.model.modules())  # type: ignore[union-attr]
    assert all(row[f"attention_{label}"] > 0 for row in result.history[1:] for label in result.info["layers"])


def test_settings() -> None:
    config = NADConfig()
    assert (config.teacher_epochs, config.epochs, config.betas, config.power) == (10, 20, (500, 1000, 1000), 2)
    assert [NADConfig(lr=0.1).rate(epoch) for epoch in (0, 1, 2, 19, 20)] == [0.1, 0.1, 0.01, 0.01, 1e-4]
    assert NADConfig(preset="reference").epochs == 10 and NADConfig(preset="paper").lr == 0.1
    assert config.for_dataset("tiny_imagenet").batch_size == 128
    for bad, text in [
        ({"lr_later": ((0, 0.1),)}, "rise from 1"),
        ({"lr_later": ((3, 0.1), (3, 0.2))}, "rise from 1"),
        ({"betas": ()}, "betas"),
        ({"betas": (1.0, -1.0)}, "betas"),
        ({"layers": ("stage1",)}, "layers must be 3 different ones"),
    ]:
        with pytest.raises(ConfigError, match=text):
            defenses.create("nad", **bad)


def test_layers_by_name() -> None:
    model = build("small_cnn", 4, (12, 12))
    taps = named_taps(model, ("stage1", "layer2.0"), "nad")
    assert [tap.module for tap in taps] == ["layer1", "layer2.0"]
    with pytest.raises(UnsupportedModelError, match="it has no layer 'stage9'"):
        named_taps(model, ("stage9",), "nad")


def test_a_model_without_stages_is_refused_before_work(toy_attack: MakeAttack) -> None:
    ran: list[int] = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net[0].register_forward_hook(lambda *_: ran.append(1))
    attack = toy_attack(model=net)
    with pytest.raises(UnsupportedModelError, match="its stages are not known"):
        defenses.defend("nad", attack, 0.3, device="cpu", progress=False)
    assert not ran
    named = defenses.create("nad", layers=("0",), betas=(10.0,), teacher_epochs=1, epochs=1)
    assert defenses.defend(named, attack, 0.3, device="cpu", progress=False).history


def test_a_killed_run_goes_on(toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    defense = defenses.create("nad", teacher_epochs=2, epochs=4)
    whole = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    plain = Distillation.epoch_end

    def killed(self: Distillation, epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distillation, "epoch_end", killed)
        defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    again = defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    assert same_state(whole.model, again.model)  # type: ignore[arg-type]


def test_it_repairs_the_digits(digits_attack: AttackResult) -> None:
    result = defenses.defend("nad", digits_attack, device="cpu", progress=False)
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.1
    assert result.metrics["asr"] <= 0.15
