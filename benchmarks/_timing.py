"""What every benchmark script shares: the machine's description, repeated timing, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["copy_bandwidth", "header", "repeat", "summary", "synchronize", "write_json"]


def header(device: torch.device) -> dict[str, Any]:
    """The facts that figures depend on; printed first and written into the JSON file."""
    import bbfast
    from bbfast.ops import status

    facts: dict[str, Any] = {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bbfast": bbfast.__version__,
        "native": status().cpu,
        "native_cuda": status().cuda,
    }
    if status().cpu:
        from bbfast import _C

        build = _C.build_info()
        facts |= {"simd": build["simd"], "compiler": build["compiler"], "cuda_build": build["cuda"]}
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat(call: Callable[[], object], device: torch.device, repeats: int, budget: float = 2.0) -> list[float]:
    """Seconds of each of ``repeats`` timings of ``call``, after a warm-up outside the timed part.

    A timing runs ``call`` as often as it takes to fill ``budget / repeats`` seconds (once at least), and is divided
    by that.
    """
    for _ in range(3):
        call()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - begin, 1e-7)
    loops = max(1, int(budget / repeats / once))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(loops):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / loops)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, and the quartiles as the spread."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": statistics.median(seconds), "q1": quartiles[0], "q3": quartiles[2]}


def copy_bandwidth(device: torch.device, bytes_moved: int = 64 << 20) -> float:
    """Bytes a second that a plain tensor copy reads and writes together: the measure of memory-bound operations."""
    source = torch.ones(bytes_moved // 2 // 4, device=device)
    target = torch.empty_like(source)
    seconds = summary(repeat(lambda: target.copy_(source), device, repeats=20))["median"]
    return 2 * source.numel() * source.element_size() / seconds


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path``; nothing without a path."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
