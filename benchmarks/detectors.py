"""Detectors that share a pass against each alone, and where STRIP's time goes; side by side in one run.

    python benchmarks/detectors.py --data cifar10_small.npz --normalize cifar10 --model preactresnet18

The model is trained for ``--epochs`` epochs on a tenth of poisoned images; what is timed hardly depends on how well.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from bbfast import attack, attacks, datasets, defend, defenses
from bbfast.attacks import AttackResult
from bbfast.defenses import Defense
from bbfast.training import Recipe

FEATURES = ("ac", "ss", "scan", "spectre", "beatrix")


def detectors() -> list[Defense]:
    """Those that read features, all of the training set."""
    own: dict[str, dict[str, Any]] = {"beatrix": {"stage": "train"}}
    return [defenses.create(n, **defenses.find(n).Config.detect_only, **own.get(n, {})) for n in FEATURES]


def compare(result: AttackResult, repeats: int) -> None:
    """Time ``detect_all`` against one ``defend`` after the other, alternating."""
    shared, alone, parts = [], [], {}
    for _ in range(repeats):
        started = time.perf_counter()
        found = defenses.detect_all(result, detectors())
        shared.append(time.perf_counter() - started)
        total = 0.0
        for method in detectors():
            started = time.perf_counter()
            single = defend(method, result)
            total += time.perf_counter() - started
            parts[method.name] = (single.seconds, found[method.name].seconds, single.metrics["peak_memory_bytes"])
        alone.append(total)
    best = min(shared), min(alone)
    print(f"together {best[0]:.2f} s, each alone {best[1]:.2f} s: {best[1] / best[0]:.2f} times")
    passes = max(found[name].metrics["seconds_shared"] for name in FEATURES)
    print(f"  the shared passes {passes:.2f} s")
    for name, (one, own, memory) in parts.items():
        print(f"  {name}: alone {one:.2f} s, after the shared pass {own:.2f} s, peak {memory / 2**20:.0f} MiB alone")


def split(result: AttackResult, overlays: int) -> None:
    """Share of STRIP's time that is not the network's forward pass."""
    kind = type(result.model)
    plain, spent = kind.forward, [0.0]

    def timed(self: torch.nn.Module, x: torch.Tensor) -> Any:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        started = time.perf_counter()
        out = plain(self, x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        spent[0] += time.perf_counter() - started
        return out

    kind.forward = timed  # type: ignore[method-assign]
    try:
        found = defend(defenses.create("strip", stage="train", overlays=overlays), result)
    finally:
        kind.forward = plain  # type: ignore[method-assign]
    rest = found.seconds - spent[0]
    print(
        f"strip, {len(result.train)} images x {found.info['overlays']} overlays: {found.seconds:.1f} s, forward "
        f"{spent[0]:.1f} s, the rest {rest:.2f} s = {100 * rest / found.seconds:.1f} %, "
        f"peak {found.metrics['peak_memory_bytes'] / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file or the name of a data set that needs no folder")
    parser.add_argument("--normalize", default="auto")
    parser.add_argument("--model", default="preactresnet18")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--overlays", type=int, default=100)
    parser.add_argument("--strip-images", type=int, default=500)
    given = parser.parse_args()
    if Path(given.data).suffix == ".npz":
        data = datasets.load("npz", given.data, normalize=given.normalize)
    else:
        data = datasets.load(given.data)
    recipe = Recipe.preset("quick", dataset=data.name, model=given.model).replace(epochs=given.epochs, eval_every=0)
    result = attack(attacks.create("badnets", ratio=0.1), data, given.model, recipe)
    print(f"{data.name}, {len(data.train)} training images, {given.model}, {torch.get_num_threads()} threads")
    compare(result, given.repeats)
    few = dataclasses.replace(data, train=data.train[: given.strip_images], fingerprint="")
    split(attack(attacks.create("badnets", ratio=0.1), few, given.model, recipe), given.overlays)


if __name__ == "__main__":
    main()
