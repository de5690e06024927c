"""One row an attack: a clean test image, the triggered one, and their difference, amplified; docs/triggers.png.

    python benchmarks/trigger_pictures.py runs/table --out docs/triggers.png

Reads the attacks on digits that ``attack_table.py`` stored; of several runs the one nearest to the defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch

from bbfast import artifact, attacks
from bbfast._hashing import to_json
from bbfast.attacks import AttackResult
from bbfast.store import Store

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = 4
"""Attacks side by side."""


def picture(axes: Any, image: torch.Tensor, title: str, first: bool) -> None:
    pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=7, loc="left", pad=2, fontweight="bold" if first else "normal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image", type=int, default=3, help="which triggered test image")
    parser.add_argument("--out", type=Path, default=Path("docs/triggers.png"))
    given = parser.parse_args()

    runs: dict[str, list[tuple[int, Path]]] = {}
    for entry in Store(given.store).list("attack"):
        config = artifact.read(entry.path, "attack", verify="lazy").config
        if config["data"]["name"] == given.dataset:
            defaults = to_json(attacks.info(entry.name)["defaults"])
            changed = sum(defaults[key] != value for key, value in config["attack_config"].items())
            runs.setdefault(entry.name, []).append((changed, entry.path))
    found = {name: min(of_name)[1] for name, of_name in runs.items()}
    lines = -(-len(found) // COLUMNS)
    figure, grid = plt.subplots(lines, 3 * COLUMNS, figsize=(1.0 * 3 * COLUMNS, 1.2 * lines), squeeze=False, dpi=150)
    for axes in grid.flat:
        axes.set_axis_off()
    for at, name in enumerate(sorted(found)):
        result = AttackResult.load(found[name])
        triggered, number = result.backdoor_test.images[given.image], result.backdoor_test.ids[given.image]
        clean = result.test.images[(result.test.ids == number).nonzero()[0, 0]]
        difference = triggered.int() - clean.int()
        factor = max(1, 127 // max(1, int(difference.abs().max())))
        shown = (128 + factor * difference).clamp(0, 255).to(torch.uint8)
        line, column = divmod(at, COLUMNS)
        parts = ((clean, name), (triggered, "with trigger"), (shown, f"difference x{factor}"))
        for axes, (image, title) in zip(grid[line, 3 * column : 3 * column + 3], parts, strict=True):
            axes.set_axis_on()
            picture(axes, image, title, first=title == name)
    figure.tight_layout(pad=0.4, w_pad=0.4, h_pad=0.8)
    figure.savefig(given.out)


if __name__ == "__main__":
    main()
