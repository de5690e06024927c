"""D-BR: features of poisoned samples change when the image is turned."""

from __future__ import annotations

from typing import Any, ClassVar

from bbfast.defenses._fct import FctConfig, check_fct, sensitivity
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView

__all__ = ["DBR"]


@register_defense("d_br")
class DBR(Defense):
    """Train a small model on the poisoned set and flag the samples whose features move most when turned and shifted.

    The model learns the poisoned set for few epochs, in which a trigger is learned and little else, and is then taught
    to keep classes apart (:func:`bbfast.defenses._fct.sensitivity` has the steps). A triggered image's features rest on
    the trigger, which a rotation and a shift move or cut off; those of a clean image change less. The score is the mean
    squared change over ``views`` random turns, and the ``alpha_poison`` of the samples with the largest are flagged: a
    fixed share, so a clean set has that many false alarms, and ``tpr`` cannot exceed ``alpha_poison`` over the
    poisoned share.

    **What it can see.** Triggers that a turn breaks more than it breaks the objects. Not those that survive turning (a
    blend over the whole image, an overall tint), least of all where turned objects are other objects: on digits blended
    samples are the *least* sensitive.

    Source: Chen, Wu and Wang, Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, NeurIPS 2022,
    section 4.1 (sample distinguishment).
    """

    card = DefenseCard(
        title="D-BR (sample distinguishment)",
        paper="Chen, Wu and Wang, Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, "
        "NeurIPS 2022",
        year=2022,
        arxiv="",
        kinds=("detection",),
        needs=frozenset({"poisoned_train", "fresh_model"}),
        summary="Flags the samples whose features change most when the image is turned and shifted.",
        deviations=(
            "The change is averaged over 4 random turns; the paper draws one (views=1).",
            "Turns are drawn once, from the image's pixels; BackdoorBench draws anew between threshold and split.",
            "Exactly the stated shares are set apart, ties by the stored pixels.",
            "The model sees images normalised as the attacked one does; BackdoorBench uses other deviations.",
        ),
    )

    class Config(FctConfig):
        """Settings of D-BR: those of sample distinguishment."""

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"views": 1},
            "paper": {"views": 1},
        }

    def check(self, view: DefenderView) -> None:
        check_fct(view, self.config)

    def run(self, view: DefenderView) -> DefenseResult:
        found = sensitivity(view, self.config)
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=found.scores,
            flags=found.poisoned,
            threshold=float(found.scores[found.poisoned].min()),
            history=found.history,
            info={
                "calibration": {"rule": "share", "alpha_poison": self.config.alpha_poison},
                "clean": int(found.clean.sum()),
                "flagged": int(found.poisoned.sum()),
                "seconds": found.seconds,
            },
        )
