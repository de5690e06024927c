from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.training import EpochInfo, Recipe, SampleRecorder, StartInfo, StepInfo, train
from bbfast.training import recorder as recorder_module
from bbfast.training.checkpoint import Checkpoints
from bbfast.training.recorder import NEVER, Forgetting

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]
GPU = pytest.mark.gpu


class Naive:
    """Sample after sample, in lists: what the recorder must agree with."""

    def on_start(self, info: StartInfo) -> None:
        n = len(info.train)
        self.last, self.events, self.learned_at = [False] * n, [0] * n, [NEVER] * n
        self.loss: list[list[float]] = []
        self.steps: list[list[int]] = []
        self.correct: list[list[bool]] = []
        self._open(n)

    def _open(self, n: int) -> None:
        self._loss, self._steps = [float("nan")] * n, [-1] * n

    def on_step(self, info: StepInfo) -> None:
        assert info.logits is not None
        for row, y, i in zip(info.logits, info.batch.y.tolist(), info.batch.index.tolist(), strict=True):
            now = int(row.argmax()) == y
            self.events[i] += self.last[i] and not now
            if now and self.learned_at[i] == NEVER:
                self.learned_at[i] = info.batch.epoch
            self.last[i] = now
            self._loss[i] = float(F.cross_entropy(row.float()[None], torch.tensor([y], device=row.device)))
            self._steps[i] = info.batch.step

    def on_epoch_end(self, info: EpochInfo) -> None:
        self.loss.append(self._loss)
        self.steps.append(self._steps)
        self.correct.append(list(self.last))
        self._open(len(self.last))


def assert_agree(recorder: SampleRecorder, naive: Naive, fine: int) -> None:
    assert recorder.forgetting.last.tolist() == naive.last
    assert recorder.forgetting.events.tolist() == naive.events
    assert recorder.forgetting.learned_at.tolist() == naive.learned_at
    torch.testing.assert_close(recorder.loss, torch.tensor(naive.loss), equal_nan=True)
    assert recorder.correct.tolist() == naive.correct
    assert recorder.steps.tolist() == naive.steps[:fine]


@pytest.mark.parametrize("held", [1, 1 << 22])  # counted at every step, and once an epoch
@pytest.mark.parametrize("drop_last", [False, True])
def test_agrees_with_counting_one_by_one(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, held: int, drop_last: bool
) -> None:
    monkeypatch.setattr(recorder_module, "_HELD", held)
    recorder, naive = SampleRecorder(fine_epochs=2), Naive()
    recipe = recipe.replace(epochs=6, lr=0.3, drop_last=drop_last)
    hard = make_set(45).with_labels(torch.randint(0, 3, (45,), generator=torch.Generator().manual_seed(0)))
    train(make_net(), hard, recipe, device="cpu", callbacks=[recorder, naive])
    assert_agree(recorder, naive, 2)
    assert recorder.forgetting.events.sum() > 0 and bool(recorder.loss.isnan().any()) == drop_last
    train(make_net(seed=1), make_set(10), recipe, device="cpu", callbacks=[recorder, naive])
    assert_agree(recorder, naive, 2)  # the second run alone


def test_forgetting_counts_repeated_presentations_in_order() -> None:
    counters = Forgetting.of(3)
    counters.add(torch.tensor([0, 1, 0, 0, 1]), torch.tensor([True, False, False, True, False]), 0)
    assert counters.events.tolist() == [1, 0, 0] and counters.learned_at.tolist() == [0, NEVER, NEVER]
    counters.add(torch.tensor([2, 1, 0]), torch.tensor([True, True, False]), 4)
    assert counters.events.tolist() == [2, 0, 0] and counters.learned_at.tolist() == [0, 4, 4]
    assert counters.last.tolist() == [False, True, True]
    counters.events[1] = NEVER
    counters.add(torch.tensor([1]), torch.tensor([False]), 70_000)
    assert counters.events[1] == NEVER  # 16 bits, as they are stored
    counters.add(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), 5)


