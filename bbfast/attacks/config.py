"""Settings that all attacks share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bbfast._config import MethodConfig
from bbfast.attacks.poisoning import IndexRng, LabelMode

__all__ = ["AttackConfig"]


class AttackConfig(MethodConfig):
    """Settings that all attacks share.

    Args:
        ratio: Share of the whole training set to poison, also for clean labels.
        count: Number of samples to poison; wins over ``ratio``.
        target: Class that triggered images shall be taken for.
        label_mode: See :class:`~bbfast.attacks.poisoning.LabelRule`.
        shift: Label shift of ``all2all``.
        source_classes: Attacked classes of ``one2one``.
        clip_to_class: When the class has fewer samples than the ratio asks for, take all of them instead of failing.
        index_rng: ``numpy_legacy`` selects the samples that the reference implementation selects; ``torch`` uses torch.
        compat: ``paper`` follows the paper; ``reference`` reproduces the reference implementation where it departs, see
            docs/deviations.md.
    """

    ratio: float | None = Field(0.1, gt=0, le=1)
    count: int | None = Field(None, ge=1)
    target: int = Field(0, ge=0)
    label_mode: LabelMode = "all2one"
    shift: int = Field(1, ge=1)
    source_classes: tuple[int, ...] = ()
    clip_to_class: bool = False
    index_rng: IndexRng = "numpy_legacy"
    compat: Literal["paper", "reference"] = "paper"

    @model_validator(mode="after")
    def _check_selection(self) -> AttackConfig:
        if self.ratio is None and self.count is None:
            raise ValueError("one of ratio and count is needed, got neither")
        if self.label_mode == "one2one":
            if not self.source_classes:
                raise ValueError("label_mode 'one2one' needs source_classes")
            if self.target in self.source_classes:
                raise ValueError(
                    f"source_classes must not hold the target {self.target}, got {list(self.source_classes)}"
                )
        elif self.source_classes:
            raise ValueError(f"source_classes belong to label_mode 'one2one', got label_mode {self.label_mode!r}")
        return self
