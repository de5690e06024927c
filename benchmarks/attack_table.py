"""What the attacks reach on real colour images: C-Acc, ASR, R-Acc and seconds per epoch, as a table.

    python benchmarks/attack_table.py --data cifar10_small.npz --normalize cifar10 --flip --out runs/real
    python benchmarks/attack_table.py --data gtsrb_small.npz --normalize gtsrb --out runs/real

Every run is stored and goes on where it was stopped; a finished one is read back, not run again. ``clean`` is the same
recipe on unpoisoned data, measured with the first attack's triggers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bbfast import attacks, datasets, models, train
from bbfast.attacks import AttackResult
from bbfast.cli.stages import attack_stage, recipe_for
from bbfast.data import DataPair
from bbfast.evaluation import evaluate
from bbfast.store import Store
from bbfast.training import Recipe


def clean_row(data: DataPair, model: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Metrics of a model trained on the unpoisoned set; its ASR is what the trigger does without a backdoor."""
    import torch

    torch.manual_seed(seed)
    net = models.build(model, data.num_classes, data.image_size)
    trained = train(net, data.train, recipe, test=data.test, seed=seed, description=f"clean on {data.name}")
    triggered = attacks.create("badnets").backdoor_test(data.test, num_classes=data.num_classes)
    metrics = evaluate(net, data.test, triggered)
    return {"attack": "none (clean)", **metrics, "seconds_per_epoch": trained.seconds_per_epoch}


def attack_row(result: AttackResult, name: str) -> dict[str, Any]:
    return {"attack": name, **result.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file or the name of a data set that needs no folder")
    parser.add_argument("--normalize", default="auto")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--model", default="preactresnet18")
    parser.add_argument("--attacks", nargs="+", default=["badnets", "blended", "wanet"])
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--preset", default="quick", choices=["quick", "paper"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-clean", action="store_true", help="leave out the clean model")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    given = parser.parse_args()

    if Path(given.data).suffix == ".npz":
        data = datasets.load("npz", given.data, normalize=given.normalize, flip=given.flip)
    else:
        data = datasets.load(given.data)
    changes = {} if given.epochs is None else {"epochs": given.epochs}
    store = Store(given.out)
    rows = []
    for name in given.attacks:
        method = attacks.create(name, ratio=given.ratio)
        recipe = recipe_for(method, given.preset, data.name, given.model).replace(eval_every=0, **changes)
        made = attack_stage(store, method, data, given.model, recipe, seed=given.seed)
        rows.append(attack_row(made.result, name))
    if not given.no_clean:
        recipe = Recipe.preset(given.preset, dataset=data.name, model=given.model).replace(eval_every=0, **changes)
        rows.append(clean_row(data, given.model, recipe, given.seed))

    print(
        f"\n{data.name}: {len(data.train)} / {len(data.test)} images, {given.model}, {recipe.epochs} epochs,", end=" "
    )
    print(f"preset {given.preset}, ratio {given.ratio:g}, seed {given.seed}\n")
    print("| attack | C-Acc | ASR | R-Acc | s / epoch |")
    print("|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(f"{100 * row[key]:.2f}" for key in ("c_acc", "asr", "r_acc"))
        print(f"| {row['attack']} | {figures} | {row['seconds_per_epoch']:.1f} |")


if __name__ == "__main__":
    main()
