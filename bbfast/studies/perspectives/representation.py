"""P10: at which depth a trigger becomes a feature, which channels carry it, and what a defense changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.analysis.subject import Subject
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described, with_none
from bbfast.studies.looks import MARKERS, look
from bbfast.studies.perspectives import _depth as depth
from bbfast.studies.results import Results, Row
from bbfast.studies.statistics import nanmean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Representation"]

_TOP = 20
_SEPARABLE = 0.95


class RepresentationConfig(DataConfig):
    """Settings of the study of representations.

    Args:
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratios: Shares of the training set that are poisoned.
        defenses: Defenses that repair a model; none is always added.
        probe: Poisoned and clean training samples, of each at most, that the probes are trained on.
        n: Test images of the activations.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(
        ("badnets", "blended", {"name": "sig", "label": "sig, dirty", "set": {"label_mode": "all2one"}}), min_length=1
    )
    ratios: tuple[Share, ...] = Field((0.1,), min_length=1)
    defenses: Listed = ("ft", "fp")
    probe: int = Field(500, ge=5)
    n: int = Field(500, ge=1)


@register_study("representation")
class Representation(Study):
    """Models of attacks and defenses, layer by layer.

    ``auroc``: linear separability of poisoned training samples from clean ones of the target class in the output of a
    block, averaged over space: a logistic regression with five folds. It uses the ground truth: an analysis, no
    detector. ``neurons``: share of a layer's channels whose strongest test images are mostly triggered ones. ``gini``:
    how concentrated the change by the trigger (L2) is on few channels of a layer. ``jaccard``: overlap of the 5 % most
    changed channels and the 5 % with the largest Lipschitz bounds. ``z_top``: the change of the 20 channels that the
    trigger moves most in the attacked model, in standard deviations on clean images, in the attacked and in the
    defended model.

    Arrays (M models, a row each in the table; B blocks, L layers): ``auroc``, ``auroc_sd`` f64 ``[M, B]``; ``neurons``,
    ``gini`` f64 ``[M, L]``; ``z_top`` f64 ``[M, 20]`` (NaN where there are fewer channels). Names in ``meta``.
    """

    card = StudyCard(
        title="Representation and neurons",
        question="At which depth does the trigger become a feature, and what does a defense change there?",
        reading=(
            "A column is an attack, black is the attacked model, the other lines defended ones. First row: how well a "
            "line tells poisoned samples from clean ones of the target class after each block; 0.5 is not at all. "
            "Where the black line reaches 1, the network has a trigger feature; a defense whose line stays at 1 has "
            "only cut it off from the output. Second row: channels that fire for triggered images above all. Third "
            "row: concentration of the trigger's change, near 1 if few channels carry it (pruning can remove those), "
            "near 0 if all do. Fourth row: each thin line is one of the 20 channels that the trigger moves most, from "
            "the attacked to the defended model; lines that fall are channels that the defense has silenced."
        ),
    )
    Config = RepresentationConfig

    def grids(self) -> Sequence[Grid]:
        c = self.config
        defenses = with_none(c.defenses)
        return [c.grid(self.name, models=[c.model], attacks=c.attacks, ratios=c.ratios, defenses=defenses)]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        rows: list[dict[str, Any]] = []
        found: dict[str, list[NDArray[Any]]] = {key: [] for key in ("auroc", "auroc_sd", "neurons", "gini", "z_top")}
        names: dict[str, list[str]] = {}
        top: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
        for cell in sorted(results.rows, key=lambda row: row["defense"] != NO_DEFENSE):
            if cell["status"] != "done" or cell["c_acc"] is None:
                continue
            place = tuple(cell[key] for key in ("attack", "ratio", "seed"))
            row, arrays, names, top[place] = self._model(cell, results, top.get(place))
            rows.append(row)
            for key, values in arrays.items():
                found[key].append(values)
        plain = [row for row in rows if row["defense"] == NO_DEFENSE]
        summary: dict[str, Any] = {"models": len(rows)}
        for key in ("auroc_last", "neurons", "gini", "jaccard_top_5_percent"):
            summary[key] = float(nanmean([row[key] for row in plain]))
        return Numbers(
            {key: np.array(values) for key, values in found.items()},
            rows,
            summary,
            {
                **names,
                "attacks": [entry.label for entry in grid.attacks],
                "ratios": list(grid.ratios),
                "defenses": [entry.label for entry in grid.defenses if entry.label != NO_DEFENSE],
                "models": [{key: row[key] for key in ("attack", "ratio", "seed", "defense", "asr")} for row in rows],
                "caption": f"{described(grid)}; probes on up to 2 x {self.config.probe} training samples",
                "findings": [_finding(row) for row in rows],
            },
        )

    def _model(
        self, cell: Row, results: Results, top: list[tuple[str, int]] | None
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]], dict[str, list[str]], list[tuple[str, int]]]:
        """Row, arrays and names of a cell's model, and the channels that its attacked model's trigger moves most."""
        c = self.config
        subject = Subject(results.attack(cell), results.defense(cell), results.device, c.seeds[0])
        view = depth.probe_view(subject, c.probe)
        features = depth.pooled(subject, view.images, depth.blocks(subject.model))
        truth = view.poisoned.numpy()
        auroc = np.array([depth.probe_auroc(x, truth, c.seeds[0]) for x in features.values()])
        neurons = depth.trigger_neurons(subject, c.n)
        moved = depth.channel_changes(subject, c.n)
        if top is None:
            every = [(name, j) for name, (_, z) in moved.items() for j in range(len(z))]
            top = sorted(every, key=lambda at: -float(moved[at[0]][1][at[1]]))[:_TOP]
        z_top = np.full(_TOP, np.nan)
        z_top[: len(top)] = [moved[name][1][j] for name, j in top]
        both = depth.overlap(subject, {name: l2 for name, (l2, _) in moved.items()})
        ginis = np.array([depth.gini(l2) for l2, _ in moved.values()])
        above = np.flatnonzero(auroc[:, 0] >= _SEPARABLE)
        row: dict[str, Any] = {
            **{key: cell[key] for key in ("attack", "ratio", "seed", "defense", "c_acc", "asr")},
            "probe_samples": len(view),
            "separable_from": list(features)[above[0]] if len(above) else "",
            "auroc_first": float(auroc[0, 0]),
            "auroc_last": float(auroc[-1, 0]),
            "neurons": sum(few for few, _ in neurons.values()),
            "channels": sum(all_ for _, all_ in neurons.values()),
            "gini": float(nanmean(ginis)),
            "z_top_median": float(np.nanmedian(z_top)),
            **{key: both.get(key, float("nan")) for key in ("jaccard_top_5_percent", "spearman_tac_within_layers")},
        }
        arrays = {
            "auroc": auroc[:, 0],
            "auroc_sd": auroc[:, 1],
            "neurons": np.array([few / all_ for few, all_ in neurons.values()]),
            "gini": ginis,
            "z_top": z_top,
        }
        return row, arrays, {"blocks": list(features), "layers": list(moved)}, top

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        meta = numbers.meta
        columns = [(attack, ratio) for attack in meta["attacks"] for ratio in meta["ratios"]]
        rows = 4 if meta["defenses"] else 3
        with figure(max(4.7, 1.8 + 2.9 * len(columns)), 2.3 * rows, meta["caption"]) as made:
            axes: Any = made.subplots(rows, len(columns), sharey="row", squeeze=False)
            for own, (attack, ratio) in zip(axes.T, columns, strict=True):
                here = [
                    i
                    for i, row in enumerate(meta["models"])
                    if (row["attack"], row["ratio"]) == (attack, ratio) and row["seed"] == meta["models"][0]["seed"]
                ]
                _draw_column(own, numbers, here)
                plain = [meta["models"][i]["asr"] for i in here if meta["models"][i]["defense"] == NO_DEFENSE]
                said = f"ASR {100 * plain[0]:.0f} %" if plain else "not run"
                own[0].set_title(f"{attack}, {100 * ratio:.3g} %\n{said}")
            words = (
                "probe AUROC",
                "trigger neurons,\n% of the layer",
                "Gini of the change",
                "change of the top 20\nchannels, clean sd",
            )
            for axis, word in zip(axes[:, 0], words, strict=False):
                axis.set_ylabel(word)
            from matplotlib.lines import Line2D

            handles = [
                Line2D([], [], **_style(name, meta["defenses"]), label=name) for name in (NO_DEFENSE, *meta["defenses"])
            ]
            made.legend(handles=handles, loc="outside upper center", ncols=len(handles), title="defense")
        return made


