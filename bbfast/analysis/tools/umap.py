"""UMAP: the t-SNE question for many samples, and where triggered ones land in the geometry of the clean ones."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from bbfast.analysis._embedding import (
    EmbeddingConfig,
    draw_embedding,
    embedding_numbers,
    features,
    principal,
    sample,
)
from bbfast.analysis._named import usable_layer
from bbfast.analysis.base import Tool, ToolCard, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.subject import Subject
from bbfast.errors import DataRequirementError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UMAP"]

_FEWEST, _MOST = 35, 5000


@register_tool("umap")
class UMAP(Tool):
    """A plane that keeps the neighbourhoods of the features' principal components (umap-learn).

    Statistics as for t-SNE, and ``trustworthiness``: how far the 15 nearest in the plane are near in the features, on
    at most 5,000 samples. A fixed seed keeps umap-learn to one thread.

    Arrays: ``xy`` f32 ``[n, 2]``, ``label`` (true class) i16, ``poison`` bool, ``id`` i32, all ``[n]``. Table: name and
    value of each statistic.

    Source: McInnes, Healy and Melville, arXiv 1802.03426.
    """

    shared_axes = False
    card = ToolCard(
        title="UMAP",
        question="Where do triggered samples lie in the features of a whole data set?",
        paper="L. McInnes et al., UMAP, arXiv 1802.03426",
        extra="analysis",
        deviations=(
            "The first 50 principal components are embedded; BackdoorBench embeds raw features.",
            "All samples are taken; BackdoorBench takes 5,000.",
            "fit_on='clean' fits on clean samples alone and then places the triggered ones; BackdoorBench has no such "
            "choice.",
        ),
    )

    class Config(EmbeddingConfig):
        """Settings of UMAP.

        Args:
            n_sub: Samples at most; None takes all.
            n_neighbors: Size of a neighbourhood.
            min_dist: How close points may come, 0..1.
            fit_on: ``all``, or ``clean``: triggered samples are placed in the plane of the clean ones.
        """

        n_sub: int | None = Field(None, ge=_FEWEST)
        n_neighbors: int = Field(15, ge=2)
        min_dist: float = Field(0.1, ge=0, le=1)
        fit_on: Literal["all", "clean"] = "all"

    def check(self, subject: Subject) -> None:
        if importlib.util.find_spec("umap") is None:
            raise MissingExtraError("the tool 'umap'", "umap-learn", "analysis")
        usable_layer(subject, self.name, self.config.layer)
        found = len(subject.view(self.config.view))
        # Spectral initialisation needs more samples than that; n_neighbors must be fewer than there are.
        fewest = max(_FEWEST, self.config.n_neighbors + 1)
        if found < fewest:
            raise DataRequirementError(f"umap needs at least {fewest} samples, and {self.config.view} has {found}")

    def measure(self, subject: Subject) -> Numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # that its variant for TensorFlow will be missing
            import umap
        from sklearn.manifold import trustworthiness

        config = self.config
        view = sample(subject, config.view, config.n_sub, config.c_sub)
        points = principal(features(subject, config.layer, view.images, self.name), config.pca, config.seed)
        made = umap.UMAP(n_neighbors=config.n_neighbors, min_dist=config.min_dist, random_state=config.seed, n_jobs=1)
        if config.fit_on == "clean" and bool(view.poisoned.any()):
            bad = view.poisoned.numpy()
            xy = np.zeros((len(view), 2), dtype=np.float32)
            xy[~bad] = made.fit_transform(points[~bad])
            xy[bad] = made.transform(points[bad])
        else:
            xy = np.asarray(made.fit_transform(points))
        some = slice(None, None, -(-len(view) // _MOST))
        near = min(15, (len(points[some]) - 1) // 2)
        trust = float(trustworthiness(points[some], xy[some], n_neighbors=near))
        numbers = embedding_numbers(subject, view, points, xy, trustworthiness=trust)
        numbers.meta |= {"view": config.view, "layer": subject.layer(config.layer)[0], "fit_on": config.fit_on}
        return numbers

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return draw_embedding(numbers, "UMAP")
