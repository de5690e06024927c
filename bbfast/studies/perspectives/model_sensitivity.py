"""P3: whether attacks and defenses depend on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import STATES, described, with_none
from bbfast.studies.perspectives._factor import anova_arrays, factor_findings, factor_summary, measure_factor
from bbfast.studies.perspectives._factor_bars import draw_factor, factor_size
from bbfast.studies.results import Results, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["ModelSensitivity"]


class ModelSensitivityConfig(DataConfig):
    """Settings of the study of models.

    Args:
        models: Names of models.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratio: Share of the training set that is poisoned.
        defenses: Defenses, like attacks; none is always added.
    """

    models: tuple[str, ...] = Field(("small_cnn", "resnet18"), min_length=1)
    attacks: Listed = Field(("badnets", "blended"), min_length=1)
    ratio: Share = 0.1
    defenses: Listed = Field(("ft", "fp", "clp", "bnp"), min_length=1)


@register_study("model_sensitivity")
class ModelSensitivity(Study):
    """Every attack and defense on several architectures.

    A two-way analysis of variance of the ASR, attack by model, without and with each defense: what share of the
    variation over cells the model explains, and what is left to the combination of the two (the residual, which holds
    the interaction). Stability: the standard deviation over models of a defense's mean DER.

    Arrays: see :func:`bbfast.studies.perspectives._factor.measure_factor`, the factor is the model; ``anova_share`` and
    ``anova_p`` f64 ``[D, 3]`` and ``[D, 2]``: attack, model, residual. Table: a row a cell. ``meta["anova"]``: the
    analyses in full.
    """

    card = StudyCard(
        title="Model architecture",
        question="Do results on one architecture hold on another?",
        reading=(
            "Left, the ASR of every attack on every model without a defense. Middle, each defense's mean DER, a "
            "bar a model, best defense first; whiskers go from its worst attack to its best, n/a marks a model "
            "that it refuses (methods on BatchNorm have nothing to work on in ViT or ConvNeXt). Right, how much "
            "that mean moves between models: a short bar is a defense whose published figure can be carried over. "
            "Bars of one group that differ while the left panel shows equal attacks are the defense's doing."
        ),
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
    )
    Config = ModelSensitivityConfig

    def grids(self) -> Sequence[Grid]:
        config = self.config
        return [
            config.grid(
                self.name,
                models=config.models,
                attacks=config.attacks,
                ratios=[config.ratio],
                defenses=with_none(config.defenses),
            )
        ]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        arrays, names, analyses = measure_factor(results.rows, grid, "model", grid.models)
        arrays |= anova_arrays(analyses)
        summary = factor_summary(arrays, names)
        summary["not_applicable"] = int((arrays["state"] == STATES.index("not applicable")).sum())
        meta = {**names, "anova": analyses, "caption": described(grid)}
        meta["findings"] = factor_findings(arrays, names, analyses)
        return Numbers(arrays, table(results.rows), summary, meta)

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        with figure(*factor_size(numbers), numbers.meta["caption"]) as made:
            draw_factor(made.add_gridspec(1, 1)[0], numbers)
        return made
