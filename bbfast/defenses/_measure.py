"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """``bytes`` is set when the block ends: most memory allocated on CUDA, growth of the resident set on the CPU."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block; on the CPU relative to the start of the block."""
    measured = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield measured
        torch.cuda.synchronize(device)
        measured.bytes = torch.cuda.max_memory_allocated(device)
        return
    # Linux can start the high-water mark anew; elsewhere a block that stays below an earlier peak measures 0.
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    before = _resident()
    yield measured
    measured.bytes = max(_high_water() - before, 0)


def _resident() -> int:
    return _status("VmRSS") or _high_water()


def _high_water() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    """A size of ``/proc/self/status`` in bytes; 0 where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
