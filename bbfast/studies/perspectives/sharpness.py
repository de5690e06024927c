"""P9: whether a backdoor in a flat place survives, and what lies between an attacked and a defended model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.subject import Subject
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described, with_none
from bbfast.studies.perspectives._paths import kept_path
from bbfast.studies.perspectives._sharp import curvature, cuts, findings, half_radius
from bbfast.studies.perspectives._sharp_figure import drawn
from bbfast.studies.results import ATTACK_FAILED_BELOW, Results, Row
from bbfast.studies.statistics import nanmean, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Sharpness"]

_FIGURES = ("lambda_clean", "lambda_clean_sd", "trace_clean", "lambda_bd", "lambda_bd_sd", "trace_bd")


class SharpnessConfig(DataConfig):
    """Settings of the study of sharpness.

    Args:
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratio: Share of the training set that is poisoned.
        defenses: Defenses that repair a model; none is always added.
        after: The defense whose ASR the curvature is compared with, one of them.
        benign: Whether a model trained on clean data is looked at as well.
        n: Test images of each kind; 2,000 in the benchmark's protocol.
        probes: Random vectors of the curvature.
        m: Lanczos steps of each.
        directions: Random filter-normalised directions, each looked along both ways.
        points: Points of a cut, odd.
        extent: A cut goes from minus this to this, in lengths of the filters.
        path_points: Points of each path between an attacked and a defended model.
        path_epochs: Passes over the clean hold-out that the curved path is trained for.
        path_lr: Its learning rate.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(
        ("badnets", "blended", {"name": "sig", "label": "sig, dirty", "set": {"label_mode": "all2one"}}), min_length=1
    )
    ratio: Share = 0.1
    defenses: Listed = Field(("ft", "ft_sam"), min_length=1)
    after: str = "ft"
    benign: bool = True
    n: int = Field(128, ge=1)
    probes: int = Field(2, ge=1)
    m: int = Field(12, ge=2)
    directions: int = Field(2, ge=1)
    points: int = Field(21, ge=3)
    extent: float = Field(1.0, gt=0)
    path_points: int = Field(11, ge=3)
    path_epochs: int = Field(20, ge=0)
    path_lr: float = Field(0.02, gt=0)

    @field_validator("points")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the model itself is on the cut")
        return value


