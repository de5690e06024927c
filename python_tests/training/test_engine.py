from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.errors import BBFastError, DivergedError
from bbfast.training import EpochInfo, Program, Recipe, TrainResult, predict_labels, train

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_in_place(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    data, test = make_set(96), make_set(30, seed=1)
    model = make_net()
    result = train(model, data, recipe.replace(epochs=8), test=test, device="cpu")
    assert result.model is model and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    assert result.history[-1]["c_acc"] > 0.95
    accuracy = (predict_labels(model, test) == test.labels).double().mean()
    assert result.history[-1]["c_acc"] == float(accuracy)
    assert result.precision == "fp32" and result.device == torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, precision: str) -> None:
    data = make_set(50)
    recipe = recipe.replace(precision=precision, flip=True)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the caller's random state must not matter
        model = make_net(dropout=0.3)
        results.append((train(model, data, recipe, seed=4, device="cpu").history, weights(model)))
    (history_a, a), (history_b, b) = results
    assert same(a, b)
    assert [row["loss"] for row in history_a] == [row["loss"] for row in history_b]
    other = make_net(dropout=0.3)
    train(other, data, recipe, seed=5, device="cpu")
    assert not same(a, weights(other))


def test_the_callers_torch_is_left_as_it_was(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    cudnn = torch.backends.cudnn
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    data = make_set(20)
    for deterministic in (True, False):
        model = make_net()
        train(model, data, recipe.replace(deterministic=deterministic), device="cpu")
        assert torch.equal(before, torch.get_rng_state())
        assert flags == (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        assert all(p.is_contiguous() for p in model.parameters())


def test_no_epochs_no_change(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    model = make_net()
    before = weights(model)
    result = train(model, make_set(20), recipe.replace(epochs=0), test=make_set(6), device="cpu")
    assert same(before, weights(model))
    assert result.history == [] and result.seconds_per_epoch == 0


def test_history(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    data, test = make_set(40), make_set(12, seed=1)
    backdoor = BackdoorSet(test.images, torch.zeros_like(test.labels), test.mean, test.std, original_labels=test.labels)
    recipe = recipe.replace(epochs=5, eval_every=2, schedule="step", step_size=2, gamma=0.5)
    result = train(make_net(), data, recipe, test=test, backdoor_test=backdoor, device="cpu")
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3, 4]
    assert [row["lr"] for row in result.history] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    measured = [{"c_acc", "asr", "r_acc"} <= row.keys() for row in result.history]
    assert measured == [False, True, False, True, True]  # every second one and the last
    last = result.history[-1]
    predicted = predict_labels(result.model, test)
    assert last["asr"] == float((predicted == 0).double().mean())
    assert last["r_acc"] == last["c_acc"]  # the same images under their true labels
    assert all(0 <= row["train_acc"] <= 1 and row["seconds"] > 0 for row in result.history)
    assert result.seconds >= sum(row["seconds"] for row in result.history)
    assert result.seconds_per_epoch == pytest.approx(sum(row["seconds"] for row in result.history) / 5)


def test_eval_every_0_never_measures(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    result = train(make_net(), make_set(20), recipe.replace(eval_every=0), test=make_set(6), device="cpu")
    assert all("c_acc" not in row for row in result.history)


def test_loss_and_accuracy_of_an_epoch_are_those_of_a_plain_loop(make_set: MakeSet, make_net: MakeNet) -> None:
    data = make_set(40)
    recipe = Recipe(epochs=2, batch_size=16, lr=0.05, augment=False, precision="fp32", channels_last=False)
    model = make_net()
    result = train(model, data, recipe, seed=3, device="cpu")
    plain = make_net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = BatchLoader(data, 16, seed=3, augment=False, merge_single=True)
    for epoch in range(2):
        losses, correct = [], 0
        optimizer.param_groups[0]["lr"] = [0.05, 0.025][epoch]
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            logits = plain(batch.x)
            loss = nn.functional.cross_entropy(logits, batch.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            correct += int((logits.argmax(1) == batch.y).sum())
        assert result.history[epoch]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert result.history[epoch]["train_acc"] == pytest.approx(correct / 40)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_callbacks(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    class Spy:
        def __init__(self) -> None:
            self.calls: list[tuple[str, int, int]] = []
            self.rows: list[dict[str, Any]] = []

        def on_epoch_end(self, info: EpochInfo) -> None:
            self.calls.append(("epoch", info.epoch, info.epochs))
            self.rows.append(info.metrics)

        def on_end(self, info: EpochInfo) -> None:
            self.calls.append(("end", info.epoch, info.epochs))

    spy = Spy()
    result = train(make_net(), make_set(20), recipe, device="cpu", callbacks=[spy])
    assert spy.calls == [("epoch", 0, 3), ("epoch", 1, 3), ("epoch", 2, 3), ("end", 2, 3)]
    assert spy.rows == result.history
    with pytest.raises(
        TypeError, match="callbacks must have a method on_start or on_step or on_epoch_end or on_end, got <function"
    ):
        train(make_net(), make_set(20), recipe, callbacks=[lambda info: None])


def test_flooding_and_smoothing_change_the_loss(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    data = make_set(48)
    recipe = recipe.replace(epochs=6)
    losses = {
        name: train(make_net(), data, recipe.replace(**changes), device="cpu").history[-1]["loss"]
        for name, changes in {"plain": {}, "flood": {"flooding": 0.5}, "smooth": {"label_smoothing": 0.3}}.items()
    }
    assert losses["plain"] < 0.5 <= losses["flood"] and losses["smooth"] > losses["plain"]


def test_clipping_bounds_a_step(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    model = make_net()
    before = weights(model)
    clip = recipe.replace(epochs=1, batch_size=64, momentum=0, weight_decay=0, lr=1.0, clip_grad_norm=1e-3)
    train(model, make_set(30), clip, device="cpu")
    moved = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_frozen_weights_stay(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    model = make_net()
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before = weights(model)
    train(model, make_set(20), recipe, device="cpu")
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(before["6.weight"], model.state_dict()["6.weight"])


def test_last_batch_of_one_does_not_break_batch_norm(make_set: MakeSet, recipe: Recipe) -> None:
    # 1 x 1 maps: BatchNorm raises on a batch of one.
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    result = train(model, make_set(17), recipe.replace(batch_size=8), device="cpu")
    assert len(result.history) == 3
    with pytest.raises(ValueError, match="train must hold at least two images for a model with BatchNorm, got 1"):
        train(model, make_set(1), recipe)


@pytest.mark.parametrize("drop_last", [False, True])
def test_fewer_images_than_a_batch(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, drop_last: bool) -> None:
    model = make_net()
    before = weights(model)
    train(model, make_set(5), recipe.replace(drop_last=drop_last, batch_size=128), device="cpu")
    assert not same(before, weights(model))


def test_nan_loss_names_epoch_and_remedy(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    with pytest.raises(BBFastError, match=r"loss became (nan|inf) in epoch 0 .*lower lr"):
        train(make_net(), make_set(40), recipe.replace(lr=1e30), device="cpu")


@pytest.mark.parametrize(("steps", "broken_at"), [(3, 2), (1, 2), (3, 0)])
def test_a_diverged_training_hands_back_the_last_finite_weights(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, steps: int, broken_at: int
) -> None:
    """With one step an epoch, the epoch that breaks the weights still has a finite loss."""
    at_ends: list[dict[str, Tensor]] = []

    class Breaks(Program):
        def after_step(self, model: nn.Module) -> None:
            if len(at_ends) == broken_at:
                next(model.parameters()).data.fill_(math.nan)

    class Ends:
        def on_epoch_end(self, info: Any) -> None:
            at_ends.append(weights(info.model))

    model = make_net()
    start, quick = weights(model), recipe.replace(epochs=9, batch_size=60 // steps)
    with pytest.raises(DivergedError, match="became nan in epoch") as caught:
        train(model, make_set(60), quick, device="cpu", program=Breaks(), callbacks=[Ends()])
    kept = caught.value.last_good
    assert kept is not None and same(kept, at_ends[broken_at - 1] if broken_at else start)
    assert not same(kept, weights(model))
    make_net().load_state_dict(kept)


def test_user_model_without_batch_norm_or_convolutions(make_set: MakeSet, recipe: Recipe) -> None:
    result = train(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), make_set(40), recipe, device="cpu")
    assert not result.channels_last and result.history[-1]["loss"] < result.history[0]["loss"]


def test_deterministic_mode_refuses_what_has_no_deterministic_form(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe
) -> None:
    class Scatters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.net(x)
            x.detach().float().clone().put_(torch.tensor([0]), torch.tensor([1.0]))  # torch refuses this one
            return logits  # type: ignore[no-any-return]

    with pytest.raises(BBFastError, match=r"deterministic=True cannot be kept: put_.*use deterministic=False"):
        train(Scatters(), make_set(20), recipe, device="cpu")
    assert len(train(Scatters(), make_set(20), recipe.replace(deterministic=False), device="cpu").history) == 3


def test_ctrl_c_passes_through(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    class Interrupt:
        def on_epoch_end(self, info: EpochInfo) -> None:
            raise KeyboardInterrupt

    model = make_net()
    with pytest.raises(KeyboardInterrupt):
        train(model, make_set(20), recipe, device="cpu", callbacks=[Interrupt()], progress=True)
    assert not model.training and not torch.are_deterministic_algorithms_enabled()


def test_an_epoch_is_logged(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="bbfast"):
        train(make_net(), make_set(20), recipe, device="cpu", description="job 7")
    assert sum("job 7: {'epoch': " in message for message in caplog.messages) == 3


def test_bad_arguments(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    data, net = make_set(20), make_net()
    cases: list[tuple[type[Exception], str, Callable[[], TrainResult]]] = [
        (TypeError, r"model must be a torch.nn.Module, got str", lambda: train("net", data, recipe)),  # type: ignore[arg-type]
        (TypeError, r"train must be an ImageSet .*got Tensor", lambda: train(net, data.images, recipe)),  # type: ignore[arg-type]
        (TypeError, r"recipe must be a Recipe .*got dict", lambda: train(net, data, {"epochs": 3})),  # type: ignore[arg-type]
        (TypeError, r"test must be an ImageSet or None, got list", lambda: train(net, data, recipe, test=[])),  # type: ignore[arg-type]
        (TypeError, r"program must be a Program or None", lambda: train(net, data, recipe, program="wanet")),  # type: ignore[arg-type]
        (TypeError, r"seed must be an integer, got 1.5", lambda: train(net, data, recipe, seed=1.5)),  # type: ignore[arg-type]
        (ValueError, r"train must hold at least one image", lambda: train(net, data[:0], recipe)),
        (
            ValueError,
            r"train.labels must be below 2, the number of the model's outputs, got 2; .*num_classes=3",
            lambda: train(make_net(classes=2), data, recipe),
        ),
        (
            ValueError,
            r"backdoor_test.labels must be below 3",
            lambda: train(net, data, recipe, backdoor_test=make_set(8, classes=4)),
        ),
        (
            ValueError,
            r"test must have images of size \(3, 8, 8\) as train has, got \(3, 6, 6\)",
            lambda: train(net, data, recipe, test=make_set(8, size=6)),
        ),
        (
            ValueError,
            r"the model cannot process images of shape \[1, 3, 8, 8\]",
            lambda: train(nn.Linear(5, 3), data, recipe),
        ),
        (ValueError, r"one row of logits an image", lambda: train(nn.Conv2d(3, 3, 1), data, recipe)),
        (ValueError, r"device must be 'auto', 'cpu' or a name", lambda: train(net, data, recipe, device="gpu")),
        (TypeError, r"device must be 'auto', a name", lambda: train(net, data, recipe, device=0)),  # type: ignore[arg-type]
        (
            ValueError,
            r"precision 'fp16' needs a GPU",
            lambda: train(net, data, recipe.replace(precision="fp16"), device="cpu"),
        ),
    ]
    before = weights(net)
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert same(before, weights(net))


@pytest.mark.slow
def test_compiled_training_agrees(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    data = make_set(40)
    plain, compiled = make_net(), make_net()
    train(plain, data, recipe, device="cpu")
    train(compiled, data, recipe.replace(compile=True), device="cpu")
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
