from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.training import Batch, Program, Recipe, train

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]


class Spy(Program):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self.calls.append("start")

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self.calls.append(f"epoch_start {epoch} {steps} {batch_size}")

    def make_batch(self, batch: Batch) -> Batch:
        assert not torch.is_grad_enabled() and batch.x.dtype == torch.float32
        self.calls.append(f"make_batch {batch.epoch} {batch.step}")
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        assert model.training and torch.is_grad_enabled()
        self.calls.append("loss")
        return super().loss(model, batch)

    def after_backward(self, model: nn.Module) -> None:
        assert all(p.grad is not None for p in model.parameters())
        self.calls.append("after_backward")

    def after_step(self, model: nn.Module) -> None:
        self.calls.append("after_step")

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        self.calls.append(f"epoch_end {epoch}")
        return {"mine": 10.0 + epoch}


def test_hooks_are_called_in_order(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    spy = Spy()
    result = train(make_net(), make_set(32), recipe.replace(epochs=2, precision="bf16"), program=spy, device="cpu")
    step = ["loss", "after_backward", "after_step"]
    expected = ["start"]
    for epoch in (0, 1):
        expected += [f"epoch_start {epoch} 2 16", f"make_batch {epoch} 0", *step, f"make_batch {epoch} 1", *step]
        expected.append(f"epoch_end {epoch}")
    assert spy.calls == expected
    assert [row["mine"] for row in result.history] == [10.0, 11.0]
    assert spy.seed == 0 and spy.device == torch.device("cpu") and len(spy.train) == 32


def test_a_program_that_changes_nothing_changes_nothing(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    plain, spied = make_net(), make_net()
    train(plain, make_set(32), recipe, device="cpu")
    train(spied, make_set(32), recipe, device="cpu", program=Spy())
    for a, b in zip(plain.parameters(), spied.parameters(), strict=True):
        assert torch.equal(a, b)


def test_roles_are_counted_apart(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    class Poison(Program):
        def make_batch(self, batch: Batch) -> Batch:
            role = torch.zeros(len(batch), dtype=torch.int8)
            role[:4] = 1
            y = batch.y.clone()
            y[:4] = 1 - (batch.y[:4] == 1).long()  # never the true label
            return batch.replace(role=role, y=y)

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            truth = self.train.labels[batch.index]
            logits = nn.functional.one_hot(truth, 3).float() + 0 * model(batch.x)
            return logits.sum() * 0 + 2.5, logits

    result = train(make_net(), make_set(48), recipe.replace(epochs=1), device="cpu", program=Poison())
    row = result.history[0]
    # Predictions are the true labels: right for clean samples, wrong for all 4 of 16 poisoned ones.
    assert (row["train_acc_clean"], row["train_asr"], row["train_acc"]) == (1.0, 0.0, 0.75)
    assert row["loss"] == 2.5 and "train_cross_acc" not in row


def test_weights_of_samples_count_in_the_loss() -> None:
    program = Program()
    program.recipe = Recipe()
    model = nn.Identity()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    batch = Batch(logits, torch.tensor([0, 0]), torch.arange(2), weight=torch.tensor([1.0, 0.0]))
    value, _ = program.loss(model, batch)
    each = nn.functional.cross_entropy(logits, batch.y, reduction="none")
    assert float(value) == pytest.approx(float(each[0]) / 2)
    assert float(program.loss(model, batch.replace(weight=None))[0]) == pytest.approx(float(each.mean()))


def test_augments_itself_switches_the_loaders_augmentation_off(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe
) -> None:
    class Check(Program):
        augments_itself = True

        def make_batch(self, batch: Batch) -> Batch:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.train.mean, self.train.std))
            torch.testing.assert_close(batch.x, (self.train.images[batch.index].float() / 255 - mean) / std)
            return batch

    train(make_net(), make_set(20), recipe.replace(padding=3, flip=True), device="cpu", program=Check())


def test_a_program_may_override_drop_last(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    class Counts(Program):
        seen = 0

        def make_batch(self, batch: Batch) -> Batch:
            self.seen += len(batch)
            return batch

    class KeepsLast(Counts):
        drop_last = False

    counts, keeps = Counts(), KeepsLast()
    recipe = recipe.replace(epochs=1, batch_size=16, drop_last=True)
    train(make_net(), make_set(20), recipe, device="cpu", program=counts)
    train(make_net(), make_set(20), recipe, device="cpu", program=keeps)
    assert (counts.seen, keeps.seen) == (16, 20)


def test_programs_without_logits_and_other_outputs(make_set: MakeSet, recipe: Recipe) -> None:
    class Reconstruct(Program):
        classifies = False

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
            return (model(batch.x) - batch.x).square().mean(), None

    model = nn.Conv2d(3, 3, 1)  # gives pictures, not logits
    result = train(model, make_set(20), recipe, device="cpu", program=Reconstruct())
    assert "train_acc" not in result.history[0]
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_new_loss_is_not_taken_as_safe_to_capture() -> None:
    class NewLoss(Program):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
            return super().loss(model, batch)

    class Declared(NewLoss):
        graph_safe = True

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
            return super().loss(model, batch)

    class NewBatch(Program):
        def make_batch(self, batch: Batch) -> Batch:
            return batch

    safe: list[Any] = [program.graph_safe for program in (Program, NewLoss, Declared, NewBatch)]
    assert safe == [True, False, True, True]


def test_state_of_another_program_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Program keeps no state, but the checkpoint holds \['mask'\]"):
        Program().load_state({"mask": torch.zeros(1)})
    Program().load_state({})


class Late(Program):
    """Begins with stages of its own, in which nothing is learned that a plateau could see."""

    def __init__(self, wait: int) -> None:
        self.wait = wait
        self.rates: list[float] = []

    def schedule_start(self, recipe: Recipe) -> int:
        return self.wait

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        assert isinstance(self.optimizer, torch.optim.SGD)
        super().start(model, train, recipe, seed, device)

    def after_step(self, model: nn.Module) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        loss, logits = super().loss(model, batch)
        return (loss, logits) if batch.epoch >= self.wait else (loss / 1000, logits)


def test_the_schedule_can_begin_later(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    recipe = recipe.replace(epochs=5, schedule="cosine", batch_size=32)
    late = Late(2)
    train(make_net(), make_set(32), recipe, program=late, device="cpu")
    assert late.rates == pytest.approx([0.1, 0.1, 0.1, 0.075, 0.025])
    # The losses of the first epochs are not the schedule's: the rate falls only once the later ones stop falling.
    late = Late(2)
    train(make_net(), make_set(32), recipe.replace(schedule="plateau", patience=0), program=late, device="cpu")
    assert late.rates == pytest.approx([0.1] * 5)
    for wait in (-1, 6):
        with pytest.raises(ValueError, match=rf"schedule_start of Late must lie in 0\.\.5, .* got {wait}"):
            train(make_net(), make_set(32), recipe, program=Late(wait), device="cpu")
