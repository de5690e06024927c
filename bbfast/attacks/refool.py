"""Refool: reflections as in a window pane (Liu et al., arXiv 2007.02343; spec/attacks section 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast.attacks._pool import digests, draw_textures, load_folder
from bbfast.attacks._reflection_ranking import Ranking, rank_reflections
from bbfast.attacks._reflections import Draws, lay_over
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES, draw_index
from bbfast.attacks.surrogate import SurrogateConfig, clean_surrogate
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed

__all__ = ["Refool"]

Unit = Annotated[float, Field(ge=0, le=1)]
Offset = Annotated[int, Field(ge=0)]


@register_attack("refool")
class Refool(Attack):
    """Lays a random reflection over each image: doubled (a thick pane), out of focus, or in focus.

    The reflections are training images of other classes than the target's, unless others are given. Each image, also
    each test image, gets its own reflection and its own optics, drawn from its number.
    """

    card = Card(
        title="Refool",
        paper="Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks",
        year=2020,
        arxiv="2007.02343",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="A random reflection, as in a window pane, over the whole image.",
        deviations=(
            "Reflections are training images of other classes than the target's (for one2one also than the sources', "
            "if there are others); the paper and the reference take photographs that may not be redistributed "
            "(reflections_path takes your own).",
            "Kernels are drawn as ghost .4, out of focus .4, in focus .2, and the reflection's weight from .05 to .4, "
            "as in the paper; the reference has no reflection in focus, and weight .6 (compat='reference').",
            "Results are rounded half to even; the reference truncates (compat='reference' does so).",
            "The canvas has the image's larger side; in the reference it has 560 pixels.",
            "Ghosts are shifted by 3 to 8 pixels, but by half a side at most.",
            "Labels are dirty by default, as in the benchmark; the paper's are clean (label_mode='clean_label').",
            "Random numbers are hashes of seed and sample; the reference draws from two global generators.",
            "With rank=True reflections are ranked on training images of other classes, where the paper has a "
            "validation set.",
        ),
    )
    fits_data = True

    class Config(SurrogateConfig):
        """Settings of Refool.

        Args:
            reflections: Where reflections come from: ``data`` (training images of other classes than the target's) or
                ``textures`` (drawn by code).
            reflections_path: Your own folder of pictures, resized to the images whatever their aspect ratio; replaces
                ``reflections``.
            pool: Number of reflections in use.
            ghost_rate: Share of ghosts; None: .4, in reference mode .49.
            focus_rate: Share of reflections in focus; None: .2, in reference mode 0. The rest is out of focus.
            alpha_t: Weight of the image, or the range that it is drawn from; None: .6 to .95, in reference mode .4.
            offset: Rows and columns between the two copies of a ghost; None: drawn from 3 to 8.
            ghost_alpha: Weight of a ghost's first copy; None: drawn from .15 to .5 or from .5 to .85.
            sigma: Deviation of the blur out of focus, in pixels; None: drawn from 1 to 5.
            rank: Keep the ``pool`` most effective of ``candidates`` reflections, found with a surrogate.
            candidates: Reflections that are ranked.
            rank_iterations: Times that the surrogate is fine-tuned.
            rank_ratio: Share of the target class that carries reflections then.
            rank_epochs: Epochs of each fine-tuning.
            rank_images: Training images of other classes that a reflection's success is measured on.
        """

        reflections: Literal["data", "textures"] = "data"
        reflections_path: Path | None = None
        pool: int = Field(200, ge=1)
        ghost_rate: Unit | None = None
        focus_rate: Unit | None = None
        alpha_t: Unit | tuple[Unit, Unit] | None = None
        offset: tuple[Offset, Offset] | None = None
        ghost_alpha: Unit | None = None
        sigma: float | None = Field(None, gt=0, le=5)
        rank: bool = False
        candidates: int = Field(1000, ge=2)
        rank_iterations: int = Field(16, ge=1)
        rank_ratio: float = Field(0.1, gt=0, le=1)
        rank_epochs: int = Field(5, ge=1)
        rank_images: int = Field(100, ge=1)

        @model_validator(mode="after")
        def _check_optics(self) -> Refool.Config:
            ghost, blur, (low, high) = self.optics()
            if blur < 0:
                raise ValueError(f"ghost_rate + focus_rate must be at most 1, got {ghost:g} and {1 - ghost - blur:g}")
            if low > high:
                raise ValueError(f"alpha_t must be a number or a rising range, got {(low, high)}")
            if self.rank and self.label_mode == "all2all":
                raise ValueError("rank=True needs a target class, got label_mode 'all2all'")
            return self

        def optics(self) -> tuple[float, float, tuple[float, float]]:
            """Shares of ghosts and of reflections out of focus, and the range of the image's weight."""
            paper = self.compat == "paper"
            ghost = self.ghost_rate if self.ghost_rate is not None else (0.4 if paper else 0.49)
            focus = self.focus_rate if self.focus_rate is not None else (0.2 if paper else 0.0)
            weight = self.alpha_t if self.alpha_t is not None else ((0.6, 0.95) if paper else 0.4)
            blur = 1 - ghost - focus
            return ghost, 0.0 if abs(blur) < 1e-9 else blur, weight if isinstance(weight, tuple) else (weight, weight)

    config: Config

    def __init__(self, config: AttackConfig | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self.needs_context = self.config.rank  # type: ignore[misc]

    def files(self) -> dict[str, str]:
        """The pictures of the folder."""
        return super().files() | digests(self.config.reflections_path)

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c, size = self.config, data.image_size
        if c.offset is not None and not (c.offset[0] < size[1] and c.offset[1] < size[2]):
            raise ValueError(f"{self.name}: offset must be smaller than the images, {size[1:]}, got {c.offset}")
        pool = self._pictures(data, seed, max(c.pool, c.candidates) if c.rank else c.pool)
        if c.rank and len(pool) > c.pool:
            assert context is not None
            pool = pool[self._best(context, data, num_classes, pool, seed)]
        return {"reflections": pool}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pool = self.tensor("reflections", images)
        return self.reflected(images, pool, self.draw(images, index, len(pool), stage, self.seed))

    def draw(self, images: Tensor, index: Tensor, pictures: int, key: str, seed: int) -> Draws:
        """What chance gives each of the images; what the settings fix stands in its place."""
        c = self.config
        ghost, blur, weight = c.optics()
        height, width = images.shape[2:]
        draws = Draws.of(key, seed, index, (height, width), pictures, (ghost, blur), weight)
        fixed = {"offset": c.offset, "ghost_alpha": c.ghost_alpha, "sigma": c.sigma}
        given = {name: torch.as_tensor(value) for name, value in fixed.items() if value is not None}
        return draws.fixed(**given)

    def reflected(self, images: Tensor, pool: Tensor, draws: Draws) -> Tensor:
        """Images with the reflections that were drawn, in the mode's rounding."""
        return lay_over(images, pool, draws, "truncate" if self.config.compat == "reference" else "nearest")

    def _best(self, context: AttackContext, data: ImageSet, num_classes: int, candidates: Tensor, seed: int) -> Tensor:
        """Positions of the ``pool`` most effective candidates, the best first."""
        c = self.config
        surrogate = clean_surrogate(context, data, num_classes, c, seed)

        def lay(images: Tensor, pictures: Tensor, index: Tensor, key: str) -> Tensor:
            draws = self.draw(images, index, len(candidates), key, seed).fixed(picture=pictures.to(images.device))
            return self.reflected(images, candidates.to(images.device), draws)

        optics = repr((c.optics(), c.offset, c.ghost_alpha, c.sigma, c.compat))
        ranking = Ranking(c.target, c.rank_iterations, c.rank_ratio, c.rank_epochs, c.rank_images, optics)
        weight = rank_reflections(context, data, surrogate, candidates, lay, ranking, seed)
        return weight.sort(descending=True, stable=True).indices[: c.pool]

    def _pictures(self, data: ImageSet, seed: int, most: int) -> Tensor:
        c = self.config
        if c.reflections_path is not None:
            return load_folder(c.reflections_path, data.image_size, most, seed)
        if c.reflections == "textures":
            return draw_textures(data.image_size, most, seed)
        # A reflection of the target class would be evidence for it without any backdoor.
        free = torch.ones_like(data.labels, dtype=torch.bool)
        if c.label_mode != "all2all":
            free = data.labels != c.target
        if c.label_mode == "one2one":
            other = free & ~torch.isin(data.labels, data.labels.new_tensor(c.source_classes))
            free = other if bool(other.any()) else free
        rows = free.nonzero().flatten()
        if not len(rows):
            raise ValueError(
                f"{self.name}: reflections are images of other classes than the target {c.target}, and the training "
                f"set has none; use reflections='textures' or give reflections_path"
            )
        picked = draw_index(rows, min(most, len(rows)), derive_seed("reflections", seed) % 2**32, "torch")
        return data.images[picked].cpu()
