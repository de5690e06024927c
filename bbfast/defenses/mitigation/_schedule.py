"""Neural Cleanse's bookkeeping for all classes at once: cost, counters and early stopping as vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

__all__ = ["CostSchedule"]

_DOWN_POWER = 1.5


@dataclasses.dataclass(eq=False)
class CostSchedule:
    """Weight of the mask's size in each class's loss, and when the class is finished; all vectors ``[K]`` on the CPU.

    After every pass over the images each class reports its success rate and mask size. Success for ``patience`` passes
    in a row doubles its cost (times ``multiplier``), failure for as many divides it by ``multiplier ** 1.5``. Once the
    cost has gone both ways and the best size has not fallen by 1 % for ``early_stop_patience`` passes, the class is
    finished.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section V-A and its public code; as in BackdoorBench
    ``defense/nc.py``.
    """

    cost: Tensor
    best: Tensor
    prev_best: Tensor
    up: Tensor
    down: Tensor
    zero: Tensor
    stop: Tensor
    up_flag: Tensor
    down_flag: Tensor
    done: Tensor
    passes: Tensor
    init_cost: float
    asr_threshold: float
    patience: int
    multiplier: float
    early_stop_threshold: float
    early_stop_patience: int

    @classmethod
    def start(
        cls,
        classes: int,
        *,
        init_cost: float,
        asr_threshold: float,
        patience: int,
        multiplier: float,
        early_stop_threshold: float,
        early_stop_patience: int,
    ) -> CostSchedule:
        """The state before the first pass."""
        count = torch.zeros(classes, dtype=torch.int64)
        no = torch.zeros(classes, dtype=torch.bool)
        inf = torch.full((classes,), torch.inf, dtype=torch.float64)
        return cls(
            cost=torch.full((classes,), init_cost, dtype=torch.float64),
            best=inf.clone(),
            prev_best=inf.clone(),
            up=count.clone(),
            down=count.clone(),
            zero=count.clone(),
            stop=count.clone(),
            up_flag=no.clone(),
            down_flag=no.clone(),
            done=no.clone(),
            passes=count.clone(),
            init_cost=init_cost,
            asr_threshold=asr_threshold,
            patience=patience,
            multiplier=multiplier,
            early_stop_threshold=early_stop_threshold,
            early_stop_patience=early_stop_patience,
        )

    def update(self, acc: Tensor, reg: Tensor) -> Tensor:
        """Take the result of one pass of the unfinished classes; entries of finished ones are ignored.

        Args:
            acc: Success rate, 0..1, ``[K]``.
            reg: Size of the mask, ``[K]``.

        Returns:
            bool ``[K]``: whose mask of this pass is its best so far.
        """
        live = ~self.done
        acc, reg = acc.double(), reg.double()
        success = acc >= self.asr_threshold
        better = live & success & (reg < self.best)
        self.best = torch.where(better, reg, self.best)
        flat = self.best >= self.early_stop_threshold * self.prev_best
        have = live & self.best.isfinite()
        self.stop = torch.where(have, torch.where(flat, self.stop + 1, 0), self.stop)
        self.prev_best = torch.minimum(self.prev_best, self.best)
        self.passes += live
        # The test stands before this pass changes the cost, and a class that is finished keeps its cost.
        self.done = self.done | (live & self.up_flag & self.down_flag & (self.stop >= self.early_stop_patience))
        self._adjust(~self.done, success)
        return better

    def _adjust(self, live: Tensor, success: Tensor) -> None:
        self._leave_zero(live, success)
        self.up = torch.where(live, torch.where(success, self.up + 1, 0), self.up)
        self.down = torch.where(live, torch.where(success, 0, self.down + 1), self.down)
        raised, lowered = live & (self.up >= self.patience), live & (self.down >= self.patience)
        self.cost = torch.where(raised, self.cost * self.multiplier, self.cost)
        self.cost = torch.where(lowered, self.cost / self.multiplier**_DOWN_POWER, self.cost)
        self.up, self.down = self.up.masked_fill(raised, 0), self.down.masked_fill(lowered, 0)
        self.up_flag, self.down_flag = self.up_flag | raised, self.down_flag | lowered

    def _leave_zero(self, live: Tensor, success: Tensor) -> None:
        """A cost of 0 becomes positive after ``patience`` successful passes in a row; counters and flags start anew."""
        at_zero = live & (self.cost == 0)
        self.zero = torch.where(at_zero & success, self.zero + 1, 0)
        leave = at_zero & (self.zero >= self.patience)
        self.cost = self.cost.masked_fill(leave, self.init_cost or 1e-3)
        for name in ("up", "down", "zero"):
            setattr(self, name, getattr(self, name).masked_fill(leave, 0))
        self.up_flag, self.down_flag = self.up_flag & ~leave, self.down_flag & ~leave

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, tensors: dict[str, Any]) -> None:
        """Take back what :meth:`tensors` gave."""
        for name in self.tensors():
            setattr(self, name, tensors[name].clone())
