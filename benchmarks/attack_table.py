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

import json
import math
import time
from typing import Any

import torch
from _runs import VARIANTS, Setting, arguments, class_share, make_attack

from bbfast import attacks, metrics
from bbfast.attacks import AttackResult
from bbfast.attacks.prerequisites import AttackContext, seeded_model
from bbfast.attacks.surrogate import SurrogateConfig, clean_surrogate
from bbfast.data import DataPair
from bbfast.training import predict_labels, resolve_device

COLUMNS = ("attack", "poisoned", "epochs", "C-Acc", "ASR", "R-Acc", "PSNR", "SSIM", "seconds")


def clean_accuracy(at: Setting) -> float:
    """C-Acc of a model trained on the unpoisoned set."""
    data = at.data
    context = AttackContext(
        resolve_device("auto"),
        lambda seed: seeded_model(at.model, data.num_classes, data.image_size, seed),
        at.recipe,
        data.name,
        store=at.store,
    )
    net = clean_surrogate(context, data.train, data.num_classes, SurrogateConfig(), at.seed).network
    return metrics.c_acc(predict_labels(net, data.test), data.test.labels)


def ratio_of(label: str, data: DataPair, ratio: float) -> dict[str, float]:
    """Share to poison: the variant's own, or ``ratio``, or half of the class that the attack is bound to."""
    if "ratio" in VARIANTS.get(label, {}):
        return {}
    share = class_share(label, data)
    return {"ratio": ratio if share is None else min(ratio, share / 2)}


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
    parser = arguments(__doc__)
    parser.add_argument("--attacks", nargs="+", help="all if left out")
    parser.add_argument("--ratio", type=float, default=0.1)
    given = parser.parse_args()

    at = Setting(given)
    clean = clean_accuracy(at)
    rows = []
    for label in given.attacks or attacks.available():
        started = time.perf_counter()
        rows.append(row(label, make_attack(label, at, **ratio_of(label, at.data, given.ratio))))
        print(f"{rows[-1]} ({time.perf_counter() - started:.0f} s)", flush=True)

    print(f"\n{at}; clean model: C-Acc {100 * clean:.2f}\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for values in rows:
        print("| " + " | ".join(str(values[column]) for column in COLUMNS) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps({"clean": clean, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
