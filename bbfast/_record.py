"""What every result records about the software and the machine that made it."""

from __future__ import annotations

import platform
from typing import Any

import torch

from bbfast._version import __version__, commit
from bbfast.store import PROTOCOL_VERSION

__all__ = ["method_version", "versions"]


def method_version(kind: str, version: int) -> dict[str, int]:
    """What a method's version adds to its settings, and so to its key: nothing for the first one.

    Args:
        kind: ``attack`` or ``defense``.
        version: Of the method's class.
    """
    return {} if version == 1 else {f"{kind}_version": version}


def versions(method: int | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """Versions of library, protocol, torch and Python. They are no part of a key.

    Args:
        method: Version of the method, recorded too.
        device: Where it ran; of a GPU the name is recorded.
    """
    known: dict[str, Any] = {
        "bbfast": __version__,
        "commit": commit(),
        "protocol": PROTOCOL_VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if method is not None:
        known["method"] = method
    if device is not None and device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
    return known
