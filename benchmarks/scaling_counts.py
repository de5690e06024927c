"""How much a method computes, in passes over images: floating-point operations counted, no time measured.

Every method of the published grid runs on small stand-in sets (digits at 16x16 called cifar10, so that it takes the
settings of CIFAR-10), with one epoch where it has many. Counts are linear in epochs, steps and images by construction;
what depends on them is found from runs that differ in one of them:

    F = sum over terms of (a + b * N) * level

A pass is what one image costs forward and backward through the victim. Matrix products and convolutions are counted,
of every network, whatever derivative; singular value decompositions, k-means, sorting and pixel arithmetic are not.

python benchmarks/scaling_counts.py --out benchmarks/scaling_counts.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bbfast import attacks, datasets, defenses
from bbfast.attacks import AttackResult
from bbfast.attacks.prerequisites import AttackContext
from bbfast.bench import load_grid
from bbfast.data import DataPair, ImageSet
from bbfast.errors import BBFastError
from bbfast.models import build
from bbfast.training import Recipe

SIZES = (1280, 2560)
MODEL = "small_cnn"
# Levels that work is linear in; what is not listed runs as it is. ``recipe`` is epochs of the victim's recipe.
LEVELS: dict[str, tuple[str, ...]] = {
    "ft": ("epochs",),
    "fp": ("epochs",),
    "nad": ("teacher_epochs", "epochs"),
    "nc": ("inversion_epochs", "unlearn_epochs"),
    "anp": ("iters",),
    "abl": ("tuning_epochs", "finetune_epochs", "unlearn_epochs"),
    "i_bau": ("rounds",),
    "d_br": ("train_epochs", "sep_epochs", "rounds"),
    "d_st": ("train_epochs", "sep_epochs", "ssl_epochs", "warmup_epochs", "cls_epochs"),
    "dbd": ("ssl_epochs", "warmup_epochs", "semi_epochs"),
    "ac": ("recipe",),
    "ss": ("recipe",),
}
ATTACK_LEVELS = {"lc": "surrogate_epochs", "ssba": "encoder_epochs"}
OWN_NETWORKS = ("input_aware", "lira", "ssba")
"""Attacks that train networks of their own, whose operations do not depend on the victim."""
OTHER_MODEL = "resnet18"
"""A second victim, of another cost: what does not grow with the victim's is the networks'."""
EPOCHS = {"input_aware": (8, 16), "lira": (6, 12)}
"""Epochs of the two runs, (2, 4) else: these have phases that are parts of the whole."""
# blind: the second loss from the start, which is the most it takes. dbd: fewer steps of an epoch than its 1024.
# nc: it always finds a trigger to unlearn.
FIXED: dict[str, dict[str, Any]] = {
    "blind": {"history": 1, "threshold": 100.0},
    "dbd": {"semi_iters": 16},
    "nc": {"asr_threshold": 0.01, "anomaly_threshold": 1e-6},
}
STEPS: dict[str, dict[str, float]] = {"dbd": {"semi_epochs": 1024 / 16}}
"""What of a level's count does not grow with the images stands for so many times more: steps that were left out."""
LONG = ("trojannn", "lf", "input_aware", "lira", "d_br", "d_st", "dbd", "ssba", "lc")
"""Counted last."""


class Count(TorchDispatchMode):
    """Floating-point operations of everything that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


def counted(work: Callable[[], object]) -> int:
    with Count() as count:
        work()
    return count.flops


def pass_flops(model: str, classes: int, size: tuple[int, int, int]) -> int:
    """One image forward and backward, as training does it: no gradient of the images."""

    def work() -> None:
        with torch.device("meta"):
            net = build(model, classes, size)
            net(torch.empty(2, *size)).sum().backward()

    return counted(work) // 2


def stand_in(count: int) -> DataPair:
    pair = datasets.load("digits")
    shrunk = torch.nn.functional.interpolate
    train, test = (
        ImageSet(shrunk(part.images.float(), scale_factor=0.5).round().to(torch.uint8), part.labels)
        for part in (pair.train, pair.test)
    )
    return DataPair(train.subset(torch.arange(count) % len(train)), test, name="cifar10", num_classes=10)


@contextmanager
def prerequisites(count: Count, spent: list[int]) -> Iterator[None]:
    """Note what attacks spend on what later runs find in the store."""
    plain = AttackContext.obtain

    def noted(self: AttackContext, *args: Any, **kwargs: Any) -> Any:
        before = count.flops
        found = plain(self, *args, **kwargs)
        spent.append(count.flops - before)
        return found

    AttackContext.obtain = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttackContext.obtain = plain  # type: ignore[method-assign]


def attack_flops(name: str, data: DataPair, model: str, epochs: int, level: int = 1) -> tuple[int, int]:
    """Of the victim's training, and of the prerequisites, with nothing in the store."""
    own = {ATTACK_LEVELS[name]: level} if name in ATTACK_LEVELS else {}
    method = attacks.create(name, ratio=0.05, **FIXED.get(name, {}), **own)
    recipe = Recipe.preset("paper", "cifar10", model)
    recipe = recipe.replace(**method.recipe_overrides(recipe)).replace(epochs=epochs, eval_every=0)
    spent: list[int] = []
    with tempfile.TemporaryDirectory() as store, Count() as count, prerequisites(count, spent):
        attacks.attack(method, data, model, recipe, device="cpu", store=store, progress=False)
    return count.flops - sum(spent), sum(spent)