@register_study("sharpness")
class Sharpness(Study):
    """Curvature and cuts of attacked and defended models on the same test images without and with the trigger (labelled
    as the attacker wants), and the paths between them.

    ``lambda_*`` (largest eigenvalue of the Hessian of the mean cross-entropy: largest Ritz value of m Lanczos steps,
    mean over the probes, so a lower bound; ``_sd`` over the probes) and ``trace_*`` (mean of ``v^T H v``).
    ``radius_*``: along a filter-normalised direction and its opposite, the distance at which C-Acc or ASR falls below
    half of what it is at the model, by linear interpolation; the median over all of them, infinite if most of them
    never do, NaN if it is below 20 % at the model. ``barrier_*``: the largest clean loss on a path less the larger of
    its ends.

    Arrays (M models: a row each in the table, the benign one last; R directions, P points, T path points): ``a`` f64
    ``[P]``; ``cuts`` f64 ``[M, R, P, 4]``: clean loss, triggered loss, C-Acc, ASR; ``path_t`` f64 ``[T]``; ``paths``
    f64 ``[M, 2, T, 4]`` (the same four; line, Bezier), NaN for models that are not defended. Table: a row a model.

    Source: Li et al., NeurIPS 2018, arXiv 1712.09913; Zhao et al., ICLR 2020, arXiv 2005.00060 (paths).
    """

    card = StudyCard(
        title="Loss surface and sharpness",
        question="Does a backdoor in a flat place of the loss survive fine-tuning?",
        reading=(
            "First panel: curvature of the undefended models on triggered images against the ASR that fine-tuning "
            "leaves; points that fall from upper left to lower right say that flat backdoors survive. Second: how far "
            "the weights can move at random before C-Acc (across) and ASR (up) halve; above the diagonal the backdoor "
            "is the more robust of the two, an arrow marks a radius beyond the cut. Below, a column is an attack: "
            "first the loss along random directions, clean (blue, solid) and triggered (red, dashed), thin lines each "
            "direction; a wider red basin is a flatter backdoor. Then the paths to the defended models: ASR (red) and "
            "C-Acc (blue) along the straight line and a Bezier curve trained on clean images; a path on which the ASR "
            "falls while C-Acc stays high leads out of the backdoor, a dip of C-Acc is a barrier."
        ),
        paper="Li et al., NeurIPS 2018, arXiv 1712.09913; Yao et al., arXiv 1912.07145; Zhao et al., ICLR 2020",
    )
    Config = SharpnessConfig

    def grids(self) -> Sequence[Grid]:
        c = self.config
        defenses = with_none(c.defenses)
        grid = c.grid(self.name, models=[c.model], attacks=c.attacks, ratios=[c.ratio], defenses=defenses)
        if c.after not in (labels := [entry.label for entry in grid.defenses]):
            from bbfast.errors import ConfigError

            raise ConfigError(f"study {self.name}: after must be one of {', '.join(labels)}, got {c.after!r}")
        return [grid]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        rows: list[dict[str, Any]] = []
        curves, paths = [], []
        for cell in results.rows:
            if cell["status"] != "done" or cell["c_acc"] is None:
                continue
            row, cut, path = self._model(cell, results)
            rows.append(row)
            curves.append(cut)
            paths.append(path)
        if self.config.benign:
            row, cut = self._benign(results)
            rows.append(row)
            curves.append(cut)
            paths.append(np.full_like(paths[0], np.nan))
        plain = [row for row in rows if row["defense"] == NO_DEFENSE and row["attack"]]
        after = {(row["attack"], row["seed"]): row["asr"] for row in rows if row["defense"] == self.config.after}
        survived = [after.get((row["attack"], row["seed"]), float("nan")) for row in plain]
        for row, asr in zip(plain, survived, strict=True):
            row["asr_after"] = asr
        summary: dict[str, Any] = {
            "models": len(rows),
            "spearman_lambda_bd_asr_after": spearman([row["lambda_bd"] for row in plain], survived),
            "mean_lambda_clean": float(nanmean([row["lambda_clean"] for row in plain])),
            "mean_lambda_bd": float(nanmean([row["lambda_bd"] for row in plain])),
            "asr_halves_later": sum(row["radius_asr"] > row["radius_c_acc"] for row in plain),
        }
        c = self.config
        return Numbers(
            {
                "a": np.linspace(-c.extent, c.extent, c.points),
                "cuts": np.array(curves),
                "path_t": np.linspace(0, 1, c.path_points),
                "paths": np.array(paths),
            },
            rows,
            summary,
            {
                "attacks": [entry.label for entry in grid.attacks],
                "defenses": [entry.label for entry in grid.defenses if entry.label != NO_DEFENSE],
                "after": c.after,
                "extent": c.extent,
                "models": [{key: row[key] for key in _PLACE} for row in rows],
                "caption": f"{described(grid)}; {c.n} clean and {c.n} triggered test images",
                "findings": findings(rows, summary, c.after, c.extent),
            },
        )

    def _model(self, cell: Row, results: Results) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any]]:
        """The row, the cuts and the paths of a cell's model."""
        c = self.config
        attack, defense = results.attack(cell), results.defense(cell)
        subject = Subject(attack, defense, results.device, c.seeds[0])
        row, cut = self._surface(subject, {key: cell[key] for key in ("attack", "defense", "seed", "c_acc", "asr")})
        path = np.full((2, c.path_points, 4), np.nan)
        if defense is not None and defense.model is not None:
            path = kept_path(attack, defense.model, subject, cell, results, c)
            for i, name in enumerate(("line", "bezier")):
                loss = path[i, :, 0]
                row[f"barrier_{name}"] = float(loss.max() - max(loss[0], loss[-1]))
        return row, cut, path

    def _surface(self, subject: Subject, place: dict[str, Any]) -> tuple[dict[str, Any], NDArray[Any]]:
        c = self.config
        pairs = subject.pairs(c.n)
        sides = ((pairs.clean, pairs.labels), (pairs.triggered, pairs.targets))
        bends = curvature(subject, sides, c.probes, c.m)
        steps = np.linspace(-c.extent, c.extent, c.points)
        cut = cuts(subject, sides, steps, c.directions)
        row = {**place, **dict.fromkeys(_PLACE[5:], float("nan")), **dict(zip(_FIGURES, bends, strict=True))}
        for name, values in (("c_acc", cut[:, :, 2]), ("asr", cut[:, :, 3])):
            working = nanmean(values[:, c.points // 2]) >= ATTACK_FAILED_BELOW
            row[f"radius_{name}"] = half_radius(steps, values) if working else float("nan")
        return row, cut

    def _benign(self, results: Results) -> tuple[dict[str, Any], NDArray[Any]]:
        """A model of the same recipe trained on the clean data, on clean images alone."""
        import dataclasses

        from bbfast.evaluation import evaluate
        from bbfast.studies.perspectives._benign import benign_model

        first = next(row for row in results.rows if row["status"] == "done")
        attack = results.attack(first)
        model = benign_model(attack, results, int(first["seed"]))
        clean = dataclasses.replace(attack, model=model)
        subject = Subject(clean, None, results.device, self.config.seeds[0])
        figures = evaluate(model, attack.test, attack.backdoor_test, device=results.device)
        place = {"attack": "", "defense": "benign", "seed": first["seed"], "c_acc": figures["c_acc"]}
        row, cut = self._surface(subject, {**place, "asr": float("nan")})
        # It has no backdoor: what it does with triggered images under the target label is no basin of anything.
        row |= dict.fromkeys(("lambda_bd", "lambda_bd_sd", "trace_bd", "radius_asr"), float("nan"))
        cut[:, :, [1, 3]] = np.nan
        return row, cut

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return drawn(numbers)


_PLACE = ("attack", "defense", "seed", "c_acc", "asr", *_FIGURES, "radius_c_acc", "radius_asr", "asr_after",
          "barrier_line", "barrier_bezier")  # fmt: skip
