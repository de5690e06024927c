"""``bbfast demo``: the main job on the embedded data: one attack, five defenses, one table, one page."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast._version import __version__
from bbfast.cli._frame import command, emit_json, note, screen
from bbfast.cli._options import Device, Fresh, Json, Seed

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.bench.stages import Made
    from bbfast.report.run_page import Finished
    from bbfast.store import Store

__all__ = ["DEFENSES", "Demo", "register", "run_demo"]

DATASET, MODEL, ATTACK, RATIO = "digits", "small_cnn", "badnets", 0.1
RECIPE = {"epochs": 20, "lr": 0.05, "eval_every": 1}
"""On top of the quick preset: longer, so that the attack is as strong with any seed, and measured after every epoch."""
DEFENSES = ("nc", "fp", "ft", "ac", "strip")
CLEAN_FRACTION = 0.05
PAGE = "index.html"
AC_REMARK = (
    "ac (Activation Clustering) tells poison by the size of its cluster: with ten classes, 10 % poison is half of the "
    "target class, where size tells nothing."
)

_ATTACK_KEYS = ("c_acc", "asr", "r_acc")
_DEFENSE_KEYS = (*_ATTACK_KEYS, "der", "rir", "tpr", "fpr", "auroc")


@dataclass(frozen=True)
class Demo:
    """What the demo made: the attack, the defenses, the wall time of this run and where the results lie."""

    attack: Made[AttackResult]
    defenses: Sequence[Finished]
    seconds: float
    out: Path
    page: Path


def register(app: typer.Typer) -> None:
    @command(
        app,
        "demo",
        examples="bbfast demo\nbbfast demo --json\nbbfast demo --out /tmp/demo --seed 1 --fresh",
        resume="run it again to go on; stages that were finished are not run again",
    )
    def demo(
        out: Annotated[Path, typer.Option(help="Folder of the results and the page.")] = Path("runs/demo"),
        seed: Seed = 0,
        device: Device = "auto",
        fresh: Fresh = False,
        json: Json = False,
    ) -> None:
        """Attack a small network with BadNets on handwritten digits and try five defenses on it.

        Needs no GPU, no download and less than two minutes. Ends with a table and a page with pictures.
        """
        from bbfast.cli.tables import show_results
        from bbfast.report.run_page import attack_row, defense_row

        done = run_demo(out.expanduser(), seed=seed, device=device, fresh=fresh)
        if json:
            emit_json(summary(done))
            return
        rows = [attack_row(done.attack.result, done.attack.reused), *map(defense_row, done.defenses)]
        show_results(rows, f"{ATTACK} on {DATASET}, {MODEL}, {100 * RATIO:g} % poisoned")
        console = screen()
        for remark in remarks(done.defenses):
            console.print(remark, style="dim")
        console.print(f"Took {done.seconds:.1f} s. Results: {done.out}", markup=False, soft_wrap=True)
        console.print(f"Page: {done.page}", markup=False, soft_wrap=True)


def run_demo(out: Path, *, seed: int = 0, device: str = "auto", fresh: bool = False) -> Demo:
    """Run what is not in the store at ``out`` yet, and write the page.

    Args:
        out: Store of the results; the page lies beside them.
        seed: Seed of the attack and of every defense.
        device: Where to work.
        fresh: Run everything again.
    """
    from bbfast import attacks, datasets
    from bbfast.bench.stages import attack_stage, recipe_for
    from bbfast.report.page import write
    from bbfast.report.run_page import run_page
    from bbfast.store import Store

    start = time.perf_counter()
    store = Store(out)
    data = datasets.load(DATASET)
    method = attacks.create(ATTACK, ratio=RATIO)
    recipe = recipe_for(method, "quick", data.name, MODEL).replace(**RECIPE)
    with _one_thread():
        attack = attack_stage(
            store,
            method,
            data,
            MODEL,
            recipe,
            seed=seed,
            device=device,
            fresh=fresh,
            say=note,
            about=f"training {MODEL} on {len(data.train)} images, {recipe.epochs} epochs",
        )
        finished = _defend(store, attack.result, seed, device, fresh)
    facts = {
        "Folder": str(out.resolve()),
        "Seed": str(seed),
        "Made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "With": ", ".join(f"{k} {v}" for k, v in {"bbfast": __version__, **_versions()}.items()),
    }
    commands = _commands(out, seed, attack.folder)
    page = run_page(
        attack.result,
        finished,
        reused=attack.reused,
        remarks=remarks(finished),
        commands=commands,
        facts=facts,
    )
    written = write(page, out / PAGE)
    return Demo(attack, finished, time.perf_counter() - start, out, written)


def remarks(finished: Sequence[Finished]) -> list[str]:
    """What a reader who does not know the methods may wonder about in these figures."""
    missed = any(done.name == "ac" and done.result.metrics.get("tpr", 1.0) < 0.5 for done in finished)
    return [AC_REMARK] if missed else []


def _defend(store: Store, attack: AttackResult, seed: int, device: str, fresh: bool) -> list[Finished]:
    from bbfast import defenses
    from bbfast.bench.stages import defense_stage
    from bbfast.report.run_page import Finished

    finished = []
    cache = defenses.FeatureCache()
    for name in DEFENSES:
        defense = defenses.create(name)
        made = defense_stage(
            store,
            defense,
            attack,
            clean_fraction=CLEAN_FRACTION,
            seed=seed,
            device=device,
            fresh=fresh,
            cache=cache,
            say=note,
            about=defense.card.title,
        )
        finished.append(Finished(name, made.result, made.folder, made.reused))
    return finished


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for the block.

    A network this small gains little from a second thread and loses much where another program wants the core: each of
    its many short steps waits for the slower thread. With one, the figures do not depend on the number of cores either.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(done: Demo) -> dict[str, Any]:
    """The figures as ``--json`` prints them; what does not apply to a defense is left out."""
    attack = done.attack.result.metrics
    return {
        "attack": {
            **{key: attack[key] for key in _ATTACK_KEYS},
            "seconds": attack["seconds"],
            "reused": done.attack.reused,
        },
        "defenses": {
            finished.name: {
                **{
                    key: finished.result.metrics[key]
                    for key in _DEFENSE_KEYS
                    if _defined(finished.result.metrics.get(key))
                },
                "seconds": finished.result.seconds,
                "reused": finished.reused,
            }
            for finished in done.defenses
        },
        "seconds": done.seconds,
        "out": done.out,
        "page": done.page,
    }


def _defined(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _versions() -> dict[str, str]:
    import torch

    return {"torch": str(torch.__version__), "Python": platform.python_version()}


def _commands(out: Path, seed: int, attack: Path) -> list[str]:
    """Command lines that find or make the same results in the same folder."""
    common = f" --seed {seed}" if seed else ""
    recipe = "--preset quick --epochs {epochs} --lr {lr:g} --recipe eval_every={eval_every}".format(**RECIPE)
    return [
        f"bbfast demo --out {out}{common}",
        f"bbfast attack {ATTACK} --dataset {DATASET} --model {MODEL} --ratio {RATIO:g} {recipe} --out {out}{common}",
        *(f"bbfast defend {n} --attack {attack} --clean-fraction {CLEAN_FRACTION:g}{common}" for n in DEFENSES),
    ]
