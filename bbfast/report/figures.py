"""Figures as inline SVG that follow the page's light or dark colours.

Matplotlib draws with placeholder colours; they are replaced by CSS variables, so one drawing serves both schemes. Text
stays text (it can be selected and read aloud), in the page's own font.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = ["anomaly_bars", "loss_curve", "progress_curve", "rate_curves", "score_histogram"]

# Placeholder -> what the page defines. Lower-case hex, as Matplotlib writes it.
_INK, _LINE, _BLUE, _ORANGE, _GREEN = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {
    _INK: "var(--ink-soft)",
    _LINE: "var(--line)",
    _BLUE: "var(--blue)",
    _ORANGE: "var(--orange)",
    _GREEN: "var(--green)",
}
_SIZE = (4.6, 2.6)  # inches at 72 points: half a text column, and still readable on a telephone


def loss_curve(history: Sequence[Mapping[str, float]]) -> str | None:
    """Training loss over the epochs; None if ``history`` has no ``loss``. Each record has ``epoch``, from 0."""
    with _drawing() as figure:
        axes = figure.subplots()
        if not _line(axes, history, "loss", _GREEN, "training loss", 1.0):
            return None
        axes.set_ylim(bottom=0)
        axes.set_title("Training loss", loc="left", color=_INK)
        _plain(axes, "epoch")
        return _svg(figure, "loss", "Training loss over the epochs")


def rate_curves(history: Sequence[Mapping[str, float]]) -> str | None:
    """C-Acc and ASR over the epochs, in per cent; None if no epoch has ``c_acc`` or ``asr`` (fractions)."""
    with _drawing() as figure:
        axes = figure.subplots()
        drawn = [
            _line(axes, history, "c_acc", _BLUE, "C-Acc", 100.0),
            _line(axes, history, "asr", _ORANGE, "ASR", 100.0, dashed=True),
        ]
        if not any(drawn):
            return None
        axes.set_ylim(-3, 103)
        axes.set_title("Test set, per cent", loc="left", color=_INK)
        axes.legend(frameon=False, loc="best", labelcolor=_INK)
        _plain(axes, "epoch")
        return _svg(figure, "rates", "Clean accuracy and attack success rate over the epochs")


def progress_curve(history: Sequence[Mapping[str, float]]) -> str | None:
    """A defense's loss over its epochs or steps, whichever it counted; None if it kept no loss."""
    if any("epoch" in record for record in history):
        return loss_curve([record for record in history if record.get("epoch") is not None])
    across = next((key for key in ("steps", "step", "round") if any(key in record for record in history)), None)
    if across is None:
        return None
    # The shared line counts from 0.
    counted = [{**record, "epoch": record[across] - 1} for record in history if record.get(across) is not None]
    with _drawing() as figure:
        axes = figure.subplots()
        if not _line(axes, counted, "loss", _GREEN, "loss", 1.0):
            return None
        axes.set_title("Loss", loc="left", color=_INK)
        _plain(axes, across.rstrip("s"))
        return _svg(figure, "loss", "Loss of the defense over its steps")


def score_histogram(scores: Sequence[float], poisoned: Sequence[bool], threshold: float | None = None) -> str | None:
    """How a detector's scores of clean and of poisoned samples lie; None if there are none of a kind.

    Args:
        scores: Higher is more suspicious; NaN (not scored) is left out.
        poisoned: Which samples are.
        threshold: Drawn as a line, if there is one for all samples.
    """
    kept = [(value, bad) for value, bad in zip(scores, poisoned, strict=True) if math.isfinite(value)]
    clean, bad = [v for v, is_bad in kept if not is_bad], [v for v, is_bad in kept if is_bad]
    if not clean or not bad:
        return None
    low, high = min(v for v, _ in kept), max(v for v, _ in kept)
    if low == high:
        return None
    edges = [low + (high - low) * i / 40 for i in range(41)]
    with _drawing() as figure:
        axes = figure.subplots()
        for values, colour, label in (
            (clean, _BLUE, f"clean ({len(clean)})"),
            (bad, _ORANGE, f"poisoned ({len(bad)})"),
        ):
            share = [100 / len(values)] * len(values)
            axes.hist(values, bins=edges, weights=share, color=colour, alpha=0.55, label=label)
        if threshold is not None and low <= threshold <= high:
            axes.axvline(threshold, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="threshold")
        axes.set_title("Scores of the training samples, per cent of their kind", loc="left", color=_INK)
        axes.legend(frameon=False, labelcolor=_INK)
        _plain(axes, "score")
        axes.xaxis.set_major_locator(_few_ticks())
        return _svg(figure, "scores", "Histogram of the detector's scores of clean and of poisoned samples")


