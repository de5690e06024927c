"""P10: at which depth a trigger becomes a feature, which channels carry it, and what a defense changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.subject import Subject
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described, with_none
from bbfast.studies.perspectives import _depth as depth
from bbfast.studies.perspectives._depth_figure import draw_depth
from bbfast.studies.perspectives._spectrum import saliency, trigger_energy
from bbfast.studies.results import Results, Row
from bbfast.studies.statistics import nanmean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Representation"]

_ARRAYS = ("auroc", "auroc_sd", "neurons", "gini", "radial", "energy", "z_top")
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
    changed channels and the 5 % with the largest Lipschitz bounds. ``trigger_high``: share of the trigger's energy
    beyond a quarter of the image's shorter side in cycles; ``fsm_*``: which frequencies the logit answers to, as the
    tool frequency_saliency measures it. ``z_top``: the change of the 20 channels that the
    trigger moves most in the attacked model, in standard deviations on clean images, in the attacked and in the
    defended model.

    Arrays (M models, a row each in the table; B blocks, L layers): ``auroc``, ``auroc_sd`` f64 ``[M, B]``; ``neurons``,
    ``gini`` f64 ``[M, L]``; ``radial`` f64 ``[M, 2, R]``, mean saliency by cycles an image without and with the
    trigger; ``energy`` f64 ``[M, R]``, shares of the trigger's energy; ``z_top`` f64 ``[M, 20]`` (NaN where there are
    fewer channels). Names in ``meta``.
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
            "near 0 if all do. Fourth row: grey is where the trigger's own energy lies, from smooth to fine; a line "
            "above 1 says that with the trigger the logit answers more to this frequency than without. A trigger "
            "feature shows where line and grey rise together; a defense that has removed it lies near 1 there. "
            "Fifth row: each thin line is one of the 20 channels that the trigger moves most, from "
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
        found: dict[str, list[NDArray[Any]]] = {key: [] for key in _ARRAYS}
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
        for key in ("auroc_last", "neurons", "gini", "jaccard_top_5_percent", "fsm_js"):
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
        energy, high = trigger_energy(subject, c.n)
        radial, frequencies = saliency(subject, c.n)
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
            "trigger_high": high,
            **frequencies,
            "z_top_median": float(np.nanmedian(z_top)),
            **{key: both.get(key, float("nan")) for key in ("jaccard_top_5_percent", "spearman_tac_within_layers")},
        }
        arrays = {
            "auroc": auroc[:, 0],
            "auroc_sd": auroc[:, 1],
            "neurons": np.array([few / all_ for few, all_ in neurons.values()]),
            "gini": ginis,
            "radial": radial,
            "energy": energy,
            "z_top": z_top,
        }
        return row, arrays, {"blocks": list(features), "layers": list(moved)}, top

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return draw_depth(numbers)


def _finding(row: dict[str, Any]) -> str:
    name = row["attack"] + (f" and {row['defense']}" if row["defense"] != NO_DEFENSE else "")
    where = f"separable from {row['separable_from']} on" if row["separable_from"] else "nowhere separable"
    return (
        f"{name} at {100 * row['ratio']:.3g} %, seed {row['seed']} (ASR {100 * row['asr']:.0f} %): poisoned samples "
        f"are {where} (AUROC {row['auroc_first']:.2f} first, {row['auroc_last']:.2f} last); {row['neurons']} of "
        f"{row['channels']} channels are trigger neurons; mean Gini {row['gini']:.2f}; top channels move by "
        f"{row['z_top_median']:.1f} sd; {100 * row['trigger_high']:.0f} % of the trigger's energy is of high "
        f"frequency, and of the saliency {100 * row['fsm_high_clean']:.0f} % without and "
        f"{100 * row['fsm_high_triggered']:.0f} % with it; "
        f"overlap with the largest Lipschitz bounds {row['jaccard_top_5_percent']:.2f}."
    )
