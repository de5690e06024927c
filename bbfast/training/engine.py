"""The training engine: one loop for plain training, training-controlled attacks and in-training defenses."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bbfast import _progress
from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader, derive_seed
from bbfast.errors import BBFastError, DivergedError
from bbfast.training._checks import check_arguments, check_fit
from bbfast.training._last_good import LastGood
from bbfast.training._tally import Tally
from bbfast.training.callbacks import Callbacks, EpochInfo, StartInfo
from bbfast.training.checkpoint import Checkpoint, Checkpoints
from bbfast.training.device import Numerics, choose_numerics, placed, resolve_device
from bbfast.training.measure import measure
from bbfast.training.optim import Schedule, load_optimizer_state, make_optimizer, optimizer_state
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe
from bbfast.training.runtime import deterministic, forked_rng, keep_freed_memory, seed_generators
from bbfast.training.step import EagerStep, make_step

__all__ = ["TrainResult", "train"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training run gives.

    Args:
        model: The model that was passed in, trained in place, in eval mode.
        history: One row an epoch: epoch (from 0), loss (mean over batches), train_acc, lr (of the last step), seconds
            (training alone), what the program adds, and c_acc, asr, r_acc of the epochs in which the test sets were
            measured.
        seconds: The whole run, measuring and checkpoints included; also what a killed run before it took up to its
            checkpoint.
        seconds_per_epoch: Mean of the epochs' training time.
        device: Where it ran.
        precision: ``fp32``, ``bf16`` or ``fp16``, as chosen.
        channels_last: Memory layout, as chosen.
        resumed_at: Epochs that came from a checkpoint.
        earlier_seconds: What those took, of ``seconds``.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float
    seconds_per_epoch: float
    device: torch.device
    precision: str = "fp32"
    channels_last: bool = False
    resumed_at: int = 0
    earlier_seconds: float = 0.0


def train(
    model: nn.Module,
    train: ImageSet,
    recipe: Recipe,
    *,
    test: ImageSet | None = None,
    backdoor_test: ImageSet | None = None,
    seed: int = 0,
    device: torch.device | str = "auto",
    callbacks: Sequence[Any] = (),
    program: Program | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    description: str = "training",
) -> TrainResult:
    """Train a model, in place.

    The order of the samples and their augmentation depend on ``(seed, epoch)`` alone; the model's initial weights are
    the caller's. With ``recipe.deterministic`` the same call on the same machine with the same number of threads
    gives the same bits. A run with a ``checkpoint`` folder that is killed goes on when the same call, with the same
    initial weights, is made again, and ends with the same bits as one never interrupted (deterministic mode; else up
    to the device's noise).

    Args:
        model: Any module that takes normalised images ``[B, C, H, W]`` and gives logits ``[B, K]``.
        train: Training images with the labels to learn and the normalisation.
        recipe: How to train.
        test: Measured as C-Acc every ``recipe.eval_every`` epochs, in the precision of the training.
        backdoor_test: Measured as ASR, and as R-Acc if it is a :class:`~bbfast.data.imageset.BackdoorSet`.
        seed: Seed of order, augmentation, dropout and the program's draws.
        device: Where to train; the model stays there.
        callbacks: Objects with ``on_start(info)``, ``on_step(info)``, ``on_epoch_end(info)`` or ``on_end(info)``, see
            :mod:`bbfast.training.callbacks`.
        program: What happens within a step; None is plain supervised training.
        checkpoint: Folder for checkpoints, written at the ends of epochs, at most a twentieth of the time; None keeps
            none.
        progress: Progress bar; None shows one on a terminal.
        description: Text before the bar.

    Returns:
        The trained model and the history. With ``recipe.epochs`` 0 the weights are untouched.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``train`` is empty, labels exceed the model's outputs, images do not fit the model, or the
            device or precision cannot be had.
        DivergedError: if the loss stops being finite; its ``last_good`` has the weights before that.
        BBFastError: if deterministic mode meets an operation that has no deterministic form.
    """
    check_arguments(model, train, recipe, program, seed, test=test, backdoor_test=backdoor_test)
    hooks = Callbacks(callbacks)
    where = resolve_device(device)
    program = program if program is not None else Program()
    if len(train) == 1 and _has_batch_norm(model):
        raise ValueError("train must hold at least two images for a model with BatchNorm, got 1")
    model.to(where)
    numerics = choose_numerics(recipe.precision, recipe.channels_last, model, where)
    with contextlib.ExitStack() as stack:
        stack.enter_context(keep_freed_memory(where))
        stack.enter_context(forked_rng(where))
        stack.enter_context(deterministic(recipe.deterministic))
        stack.enter_context(placed(model, where, numerics.memory_format))
        train = train.to(where)
        test, backdoor_test = (None if images is None else images.to(where) for images in (test, backdoor_test))
        try:
            if program.classifies:
                check_fit(model, where, numerics, train=train, test=test, backdoor_test=backdoor_test)
            run = _Run(model, train, recipe, program, seed, where, numerics, checkpoint, hooks)
            try:
                return run.go(test, backdoor_test, progress, description)
            except DivergedError as error:
                error.last_good = run.last_good.weights
                raise
        except RuntimeError as error:
            if recipe.deterministic and "deterministic" in str(error):
                reason = str(error).split(". ")[0]
                raise BBFastError(f"deterministic=True cannot be kept: {reason}; use deterministic=False") from error
            raise
        finally:
            model.eval()
            for p in model.parameters():
                p.grad = None


class _Run:
    """One training run: the state that goes into a checkpoint, and the loops."""

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet,
        recipe: Recipe,
        program: Program,
        seed: int,
        device: torch.device,
        numerics: Numerics,
        checkpoint: str | Path | None,
        hooks: Callbacks,
    ) -> None:
        self.model, self.train, self.recipe, self.program = model, train, recipe, program
        self.seed, self.device, self.numerics, self.hooks = seed, device, numerics, hooks
        self.loader = BatchLoader(
            train,
            recipe.batch_size,
            seed=seed,
            device=device,
            # A program that changes images gets all their digits.
            dtype=numerics.dtype if type(program).make_batch is Program.make_batch else torch.float32,
            channels_last=numerics.channels_last,
            augment=recipe.augment and not program.augments_itself,
            padding=recipe.padding,
            flip=recipe.flip,
            drop_last=recipe.drop_last if program.drop_last is None else program.drop_last,
            merge_single=_has_batch_norm(model),
        )
        self.history: list[dict[str, Any]] = []
        self.earlier_seconds = 0.0
        self.last_good = LastGood()
        self.checkpoints = Checkpoints(checkpoint, self._identity() if checkpoint is not None else {})

    def go(
        self,
        test: ImageSet | None,
        backdoor_test: ImageSet | None,
        progress: bool | None,
        description: str,
    ) -> TrainResult:
        """Train from the start or from the checkpoint to the end."""
        started = time.perf_counter()
        epochs, steps = self.recipe.epochs, len(self.loader)
        self.hooks.start(StartInfo(self.model, self.train, test, backdoor_test, epochs, steps, self.device))
        if epochs:
            self._prepare(steps)
            first = self._resume()
            self.last_good.keep(self.model)
        else:
            first = 0
        with _progress.bar(description, epochs * steps, progress, done=first * steps) as bar:
            shown: dict[str, Any] = {}
            for epoch in range(first, epochs):
                row = self._epoch(epoch, bar)
                if self._measures(epoch):
                    row |= measure(self.model, test, backdoor_test, self.device, self.numerics)
                if epoch < epochs - 1:
                    self.last_good.keep(self.model)
                self.history.append(row)
                shown |= {"epoch": f"{epoch + 1}/{epochs}"} | {k: row[k] for k in ("loss", "c_acc", "asr") if k in row}
                bar.show(shown)
                _log.info("%s: %s", description, row)
                info = EpochInfo(epoch, epochs, self.model, row)
                self.hooks.epoch_end(info)
                if self.checkpoints.due(last=epoch == epochs - 1):
                    self._save(epoch + 1, self.earlier_seconds + time.perf_counter() - started)
            if self.history:
                self.hooks.end(EpochInfo(epochs - 1, epochs, self.model, self.history[-1]))
        times = [row["seconds"] for row in self.history]
        return TrainResult(
            model=self.model,
            history=self.history,
            seconds=self.earlier_seconds + time.perf_counter() - started,
            seconds_per_epoch=sum(times) / len(times) if times else 0.0,
            device=self.device,
            precision=self.numerics.precision,
            channels_last=self.numerics.channels_last,
            resumed_at=first,
            earlier_seconds=self.earlier_seconds,
        )

    def _prepare(self, steps: int) -> None:
        recipe = self.recipe
        self.optimizer = make_optimizer(self.model.parameters(), recipe)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule_start = self.program.schedule_start(recipe)
        if not 0 <= self.schedule_start <= recipe.epochs:
            raise ValueError(
                f"schedule_start of {type(self.program).__name__} must lie in 0..{recipe.epochs}, the recipe's epochs, "
                f"got {self.schedule_start}"
            )
        self.schedule = Schedule(recipe.replace(epochs=recipe.epochs - self.schedule_start), steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.numerics.dtype == torch.float16)
        runnable = self.model
        if recipe.compile:
            runnable = cast(nn.Module, torch.compile(self.model, dynamic=False))
        eager = EagerStep(runnable, self.program, self.numerics, self.device, self.scaler, self.parameters)
        self.step = make_step(recipe, eager)
        seed_generators(derive_seed("start", self.seed), self.device)
        self.program.optimizer = self.optimizer
        self.program.start(self.model, self.train, recipe, self.seed, self.device)

    def _epoch(self, epoch: int, bar: _progress.Bar) -> dict[str, Any]:
        started = time.perf_counter()
        seed_generators(derive_seed("epoch", self.seed, epoch), self.device)
        self.model.train()
        self.program.epoch_start(epoch, len(self.loader), self.loader.batch_size)
        tally = Tally(self.device)
        for batch in self.loader.epoch(epoch):
            self._set_lr(epoch, batch.step)
            self._train_on(batch, tally)
            bar.advance()
        row = {"epoch": epoch, **tally.result(), "lr": self.optimizer.param_groups[0]["lr"]}
        if not math.isfinite(row["loss"]):
            raise DivergedError(
                f"the training loss became {row['loss']} in epoch {epoch} (learning rate {row['lr']:g}, precision "
                f"{self.numerics.precision})",
                "lower lr, set clip_grad_norm, or use precision='fp32'",
            )
        if epoch >= self.schedule_start:
            self.schedule.epoch_done(row["loss"])
        row |= self.program.epoch_end(epoch, self.model)
        row["seconds"] = time.perf_counter() - started
        return row

    def _train_on(self, batch: Batch, tally: Tally) -> None:
        with torch.no_grad():
            batch = self.program.make_batch(batch)
        loss, logits = self.step(batch)
        tally.add(loss, logits, batch)
        self.scaler.unscale_(self.optimizer)
        self.program.after_backward(self.model)
        if self.recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.program.after_step(self.model)
        self.hooks.step(batch, loss, logits, self.model)

    def _set_lr(self, epoch: int, step: int) -> None:
        waiting = epoch < self.schedule_start
        lr = self.recipe.lr if waiting else self.schedule.lr(epoch - self.schedule_start, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _measures(self, epoch: int) -> bool:
        every = self.recipe.eval_every
        return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == self.recipe.epochs)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: recipe, seed, data, initial weights, program and number format."""
        return {
            "recipe": self.recipe.model_dump(),
            "seed": self.seed,
            "data": content_hash({"images": self.train.images, "labels": self.train.labels}),
            "normalisation": [self.train.mean, self.train.std],
            "initial_weights": content_hash(self.model.state_dict()),
            "program": self.program.describe(),
            "precision": self.numerics.precision,
            "device": self.device.type,
            # Only if there is any: what is kept of half a run would be worth nothing.
            **({"recording": kept} if (kept := self.hooks.describe()) else {}),
        }

    def _save(self, epochs_done: int, seconds: float) -> None:
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.optimizer),
            "program": self.program.state(),
            "recording": self.hooks.state(),
        }
        values = {"schedule": self.schedule.state(), "scaler": self.scaler.state_dict(), "seconds": seconds}
        self.checkpoints.write(Checkpoint(epochs_done, self.history, values, tensors))

    def _resume(self) -> int:
        found = self.checkpoints.find()
        if found is None:
            return 0
        self.model.load_state_dict(found.tensors["model"])
        load_optimizer_state(self.optimizer, found.tensors["optimizer"])
        self.program.load_state({name: value.to(self.device) for name, value in found.tensors["program"].items()})
        self.hooks.load_state(found.tensors["recording"])
        self.schedule.load_state(found.values["schedule"])
        self.scaler.load_state_dict(found.values["scaler"])
        self.history = list(found.history)
        self.earlier_seconds = found.values["seconds"]
        _log.info("going on after epoch %d of %d", found.epochs_done, self.recipe.epochs)
        return found.epochs_done


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())
