"""Every analysis tool on an attacked and on a repaired model: the pictures of docs/gallery.md, and any others.

    python benchmarks/gallery.py --out docs
    python benchmarks/gallery.py --out runs/look --dataset npz --root gtsrb_small.npz --data normalize=gtsrb \\
        --attack blended --defense ft --epochs 60 --model preactresnet18 --set hessian.n=64 loss_landscape.points=5

Writes ``gallery.md`` and small pictures under ``gallery/``. Runs and full figures are kept in ``--store``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from bbfast import analysis, attacks, datasets, defenses
from bbfast.analysis import AnalysisResult
from bbfast.analysis.run import run
from bbfast.attacks import AttackResult
from bbfast.bench.stages import Made, attack_stage, defense_stage, recipe_for
from bbfast.cli._options import parse_settings, parse_settings_of
from bbfast.defenses import DefenseResult
from bbfast.errors import BBFastError
from bbfast.store import Store

WIDTH = 1000  # pixels of a picture in the documentation
COLOURS = 256
SMALLER: dict[str, dict[str, Any]] = {
    "hessian": {"n": 300, "m": 40, "probes": 2, "trace_probes": 10},
    "loss_landscape": {"points": 21},
}
"""For tools whose defaults take a CPU core an hour."""


def shrink(figure: Path, out: Path) -> None:
    """A small copy with few colours, thin lines' among them: drawings do not suffer, and a page of them stays light."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(figure) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
        small.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


def said(found: AnalysisResult) -> str:
    numbers = [(k, v) for k, v in found.summary.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers[:6])


def rates(made: Made[Any]) -> str:
    return ", ".join(
        f"{name} {100 * made.result.metrics[key]:.1f}" for key, name in (("c_acc", "C-Acc"), ("asr", "ASR"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--data", nargs="*", default=[], help="options of the data set, KEY=VALUE")
    parser.add_argument("--attack", default="badnets")
    parser.add_argument("--defense", default="nc")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tools", nargs="+", choices=analysis.available(), default=analysis.available())
    parser.add_argument("--set", nargs="*", default=[], help="settings of tools, TOOL.KEY=VALUE")
    given = parser.parse_args()
    settings = {name: dict(values) for name, values in SMALLER.items()}
    for tool, values in parse_settings_of(given.set).items():
        settings.setdefault(tool, {}).update(values)

    store, data = Store(given.store), datasets.load(given.dataset, given.root, **parse_settings(given.data, "--data"))
    attack = attacks.create(given.attack, ratio=0.1)
    recipe = recipe_for(attack, "quick", data.name, given.model).replace(epochs=given.epochs, lr=given.lr)
    attacked: Made[AttackResult] = attack_stage(store, attack, data, given.model, recipe, say=print)
    repaired: Made[DefenseResult] = defense_stage(store, defenses.create(given.defense), attacked.result, say=print)

    lines = [
        "# Gallery",
        "",
        f"Every analysis tool on {given.attack} ({data.name}, {given.model}, 10 % poisoned, seed 0; "
        f"{rates(attacked)}), and on the same model after {given.defense} ({rates(repaired)}). What to read in each is "
        "in [Analysis](analysis.md); `benchmarks/gallery.py` makes them.",
    ]
    for name in given.tools:
        card = analysis.info(name)
        less = ", ".join(f"{key} = {value}" for key, value in settings.get(name, {}).items())
        lines += ["", f"## {card['title']}", "", str(card["question"]) + (f" With {less}." if less else "")]
        for label, result, folder in (
            ("attacked", None, attacked.folder),
            (f"after {given.defense}", repaired.result, repaired.folder),
        ):
            try:
                place = store.root / "analysis" / folder.name / name
                found = run(name, attacked.result, result, place, **settings.get(name, {}))
            except BBFastError as error:
                lines += ["", f"{label}: {error}"]
                print(f"{name}, {label}: {error}", flush=True)
                continue
            assert found.figure is not None
            picture = Path("gallery") / f"{name}-{'attacked' if result is None else given.defense}.png"
            shrink(found.figure, given.out / picture)
            lines += ["", f"![{card['title']}, {label}: {said(found)}]({picture})", "", f"*{label}: {said(found)}*"]
            print(f"{name}, {label}: {found.numbers.meta['seconds']:.1f} s, {said(found)}", flush=True)
    (given.out / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