def anomaly_bars(
    values: Sequence[float], flagged: Sequence[int], threshold: float, names: Sequence[str] = ()
) -> str | None:
    """One bar a class: by how many deviations its reversed trigger is smaller than the median one; None without values.

    Args:
        values: Index of each class, negative for a trigger larger than the median.
        flagged: Classes that the method calls attacked; drawn in the accent colour.
        threshold: Drawn as a line.
        names: Class names under the bars; their numbers if left out.
    """
    if not len(values):
        return None
    # An infinite index (all other classes equal) is drawn as a bar that reaches the edge.
    finite = [threshold, 0.0, *filter(math.isfinite, values)]
    low, high = 1.1 * min(finite), 1.2 * max(finite)
    heights = [0.0 if math.isnan(value) else min(max(value, low), high) for value in values]
    colours = [_ORANGE if k in set(flagged) else _BLUE for k in range(len(values))]
    with _drawing() as figure:
        axes = figure.subplots()
        axes.bar(range(len(values)), heights, color=colours, width=0.7)
        axes.axhline(0, color=_LINE, linewidth=1)
        axes.axhline(threshold, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        label = f"threshold {threshold:g}"
        across = ("axes fraction", "data")
        axes.annotate(label, (1, threshold), (-2, 3), across, "offset points", ha="right", color=_INK)
        axes.set_ylim(low, high)
        _plain(axes, "class")
        if len(values) <= 20:
            axes.set_xticks(range(len(values)), list(names) or [str(k) for k in range(len(values))])
        axes.set_title("Anomaly index: how much smaller than the median", loc="left", color=_INK)
        return _svg(figure, "anomaly", "Anomaly index of every class")


@contextlib.contextmanager
def _drawing() -> Iterator[Figure]:
    """An empty figure; what is drawn on it inside gets the page's text sizes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bbfast",
            "font.size": 9.0,
            "axes.titlesize": 9.5,
            "text.parse_math": False,  # a class may be called "$x"
        }
    ):
        yield Figure(figsize=_SIZE, layout="constrained")


def _line(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    key: str,
    colour: str,
    label: str,
    scale: float,
    *,
    dashed: bool = False,
) -> bool:
    points = [(record["epoch"] + 1, scale * record[key]) for record in history if record.get(key) is not None]
    if not points:
        return False
    x, y = zip(*points, strict=True)
    axes.plot(
        x, y, color=colour, label=label, linewidth=1.8, marker="o", markersize=3, linestyle="--" if dashed else "-"
    )
    return True


def _plain(axes: Axes, xlabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.set_xlabel(xlabel, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _few_ticks() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6)


def _svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as one ``<svg>`` element for an HTML page.

    Names inside get ``prefix``, so that two figures on a page do not use each other's; the XML head, name spaces and
    metadata go, because HTML needs none of them.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> inside would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]+\")[^>]*>",
        rf'<svg class="chart" role="img" aria-label="{description}" \1>',
        text,
        count=1,
    )
    text = re.sub(
        r"font: ([\d.]+)px [^;\"]+|font-family: [^;\"]+", lambda m: f"font-size: {m[1]}px" if m[1] else "", text
    )
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text.strip()
