"""What went wrong: what the note of a stage that has no result records, and the failed stages of a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from bbfast._record import versions
from bbfast.bench.outcomes import Book, Outcome
from bbfast.bench.plan import Plan
from bbfast.bench.progress import labels, places
from bbfast.store import Store

__all__ = ["failures", "recorded", "refusals"]


def recorded(outcome: Outcome, spec: Mapping[str, Any]) -> Outcome:
    """``outcome`` with what it was about, when it ended and the runner's versions, unless there is a result, which has
    all that itself.

    Args:
        outcome: How the stage ended.
        spec: What was to be done: data, model, methods with settings, recipe, seed, device.
    """
    if outcome.status == "done":
        return outcome
    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return dataclasses.replace(outcome, record={"spec": dict(spec), "versions": versions(), "ended": ended})


def failures(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """The failed stages of ``plan``, in its order.

    Each has dataset, model, attack, ratio, seed and defense (labels of the grid; ``none`` for an attack), ``stage``
    (the same in words), ``kind``, ``key``, ``reason``, ``traceback`` ("" if its process was ended or lost),
    ``seconds``, ``attempts``, ``waiting`` (the cells that have no figures because of it, beside its own) and ``record``
    (see :func:`recorded`; empty in notes that an older bbfast wrote).
    """
    known, names, where = Book(store).read_all(plan.tasks), labels(plan), places(plan)
    waiting: dict[str, int] = {}
    for cell in plan.cells:
        parent = None if cell.task is None else plan.tasks[cell.task].parent
        if parent is not None and cell.task not in known:
            waiting[parent] = waiting.get(parent, 0) + 1
    return [
        {
            **where[key],
            "stage": names[key],
            "kind": task.kind,
            "key": key,
            **{name: getattr(known[key], name) for name in ("reason", "traceback", "seconds", "attempts", "record")},
            "waiting": waiting.get(key, 0),
        }
        for key, task in plan.tasks.items()
        if key in known and known[key].status == "failed"
    ]


def refusals(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells that are not applicable, by reason, the most frequent first.

    Args:
        rows: Cells with the keys dataset, model, attack, ratio, defense, seed and reason.

    Returns:
        Dicts of ``reason``, ``count``, and ``cells``: dicts of dataset, model, attack and ratio with lists ``defenses``
        and ``seeds``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["reason"]), []).append(row)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"reason": reason, "count": len(members), "cells": _cells(members)} for reason, members in ranked]


def _cells(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = ("dataset", "model", "attack", "ratio")
    places: dict[tuple[Any, ...], dict[str, dict[Any, None]]] = {}
    for row in rows:
        lists = places.setdefault(tuple(row[key] for key in keys), {"defenses": {}, "seeds": {}})
        lists["defenses"][row["defense"]] = None
        lists["seeds"][row["seed"]] = None
    return [
        {**dict(zip(keys, place, strict=True)), **{name: list(values) for name, values in lists.items()}}
        for place, lists in places.items()
    ]
