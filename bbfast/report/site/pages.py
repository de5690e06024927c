"""The page of each stored run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.report.commands import attack_command, defense_command
from bbfast.report.figures import progress_curve, score_histogram
from bbfast.report.page import Analysis, Link, Row, RunPage
from bbfast.report.run_page import Finished, defense_row, lead, run_page
from bbfast.report.site.records import Record

__all__ = ["attack_page", "defense_page", "page_name", "row_of"]

_HOME = Link("Leaderboard", "../index.html")
_GIB = 2**30


def page_name(folder: str) -> str:
    """File of a run's page, below ``runs/``."""
    return f"{folder}.html"


def attack_page(
    record: Record, attack: AttackResult, defenses: Sequence[Row], analyses: Sequence[Analysis], store: str
) -> RunPage:
    """The page of an attack: what it does, and every defense that was run on it.

    Args:
        record: What the store says of it.
        attack: Its result.
        defenses: A line for each defense, with links to their pages.
        analyses: What tools found.
        store: The store's name, for the command line.
    """
    page = run_page(attack, [], commands=_kept(attack_command(record.config, store)), facts=_facts(record))
    rows = [*page.rows, *defenses]
    title, said = page.title, lead(rows)
    if record.row["ratio"] == 0:
        title += ", without poison"
        said = (
            "A clean model under this attack's trigger, to compare the attack with: it classifies "
            f"{_percent(rows[0].metrics['c_acc'])} of the clean test images correctly and takes "
            f"{_percent(rows[0].metrics['asr'])} of the triggered ones for the target."
        )
    return dataclasses.replace(page, title=title, rows=rows, lead=said, path=[_HOME], analyses=analyses)


def defense_page(
    record: Record, of: Record, attack: AttackResult, result: DefenseResult, analyses: Sequence[Analysis], store: str
) -> RunPage:
    """The page of a defense, beside the attack that it was run on; arguments as of :func:`attack_page`."""
    name = str(record.config["defense"])
    done = Finished(name, result, Path(record.folder))
    commands = [
        *_kept(attack_command(of.config, store)),
        *_kept(defense_command(record.config, f"{store}/{of.folder}")),
    ]
    charts = [progress_curve(result.history), _scores(attack, result)]
    page = run_page(attack, [done], commands=commands, facts=_facts(record), charts=charts)
    against = dataclasses.replace(page.rows[0], href=page_name(of.folder))
    return dataclasses.replace(
        page,
        title=f"{page.rows[1].title} against {page.title}",
        lead=_sentence(page.rows[1], result),
        rows=[against, page.rows[1]],
        charts_title="The defense at work",
        path=[_HOME, Link(page.title, page_name(of.folder))],
        analyses=analyses,
    )


def row_of(record: Record, result: DefenseResult) -> Row:
    """A defense's line on its attack's page."""
    row = defense_row(Finished(str(record.config["defense"]), result, Path(record.folder)))
    return dataclasses.replace(row, href=page_name(record.folder))


def _sentence(row: Row, result: DefenseResult) -> str:
    """What came of a defense, from the figures alone."""
    m = row.metrics
    parts = []
    if m.get("asr") is not None and m.get("c_acc") is not None:
        parts.append(
            f"Afterwards the attack succeeds on {_percent(m['asr'])} of the triggered test images; clean accuracy is "
            f"{_percent(m['c_acc'])}."
        )
    if m.get("tpr") is not None:
        parts.append(
            f"It flags {_percent(m['tpr'])} of the poisoned and {_percent(m.get('fpr'))} of the clean samples."
        )
    if "backdoored" in result.verdict:
        targets = ", ".join(map(str, result.verdict.get("targets") or []))
        verdict = (
            f"a backdoor{f', target class {targets}' if targets else ''}" if result.verdict["backdoored"] else "none"
        )
        parts.append(f"Its verdict on the model: {verdict}.")
    return " ".join(parts)


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None or value != value else f"{100 * value:.1f} %"


def _scores(attack: AttackResult, result: DefenseResult) -> str | None:
    """Only of detectors that scored the whole training set: what a stream held is not stored."""
    scores, poisoned = result.scores, attack.poisoned
    if result.metrics.get("population") not in (None, "train") or not isinstance(scores, torch.Tensor):
        return None
    if poisoned is None or scores.ndim != 1 or len(scores) != len(poisoned):
        return None
    threshold = result.threshold if isinstance(result.threshold, float | int) else None
    return score_histogram(scores.tolist(), poisoned.tolist(), threshold)


def _facts(record: Record) -> dict[str, str]:
    row = record.row
    commit = str(row["commit_id"] or "")[:12]
    facts = {
        "Result": record.folder,
        "Seed": str(row["seed"]),
        "Made": str(row["created"] or ""),
        "Seconds": "" if row["seconds"] is None else f"{row['seconds']:.1f}",
        "Highest memory": "" if not row["peak_memory_bytes"] else f"{row['peak_memory_bytes'] / _GIB:.2f} GiB",
        "On": str(row["device"] or ""),
        "With": f"bbfast {row['bbfast']}{commit and f' ({commit})'}, torch {row['torch']}",
        "Changed settings": record.changed or "none",
    }
    return {key: value for key, value in facts.items() if value}


def _kept(line: str | None) -> list[str]:
    return [] if line is None else [line]
