"""The workers of a run by the executor's name."""

from __future__ import annotations

import os
from pathlib import Path

from bbfast.bench.plan import Plan
from bbfast.bench.pool import LocalPool, Pool

__all__ = ["EXECUTORS", "local_pool", "make_pool"]

EXECUTORS = ("local", "ray", "slurm")


def local_pool(root: str | Path, plan: Plan, workers: int | None = None) -> LocalPool:
    """Workers of this machine: one a GPU, or one a core with one thread each where there is none.

    Args:
        root: The store.
        plan: What will be run; its grid has the device and the limits.
        workers: Number of processes instead.
    """
    import torch

    gpus = torch.cuda.device_count() if plan.grid.device == "auto" else 0
    devices = [f"cuda:{i}" for i in range(gpus)] or None
    return LocalPool(
        root,
        workers or gpus or len(os.sched_getaffinity(0)),
        plan.grid.limits,
        devices=devices,
    )


def make_pool(executor: str, root: str | Path, plan: Plan, workers: int | None = None, gpus: float = 0.0) -> Pool:
    """The workers that will run ``plan``.

    Args:
        executor: ``local``; ``ray``: the cluster that RAY_ADDRESS names, or one on this machine; ``slurm``.
        root: The store.
        plan: What will be run; its grid has the device and the limits.
        workers: How many at once; None is what there is, 64 jobs for Slurm.
        gpus: GPUs of each worker, for Ray and Slurm; Ray takes fractions.

    Raises:
        ValueError: if there is no such executor, or Slurm is asked for a part of a GPU.
        BBFastError: if what it needs is not installed.
    """
    if executor == "local":
        return local_pool(root, plan, workers)
    # Relative paths would mean something else on another machine.
    root, limits = Path(root).resolve(), plan.grid.limits
    if executor == "ray":
        from bbfast.bench.pool_ray import RayPool

        return RayPool(root, workers, limits, gpus=gpus)
    if executor == "slurm":
        from bbfast.bench.pool_slurm import SlurmPool

        if gpus != int(gpus):
            raise ValueError(f"gpus must be a whole number for slurm, got {gpus:g}")
        return SlurmPool(root, workers or 64, limits, parameters={"gpus_per_node": int(gpus)} if gpus else None)
    raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
