"""``bbfast doctor``: whether this machine has what bbfast wants, and what to do where it has not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from bbfast._version import __version__
from bbfast.cli._frame import FAILED, command, emit_json, screen
from bbfast.cli._options import Json

__all__ = ["Finding", "examine", "register"]

_NEEDED = (
    "numpy",
    "scipy",
    "scikit-learn",
    "pydantic",
    "typer",
    "rich",
    "PyYAML",
    "safetensors",
    "jinja2",
    "matplotlib",
)
_EXTRAS = {"analysis": "umap-learn", "ray": "ray", "slurm": "submitit", "query": "duckdb"}
_LITTLE = 1.0  # GiB of free space below which a larger run is likely to fail
_BUILD = "reinstall bbfast with a C++20 compiler and CMake at hand: pip install --no-build-isolation ."


class Finding(NamedTuple):
    """One line of the examination: ``state`` is ``ok``, ``note``, ``warn`` (slower or less) or ``fail`` (broken)."""

    topic: str
    state: str
    value: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    @command(app, "doctor", examples="bbfast doctor\nbbfast doctor --json")
    def doctor(json: Json = False) -> None:
        """Examine this installation and machine, and say what to do about what is missing.

        Ends with status 1 if something is broken; what is merely slower or absent by choice is not.
        """
        findings = examine()
        if json:
            emit_json([finding._asdict() for finding in findings])
        else:
            screen().print(_table(findings))
        if any(finding.state == "fail" for finding in findings):
            raise typer.Exit(FAILED)


def examine() -> list[Finding]:
    """Every finding, in the order in which they are shown."""
    findings = [Finding("bbfast", "ok", f"{__version__} in {Path(__file__).parents[1]}"), _python()]
    for check in (_torch, _packages, _native, _cuda, _processor, _places, _extras):
        findings.extend(_guarded(check))
    return findings


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """One check that breaks is a finding, not the end of the examination."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(
            check.__name__.strip("_"),
            "fail",
            f"{type(error).__name__}: {error}"[:300],
            "this check could not be finished",
        )


def _python() -> Finding:
    ok = sys.version_info >= (3, 10)
    remedy = "" if ok else "bbfast needs Python 3.10 or newer"
    return Finding(
        "python",
        "ok" if ok else "fail",
        f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        remedy,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    if _version("torch") is None:
        yield Finding("torch", "fail", "not installed", "pip install torch torchvision")
        return
    import torch

    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10)
    yield Finding(
        "torch",
        "warn" if old else "ok",
        torch.__version__,
        "the native operations need torch 2.10 or newer" if old else "",
    )
    try:
        import torchvision
    except Exception as error:
        # torchvision is built for one torch version; beside another its import breaks in many ways.
        yield Finding(
            "torchvision",
            "fail",
            f"cannot be imported: {error}"[:200],
            "install the torchvision that belongs to this torch",
        )
    else:
        yield Finding("torchvision", "ok", torchvision.__version__)


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in _NEEDED}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("packages", "fail" if missing else "ok", found, f"pip install {' '.join(missing)}" if missing else "")


def _native() -> Iterator[Finding]:
    if importlib.util.find_spec("bbfast._C") is None:
        yield Finding("native operations", "warn", "not built: the PyTorch reference runs instead, slower", _BUILD)
        return
    try:
        info: dict[str, Any] = importlib.import_module("bbfast._C").build_info()
    except Exception as error:
        yield Finding("native operations", "fail", f"cannot be loaded: {error}"[:200], _BUILD)
        return
    yield Finding("native operations", "ok", ", ".join(f"{key} {_flat(value)}" for key, value in info.items()))


def _flat(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cuda() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding("GPU", "note", "this torch is built without CUDA; everything runs on the CPU")
    elif not torch.cuda.is_available():
        yield Finding("GPU", "note", f"none found (torch has CUDA {torch.version.cuda}); everything runs on the CPU")
    else:
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            text = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
            yield Finding(f"GPU {number}", "ok", text)
        if importlib.util.find_spec("bbfast._C_cuda") is None:
            yield Finding(
                "GPU operations",
                "warn",
                "not built: the reference runs on the GPU instead",
                f"with nvcc on PATH, {_BUILD}",
            )


def _processor() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    yield Finding(
        "CPU",
        "warn" if many else "ok",
        f"{_cpu_name()}, {cores} cores, {threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"more threads than cores is slower: export OMP_NUM_THREADS={cores}" if many else "",
    )
    units = _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}
    text = f"yes ({', '.join(sorted(units))})" if units else "no: training on the CPU runs in float32"
    yield Finding("bf16 units of the CPU", "ok" if units else "note", text)


def _cpu_name() -> str:
    return next((line for line in _cpuinfo("model name")), platform.processor() or platform.machine())


def _cpu_flags() -> set[str]:
    return {flag for line in (*_cpuinfo("flags"), *_cpuinfo("Features")) for flag in line.split()}


def _cpuinfo(key: str) -> list[str]:
    """Values of ``key`` in Linux's list of processors; none elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    pairs = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _places() -> Iterator[Finding]:
    from bbfast.data.cache import cache_root

    remedies = {
        "cache": "set BBFAST_CACHE to a folder with space",
        "present folder": "give results another place with --out",
    }
    for topic, place in (("cache", cache_root()), ("present folder", Path.cwd())):
        if place is None:
            continue
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        good = writable and free > _LITTLE
        text = f"{place}, {free:.0f} GiB free{'' if writable else ', not writable'}"
        yield Finding(topic, "ok" if good else "warn", text, "" if good else remedies[topic])


def _extras() -> Iterator[Finding]:
    have = [f"{extra} ({package} {_version(package)})" for extra, package in _EXTRAS.items() if _version(package)]
    lack = [extra for extra, package in _EXTRAS.items() if not _version(package)]
    remedy = f"if wanted: pip install 'bbfast[{','.join(lack)}]'" if lack else ""
    yield Finding("optional parts", "note", ", ".join(have) or "none", remedy)


_MARKS = {"ok": "[green]ok[/]", "note": "[blue]note[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        remedy = f"\n[yellow]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(_MARKS[finding.state], finding.topic, escape(finding.value) + remedy)
    return table
