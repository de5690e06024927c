"""t-SNE: do triggered samples form a cluster of their own in the features?"""

from __future__ import annotations

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
from bbfast.errors import DataRequirementError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TSNE"]

_FEWEST = 5


@register_tool("tsne")
class TSNE(Tool):
    """A plane in which near features stay near (scikit-learn's Barnes-Hut t-SNE on principal components).

    The picture is for the eye; what is compared across runs are the statistics of the components: purity (20 nearest),
    silhouette and separation of the triggered samples, and their distance to each class.

    Arrays: ``xy`` f32 ``[n, 2]``, ``label`` (true class) i16, ``poison`` bool, ``id`` i32, all ``[n]``. Table: name and
    value of each statistic.

    Source: van der Maaten and Hinton, JMLR 9, 2008.
    """

    shared_axes = False
    card = ToolCard(
        title="t-SNE",
        question="Do triggered samples form a cluster of their own in the features, and next to which class?",
        paper="L. van der Maaten and G. Hinton, Visualizing Data using t-SNE, JMLR 9, 2008",
        deviations=(
            "The first 50 principal components are embedded, and they start it; BackdoorBench embeds raw features from "
            "a random start.",
            "Up to 200 poisoned samples are kept however few there are; BackdoorBench keeps their share.",
            "Statistics stand beside the picture; BackdoorBench gives the picture alone.",
        ),
    )

    class Config(EmbeddingConfig):
        """Settings of t-SNE.

        Args:
            n_sub: Samples at most.
            perplexity: Effective number of neighbours; less where there are few samples.
            init: Where it starts: ``pca`` or ``random``.
        """

        n_sub: int | None = Field(5000, ge=_FEWEST)
        perplexity: float = Field(30.0, gt=0)
        init: Literal["pca", "random"] = "pca"

    def check(self, subject: Subject) -> None:
        usable_layer(subject, self.name, self.config.layer)
        found = len(subject.view(self.config.view))
        if found < _FEWEST:
            raise DataRequirementError(f"tsne needs at least {_FEWEST} samples, and {self.config.view} has {found}")

    def measure(self, subject: Subject) -> Numbers:
        from sklearn.manifold import TSNE as Embedding

        config = self.config
        view = sample(subject, config.view, config.n_sub, config.c_sub)
        points = principal(features(subject, config.layer, view.images, self.name), config.pca, config.seed)
        perplexity = min(config.perplexity, (len(view) - 1) / 3)
        made = Embedding(perplexity=perplexity, init=config.init, random_state=config.seed, n_jobs=1)
        numbers = embedding_numbers(subject, view, points, np.asarray(made.fit_transform(points)))
        numbers.meta |= {"view": config.view, "layer": subject.layer(config.layer)[0], "perplexity": perplexity}
        return numbers

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return draw_embedding(numbers, "t-SNE")
