"""What the tables have in common: data and recipe by command line, and attacks by label, made once and stored."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bbfast import attacks, datasets
from bbfast.attacks import AttackResult
from bbfast.bench.presets import GRIDS
from bbfast.bench.stages import attack_stage, recipe_for
from bbfast.data import DataPair
from bbfast.store import Store
from bbfast.training import Recipe

__all__ = ["VARIANTS", "Setting", "arguments", "class_share", "make_attack"]


def _works(name: str, **more: Any) -> dict[str, Any]:
    """The settings with which an attack works on the digits, those of the grid of that name."""
    entry = next(each for each in GRIDS["digits-full"]["attacks"] if isinstance(each, dict) and each["name"] == name)
    return {**entry.get("set", {}), **({"recipe": entry["recipe"]} if "recipe" in entry else {}), **more}


VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive_patch:logo and square": _works("adaptive_patch"),
    "blind:one pass": _works("blind"),
    "bpp:Adam": _works("bpp"),
    "ctrl:no crops, test 200": _works("ctrl", ratio=0.09),
    "ftrojan:no crops": {"recipe": {"augment": False}},
    "input_aware:Adam": _works("input_aware"),
    "lc:plain surrogate": {"surrogate_kind": "standard"},
    "lc:plain surrogate, eps 32, no crops": {
        "surrogate_kind": "standard",
        "eps": 32 / 255,
        "recipe": {"augment": False},
    },
    "lc:robust 30, eps 16, no crops": {
        "surrogate_epochs": 30,
        "eps": 16 / 255,
        "recipe": {"augment": False},
    },
    "lf:3 passes": {"passes": 3},
    "lira:one pass, eps 26 levels": _works("lira"),
    "narcissus:eps 64": _works("narcissus"),
    "narcissus:small surrogate, no warm-up": {
        "surrogate": "small_cnn",
        "surrogate_preset": "quick",
        "warmup_epochs": 0,
        "rounds": 300,
    },
    "narcissus:small surrogate": {"surrogate": "small_cnn", "surrogate_preset": "quick"},
    "poison_ink:quick encoder": _works("poison_ink"),
    "refool:as the reference": _works("refool"),
    "sig:class 8, test 80": _works("sig", ratio=0.08),
    "sleeper_agent:eps 64": _works("sleeper_agent"),
    "sleeper_agent:quick surrogates": {"surrogate_preset": "quick"},
    "sleeper_agent:quick surrogates, no crops": {"surrogate_preset": "quick", "recipe": {"augment": False}},
    "ssba:quick encoder": _works("ssba"),
    "tact:2 %": {"ratio": 0.02},
    "tuap:eps 76": _works("tuap", ratio=0.08),
    "tuap:eps 20": {"eps": 20 / 255},
    "tuap:eps 20, no crops": {"eps": 20 / 255, "recipe": {"augment": False}},
    "wanet:s 1": _works("wanet"),
}
"""``attack:variant`` to settings that differ from the attack's defaults, those of the recipe included. They were found
on digits, by what they reach there: a row with one of them belongs beside the row of the defaults."""


class Setting:
    """Data, recipe and store of one call.

    Args:
        given: Parsed command line, see :func:`arguments`.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        if Path(given.data).suffix == ".npz":
            self.data = datasets.load("npz", given.data, normalize=given.normalize, flip=given.flip)
        else:
            self.data = datasets.load(given.data)
        self.model, self.preset, self.seed = given.model, given.preset, given.seed
        self.store = Store(given.out)
        self.changes: dict[str, Any] = {} if given.epochs is None else {"epochs": given.epochs}
        base = Recipe.preset(given.preset, dataset=self.data.name, model=given.model)
        self.recipe = base.replace(eval_every=0, **self.changes)

    def __str__(self) -> str:
        return (
            f"{self.data.name}: {len(self.data.train)} / {len(self.data.test)} images, {self.model}, preset "
            f"{self.preset}, {self.recipe.epochs} epochs, seed {self.seed}"
        )


def arguments(text: str | None) -> argparse.ArgumentParser:
    """A parser with what :class:`Setting` reads and ``--json``; ``text`` is the script's docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file or the name of a data set that needs no folder")
    parser.add_argument("--normalize", default="auto")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--preset", default="quick", choices=["quick", "paper"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="the store")
    parser.add_argument("--json", type=Path, help="also write what was measured there")
    return parser


def class_share(label: str, data: DataPair) -> float | None:
    """Share of the training set in the classes that the attack is bound to; None if it may poison any."""
    own, defaults = VARIANTS.get(label, {}), attacks.info(label.split(":")[0])["defaults"]
    mode = own.get("label_mode", defaults["label_mode"])
    if mode not in ("clean_label", "one2one"):
        return None
    target = own.get("target", defaults["target"])
    # Sleeper Agent is tested on its source classes, but poisons the target's.
    bound = mode == "clean_label" or label.startswith("sleeper_agent")
    classes = [target] if bound else own.get("source_classes", defaults["source_classes"])
    return float(torch.isin(data.train.labels, torch.tensor(classes)).double().mean())


def make_attack(label: str, at: Setting, **settings: Any) -> AttackResult:
    """The attack ``name`` or ``name:variant`` with ``settings`` on top, from the store or made now."""
    own = {**VARIANTS.get(label, {}), **settings}
    changes = own.pop("recipe", {})
    method = attacks.create(label.split(":")[0], **own)
    recipe = recipe_for(method, at.preset, at.data.name, at.model)
    recipe = recipe.replace(eval_every=0, **{**at.changes, **changes})
    return attack_stage(at.store, method, at.data, at.model, recipe, seed=at.seed).result
