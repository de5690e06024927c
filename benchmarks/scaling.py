"""GPU-hours of the published grid, and what sharing saves: an estimate from counted passes, not a measurement.

    GPU-hours = passes (counted, scaled to each data set) * operations of a pass (counted) / sustained rate (assumed)

Counted: benchmarks/scaling_counts.json, by scaling_counts.py. The rate is a parameter; its default is what a published
training reaches: ResNet-50 at 224x224 in mixed precision on one A100, 2,470 images a second (NVIDIA
DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, README at commit 291f0d0).

python benchmarks/scaling.py [--rate 60] [--store runs/]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from scaling_counts import ATTACK_LEVELS, LEVELS, STEPS, counted, pass_flops

from bbfast import attacks, datasets, defenses
from bbfast.bench import Index, Plan, Task, load_grid, make_plan
from bbfast.store import Store
from bbfast.training import Recipe

PUBLISHED_IMAGES = 2470
OWN_EPOCHS = {"lc": 100, "ssba": 20}
"""Epochs of their own prerequisites, of ATTACK_LEVELS."""
PLAIN = "badnets"
BY_CLASS = ("nc",)
"""Work that grows with the number of classes; it was counted for ten."""
COUNTED_SIDE = 16
"""Pixels of a side of the images that were counted."""
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage computes.

    Args:
        passes: Of the victim, forward and backward, of one image.
        operations: Of other networks.
    """

    passes: float
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.passes + other.passes, self.operations + other.operations)

    def flops(self, dataset: str, model: str) -> float:
        return self.passes * _operations(dataset, model) + self.operations


class Counts:
    """Passes of a stage on a data set."""

    def __init__(self, path: Path) -> None:
        self._found = json.loads(path.read_text())
        self._sizes = self._found["sizes"]

    def knows(self, kind: str, name: str) -> bool:
        return name in self._found.get(f"{kind}s", {})

    def attack(self, name: str, dataset: str) -> tuple[Work, Work]:
        """The victim's training with its evaluation, and what its other runs find in the store."""
        recipe = Recipe.preset("paper", dataset)
        epochs = recipe.replace(**attacks.create(name).recipe_overrides(recipe)).epochs
        own = OWN_EPOCHS[name] if name in ATTACK_LEVELS else 0

        def both(*parent: str) -> tuple[float, float]:
            part = functools.partial(self._at, ("attacks", name), _train(dataset), *parent)
            return part("epoch") * epochs, part("surrogate") * recipe.epochs + part("own") * own + part("rest")

        run, once = both()
        # Networks of the attacker's: convolutions over the image, whatever the victim.
        height, width = datasets.info(dataset)["image_size"][1:]
        pixels = height * width / COUNTED_SIDE**2
        networks = both("networks") if self._found["attacks"][name][str(self._sizes[0])].get("networks") else (0, 0)
        return Work(run + _evaluation(dataset), networks[0] * pixels), Work(once, networks[1] * pixels)

    def defense(self, name: str, dataset: str) -> float:
        config = defenses.create(name).for_dataset(dataset).config
        part = functools.partial(self._at, ("defenses", name), _train(dataset))
        classes = datasets.info(dataset)["num_classes"] / 10 if name in BY_CLASS else 1.0
        total = part("rest")
        for level in LEVELS.get(name, ()):
            times = Recipe.preset("paper", dataset).epochs if level == "recipe" else getattr(config, level)
            total += part(level) * times * (classes if level == "inversion_epochs" else 1.0)
        return total + _evaluation(dataset)

    def _at(self, method: tuple[str, str], images: int, *part: str) -> float:
        """Linear in the number of training images; the hold-out is 5 % of them, here and there."""
        low, high = self._sizes
        kind, name = method
        found = self._found[kind][name]
        first, second = (functools.reduce(lambda at, key: at[key], part, found[str(size)]) for size in (low, high))
        each = (second - first) / (high - low)
        fixed = (first - each * low) * STEPS.get(name, {}).get(part[-1], 1.0)
        return max(0.0, fixed + each * images)


def _train(dataset: str) -> int:
    return int(datasets.info(dataset)["train"])


def _evaluation(dataset: str) -> float:
    """Clean and triggered test images forward, a third of a pass each."""
    return 2 * int(datasets.info(dataset)["test"]) / 3


@functools.cache
def _operations(dataset: str, model: str) -> int:
    about = datasets.info(dataset)
    return pass_flops(model, about["num_classes"], tuple(about["image_size"]))


