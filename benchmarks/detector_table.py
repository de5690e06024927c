"""What the detectors find: TPR, FPR and AUROC against attacks at several poisoning ratios; tables, one an attack.

    python benchmarks/detector_table.py --data digits --out runs/table
    python benchmarks/detector_table.py --data gtsrb_small.npz --normalize gtsrb --epochs 60 --out runs/table

Every attack and every detection is stored; a finished one is read back. ``--detectors`` takes labels of ``DETECTORS``.
A ratio that an attack cannot have, because the class that it is bound to is too small, is left out. The last table is
of the same recipe with one poisoned image: what a detector flags there, it flags without cause.
"""

from __future__ import annotations

import json
import time
from typing import Any

from _runs import Setting, arguments, class_share, make_attack

from bbfast import defenses
from bbfast.attacks import AttackResult
from bbfast.bench.stages import defense_stage
from bbfast.errors import BBFastError

ATTACKS = ("badnets", "blended", "sig", "wanet", "tact", "adaptive_blend")
RATIOS = (0.01, 0.05, 0.10)
_TRAIN = {"stage": "train"}
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("ac", "ss", "scan", "spectre", "agpd", "asset", "abl", "d_br")},
    **{f"{name}, training set": (name, _TRAIN) for name in ("strip", "beatrix", "cd", "freak")},
    **{f"{name}, stream": (name, {"stage": "inference"}) for name in ("strip", "beatrix", "cd", "freak")},
    # For sets with few test images a class.
    "beatrix, 10 a class, training set": ("beatrix", {**_TRAIN, "reserve_per_class": 10}),
    "beatrix, 10 a class, stream": ("beatrix", {"stage": "inference", "reserve_per_class": 10}),
    **{name: (name, {}) for name in ("scale_up", "ibd_psc", "sentinet", "teco", "mm_bd", "nc")},
}
"""Label to method and settings. Methods that go on to mitigate only detect."""


def detect(label: str, result: AttackResult, at: Setting, cache: defenses.FeatureCache) -> dict[str, Any] | None:
    """Metrics of one detector on one attack; None where it refuses."""
    name, settings = DETECTORS[label]
    method = defenses.create(name, **defenses.find(name).Config.detect_only, **settings)
    try:
        found = defense_stage(at.store, method, result, seed=at.seed, cache=cache).result
    except BBFastError as error:
        print(f"  {label}: {error}", flush=True)
        return None
    return {
        **found.metrics,
        "verdict": {key: found.verdict[key] for key in ("backdoored", "targets") if key in found.verdict},
    }


def cell(found: dict[str, Any] | None) -> str:
    """TPR / FPR / AUROC in per cent; of detectors of models, the classes that they accuse."""
    if found is None:
        return "refused"
    if "tpr" not in found:
        verdict = found["verdict"]
        return f"accuses {verdict['targets']}" if verdict.get("backdoored") else "accuses none"
    shown = (found[key] for key in ("tpr", "fpr", "auroc"))
    return " / ".join("-" if value != value else f"{100 * value:.0f}" for value in shown)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attacks", nargs="+", default=ATTACKS, help="names, or name:variant as in attack_table.py")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), metavar="LABEL")
    given = parser.parse_args()

    at = Setting(given)
    rows: list[dict[str, Any]] = []
    plan: list[tuple[str, dict[str, Any]]] = [
        (label, {"ratio": ratio})
        for label in given.attacks
        for ratio in given.ratios
        if ratio <= (class_share(label, at.data) or 1.0)
    ]
    for name, settings in [*plan, ("badnets", {"ratio": None, "count": 1})]:
        result = make_attack(name, at, **settings)
        cache = defenses.FeatureCache()
        for label in given.detectors:
            started = time.perf_counter()
            found = detect(label, result, at, cache)
            known = {key: result.metrics[key] for key in ("c_acc", "asr")}
            rows.append({"attack": name, **settings, **known, "detector": label, "found": found})
            print(f"{name} {settings} {label}: {cell(found)} ({time.perf_counter() - started:.0f} s)", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=1))

    print(f"\n{at}: TPR / FPR / AUROC")
    for name in [*given.attacks, None]:
        mine = [
            row for row in rows if (row["attack"] == name and "count" not in row) or (name is None and "count" in row)
        ]
        columns = list(dict.fromkeys(row["ratio"] for row in mine))
        asr = {row["ratio"]: row["asr"] for row in mine}
        heads = ["no backdoor" if ratio is None else f"{ratio:.0%}, ASR {100 * asr[ratio]:.0f}" for ratio in columns]
        print(f"\n| {name or 'one image'} | " + " | ".join(heads) + " | seconds |")
        print("|" + "---|" * (len(columns) + 2))
        for label in given.detectors:
            cells = [row["found"] for row in mine if row["detector"] == label]
            seconds = [found["seconds"] for found in cells if found is not None]
            spent = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
            print(f"| {label} | " + " | ".join(map(cell, cells)) + f" | {spent} |")


if __name__ == "__main__":
    main()
