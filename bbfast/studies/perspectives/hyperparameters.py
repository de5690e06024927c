"""P5: settings of attacks and defenses, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import cube, described, with_none
from bbfast.studies.looks import look, series
from bbfast.studies.panels import label_edges, make_panels, panel_size
from bbfast.studies.perspectives._sweep_panels import draw_boxes, draw_lines
from bbfast.studies.perspectives._sweeps import Sweep, area, clean_fraction_sweep, gap, sweep_of
from bbfast.studies.results import Results, table
from bbfast.studies.statistics import nanmean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Hyperparameters"]

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
_BOXES = ("target", "source_classes")
"""Settings whose values have no order: drawn as boxes over all of them."""


class HyperparametersConfig(DataConfig):
    """Settings of the study of hyper-parameters.

    Args:
        model: Name of the model.
        ratio: Share of the training set that is poisoned.
        attacks: Attacks that settings of defenses are tried on: names, or mappings with name, label and set.
        defenses: Defenses that settings of attacks are tried on.
        attack_sweeps: Attack to setting to values, as {badnets: {target: [0, 1]}}; settings joined by + move together;
            a mapping as a value sets all that it names.
        defense_sweeps: Defense to setting to values.
        clean_fractions: Shares of clean images that a defender holds, for the defenses of clean_fraction_of.
        clean_fraction_of: Defenses that are run with each of clean_fractions.
    """

    model: str = "small_cnn"
    ratio: Share = 0.1
    attacks: Listed = Field(("badnets", "blended"), min_length=1)
    defenses: Listed = Field(("ft", "clp"), min_length=1)
    attack_sweeps: dict[str, dict[str, Values]] = Field(
        default={
            "badnets": {"square_size": (1, 2, 4), "target": (2, 5, 8)},
            "blended": {"train_alpha+test_alpha": (0.05, 0.1)},
        }
    )
    defense_sweeps: dict[str, dict[str, Values]] = Field(
        default={"ft": {"epochs": (10, 30), "lr": (0.005, 0.1)}, "clp": {"u": (1.0, 2.0, 4.0)}}
    )
    clean_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.02, 0.1)
    clean_fraction_of: tuple[str, ...] = ("ft",)


@register_study("hyperparameters")
class Hyperparameters(Study):
    """DER over the settings of attacks and defenses, each varied alone around the defaults.

    For each curve (a defense in an attack's sweep, an attack in a defense's) of DER, mean over seeds: the area under it
    with its points evenly spaced over a width of one, a default that follows from the data left out; and what the best
    value gains over the default. ``target`` and ``source_classes``, whose values have no order, are drawn as boxes.

    Arrays (for panel i with V values, L lines, S seeds): ``der_<i>``, ``asr_<i>``, ``c_acc_<i>`` f64 ``[V, L, S]``;
    ``attack_asr_<i>`` f64 ``[V, S]`` for a sweep of an attack: its ASR without a defense; ``area``, ``gap`` f64
    ``[panels, lines]``, NaN where a panel has fewer lines. Table: a row a cell, ``sweep`` first.
    """

    card = StudyCard(
        title="Sensitivity to hyper-parameters",
        question="How much of a result hangs on the settings it was measured with?",
        reading=(
            "A panel is one setting of an attack or a defense, its values evenly spaced, the default marked by the "
            "dotted line; y is DER. In an attack's panels a line is a defense and the grey area the ASR without any: "
            "look for settings that are still a working attack where the coloured lines are low. In a defense's "
            "panels a line is an attack: a curve that peaks away from the dotted line is a default that was not made "
            "for this case, one that is flat a setting that does not matter. Boxes show all target or source classes "
            "at once, a star the default: a tall box says that one class is not enough."
        ),
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
    )
    Config = HyperparametersConfig

    def sweeps(self) -> list[Sweep]:
        """All sweeps, attacks' first.

        Raises:
            ConfigError, UnknownNameError: naming the method or setting.
        """
        config = self.config
        found = [
            sweep_of(kind, method, key, values, config.dataset)
            for kind, sweeps in (("attack", config.attack_sweeps), ("defense", config.defense_sweeps))
            for method, settings in sweeps.items()
            for key, values in settings.items()
        ]
        if config.clean_fractions:
            shares = config.clean_fractions, config.clean_fraction
            found += [clean_fraction_sweep(name, *shares) for name in config.clean_fraction_of]
        if not found:
            raise ValueError("study 'hyperparameters': attack_sweeps, defense_sweeps and clean_fractions are all empty")
        return found

    def grids(self) -> Sequence[Grid]:
        config, grids = self.config, []
        common = {"models": [config.model], "ratios": [config.ratio]}
        for sweep in self.sweeps():
            if sweep.key == "clean_fraction":
                for share, label in zip(sweep.values, sweep.labels(), strict=True):
                    own = {"attacks": config.attacks, "defenses": with_none([sweep.method]), "clean_fraction": share}
                    grids.append(config.grid(label, **common, **own))
            elif sweep.kind == "attack":
                own = {"attacks": sweep.entries(), "defenses": with_none(config.defenses)}
                grids.append(config.grid(sweep.title, **common, **own))
            else:
                own = {"attacks": config.attacks, "defenses": [NO_DEFENSE, *sweep.entries()]}
                grids.append(config.grid(sweep.title, **common, **own))
        return grids

    def measure(self, results: Results) -> Numbers:
        seeds = list(self.config.seeds)
        arrays: dict[str, Any] = {}
        panels, areas, gaps = [], [], []
        for i, sweep in enumerate(self.sweeps()):
            lines, found = self._of(results, sweep, seeds)
            arrays |= {f"{key}_{i}": found[key] for key in ("der", "asr", "c_acc")}
            if sweep.kind == "attack":
                arrays[f"attack_asr_{i}"] = found["attack_asr"][:, 0]
            mean = nanmean(found["der"], 2)
            ordered = np.array([value is not None for value in sweep.values])
            boxed = sweep.key in _BOXES
            areas.append([float("nan") if boxed else area(column[ordered]) for column in mean.T])
            gaps.append([gap(column, sweep.default) for column in mean.T])
            panels.append(
                {
                    "title": f"{sweep.method}: {sweep.key.replace('+', ', ')}",
                    "kind": sweep.kind,
                    "boxes": boxed,
                    "texts": sweep.texts,
                    "default": sweep.default,
                    "auto": sweep.values[0] is None,
                    "lines": lines,
                }
            )
        width = max(map(len, areas))
        arrays |= {
            key: np.array([row + [float("nan")] * (width - len(row)) for row in rows])
            for key, rows in (("area", areas), ("gap", gaps))
        }
        summary = {
            "settings": len(panels),
            "mean_area": float(nanmean(arrays["area"])),
            "mean_gap": float(nanmean(arrays["gap"])),
        }
        findings = _findings(panels, areas, gaps, summary)
        meta = {"panels": panels, "caption": described(results.plans[0].grid), "findings": findings}
        rows = [{"sweep": own["grid"], **row} for own, row in zip(results.rows, table(results.rows), strict=True)]
        return Numbers(arrays, rows, summary, meta)

    def _of(self, results: Results, sweep: Sweep, seeds: list[int]) -> tuple[list[str], Any]:
        """The lines of a panel, and figures ``[V, L, S]``."""
        labels = sweep.labels()
        grid = next(plan.grid for plan in results.plans if plan.grid.name in (sweep.title, labels[0]))
        if sweep.kind == "attack":
            lines = [entry.label for entry in grid.defenses if entry.label != NO_DEFENSE]
            return lines, cube(results.of(sweep.title), {"attack": labels, "defense": lines, "seed": seeds})
        lines = [entry.label for entry in grid.attacks]
        if sweep.key == "clean_fraction":
            rows = [{**row, "value": label} for label in labels for row in results.of(label)]
            rows = [row for row in rows if row["defense"] != NO_DEFENSE]
            return lines, cube(rows, {"value": labels, "attack": lines, "seed": seeds})
        return lines, cube(results.of(sweep.title), {"defense": labels, "attack": lines, "seed": seeds})

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        panels = numbers.meta["panels"]
        with figure(*panel_size(len(panels)), f"{numbers.meta['caption']}; dotted or star: the default") as made:
            axes = make_panels(made, len(panels), share_x=False)
            handles: dict[str, Any] = {}
            for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
                der = numbers.arrays[f"der_{i}"]
                attack = panel["kind"] == "attack"
                styles = [look(name) for name in panel["lines"]] if attack else series(panel["lines"], skip=4)
                if panel["boxes"]:
                    draw_boxes(axis, panel, der, styles)
                else:
                    asr = numbers.arrays.get(f"attack_asr_{i}")
                    handles |= draw_lines(axis, panel, der, asr, styles)
                axis.set(title=panel["title"], ylim=(0, 1.02))
                axis.grid(axis="y", color="#E5E5E5", lw=0.6)
                axis.set_axisbelow(True)
            label_edges(axes, "", "DER")
            if handles:
                made.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))
        return made


def _area(value: float) -> str:
    return f", area {value:.3f}." if np.isfinite(value) else "."


def _findings(panels: list[dict[str, Any]], areas: Any, gaps: Any, summary: dict[str, Any]) -> list[str]:
    lines = [
        f"Over {len(panels)} settings the mean area under the DER curve is {summary['mean_area']:.3f}, and the best "
        f"value gains {summary['mean_gap']:.3f} over the default."
    ]
    every = [
        (value, f"{panel['title']}, {name}: best minus default {value:+.3f}" + _area(own))
        for panel, row, those in zip(panels, gaps, areas, strict=True)
        for name, value, own in zip(panel["lines"], row, those, strict=True)
        if np.isfinite(value)
    ]
    return lines + [text for _, text in sorted(every, reverse=True)]
