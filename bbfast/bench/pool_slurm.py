"""Stages as jobs of a Slurm cluster, through submitit."""

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

__all__ = ["SlurmPool"]

_PAUSE = 0.2
_SPARE_MINUTES = 5


class SlurmPool:
    """One job a stage; the runner stays up and submits what may begin.

    Every node must see the store under the same path. A job that is lost, preempted or ended by Slurm counts as lost.

    Args:
        root: The store; logs and job files lie in ``.bench/jobs``.
        workers: Jobs in the queue at once.
        limits: What one stage may use; both are asked of Slurm too, with five minutes to spare.
        cluster: ``slurm``, or ``local`` for processes of this machine.
        parameters: What submitit takes besides: ``slurm_partition``, ``gpus_per_node``. Stages are no array.
        work: What a job does with its stage.

    Raises:
        MissingExtraError: if submitit is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        workers: int = 64,
        limits: Limits | None = None,
        *,
        cluster: str = "slurm",
        parameters: Mapping[str, Any] | None = None,
        work: Work = perform,
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise MissingExtraError("the executor 'slurm'", "submitit", "slurm") from error
        self._limits, self._root, self._slots, self._work = limits or Limits(), str(root), workers, work
        self._executor = submitit.AutoExecutor(folder=str(Path(root) / ".bench" / "jobs"), cluster=cluster)
        asked: dict[str, Any] = {"name": "bbfast"}
        if self._limits.seconds is not None:
            asked["timeout_min"] = int(self._limits.seconds // 60) + _SPARE_MINUTES
        if self._limits.memory_gib is not None:
            asked["mem_gb"] = self._limits.memory_gib + 1
        self._executor.update_parameters(**{**asked, **(parameters or {})})
        self._busy: dict[str, tuple[Any, float]] = {}

    @property
    def free(self) -> int:
        return self._slots - len(self._busy)

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        forget_ended(self._root, key)
        job = self._executor.submit(
            _perform, self._work, key, dict(task), self._root, self._limits.seconds, self._limits.memory_gib
        )
        self._busy[key] = (job, time.monotonic())

    def wait(self, timeout: float) -> Sequence[Ended]:
        deadline = time.monotonic() + timeout
        while True:
            over = [key for key, (job, _) in self._busy.items() if job.done()]
            if over or time.monotonic() >= deadline:
                return [self._take(key) for key in over]
            time.sleep(_PAUSE)

    def close(self) -> None:
        for job, _ in self._busy.values():
            job.cancel()
        self._busy.clear()

    def _take(self, key: str) -> Ended:
        job, began = self._busy.pop(key)
        try:
            return Ended(key, job.result())
        except Exception as error:  # submitit's own, or whatever the job's process died of
            spent = time.monotonic() - began
            reason = ended_reason(self._root, key)
            if reason is not None:
                return Ended(key, Outcome("failed", reason=reason, seconds=spent))
            said = " ".join(f"its job {job.job_id} was lost: {type(error).__name__}".split())
            return Ended(key, Outcome("failed", reason=said, seconds=spent), lost=True)


def _perform(
    work: Work, key: str, task: Mapping[str, Any], root: str, seconds: float | None, memory_gib: float | None
) -> Outcome:
    with Watch(root, key, memory_gib, seconds) as watch:
        return watch.measured(work(task, root, Memory()))
