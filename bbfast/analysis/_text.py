"""Text of figures is drawn as it stands: ``$`` in a class's name begins no formula."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatterMathtext

__all__ = ["HouseFigure", "plain_powers"]

_RAISED = str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·")
_POWER = re.compile(r"\^\{(.*?)\}")


def plain_powers(formula: str) -> str:
    """A tick label of Matplotlib's, say ``$\\mathdefault{10^{-3}}$``, in plain characters."""
    inner = re.sub(r"^\$\\mathdefault\{(.*)\}\$$", r"\1", formula)
    inner = _POWER.sub(lambda found: found[1].replace("\N{MINUS SIGN}", "-").translate(_RAISED), inner)
    return re.sub(r"\\times\s*", "\N{MULTIPLICATION SIGN}", inner).replace("-", "\N{MINUS SIGN}")


class _Plain(Formatter):
    """Another formatter's labels without formulas."""

    def __init__(self, inner: Formatter) -> None:
        self.inner = inner

    def set_axis(self, axis: Any) -> None:
        super().set_axis(axis)
        self.inner.set_axis(axis)

    def set_locs(self, locs: Sequence[float]) -> None:
        self.inner.set_locs(locs)  # type: ignore[arg-type]

    def __call__(self, x: float, pos: int | None = None) -> str:
        return plain_powers(self.inner(x, pos))


class HouseFigure(Figure):
    """A figure that is drawn in the style it was made in, wherever it is saved: ticks are made only then."""

    house: Mapping[str, Any] = {}

    def savefig(self, *args: Any, **options: Any) -> None:
        """As Matplotlib's, with labels of logarithmic axes in plain characters."""
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                for which in ("major", "minor"):
                    formatter = getattr(axis, f"get_{which}_formatter")()
                    if isinstance(formatter, LogFormatterMathtext):
                        getattr(axis, f"set_{which}_formatter")(_Plain(formatter))
        with matplotlib.rc_context(self.house):  # type: ignore[arg-type]
            super().savefig(*args, **options)
