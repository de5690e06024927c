"""The workers of a run by the executor's name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast.bench.plan import Plan
from bbfast.bench.pool import Ended, LocalPool, Pool

__all__ = ["EXECUTORS", "local_pool", "make_pool"]

EXECUTORS = ("local", "ray", "slurm")


def local_pool(root: str | Path, plan: Plan, workers: int | None = None) -> LocalPool:
    """Workers of this machine: one a GPU, or one a core with one thread each where there is none.

    A grid whose device is one GPU (``cuda``, ``cuda:1``) gets one worker.

    Args:
        root: The store.
        plan: What will be run; its grid has the device and the limits.
        workers: Number of processes instead.
    """
    import torch

    device = plan.grid.device
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "auto" else []
    own = len(devices) or (1 if device.startswith("cuda") else len(os.sched_getaffinity(0)))
    return LocalPool(root, workers or own, plan.grid.limits, devices=devices or None)


def make_pool(executor: str, root: str | Path, plan: Plan, workers: int | None = None, gpus: float = 0.0) -> Pool:
    """The workers that will run ``plan``.

    Args:
        executor: ``local``; ``ray``: the cluster that RAY_ADDRESS names, or one on this machine; ``slurm``.
        root: The store.
        plan: What will be run; its grid has the device and the limits.
        workers: How many at once; None is what there is, 64 jobs for Slurm.
        gpus: GPUs of each worker, for Ray and Slurm; Ray takes fractions.

    Relative paths of data sets are taken from here, as the store's is: on another machine they would mean something
    else.

    Raises:
        ValueError: if there is no such executor, Slurm is asked for a part of a GPU, or local workers for any.
        BBFastError: if what it needs is not installed.
    """
    if executor == "local":
        if gpus:
            raise ValueError(
                f"gpus is for ray and slurm, got {gpus:g} with local, which has a worker for each GPU it sees; choose "
                "them with CUDA_VISIBLE_DEVICES, or their number with workers"
            )
        return local_pool(root, plan, workers)
    root, limits = Path(root).resolve(), plan.grid.limits
    if executor == "ray":
        from bbfast.bench.pool_ray import RayPool

        return _Elsewhere(RayPool(root, workers, limits, gpus=gpus))
    if executor == "slurm":
        from bbfast.bench.pool_slurm import SlurmPool

        if gpus != int(gpus):
            raise ValueError(f"gpus must be a whole number for slurm, got {gpus:g}")
        parameters = {"gpus_per_node": int(gpus)} if gpus else None
        return _Elsewhere(SlurmPool(root, workers or 64, limits, parameters=parameters))
    raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")


class _Elsewhere:
    """A pool of other machines: stages are given to it with the whole path of their data.

    Keys of stages keep the path as the grid has it, so that where a run was begun does not decide what is done.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def free(self) -> int:
        return self._pool.free

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        data = task["spec"]["data"]
        if data["root"] is not None:
            data = {**data, "root": str(Path(data["root"]).expanduser().resolve())}
        self._pool.submit(key, {**task, "spec": {**task["spec"], "data": data}})

    def wait(self, timeout: float) -> Sequence[Ended]:
        return self._pool.wait(timeout)

    def close(self) -> None:
        self._pool.close()
