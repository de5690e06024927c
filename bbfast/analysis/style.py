"""One look for all figures: colours that colour-blind readers tell apart, sizes, captions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLEAN", "OTHER", "POISONED", "TARGET", "class_colours", "figure", "legend", "put_caption", "short_name"]

CLEAN, POISONED, TARGET, OTHER = "#2166AC", "#D6604D", "#FDB863", "#9E9E9E"
"""Clean, triggered, the target class, everything else. Sequential maps: ``Blues``, ``Oranges``, ``viridis``; signed:
``coolwarm``, centred."""
DPI = 200

_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class may be called "$x"
}


@contextmanager
def figure(width: float, height: float, caption: str = "") -> Iterator[Figure]:
    """A figure of the house style in inches, its caption in small grey print below; not pyplot's, so it leaves no
    state."""
    import matplotlib

    from bbfast.analysis._text import HouseFigure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        made = HouseFigure(figsize=(width, height), dpi=DPI, layout="constrained")
        made.house = _STYLE
        yield made
        if caption:
            put_caption(made, caption)


def put_caption(made: Figure, words: str) -> None:
    """``words`` below a figure, in lines of its width; instead of those that are there."""
    made.supxlabel(textwrap.fill(words, max(30, int(made.get_figwidth() * 14))), fontsize=9, color="#555555")


def legend(owner: Any, handles: Sequence[Any], words: Sequence[str], **where: Any) -> Any:
    """A legend of any words on axes or a figure: Matplotlib itself leaves out those that begin with ``_``."""
    made = owner.legend(list(handles), ["x"] * len(words), **where)
    for text, word in zip(made.get_texts(), words, strict=True):
        text.set_text(word)
    return made


def class_colours(count: int) -> list[Any]:
    """A colour for each class: distinct ones up to ten (Tol's muted), then evenly spaced hues."""
    muted = [
        "#332288",
        "#88CCEE",
        "#44AA99",
        "#117733",
        "#999933",
        "#DDCC77",
        "#CC6677",
        "#882255",
        "#AA4499",
        "#777777",
    ]
    if count <= len(muted):
        return muted[:count]
    import matplotlib

    hues = matplotlib.colormaps["hsv"]
    return [hues(i / count) for i in range(count)]


def short_name(name: str, most: int = 12) -> str:
    """``name`` in at most ``most`` characters: its beginning and, if that is short, its last word, by which names like
    "Speed limit 30" and "Speed limit 50" differ. It is one line."""
    name = " ".join(name.splitlines())
    if len(name) <= most:
        return name
    *_, last = name.split(" ")
    tail = f" {last}" if len(last) < most // 2 else ""
    return name[: most - 1 - len(tail)].rstrip() + "\N{HORIZONTAL ELLIPSIS}" + tail