def _finding(row: dict[str, Any]) -> str:
    name = row["attack"] + (f" and {row['defense']}" if row["defense"] != NO_DEFENSE else "")
    where = f"separable from {row['separable_from']} on" if row["separable_from"] else "nowhere separable"
    return (
        f"{name} at {100 * row['ratio']:.3g} %, seed {row['seed']} (ASR {100 * row['asr']:.0f} %): poisoned samples "
        f"are {where} (AUROC {row['auroc_first']:.2f} first, {row['auroc_last']:.2f} last); {row['neurons']} of "
        f"{row['channels']} channels are trigger neurons; mean Gini {row['gini']:.2f}; top channels move by "
        f"{row['z_top_median']:.1f} sd; overlap with the largest Lipschitz bounds {row['jaccard_top_5_percent']:.2f}."
    )


def _style(defense: str, defenses: Sequence[str]) -> dict[str, Any]:
    place = 1 + defenses.index(defense) if defense in defenses else 0
    return {**look(defense), "marker": MARKERS[place % len(MARKERS)], "ms": 4, "lw": 1.4}


def _draw_column(axes: Any, numbers: Numbers, here: Sequence[int]) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    plain = next((i for i in here if meta["models"][i]["defense"] == NO_DEFENSE), None)
    for i in here:
        name = meta["models"][i]["defense"]
        for axis, key, scale in ((axes[0], "auroc", 1), (axes[1], "neurons", 100), (axes[2], "gini", 1)):
            axis.plot(scale * arrays[key][i], clip_on=False, zorder=3, **_style(name, meta["defenses"]))
        if plain is not None and i != plain:
            at = 1.6 * meta["defenses"].index(name)
            for before, after in zip(arrays["z_top"][plain], arrays["z_top"][i], strict=True):
                axes[3].plot([at, at + 1], [before, after], color=look(name)["color"], lw=0.8, marker=".", ms=4)
    axes[0].axhline(0.5, color="#BBBBBB", lw=0.8, ls=":")
    axes[0].set(ylim=(0.4, 1.02))
    axes[2].set(ylim=(0, 1), xlabel="convolution or linear layer")
    axes[1].set(xlabel="convolution or linear layer", ylim=(0, None))
    _named(axes[0], meta["blocks"])
    for axis in axes[1:3]:
        axis.set_xticks(range(0, len(meta["layers"]), max(1, len(meta["layers"]) // 7)))
    if not meta["defenses"]:
        return
    ends = [(1.6 * k + x, word) for k, name in enumerate(meta["defenses"]) for x, word in ((0, "none"), (1, name))]
    axes[3].set_xticks([x for x, _ in ends], [word for _, word in ends])
    # Changes of one channel differ by decades from those of another.
    top = float(np.nanmax(arrays["z_top"], initial=1.0))
    axes[3].set(yscale="symlog", ylim=(0, 1.3 * top))


def _named(axis: Any, names: Sequence[str]) -> None:
    short = len(names) <= 10
    shown = names if short else [str(i) for i in range(len(names))]
    step = 1 if short else max(1, len(names) // 8)
    axis.set_xticks(
        range(0, len(names), step), shown[::step], rotation=35 if short else 0, ha="right" if short else "center"
    )
    axis.set_xlabel("after block")
