"""Process-wide settings that training needs, each put back afterwards: determinism, random state, memory reuse."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

__all__ = ["deterministic", "forked_rng", "keep_freed_memory", "seed_generators"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_GIB = 1 << 30
# Whether a block of keep_freed_memory is open: one within it (a prediction while training) must not end it.
_keeping: contextvars.ContextVar[bool] = contextvars.ContextVar("bbfast_keeping_memory", default=False)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Deterministic kernels only (``enabled``) or the fastest ones; torch's flags as they were afterwards.

    cuBLAS reads its workspace setting when it is first used in a process: set ``CUBLAS_WORKSPACE_CONFIG=:4096:8``
    before starting Python if something else uses the GPU first (torch raises an error that says so).
    """
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose attribute is a property
    fill = settings.fill_uninitialized_memory
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    try:
        if enabled:
            os.environ.setdefault(_CUBLAS, ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Filling every new tensor finds reads of uninitialised memory; it changes no result and costs time.
            settings.fill_uninitialized_memory = False
            cudnn.deterministic, cudnn.benchmark = True, False
        else:
            cudnn.benchmark = True
        yield
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        settings.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


@contextlib.contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Torch's global random state of the CPU and of ``device`` as it was, after the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of ``device``, no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Let the C allocator keep what a training step frees, for the next step.

    By default glibc maps every large activation anew and hands it back when it is freed, so a step on the CPU spends a
    tenth (bf16) to a third (float32) of its time in page faults. Within the block freed memory stays with the process;
    afterwards it is returned and the thresholds are where glibc's own adaptation ends after freeing one large block
    (32 MiB and twice that). Does nothing for other devices and other C libraries.
    """
    mallopt = _glibc_function("mallopt") if device.type == "cpu" and not _keeping.get() else None
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _GIB):
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1)
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        trim = _glibc_function("malloc_trim")
        if trim is not None:
            trim(0)


def _glibc_function(name: str) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    # musl has neither function nor the version string; other allocators (jemalloc) shadow malloc but not these.
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, name):
        return None
    return getattr(libc, name)
