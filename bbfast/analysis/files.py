"""The files of an analysis or a study: numbers, figure and words, replaced as a set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bbfast.analysis.numbers import ARRAYS, META, TABLE, Numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_set"]

_PNG, _PDF = "figure.png", "figure.pdf"


def write_set(
    numbers: Numbers,
    folder: Path,
    draw: Callable[[Numbers], Figure] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path | None:
    """Write the numbers, the figure drawn from them, and texts; what lies there from before goes, other files stay.

    The files are written in a folder inside ``folder`` and moved when all are whole, ``meta.json`` last: a folder
    without it is half written. If the drawing fails, the numbers are kept, without a figure.

    Args:
        numbers: What is written and drawn.
        folder: Made if missing.
        draw: Makes the figure; None for none: then an older one is removed.
        texts: Other files by name.

    Returns:
        ``figure.png``, 200 dots an inch; ``figure.pdf`` lies beside it. None if there is no figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        work = Path(temporary)
        numbers.save(work)
        for name, text in (texts or {}).items():
            (work / name).write_text(text, encoding="utf-8")
        try:
            if draw is not None:
                _drawn(draw(numbers), work)
        except BaseException:
            for name in (_PNG, _PDF):
                (work / name).unlink(missing_ok=True)
            raise
        finally:
            for name in (META, ARRAYS, TABLE, _PNG, _PDF):
                (folder / name).unlink(missing_ok=True)
            for file in sorted(work.iterdir(), key=lambda file: file.name == META):
                os.replace(file, folder / file.name)
    return None if draw is None else folder / _PNG


def _drawn(figure: Figure, folder: Path) -> None:
    # Without a date, so that the same numbers give the same file; the layout settles when it is first drawn.
    figure.savefig(folder / _PNG, metadata={"Software": None})
    figure.savefig(folder / _PDF, metadata={"CreationDate": None})
