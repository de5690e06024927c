"""What the defenses that repair or train a model reach: C-Acc, ASR, R-Acc, DER, RIR, seconds and peak memory; tables.

    python benchmarks/defense_table.py --data digits --out runs/table
    python benchmarks/defense_table.py --data gtsrb_small.npz --normalize gtsrb --epochs 60 --out runs/table

Every attack and every defense is stored; a finished one is read back. ``--attacks`` takes names, or ``name:variant``
as in attack_table.py. The last table is of the same recipe with one poisoned image: what a defense costs a model
without a backdoor.
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

ATTACKS = ("badnets", "blended", "sig", "wanet", "input_aware")
METRICS = ("c_acc", "asr", "r_acc", "der", "rir")


def measured(name: str, result: AttackResult, at: Setting, fraction: float) -> dict[str, Any] | str:
    """Metrics of one defense on one attack, or why it refuses."""
    try:
        made = defense_stage(at.store, defenses.create(name), result, clean_fraction=fraction, seed=at.seed)
    except BBFastError as error:
        return str(error)
    return {**made.result.metrics, "verdict": made.result.verdict}


def shown(found: dict[str, Any] | str) -> list[str]:
    if isinstance(found, str):
        return ["refused", *[""] * (len(METRICS) + 1)]
    cells = [f"{100 * found[key]:.2f}" for key in METRICS]
    return [*cells, f"{found['seconds']:.0f}", f"{found['peak_memory_bytes'] / 2**20:.0f}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attacks", nargs="+", default=ATTACKS, help="names, or name:variant as in attack_table.py")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--defenses", nargs="+", help="all that give a model if left out")
    parser.add_argument("--clean-fraction", type=float, default=0.05)
    given = parser.parse_args()

    at = Setting(given)
    names = given.defenses or sorted({*defenses.available("mitigation"), *defenses.available("training")})
    rows: list[dict[str, Any]] = []
    tables: dict[str, list[list[str]]] = {}
    for label in [*given.attacks, None]:
        if label is None:
            result = make_attack("badnets", at, ratio=None, count=1)
        else:
            share = class_share(label, at.data)
            result = make_attack(label, at, ratio=given.ratio if share is None else min(given.ratio, 0.8 * share))
        before = result.metrics
        head = label.replace(":", ", ") if label else "one image"
        tables[head] = [["no defense", *(f"{100 * before[key]:.2f}" for key in METRICS[:3]), *[""] * 4]]
        for name in names:
            started = time.perf_counter()
            found = measured(name, result, at, given.clean_fraction)
            rows.append({"attack": label, "poisoned": before["poison_ratio"], "defense": name, "found": found})
            tables[head].append([name, *shown(found)])
            print(f"{head} {tables[head][-1]} ({time.perf_counter() - started:.0f} s)", flush=True)
            if isinstance(found, str):
                print(f"  {found}", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=1))

    print(f"\n{at}; {100 * given.clean_fraction:g} % of the clean training set granted")
    for head, lines in tables.items():
        print(f"\n| {head} | C-Acc | ASR | R-Acc | DER | RIR | seconds | MiB |\n" + "|---" * 8 + "|")
        for line in lines:
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
