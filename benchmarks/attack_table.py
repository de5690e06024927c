"""What the attacks reach: C-Acc beside a clean model's, ASR, R-Acc, how visible the trigger is, and seconds; a table.

    python benchmarks/attack_table.py --data digits --out runs/table
    python benchmarks/attack_table.py --data cifar10_small.npz --normalize cifar10 --flip --out runs/table
    python benchmarks/attack_table.py --data gtsrb_small.npz --normalize gtsrb --out runs/table

Every run is stored and goes on where it was stopped; a finished one is read back, not run again. The clean model is
the same recipe on unpoisoned data. Attacks that may poison one class only get half of it; ``SETTINGS`` holds what else
differs from an attack's defaults. PSNR and SSIM compare each triggered test image with its original.
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

SETTINGS: dict[str, dict[str, Any]] = {}
"""By attack: settings that differ from the defaults; ``epochs`` is one of the recipe."""
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


def settings_for(name: str, data: DataPair, ratio: float) -> dict[str, Any]:
    """The share to poison: ``ratio``, or half of the class that an attack is bound to."""
    own = dict(SETTINGS.get(name, {}))
    defaults = attacks.info(name)["defaults"]
    mode = own.get("label_mode", defaults["label_mode"])
    if mode in ("clean_label", "one2one") and not {"ratio", "count"} & own.keys():
        sources = (
            [defaults["target"]] if mode == "clean_label" else own.get("source_classes", defaults["source_classes"])
        )
        available = int(torch.isin(data.train.labels, torch.tensor(sources)).sum())
        own["ratio"] = min(ratio, available / 2 / len(data.train))
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


def row(name: str, result: AttackResult) -> dict[str, Any]:
    psnr, ssim = quality(result)
    m = result.metrics
    return {
        "attack": name,
        "poisoned": f"{100 * m['poison_ratio']:.3g} %",
        "epochs": result.config["recipe"]["epochs"],
        **{label: f"{100 * m[key]:.2f}" for label, key in (("C-Acc", "c_acc"), ("ASR", "asr"), ("R-Acc", "r_acc"))},
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
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="settings of every attack named")
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
    for name in given.attacks or attacks.available():
        settings = {
            **settings_for(name, data, given.ratio),
            **{k: json.loads(v) for k, v in (s.split("=", 1) for s in given.set)},
        }
        own = {"epochs": settings.pop("epochs")} if "epochs" in settings else {}
        method = attacks.create(name, **settings)
        recipe = recipe_for(method, given.preset, data.name, given.model).replace(eval_every=0, **{**own, **changes})
        started = time.perf_counter()
        made = attack_stage(store, method, data, given.model, recipe, seed=given.seed)
        rows.append(row(name, made.result))
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
