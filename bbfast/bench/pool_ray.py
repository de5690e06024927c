"""Stages on a Ray cluster, or on a laptop that plays one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast.bench.grid import Limits
from bbfast.bench.outcomes import Outcome
from bbfast.bench.pool import Ended, Work
from bbfast.bench.watch import Watch, ended_reason, forget_ended
from bbfast.bench.work import Memory, perform
from bbfast.errors import MissingExtraError

__all__ = ["RayPool"]


class RayPool:
    """Ray actors that take one stage after another; each keeps the last data set and attack in memory.

    Every machine of the cluster must see the store under the same path. A stage whose actor dies, or whose machine
    goes, counts as lost and is begun elsewhere.

    Args:
        root: The store.
        workers: Number of actors; None is what the cluster's CPUs, or GPUs, allow.
        limits: What one stage may use, watched by the actor itself.
        gpus: GPUs of each actor; a fraction lets several share one.
        cpus: CPUs of each actor.
        address: Of the cluster; None is the one that ``RAY_ADDRESS`` names, or a new one on this machine.
        work: What an actor does with a stage.

    Raises:
        MissingExtraError: if Ray is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        workers: int | None = None,
        limits: Limits | None = None,
        *,
        gpus: float = 0.0,
        cpus: float = 1.0,
        address: str | None = None,
        work: Work = perform,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("the executor 'ray'", "Ray", "ray") from error
        self._ray: Any = ray
        self._limits, self._root, self._work = limits or Limits(), str(root), work
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        whole = ray.cluster_resources()
        fits = [int(whole.get(kind, 0) / share) for kind, share in (("CPU", cpus), ("GPU", gpus)) if share]
        self._slots = workers or max(1, min(fits, default=1))
        self._actor: Any = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        self._threads = max(1, int(cpus))
        self._idle: list[tuple[Any, str | None]] = []
        self._busy: dict[Any, _Job] = {}

    @property
    def free(self) -> int:
        return self._slots - len(self._busy)

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        forget_ended(self._root, key)
        near = task.get("parent")
        self._idle.sort(key=lambda each: each[1] == near)
        actor = self._idle.pop()[0] if self._idle else self._actor.remote(self._threads, self._limits)
        call = actor.perform.remote(self._work, key, dict(task), self._root)
        self._busy[call] = _Job(key, actor, near)

    def wait(self, timeout: float) -> Sequence[Ended]:
        ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        return [self._take(call) for call in ready]

    def close(self) -> None:
        for actor in [*(job.actor for job in self._busy.values()), *(each for each, _ in self._idle)]:
            self._ray.kill(actor)
        self._busy.clear()
        self._idle.clear()
        if self._mine:
            self._ray.shutdown()

    def _take(self, call: Any) -> Ended:
        job = self._busy.pop(call)
        try:
            outcome = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            spent = time.monotonic() - job.began
            reason = ended_reason(self._root, job.key)
            if reason is not None:
                return Ended(job.key, Outcome("failed", reason=reason, seconds=spent))
            said = f"its worker was lost: {type(error).__name__}"
            return Ended(job.key, Outcome("failed", reason=said, seconds=spent), lost=True)
        self._idle.append((job.actor, outcome.folder if job.near is None else job.near))
        return Ended(job.key, outcome)


class _Job:
    def __init__(self, key: str, actor: Any, near: Any) -> None:
        self.key, self.actor, self.near, self.began = key, actor, near, time.monotonic()


class _Actor:
    """A worker's life, one stage at a time."""

    def __init__(self, threads: int, limits: Limits) -> None:
        import torch

        torch.set_num_threads(threads)
        self._memory, self._limits = Memory(), limits

    def perform(self, work: Work, key: str, task: Mapping[str, Any], root: str) -> Outcome:
        with Watch(root, key, self._limits.memory_gib, self._limits.seconds) as watch:
            return watch.measured(work(task, root, self._memory))
