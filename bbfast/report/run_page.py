"""From results to the page that shows them."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbfast.errors import UnknownNameError
from bbfast.report.figures import anomaly_bars, loss_curve, rate_curves
from bbfast.report.images import png_uri, to_uint8
from bbfast.report.page import Example, Picture, Row, RunPage

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["Finished", "attack_row", "defense_row", "lead", "run_page"]

_EXAMPLES = 6
_NC_THRESHOLD = 2.0
"""Anomaly index above which a class counts as attacked where a method has no setting of its own for it."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A defense that has run: its name, its result, its folder, and whether the result was there already."""

    name: str
    result: DefenseResult
    folder: Path
    reused: bool = False


def attack_row(result: AttackResult, reused: bool = False) -> Row:
    """The undefended model's line of the table."""
    from bbfast import attacks

    name = title = str(result.config["attack"])
    # An imported result's attack may be unknown, and the package that brought an attack may be gone.
    with contextlib.suppress(UnknownNameError):
        title = str(attacks.info(name)["title"])
    metrics = {key: result.metrics.get(key) for key in ("c_acc", "asr", "r_acc")}
    return Row(name, title, "attack", metrics, float(result.metrics["seconds"]), reused)


def defense_row(done: Finished) -> Row:
    """A defense's line of the table."""
    from bbfast import defenses

    title = done.name
    with contextlib.suppress(UnknownNameError):
        title = str(defenses.info(done.name)["title"])
    return Row(done.name, title, done.result.kind, done.result.metrics, done.result.seconds, done.reused)


def run_page(
    attack: AttackResult,
    defenses: Sequence[Finished],
    *,
    reused: bool = False,
    remarks: Sequence[str] = (),
    commands: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    charts: Sequence[str | None] | None = None,
) -> RunPage:
    """The page of an attack and the defenses tried on it.

    Args:
        attack: The attack's result.
        defenses: The defenses, in the order of the table.
        reused: Whether the attack's result was there already.
        remarks: Sentences under the table.
        commands: Command lines that give the same results.
        facts: Where, when and with what it was made.
        charts: Instead of those of the attack's training; None stands for one that could not be drawn.
    """
    rows = [attack_row(attack, reused), *map(defense_row, defenses)]
    config = attack.config
    settings: dict[str, Mapping[str, Any]] = {
        f"Attack: {config['attack']}": config["attack_config"],
        "Data": {key: config["data"][key] for key in ("name", "num_classes", "image_size", "mean", "std")},
        "Training": config["recipe"] or {},
        **{f"Defense: {done.name}": done.result.config.get("defense_config", {}) for done in defenses},
    }
    charts = [loss_curve(attack.history), rate_curves(attack.history)] if charts is None else charts
    return RunPage(
        title=f"{rows[0].title} on {config['data']['name']}",
        lead=lead(rows),
        rows=rows,
        remarks=remarks,
        examples=_examples(attack),
        charts=[chart for chart in charts if chart],
        inversion=_inversion(attack, defenses),
        settings=settings,
        commands=commands,
        facts=facts or {},
    )


def lead(rows: Sequence[Row]) -> str:
    """What came out, in two sentences, from the figures alone."""
    attack, *defenses = rows
    text = (
        f"The attacked model classifies {_percent(attack.metrics['c_acc'])} of the clean test images correctly and "
        f"sends {_percent(attack.metrics['asr'])} of the triggered ones where the attacker wants them."
    )
    repaired = [row for row in defenses if row.metrics.get("asr") is not None and row.metrics.get("der") is not None]
    if repaired:
        best = max(repaired, key=lambda row: float(row.metrics["der"] or 0))
        text += (
            f" By DER, {best.title} repairs it best: {_percent(best.metrics['asr'])} attack success at "
            f"{_percent(best.metrics['c_acc'])} clean accuracy."
        )
    return text


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None or value != value else f"{100 * value:.1f} %"