def test_recording_changes_nothing(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    runs = [
        train(make_net(dropout=0.2), make_set(40), recipe, device="cpu", callbacks=callbacks).model.state_dict()
        for callbacks in ([], [SampleRecorder()], [SampleRecorder("eval")])
    ]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in runs[0])


def test_eval_mode_reads_the_stored_images(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    recorder, rows = SampleRecorder("eval"), []
    data = make_set(30)

    class Look:
        def on_epoch_end(self, info: EpochInfo) -> None:
            info.model.eval()
            x = (data.images.float() / 255 - 0.4) / 0.25
            with torch.no_grad():
                rows.append(info.model(x))
            info.model.train()

    train(make_net(), data, recipe, device="cpu", callbacks=[recorder, Look()])
    assert recorder.correct.tolist() == [(row.argmax(1) == data.labels).tolist() for row in rows]
    expected = torch.stack([F.cross_entropy(row, data.labels, reduction="none") for row in rows])
    torch.testing.assert_close(recorder.loss, expected, rtol=1e-4, atol=1e-5)
    assert recorder.steps.shape == (0, 30)


class Stop:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, info: EpochInfo) -> None:
        if info.epoch == self.epoch:
            raise KeyboardInterrupt


def everything(recorder: SampleRecorder) -> list[Tensor]:
    counters = recorder.forgetting
    return [recorder.loss, recorder.correct, recorder.steps, counters.last, counters.events, counters.learned_at]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_killed_run_goes_on_recording(
    make_set: MakeSet,
    make_net: MakeNet,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: Any,
) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self, last: self.active)

    def run(folder: Path | None, *more: object, keep: bool = True) -> tuple[SampleRecorder, int]:
        recorder = SampleRecorder(mode, fine_epochs=2)
        callbacks = [*([recorder] if keep else []), *more]
        done = train(
            make_net(), make_set(37), recipe.replace(epochs=5), device="cpu", checkpoint=folder, callbacks=callbacks
        )
        return recorder, done.resumed_at

    whole, _ = run(None)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Stop(stop))
    resumed, at = run(tmp_path)
    assert at == 3
    for a, b in zip(everything(whole), everything(resumed), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    # A checkpoint without the recording is of no use to a run with it, nor the other way round.
    with caplog.at_level("WARNING", logger="bbfast"):
        _, at = run(tmp_path, keep=False)
    assert at == 0 and "is of another run (recording): starting anew" in caplog.text
    again, at = run(tmp_path)
    assert at == 0 and torch.equal(again.forgetting.events, whole.forgetting.events)


def test_bad_arguments(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="mode must be 'train' or 'eval', got 'both'"):
        SampleRecorder("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fine_epochs must be at least 0, got -1"):
        SampleRecorder(fine_epochs=-1)

    class Forgetful:
        def on_step(self, info: StepInfo) -> None: ...

        def state(self) -> dict[str, Tensor]:
            return {}

    with pytest.raises(TypeError, match="must have load_state, describe too"):
        train(make_net(), make_set(20), recipe, device="cpu", callbacks=[Forgetful()])


def test_without_an_epoch_there_is_nothing(make_set: MakeSet, make_net: MakeNet, recipe: Recipe) -> None:
    recorder = SampleRecorder()
    train(make_net(), make_set(20), recipe.replace(epochs=0), device="cpu", callbacks=[recorder])
    assert recorder.loss.shape == recorder.correct.shape == (0, 20)
    assert (recorder.forgetting.learned_at == NEVER).all()


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": True}, {"compile": True}])
def test_on_a_gpu(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, changes: dict[str, Any]) -> None:
    recorder, naive = SampleRecorder(fine_epochs=2), Naive()
    recipe = recipe.replace(epochs=6, lr=0.3, deterministic=False, **changes)
    train(make_net(), make_set(150), recipe, device="cuda", callbacks=[recorder, naive])
    assert_agree(recorder, naive, 2)
