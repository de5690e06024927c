"""What the attacks reach: C-Acc beside a clean model's, ASR, R-Acc, how visible the trigger is, and seconds; a table.

    python benchmarks/attack_table.py --data digits --out runs/table
    python benchmarks/attack_table.py --data cifar10_small.npz --normalize cifar10 --flip --out runs/table
    python benchmarks/attack_table.py --data gtsrb_small.npz --normalize gtsrb --out runs/table

Every run is stored and goes on where it was stopped; a finished one is read back, not run again. The clean model is
the same recipe on unpoisoned data. Attacks that may poison one class only get half of it. ``--attacks bpp bpp:Adam``
adds the row of a variant (``VARIANTS``) to that of the defaults. PSNR and SSIM compare each triggered test image with
its original.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from bbfast import attacks, datasets, metrics
from bbfast.attacks import AttackResult
from bbfast.attacks.prerequisites import AttackContext, seeded_model
from bbfast.attacks.surrogate import SurrogateConfig, clean_surrogate
from bbfast.cli.stages import attack_stage, recipe_for
from bbfast.data import DataPair
from bbfast.store import Store
from bbfast.training import Recipe, predict_labels, resolve_device

_ADAM = {"optimizer": "adam", "lr": 0.003, "weight_decay": 0.0, "schedule": "cosine"}
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive_patch:logo and square": {"test_triggers": ("logo", "square")},
    "blind:one pass": {"history": 50, "joint_forward": True},
    "bpp:Adam": {"recipe": {**_ADAM, "epochs": 40}},
    "ctrl:no crops, test 200": {"ratio": 0.09, "target": 8, "magnitude_test": 200, "recipe": {"augment": False}},
    "ftrojan:no crops": {"recipe": {"augment": False}},
    "input_aware:Adam": {"clean_train_epochs": 12, "recipe": {**_ADAM, "epochs": 60}},
    "lc:plain surrogate": {"surrogate_kind": "standard"},
    "lf:3 passes": {"passes": 3},
    "lira:one pass, eps 26 levels": {"eps": 0.1, "eps_space": "unit", "joint_forward": True},
    "narcissus:eps 64": {
        "surrogate": "small_cnn",
        "surrogate_preset": "quick",
        "warmup_epochs": 0,
        "rounds": 100,
        "epsilon": 64,
    },
    "narcissus:small surrogate": {"surrogate": "small_cnn", "surrogate_preset": "quick"},
    "poison_ink:quick encoder": {"encoder_preset": "quick"},
    "refool:as the reference": {"compat": "reference"},
    "sig:class 8, test 80": {"ratio": 0.08, "target": 8, "delta_test": 80},
    "sleeper_agent:eps 64": {
        "surrogate_preset": "quick",
        "retrain_epochs": 15,
        "retrain_every": 20,
        "iterations": 60,
        "epsilon": 64,
    },
    "ssba:quick encoder": {"encoder_preset": "quick"},
    "tact:2 %": {"ratio": 0.02},
    "tuap:eps 76": {"ratio": 0.08, "eps": 0.298},
    "wanet:s 1": {"s": 1.0, "random_rotation": 0, "random_crop": 2, "recipe": {**_ADAM, "epochs": 100}},
}
"""``attack:variant`` to settings that differ from the attack's defaults, those of the recipe included. They were found
on digits, by what they reach there: a row with one of them belongs beside the row of the defaults."""
COLUMNS = ("attack", "poisoned", "epochs", "C-Acc", "ASR", "R-Acc", "PSNR", "SSIM", "seconds")


def clean_accuracy(data: DataPair, model: str, recipe: Recipe, seed: int, store: Store) -> float:
    """C-Acc of a model trained on the unpoisoned set."""
    context = AttackContext(
        resolve_device("auto"),
        lambda seed: seeded_model(model, data.num_classes, data.image_size, seed),
        recipe,
        data.name,
        store=store,
    )
    net = clean_surrogate(context, data.train, data.num_classes, SurrogateConfig(), seed).network
    return metrics.c_acc(predict_labels(net, data.test), data.test.labels)


def settings_for(label: str, data: DataPair, ratio: float) -> dict[str, Any]:
    """Settings of a row; the share to poison is ``ratio``, or half of the class that an attack is bound to."""
    own = dict(VARIANTS[label]) if ":" in label else {}
    defaults = attacks.info(label.split(":")[0])["defaults"]
    mode = own.get("label_mode", defaults["label_mode"])
    if mode in ("clean_label", "one2one") and "ratio" not in own:
        target = own.get("target", defaults["target"])
        # Sleeper Agent is tested on its source classes, but poisons the target's.
        bound = mode == "clean_label" or label.startswith("sleeper_agent")
        classes = [target] if bound else own.get("source_classes", defaults["source_classes"])
        own["ratio"] = min(ratio, float(torch.isin(data.train.labels, torch.tensor(classes)).double().mean()) / 2)
    return {"ratio": ratio, **own}


def quality(result: AttackResult) -> tuple[float, float]:
    """Mean PSNR (dB, over the images that changed) and mean SSIM of the triggered test images."""
    place = {number: i for i, number in enumerate(result.test.ids.tolist())}
    clean = result.test.images[torch.tensor([place[number] for number in result.backdoor_test.ids.tolist()])]
    each = metrics.psnr(result.backdoor_test.images, clean)
    changed = each[each.isfinite()]
    return float(changed.mean()) if changed.numel() else math.inf, float(
        metrics.ssim(result.backdoor_test.images, clean).mean()
    )


def row(label: str, result: AttackResult) -> dict[str, Any]:
    psnr, ssim = quality(result)
    m = result.metrics
    return {
        "attack": label.replace(":", ", "),
        "poisoned": f"{100 * m['poison_ratio']:.3g} %",
        "epochs": result.config["recipe"]["epochs"],
        **{column: f"{100 * m[key]:.2f}" for column, key in (("C-Acc", "c_acc"), ("ASR", "asr"), ("R-Acc", "r_acc"))},
        "PSNR": f"{psnr:.1f}",
        "SSIM": f"{ssim:.3f}",
        "seconds": f"{m['seconds']:.0f}",
        "metrics": {**m, "psnr": psnr, "ssim": ssim},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file or the name of a data set that needs no folder")
    parser.add_argument("--normalize", default="auto")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--attacks", nargs="+", help="all if left out")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--preset", default="quick", choices=["quick", "paper"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()

    if Path(given.data).suffix == ".npz":
        data = datasets.load("npz", given.data, normalize=given.normalize, flip=given.flip)
    else:
        data = datasets.load(given.data)
    store = Store(given.out)
    base = Recipe.preset(given.preset, dataset=data.name, model=given.model).replace(eval_every=0)
    changes: dict[str, Any] = {} if given.epochs is None else {"epochs": given.epochs}
    base = base.replace(**changes)
    clean = clean_accuracy(data, given.model, base, given.seed, store)
    rows = []
    for label in given.attacks or attacks.available():
        name, settings = label.split(":")[0], settings_for(label, data, given.ratio)
        own = settings.pop("recipe", {})
        method = attacks.create(name, **settings)
        recipe = recipe_for(method, given.preset, data.name, given.model).replace(eval_every=0, **{**changes, **own})
        started = time.perf_counter()
        made = attack_stage(store, method, data, given.model, recipe, seed=given.seed)
        rows.append(row(label, made.result))
        print(f"{rows[-1]} ({time.perf_counter() - started:.0f} s)", flush=True)

    print(
        f"\n{data.name}: {len(data.train)} / {len(data.test)} images, {given.model}, preset {given.preset}, "
        f"{base.epochs} epochs, seed {given.seed}; clean model: C-Acc {100 * clean:.2f}\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for values in rows:
        print("| " + " | ".join(str(values[column]) for column in COLUMNS) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps({"clean": clean, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