def _examples(attack: AttackResult) -> list[Example]:
    """Poisoned training images beside their originals, one a class as far as there are."""
    assert attack.role is not None
    changed = attack.role.nonzero().flatten()
    poisoned = attack.poisoned[changed]
    given, truth = attack.train.labels[changed], attack.original_labels[changed]
    relabelled = poisoned & (given != truth)
    shown = (relabelled if relabelled.any() else poisoned).nonzero().flatten()
    names = attack.config["data"]["class_names"]
    first = [int(shown[truth[shown] == k][0]) for k in truth[shown].unique()]
    rest = [int(i) for i in shown if int(i) not in first]
    return [
        Example(
            clean=png_uri(attack.clean_images[i]),
            poisoned=png_uri(attack.train.images[changed[i]]),
            before=str(names[int(truth[i])]),
            after=str(names[int(given[i])]),
        )
        for i in (first + rest)[:_EXAMPLES]
    ]


def _inversion(attack: AttackResult, defenses: Sequence[Finished]) -> dict[str, Any]:
    """What the first trigger-reversing defense found, beside the true trigger; empty if there is none."""
    done = next((d for d in defenses if d.result.verdict.get("anomaly")), None)
    if done is None:
        return {}
    verdict, names = done.result.verdict, attack.config["data"]["class_names"]
    anomaly: Mapping[int, float] = verdict["anomaly"]
    targets = [int(k) for k in verdict.get("targets") or []]
    config = done.result.config.get("defense_config", {})
    threshold = float(config.get("anomaly_threshold") or _NC_THRESHOLD)
    classes = sorted(anomaly)
    title = defense_row(done).title
    found = ", ".join(str(names[k]) for k in targets)
    text = f"{title} names class {found} as the attacker's." if targets else f"{title} names no class."
    text += (
        " For every class it looks for the smallest trigger that sends all images there; a class whose trigger is far"
    )
    text += " smaller than the others' is suspicious."
    chart = anomaly_bars(
        _signed(anomaly, done.result.trigger, classes),
        [classes.index(k) for k in targets if k in classes],
        threshold,
        [str(names[k]) for k in classes],
    )
    return {"title": f"What {title} found", "text": text, "chart": chart, "pictures": _triggers(attack, done, targets)}


def _signed(
    anomaly: Mapping[int, float], triggers: Mapping[int, Mapping[str, Any]], classes: Sequence[int]
) -> list[float]:
    """The index with its sign: negative for classes whose trigger is larger than the median, which accuses nobody."""
    if not all(k in triggers for k in classes):
        return [float(anomaly[k]) for k in classes]
    sizes = {k: float(triggers[k]["norm"]) for k in classes}
    middle = statistics.median(sizes.values())
    return [float(anomaly[k]) * (1 if sizes[k] <= middle else -1) for k in classes]


def _triggers(attack: AttackResult, done: Finished, targets: Sequence[int]) -> list[Picture]:
    reversed_ = done.result.trigger
    if not reversed_:
        return []
    target = targets[0] if targets else min(reversed_, key=lambda k: float(reversed_[k]["norm"]))
    mask, pattern = reversed_[target]["mask"].cpu(), reversed_[target]["pattern"].cpu()
    name = attack.config["data"]["class_names"][target]
    pictures = [
        Picture(png_uri(to_uint8(mask)), f"reversed mask of class {name}, size {float(mask.sum()):.1f} pixels"),
        Picture(png_uri(to_uint8(mask * pattern)), "reversed pattern under the mask"),
    ]
    true = _true_trigger(attack)
    return pictures if true is None else [*pictures, Picture(png_uri(true), "what the attacker really changed")]


def _true_trigger(attack: AttackResult) -> Tensor | None:
    """Largest change that poisoning made at every pixel, uint8 ``[C, H, W]``; None if no image was poisoned."""
    assert attack.role is not None
    changed = attack.role.nonzero().flatten()
    rows = attack.poisoned[changed].nonzero().flatten()[:256]
    if not len(rows):
        return None
    before = attack.clean_images[rows].to(torch.int16)
    after = attack.train.images[changed[rows]].to(torch.int16)
    return (after - before).abs().amax(dim=0).to(torch.uint8)
