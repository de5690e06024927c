"""The library's version, which pyproject.toml reads from here, and the commit that it is."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["__version__", "commit"]

__version__ = "0.1.0"

_SHA = re.compile(r"[0-9a-f]{40,64}")
_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def commit() -> str:
    """The commit that this library is: of the source tree it runs from, or of the one that it was built from.

    Files are read, git is not run: what was changed since the commit does not show.

    Returns:
        40 (SHA-256 repositories: 64) hexadecimal digits; "" where it is not known, as in a build from an archive.
    """
    # Beside an installed package may lie somebody else's repository; beside this one lies its native half.
    if (_PACKAGE.parent / "csrc").is_dir():
        return _head(_PACKAGE.parent / ".git")
    try:
        from bbfast import _C
    except ImportError:
        return ""
    return str(_C.build_info().get("commit", ""))


def _head(git: Path) -> str:
    """The commit that is checked out in a repository, or in one of its work trees; "" if that cannot be read."""
    try:
        if git.is_file():
            git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        common = git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref:"):
            head = _reference(shared, head.removeprefix("ref:").strip())
    except (OSError, UnicodeDecodeError):
        return ""
    return head if _SHA.fullmatch(head) else ""


def _reference(git: Path, name: str) -> str:
    loose = git / name
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()
    packed = (line.split() for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines())
    return next((words[0] for words in packed if words[1:] == [name]), "")
