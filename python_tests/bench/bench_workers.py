"""What the workers of the tests do instead of real stages; a module, so that a spawned process can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbfast.bench.outcomes import Outcome
from bbfast.bench.pool import Ended, Work
from bbfast.bench.work import Memory, failure
from bbfast.store import Content, Store


def name_of(task: Mapping[str, Any]) -> str:
    spec = task["spec"]
    attack = f"{spec['attack']['name']}-{spec['attack']['settings']['ratio']:g}-{spec['seed']}"
    return attack if task["kind"] == "attack" else f"{attack}-{spec['defense']['name']}"


def made(task: Mapping[str, Any], root: str, slow: float = 0.0) -> Outcome:
    """A result in the store whose figures follow from the stage alone; how often it was made is counted beside it."""
    spec, store = task["spec"], Store(root)
    name = name_of(task)

    begun: list[Path] = []

    def make(work: Path) -> Content:
        begun.append(work)
        time.sleep(slow)
        facts = {
            "data": {"name": spec["data"]["name"]},
            "model": {"name": spec["model"]},
            "attack": spec["attack"]["name"],
            "attack_config": spec["attack"]["settings"],
            "seed": spec["seed"],
        }
        if task["kind"] == "defense":
            facts = {"attack": facts, "defense": spec["defense"]["name"], "seed": spec["seed"]}
        return Content(task["kind"], facts, {"c_acc": len(name) / 100, "asr": 0.5, "seconds": slow})

    config = {"spec": {key: value for key, value in spec.items() if key != "device"}}
    method = spec[task["kind"]]["name"]
    store.get_or_make(task["kind"], method, config, make, kind=task["kind"])
    if begun:
        with (store.root / f"{name}.made").open("a") as file:
            file.write("x")
    return Outcome("done", folder=store.path(task["kind"], method, store.key(task["kind"], config)).name)


def quick(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    return made(task, root)


def careful(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    """As real stages do, it tells what went wrong."""
    try:
        return made(task, root)
    except Exception as error:
        return failure(error)


def slow(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    return made(task, root, slow=0.15)


def nothing(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    return Outcome("done", folder="-")


def unlucky(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    """``ft`` fails, ``fp`` is refused, the attack ``blended`` is refused, and the worker of ``nc`` is killed once."""
    name = name_of(task)
    if name.endswith("-ft"):
        return Outcome("failed", reason="ValueError: no", traceback="Traceback ...")
    if name.endswith("-fp") or name.startswith("blended"):
        return Outcome("not_applicable", reason=f"{name} cannot")
    if name.endswith("-nc") and not (mark := Path(root) / "killed").exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made(task, root)


def always_killed(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    if name_of(task).endswith("-nc"):
        os.kill(os.getpid(), signal.SIGKILL)
    return made(task, root)


def hangs(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    if name_of(task).endswith("-nc"):
        time.sleep(600)
    return made(task, root)


def hungry(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    if name_of(task).endswith("-nc"):
        held = bytearray(1 << 30)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(60)
    return made(task, root)


def rotten(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    """The first defense finds its attack's result damaged; made anew it is good."""
    mark = Path(root) / "asked"
    if task["kind"] == "defense" and not mark.exists():
        mark.touch()
        return Outcome("damaged", reason="a file is not what was written")
    if task["kind"] == "attack":
        with (Path(root) / "attacks").open("a") as file:
            file.write("x")
    return made(task, root)


def dies_once(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    if name_of(task).endswith("-nc") and not (mark := Path(root) / "killed").exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made(task, root)


class Inline:
    """A pool without processes, for tests of what is not the pool's: a spawned worker takes seconds to import torch."""

    def __init__(self, root: Path, work: Work = quick) -> None:
        self._root, self._work, self._memory = str(root), work, Memory()
        self._ended: list[Ended] = []

    @property
    def free(self) -> int:
        return 0 if self._ended else 1

    def submit(self, key: str, task: Mapping[str, Any]) -> None:
        self._ended.append(Ended(key, self._work(task, self._root, self._memory)))

    def wait(self, timeout: float) -> list[Ended]:
        over, self._ended = self._ended, []
        return over

    def close(self) -> None:
        pass