def defense_flops(name: str, attack: AttackResult, settings: Mapping[str, Any]) -> int:
    own = dict(settings)
    recipe = Recipe.preset("paper", "cifar10", MODEL).replace(epochs=own.pop("recipe", 1), eval_every=0)
    method = defenses.create(name, **{**FIXED.get(name, {}), **own})
    return counted(lambda: defenses.defend(method, attack, device="cpu", progress=False, recipe=recipe))


def attack_parts(name: str, data: DataPair, model: str) -> dict[str, float]:
    """Operations of an epoch of the victim (``epoch``) and, of what later runs find in the store, for each of the
    victim's epochs (``surrogate``), for each epoch of its own (``own``), and once (``rest``)."""
    low, high = EPOCHS.get(name, (2, 4))
    (first, needed), (second, later) = (attack_flops(name, data, model, epochs) for epochs in (low, high))
    surrogate = (later - needed) / (high - low)
    own = attack_flops(name, data, model, low, 2)[1] - needed if name in ATTACK_LEVELS else 0.0
    rest = needed - low * surrogate - own
    return {"epoch": (second - first) / (high - low), "surrogate": surrogate, "own": own, "rest": rest}


def count_attack(name: str, sets: Mapping[int, DataPair], one: int) -> dict[str, Any]:
    """Passes at each size by :func:`attack_parts`, and in ``networks`` the operations of networks of its own."""
    found: dict[str, Any] = {}
    for size, data in sets.items():
        parts, networks = attack_parts(name, data, MODEL), dict[str, float]()
        if name in OWN_NETWORKS:
            cost = pass_flops(OTHER_MODEL, 10, data.image_size)
            other = attack_parts(name, data, OTHER_MODEL)
            passes = {part: (other[part] - parts[part]) / (cost - one) for part in parts}
            networks = {part: parts[part] - passes[part] * one for part in parts}
        else:
            passes = {part: value / one for part, value in parts.items()}
        found[str(size)] = {**passes, "networks": networks}
    return found


def count_defense(name: str, results: Mapping[int, AttackResult], one: int) -> dict[str, Any]:
    """Passes of one more of each level, and of the rest, at each size."""
    found: dict[str, Any] = {}
    levels = LEVELS.get(name, ())
    for size, attack in results.items():
        lowest = dict.fromkeys(levels, 1)
        base = defense_flops(name, attack, lowest)
        slopes = {level: (defense_flops(name, attack, {**lowest, level: 2}) - base) / one for level in levels}
        rest = base / one - sum(slopes.values())
        found[str(size)] = {**slopes, "rest": rest}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; methods that are in it are not counted again")
    parser.add_argument("--methods", nargs="*", help="only these")
    options = parser.parse_args()
    grid = load_grid("paper")
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    sets = {size: stand_in(size) for size in SIZES}
    one = pass_flops(MODEL, 10, sets[SIZES[0]].image_size)
    known |= {"sizes": list(SIZES), "model": MODEL, "torch": torch.__version__, "pass_flops": one}
    recipe = Recipe(epochs=2, eval_every=0)
    results = {
        size: attacks.attack("badnets", data, MODEL, recipe, device="cpu", progress=False)
        for size, data in sets.items()
    }
    jobs = [("defenses", entry.name) for entry in grid.defenses if entry.name != "none"]
    jobs += [("attacks", entry.name) for entry in grid.attacks]
    jobs.sort(key=lambda job: job[1] in LONG)
    for kind, name in jobs:
        if name in known.get(kind, {}) or (options.methods and name not in options.methods):
            continue
        started = time.perf_counter()
        try:
            one_of = count_attack(name, sets, one) if kind == "attacks" else count_defense(name, results, one)
        except (BBFastError, ValueError) as error:
            print(f"{name}: {error}", flush=True)
            continue
        known.setdefault(kind, {})[name] = one_of
        options.out.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {json.dumps(one_of)} ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
