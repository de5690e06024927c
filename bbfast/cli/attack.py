"""``bbfast attack``: poison, train, measure, store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bbfast.cli._frame import UsageFailure, command, emit_json, note, screen, usage
from bbfast.cli._options import Device, Fresh, Json, Seed, Settings, merge_settings, parse_settings

__all__ = ["register"]

_EXAMPLES = """
bbfast attack badnets --dataset digits --model small_cnn --preset quick
bbfast attack badnets --dataset cifar10 --root data --download --ratio 0.05
bbfast attack blended --dataset gtsrb --root data --set alpha=0.2
bbfast attack badnets --dataset npz --root my.npz --label-mode all2all
"""
_TRAINING = "Training"


def register(app: typer.Typer) -> None:
    @command(
        app, "attack", examples=_EXAMPLES, resume="run the same command again to go on from the last finished epoch"
    )
    def attack(
        name: Annotated[str, typer.Argument(help="The attack; `bbfast list attacks` shows them.")],
        dataset: Annotated[str, typer.Option(help="The data set; `bbfast list datasets` shows them.")] = "digits",
        root: Annotated[Path | None, typer.Option(help="Folder (npz: file) that holds the data set.")] = None,
        model: Annotated[str, typer.Option(help="The model; `bbfast list models` shows them.")] = "preactresnet18",
        ratio: Annotated[float | None, typer.Option(help="Share of the training set to poison.")] = None,
        target: Annotated[int | None, typer.Option(help="Class that triggered images shall be taken for.")] = None,
        label_mode: Annotated[str | None, typer.Option(help="all2one, all2all, clean_label or one2one.")] = None,
        settings: Settings = [],  # noqa: B006 - typer makes a new list for every call
        preset: Annotated[
            str, typer.Option(help="Recipe: paper (as published) or quick (small machines).", rich_help_panel=_TRAINING)
        ] = "paper",
        epochs: Annotated[int | None, typer.Option(help="Instead of the preset's.", rich_help_panel=_TRAINING)] = None,
        batch_size: Annotated[
            int | None, typer.Option(help="Instead of the preset's.", rich_help_panel=_TRAINING)
        ] = None,
        lr: Annotated[float | None, typer.Option(help="Instead of the preset's.", rich_help_panel=_TRAINING)] = None,
        recipe: Annotated[
            list[str],
            typer.Option(metavar="KEY=VALUE", help="Any other setting of the recipe.", rich_help_panel=_TRAINING),
        ] = [],  # noqa: B006
        pretrained: Annotated[
            bool, typer.Option("--pretrained", help="Start from ImageNet weights.", rich_help_panel=_TRAINING)
        ] = False,
        deterministic: Annotated[
            bool, typer.Option("--deterministic", help="Same seed, same bits.", rich_help_panel=_TRAINING)
        ] = False,
        data: Annotated[
            list[str], typer.Option(metavar="KEY=VALUE", help="An option of the data set; `bbfast info datasets NAME`.")
        ] = [],  # noqa: B006
        download: Annotated[
            bool, typer.Option("--download", help="Fetch the data set into --root if missing.")
        ] = False,
        seed: Seed = 0,
        device: Device = "auto",
        out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("runs"),
        fresh: Fresh = False,
        json: Json = False,
    ) -> None:
        """Train a model with a backdoor and measure it.

        The result is stored in a folder of its own under --out, named by everything that determines it: the same
        command again finds it there, and one that was interrupted goes on where it stopped.
        """
        from bbfast import attacks, datasets, models
        from bbfast.bench.stages import attack_stage, recipe_for
        from bbfast.cli.tables import show_results
        from bbfast.errors import ConfigError
        from bbfast.report.run_page import attack_row
        from bbfast.store import Store

        named = {"ratio": ratio, "target": target, "label_mode": label_mode}
        changes = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "deterministic": deterministic or None}
        with usage():
            method = attacks.create(name, **merge_settings(named, parse_settings(settings)))
            changed = merge_settings(changes, parse_settings(recipe, "--recipe"), "--recipe")
            recipe_for(method, preset, dataset, model).replace(**changed)
            datasets.info(dataset)
            models.info(model)
            options = parse_settings(data, "--data") | ({"download": True} if download else {})
        try:
            pair = datasets.load(dataset, root, **options)
        except ConfigError as error:
            raise UsageFailure(str(error)) from error
        made = attack_stage(
            Store(out.expanduser()),
            method,
            pair,
            model,
            # Chosen by the loaded data's name: an npz file of CIFAR-10 images gets the recipe of CIFAR-10.
            recipe_for(method, preset, pair.name, model).replace(**changed),
            pretrained=pretrained,
            seed=seed,
            device=device,
            fresh=fresh,
            say=note,
            about=f"training {model} on {len(pair.train)} images of {pair.name}",
        )
        if json:
            found: dict[str, Any] = {"attack": method.name, **made.result.metrics}
            emit_json({**found, "folder": made.folder, "reused": made.reused})
            return
        show_results([attack_row(made.result, made.reused)], f"{method.name} on {pair.name}, {model}")
        screen().print(f"Result: {made.folder}", markup=False, soft_wrap=True)
