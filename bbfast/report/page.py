"""The page of one attack and the defenses tried on it: one HTML file with everything inside it.

What is shown is handed over as plain data (:class:`RunPage`), so the page knows nothing of models or methods.
Everything is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bbfast.report._templates import render as render_template
from bbfast.report._templates import write_text

__all__ = ["METRICS", "Analysis", "Column", "Example", "Link", "Picture", "Row", "RunPage", "render", "write"]


@dataclass(frozen=True)
class Column:
    """A metric of the table: its key in a row, what is printed, its meaning, and which direction is the defender's."""

    key: str
    title: str
    meaning: str
    better: str = ""


METRICS = (
    Column("c_acc", "C-Acc", "accuracy on clean test images", "higher"),
    Column("asr", "ASR", "share of triggered test images that the model sends where the attacker wants them", "lower"),
    Column(
        "r_acc", "R-Acc", "share of triggered test images that the model recognises in spite of the trigger", "higher"
    ),
    Column(
        "der", "DER", "fall of ASR weighed against loss of C-Acc; 50 is no effect, 100 is a perfect repair", "higher"
    ),
    Column("rir", "RIR", "rise of R-Acc weighed against loss of C-Acc; 50 is no effect", "higher"),
    Column("tpr", "TPR", "share of poisoned samples that were flagged", "higher"),
    Column("fpr", "FPR", "share of clean samples that were flagged", "lower"),
    Column("auroc", "AUROC", "how well the score ranks poisoned above clean samples; 50 is chance", "higher"),
)
"""The metrics of attacks and defenses, all fractions, in the order in which they are shown."""


@dataclass(frozen=True)
class Link:
    """Words that lead somewhere, relative to the page."""

    title: str
    href: str


@dataclass(frozen=True)
class Row:
    """One line of the table; metrics are fractions by the key of their column, those that do not apply are left out.
    ``href`` leads to a page of its own."""

    name: str
    title: str
    kind: str
    metrics: Mapping[str, float | None]
    seconds: float
    reused: bool = False
    href: str = ""


@dataclass(frozen=True)
class Example:
    """A training image before and after poisoning, as data URIs, with the labels as text."""

    clean: str
    poisoned: str
    before: str
    after: str


@dataclass(frozen=True)
class Picture:
    """Any other image, as data URI, with what is to be read under it."""

    image: str
    caption: str


@dataclass(frozen=True)
class Analysis:
    """What an analysis tool found: its figure (a file beside the page; empty: none was drawn), what it asks and says,
    its files of numbers, and its settings that are not defaults."""

    title: str
    question: str
    image: str
    said: str
    files: Sequence[Link] = ()
    settings: str = ""


@dataclass(frozen=True)
class RunPage:
    """Everything on the page.

    Args:
        title: Headline and name of the browser tab.
        lead: One or two sentences under it.
        rows: The attack first, then the defenses.
        remarks: Sentences under the table.
        examples: Poisoned training images.
        charts: SVG elements of the training, as :mod:`bbfast.report.figures` draws them.
        inversion: What a trigger-reversing method found: a chart, pictures and a sentence; empty if none ran.
        settings: Titled groups of settings.
        commands: Command lines that give the same results.
        facts: Where, when and with what it was made.
        path: The pages above this one, for the line over the title.
        charts_title: Headline of ``charts``.
        analyses: What analysis tools found.
    """

    title: str
    lead: str
    rows: Sequence[Row]
    remarks: Sequence[str] = ()
    examples: Sequence[Example] = ()
    charts: Sequence[str] = ()
    inversion: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commands: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    path: Sequence[Link] = ()
    charts_title: str = "Training"
    analyses: Sequence[Analysis] = ()


def render(page: RunPage) -> str:
    """The page as HTML."""
    used = [c for c in METRICS if any(row.metrics.get(c.key) is not None for row in page.rows)]
    return render_template("run.html.j2", page=page, columns=used)


def write(page: RunPage, path: Path) -> Path:
    """Write the page to ``path``, whole or not at all; a page already there is replaced."""
    return write_text(path, render(page))
