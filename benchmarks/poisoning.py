"""How long an attack takes to poison a training set: of all that need no trained surrogate or encoder.

    python benchmarks/poisoning.py --data cifar10.npz [--repeats 3] [--json out.json]

``--data`` is an .npz file of images; with CIFAR-10 that is 50,000 of them. Set against a copy of the whole set, which
every poisoned set contains. Input-Aware and LIRA make their triggers by networks of their own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _timing import header, write_json

from bbfast import attacks, datasets
from bbfast.errors import BBFastError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    given = parser.parse_args()
    facts = header(torch.device("cpu"))
    train = datasets.load("npz", given.data).train
    rows: list[dict[str, Any]] = []
    for name in attacks.available():
        info = attacks.info(name)
        if info["needs"]:
            continue
        clean = info["defaults"]["label_mode"] == "clean_label"
        method = attacks.create(name, ratio=0.05 if clean else 0.1)
        times = []
        try:
            for _ in range(given.repeats):
                started = time.perf_counter()
                found = method.poison(train, seed=0)
                times.append(time.perf_counter() - started)
        except BBFastError as error:
            print(f"{name}: {error}")
            continue
        started = time.perf_counter()
        train.images.clone()
        copy = time.perf_counter() - started
        poisoned = int(found.poisoned.sum())
        rows.append({"attack": name, "images": len(train), "poisoned": poisoned, "seconds": min(times), "copy": copy})
        print(f"{name}: {poisoned} of {len(train)}, {min(times):.2f} s, a copy of the set {copy:.2f} s", flush=True)
    write_json(given.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
