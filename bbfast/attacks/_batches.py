"""What attacks share that poison the batches as they are made (WaNet, BPP, Input-Aware; spec/attacks 0.6).

The first samples of each shuffled batch are poisoned, the next ones are cross samples, the rest is left alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from bbfast.attacks.base import Attack, AttackConfig
from bbfast.attacks.poisoning import LabelRule, PoisonedSet, Role, draw_index
from bbfast.attacks.randomness import integers, make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = [
    "BatchAttack",
    "BatchConfig",
    "BatchProgram",
    "first_of_each_batch",
    "other_rows",
    "poisoned_of",
    "truncated",
]

_CHUNK = 4096


class BatchConfig(AttackConfig):
    """Settings of attacks that poison a share of each batch."""

    @model_validator(mode="after")
    def _check_ratio(self) -> BatchConfig:
        if self.count is not None or self.ratio is None:
            raise ValueError("the attack poisons a share of each batch: give ratio, not count")
        return self


class BatchAttack(Attack):
    """An attack with poisoned and cross samples in each batch: their numbers, the exported set, the cross test set."""

    @abstractmethod
    def counts(self, batch: int, draw: float) -> tuple[int, int]:
        """Poisoned and cross samples of a batch of this size; ``draw`` is its uniform number in [0, 1)."""

    @abstractmethod
    def cross_count(self, poison: int, total: int) -> int:
        """Cross samples of an exported set of ``total`` samples, ``poison`` of them poisoned."""

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        poison = self._select_poison(labels, rule, seed)
        free = torch.ones_like(labels, dtype=torch.bool)
        free[poison] = False
        candidates = free.nonzero().flatten()
        wanted = self.cross_count(len(poison), len(labels))
        if self.config.count is None:
            # The shares were checked to fit; what can be too much by then is the rounding of the first.
            wanted = min(wanted, len(candidates))
        elif wanted > len(candidates):
            raise ValueError(
                f"{self.name}: {len(poison)} poisoned samples ask for {wanted} cross samples, but {len(candidates)} "
                f"are left"
            )
        return poison, draw_index(candidates, wanted, derive_seed("cross", seed) % 2**32, self.config.index_rng)

    def export_train(self, train: ImageSet, seed: int, num_classes: int, batch_size: int) -> PoisonedSet:
        if self.config.compat == "paper":
            return self.poison(train, seed, num_classes)
        rule = self.rule(train.labels, num_classes)
        self.prepare(train, num_classes, seed)
        key = make_key(f"{self.name} export", seed)
        poison, cross = first_of_each_batch(len(train), batch_size, key, self.counts)
        return self._materialise(train, rule, poison.to(train.device), cross.to(train.device))

    def extra_tests(self, test: ImageSet, seed: int = 0, num_classes: int | None = None) -> dict[str, ImageSet]:
        """``cross_acc``: every test image as a cross sample, true labels; it should stay near C-Acc."""
        self._make_ready(test, seed)
        rows = torch.arange(len(test), device=test.device)
        images = torch.cat([self.cover_rows(test, part, "test") for part in rows.split(_CHUNK)])
        cross = ImageSet(images, test.labels, mean=test.mean, std=test.std, ids=test.ids)
        return {**super().extra_tests(test, seed, num_classes), "cross_acc": cross}

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        """MultiStep at 100, 200, 300, 400: with the 100 epochs of the protocol a constant rate."""
        return {"schedule": "multistep", "milestones": (100, 200, 300, 400), "gamma": 0.1}


class BatchProgram(Program):
    """How many samples of each batch are poisoned, drawn on the host for a whole epoch: no step waits for the device.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    drop_last = False
    attack: BatchAttack

    def __init__(self, attack: BatchAttack, rule: LabelRule) -> None:
        self.attack, self.rule = attack, rule
        self.draws: list[float] = []

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config), "rule": repr(self.rule)}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self.draws = uniform(make_key(f"{self.attack.name} count", self.seed, epoch), torch.arange(steps)).tolist()

    def roles(self, batch: Batch) -> tuple[int, int, Tensor, Tensor]:
        """Number of poisoned and of cross samples, labels ``[B]`` and roles int8 ``[B]`` of a batch."""
        poison, cross = self.attack.counts(len(batch), self.draws[batch.step])
        role = torch.zeros(len(batch), dtype=torch.int8, device=batch.y.device)
        role[:poison], role[poison : poison + cross] = int(Role.POISON), int(Role.CROSS)
        labels = batch.y.clone()
        labels[:poison] = self.rule.given(labels[:poison])
        return poison, cross, labels, role


def poisoned_of(ratio: float, batch: int, draw: float) -> int:
    """Poisoned samples of a batch.

    ``int(ratio * batch)`` as the reference has it (10 % of 128 is 12), or, if the product is below 1, one sample with
    that probability.

    Args:
        ratio: Share of poisoned samples.
        batch: Size of the batch.
        draw: Uniform number in [0, 1) of this step.
    """
    expected = ratio * batch
    return int(expected) if expected >= 1 else int(draw < expected)


def first_of_each_batch(
    total: int, batch_size: int, key: int, counts: Callable[[int, float], tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Positions of the poisoned and the cross samples of one unshuffled pass, as the reference exports them.

    Args:
        total: Size of the training set.
        batch_size: Samples a batch.
        key: Key of the draws, from :func:`bbfast.attacks.randomness.make_key`.
        counts: Poisoned and cross samples of a batch, from its size and its draw.

    Returns:
        int64 ``[P]`` and int64 ``[Q]``.
    """
    starts = range(0, total, batch_size)
    draws = uniform(key, torch.arange(len(starts))).tolist()
    poison, cross = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for start, draw in zip(starts, draws, strict=True):
        n, m = counts(min(batch_size, total - start), draw)
        poison.append(torch.arange(start, start + n))
        cross.append(torch.arange(start + n, start + n + m))
    return torch.cat(poison), torch.cat(cross)


def other_rows(rows: Tensor, total: int, key: int, index: Tensor) -> Tensor:
    """For each of ``rows`` another position of the same set of ``total`` samples (itself if there is only one).

    Args:
        rows: Positions, int64 ``[B]``.
        total: Size of the set.
        key: From :func:`bbfast.attacks.randomness.make_key`.
        index: Sample numbers that the draw derives from, int64 ``[B]``.
    """
    step = integers(key, index, (), 0, max(total - 2, 0))
    return (rows + 1 + step) % max(total, 1)


def truncated(normalised: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 of normalised images as the reference stores them: denormalised, times 255, cut off.

    Denormalising divides by ``1 / std``: with that order of operations the result is the reference's bit for bit.

    Args:
        normalised: float ``[B, C, H, W]``.
        mean: float ``[C, 1, 1]``.
        std: float ``[C, 1, 1]``.
    """
    inverse = std.double().reciprocal().float()
    return ((normalised / inverse + mean) * 255).clamp(0, 255).to(torch.uint8)
