"""Where stages are done: one interface for all executors, and the one of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from bbfast._lock import waits_told
from bbfast.bench.grid import Limits
from bbfast.bench.outcomes import Outcome
from bbfast.bench.watch import Clock, resident, too_much
from bbfast.bench.work import Memory, perform

__all__ = ["Ended", "LocalPool", "Pool", "Work"]

Work = Callable[[Mapping[str, Any], str, Memory], Outcome]
"""What a worker does with a stage; :func:`bbfast.bench.work.perform` unless a test says otherwise."""

_POLL = 0.5
_HEADROOM = 1.25
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Ended:
    """A stage that is over.

    Args:
        key: Of the stage.
        outcome: How it ended.
        lost: Its worker died under it, for no reason that is known to be the stage's own.
    """

    key: str
    outcome: Outcome
    lost: bool = False


class Pool(Protocol):
    """Workers that do stages."""

    @property
    def free(self) -> int:
        """How many stages it would take now."""

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        """Begin a stage; only while :attr:`free` is not 0."""

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Stages that are over, after at most ``timeout`` seconds."""

    def close(self) -> None:
        """End all workers at once; what they were doing goes on from its checkpoints another time."""


class LocalPool:
    """Worker processes on this machine.

    Each takes one stage after another and keeps the last data set and attack in memory. A stage that takes longer, or
    more memory, than the limits say is ended with its process; another takes its place. Workers end when the runner
    does, however that ends.

    Args:
        root: The store.
        workers: Number of processes.
        limits: What one stage may use.
        threads: Threads of torch in each; None divides those that torch has in this process (``OMP_NUM_THREADS``).
        devices: Device of each worker, in turn, where a stage's is ``auto``; None leaves it so.
        work: What a worker does with a stage; a function that can be imported.
    """

    def __init__(
        self,
        root: str | Path,
        workers: int,
        limits: Limits | None = None,
        *,
        threads: int | None = None,
        devices: Sequence[str] | None = None,
        work: Work = perform,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self._context = multiprocessing.get_context("spawn")
        self._limits = limits or Limits()
        import torch

        threads = threads or max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))) // workers)
        self._arguments = [
            (str(root), threads, devices[i % len(devices)] if devices else None, work) for i in range(workers)
        ]
        self._workers: list[_Worker | None] = [None] * workers
        self._largest = 0

    @property
    def free(self) -> int:
        """Workers without a stage; 0 while what is running leaves too little memory for another of its size."""
        busy = [worker for worker in self._workers if worker is not None and worker.key is not None]
        if busy and _available() < _HEADROOM * max(self._largest, *(worker.peak for worker in busy)):
            return 0
        return len(self._workers) - len(busy)

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        """Begin a stage, with the worker that did its attack or another of its defenses if that one is free."""
        places = [i for i, worker in enumerate(self._workers) if worker is None or worker.key is None]
        if not places:
            raise RuntimeError("no worker is free")
        near = task.get("parent")
        places.sort(key=lambda i: self._rank(i, near))
        worker = self._workers[places[0]]
        if worker is None or not worker.process.is_alive():
            worker = self._start(places[0])
        worker.begin(key, task)

    def wait(self, timeout: float) -> Sequence[Ended]:
        busy = [worker for worker in self._workers if worker is not None and worker.key is not None]
        wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy], min(timeout, _POLL))
        ended = [self._look(i) for i in range(len(self._workers))]
        return [each for each in ended if each is not None]

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.end()
        self._workers = [None] * len(self._workers)

    def _rank(self, i: int, near: object) -> int:
        worker = self._workers[i]
        return 2 if worker is None else 0 if near is not None and worker.last == near else 1

    def _start(self, i: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, os.getpid(), *self._arguments[i]), daemon=True)
        with _no_interrupts():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers[i] = worker
        return worker

    def _look(self, i: int) -> Ended | None:
        """What has become of worker ``i``'s stage."""
        worker = self._workers[i]
        if worker is None or worker.key is None:
            return None
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                said = worker.pipe.recv()
                if said is None:
                    worker.clock.start()  # it has the stage; before that it may have been starting
                elif isinstance(said, bool):
                    worker.clock.waits(said)
                else:
                    outcome, worker.last = said
                    return worker.finish(outcome)
        spent, memory = worker.clock.spent(), resident(worker.process.pid)
        worker.peak = max(worker.peak, memory)
        self._largest = max(self._largest, memory)
        reason, lost = too_much(spent, memory, self._limits.seconds, self._limits.memory_gib), False
        if not worker.process.is_alive():
            reason, lost = f"its worker ended with {_exit(worker.process.exitcode)}", True
        if not reason:
            return None
        worker.end()
        self._workers[i] = None
        return dataclasses.replace(worker.finish(Outcome("failed", reason=reason)), lost=lost)


class _Worker:
    """One process and what it is doing."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.key: str | None = None
        self.last: str | None = None
        self.peak = 0
        self.clock = Clock()

    def begin(self, key: str, task: Mapping[str, Any]) -> None:
        self.key, self.clock, self.peak = key, Clock(), 0
        with contextlib.suppress(OSError):  # it has just died: the next look says so
            self.pipe.send(dict(task))

    def finish(self, outcome: Outcome) -> Ended:
        assert self.key is not None
        key, self.key = self.key, None
        peak = max(self.peak, outcome.peak_memory)
        return Ended(key, dataclasses.replace(outcome, seconds=self.clock.spent(), peak_memory=peak))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """What is started in the block never hears Ctrl-C, not even while it imports; here it is heard after the block."""
    # The helper that multiprocessing starts with the first process would open the signal again: it is started before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, runner: int, root: str, threads: int, device: str | None, work: Work) -> None:
    """A worker's life: take a stage, do it, say when it begins, waits for others, and how it ended."""
    # Ctrl-C reaches every process of a terminal; what becomes of the workers is the runner's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(runner)
    import torch

    torch.set_num_threads(threads)
    memory = Memory()
    with contextlib.suppress(EOFError, OSError), waits_told(pipe.send):
        while True:
            task = pipe.recv()
            pipe.send(None)
            if device is not None and task["spec"].get("device") == "auto":
                task = {**task, "spec": {**task["spec"], "device": device}}
            outcome = work(task, root, memory)
            pipe.send((outcome, outcome.folder if task["kind"] == "attack" else task.get("parent")))


def _die_with(runner: int) -> None:
    """On Linux a worker must not outlive a runner that was killed: it would hold locks for a run that nobody wants."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner:
            os._exit(1)


def _available() -> float:
    """Memory of this machine that is free or can be made so, in bytes; infinity where it cannot be known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"status {code}"
