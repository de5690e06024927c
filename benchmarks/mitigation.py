"""What mitigation gains by batching and sharing: NC's classes together, CLP, and methods that share a feature pass.

    python benchmarks/mitigation.py --data cifar10_small.npz --normalize cifar10 --model preactresnet18

Side by side in one run on the same model, data and hold-out. The model is trained for ``--epochs`` epochs on a tenth of
poisoned images; what is timed hardly depends on how well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _runs import Setting, arguments, make_attack

from bbfast import defend, defenses
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult

PASSES: dict[str, dict[str, Any]] = {"ac": {}, "ss": {}, "ep": {}, "bnp": {}}


def clocked(work: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def inversion(result: AttackResult, epochs: int, repeats: int) -> None:
    """NC's inversion of all classes in one batch against one class after another."""
    count = 1 + int(result.clean_train.labels.max())
    common = {"inversion_epochs": epochs, "unlearn_epochs": 0, "amp": "off"}

    def run(classes: Sequence[int] | None) -> DefenseResult:
        return defend(defenses.create("nc", classes=classes, **common), result, progress=False)

    together, after, apart = [], [], 0.0
    for _ in range(repeats):
        whole = run(None)
        together.append(whole.info["seconds_inversion"])
        singles = [run((k,)) for k in range(count)]
        after.append(sum(single.info["seconds_inversion"] for single in singles))
        masks = [(whole.trigger[k]["mask"], singles[k].trigger[k]["mask"]) for k in range(count)]
        apart = max(apart, *(float((one - other).abs().max()) for one, other in masks))
    print(
        f"nc, {count} classes, {epochs} passes: together {min(together):.2f} s, one after another {min(after):.2f} s: "
        f"{min(after) / min(together):.2f} times; masks at most {apart:.1e} apart"
    )


def lipschitz(result: AttackResult, repeats: int) -> None:
    seconds = [clocked(lambda: defend("clp", result))[1].seconds for _ in range(repeats)]
    print(f"clp: {min(seconds):.2f} s")


def passes(result: AttackResult, repeats: int) -> None:
    """AC and SS (detection only), EP and BNP: with one cache against each by itself."""

    def each(cache: defenses.FeatureCache | None) -> dict[str, float]:
        methods = [defenses.create(n, **defenses.find(n).Config.detect_only, **own) for n, own in PASSES.items()]
        return {m.name: clocked(lambda m=m: defend(m, result, cache=cache))[0] for m in methods}  # type: ignore[misc]

    alone, shared = [], []
    for _ in range(repeats):
        alone.append(each(None))
        shared.append(each(defenses.FeatureCache()))
    one, other = (min(runs, key=lambda run: sum(run.values())) for runs in (alone, shared))
    print(
        f"{' + '.join(PASSES)}: each its own {sum(one.values()):.2f} s, shared {sum(other.values()):.2f} s: "
        f"{sum(one.values()) / sum(other.values()):.2f} times"
    )
    for name in PASSES:
        print(f"  {name}: {one[name]:.2f} s, {other[name]:.2f} s")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inversion-epochs", type=int, default=10)
    given = parser.parse_args()
    at = Setting(given)
    result = make_attack("badnets", at)
    print(f"{at}; {torch.get_num_threads()} threads")
    lipschitz(result, given.repeats)
    passes(result, given.repeats)
    inversion(result, given.inversion_epochs, given.repeats)


if __name__ == "__main__":
    main()