def published_rate() -> float:
    """Operations a second of the published training, 10^12."""

    def work() -> None:
        with torch.device("meta"):
            torchvision.models.resnet50()(torch.empty(2, 3, 224, 224)).sum().backward()

    return PUBLISHED_IMAGES * counted(work) / 2 / 1e12


def methods_table(counts: Counts) -> None:
    grid, images = load_grid("paper"), _train("cifar10")
    about = f"of {grid.models[0]} on CIFAR-10 (counted, scaled to 50,000 images and the paper's settings)"
    print(f"\nEpochs' worth of passes {about}\n")
    print("| | a run | made once for all ratios |\n|---|---|---|")
    for entry in grid.attacks:
        if counts.knows("attack", entry.name):
            own = _operations("cifar10", grid.models[0]) * images
            run, once = (work.flops("cifar10", grid.models[0]) / own for work in counts.attack(entry.name, "cifar10"))
            print(f"| {entry.name} | {run:.1f} | {once:.1f} |")
    for entry in grid.defenses:
        if counts.knows("defense", entry.name):
            print(f"| {entry.name} | {counts.defense(entry.name, 'cifar10') / images:.1f} | |")


def hours(plan: Plan, counts: Counts, rate: float) -> tuple[dict[str, list[float]], dict[str, int]]:
    """By model, and of all: every cell by itself, one attack for its defenses, and prerequisites for all ratios; and
    the cells of attacks that are not counted, which stand there as plain ones: as the least that they take."""
    table: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    missing: defaultdict[str, int] = defaultdict(int)
    made: set[tuple[str, str, str]] = set()

    def add(task: Task, works: tuple[Work, Work, Work]) -> None:
        data, model = str(task.spec["data"]["name"]), str(task.spec["model"])
        values = [work.flops(data, model) / rate / 1e12 / 3600 for work in works]
        for key in (model, "all"):
            table[key] = [old + value for old, value in zip(table[key], values, strict=True)]

    for cell in plan.cells:
        if cell.task is None:
            continue
        task = plan.tasks[cell.task]
        name, data = str(task.spec["attack"]["name"]), str(task.spec["data"]["name"])
        if not counts.knows("attack", name):
            missing[name] += 1
            name = PLAIN
        run, once = counts.attack(name, data)
        if task.kind == "defense":
            own = Work(counts.defense(task.method, data))
            add(task, (run + once + own, own, own))
        else:
            place = (data, str(task.spec["model"]), name)
            add(task, (run + once, run + once, run if place in made else run + once))
            made.add(place)
    return table, missing


def measured(store: Store) -> None:
    """Seconds of each defense beside those of the attacks on the same data and model, as a store has them."""
    with Index(store) as index:
        index.refresh()
        rows: list[dict[str, Any]] = index.rows()
    attack = statistics.median(row["seconds"] for row in rows if row["stage"] == "attack" and row["seconds"])
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == "defense" and row["seconds"]:
            spent[row["defense"]].append(row["seconds"])
    print(f"\nMeasured in {store.root.name}: median seconds of an attack {attack:.1f}; of a defense, and in attacks\n")
    for name, values in sorted(spent.items()):
        seconds = statistics.median(values)
        print(f"| {name} | {seconds:.1f} | {seconds / attack:.2f} | {len(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, help="sustained 10^12 operations a second; the published one if left out")
    parser.add_argument("--store", type=Path, help="a store whose measured seconds are shown beside")
    options = parser.parse_args()
    counts, rate = Counts(HERE / "scaling_counts.json"), options.rate or published_rate()
    plan = make_plan(load_grid("paper"))
    table, missing = hours(plan, counts, rate)
    print(f"{len(plan.cells)} cells, {len(plan.tasks)} stages; assumed {rate:.0f} * 10^12 operations a second")
    methods_table(counts)
    print("\nGPU-hours (estimated)\n")
    print("| model | every cell by itself | one attack for its defenses | and prerequisites |")
    print("|---|---|---|---|")
    for model, values in table.items():
        if model != "all":
            print(f"| {model} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    print("| **all** | " + " | ".join(f"{value:,.0f}" for value in table["all"]) + " |")
    if missing:
        left = ", ".join(f"{name} {n}" for name, n in sorted(missing.items()))
        print(f"\ncells of attacks that are taken as plain training: {left}")
    if options.store:
        measured(Store(options.store))


if __name__ == "__main__":
    main()
