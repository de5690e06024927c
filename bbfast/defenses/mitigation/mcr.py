"""MCR: Mode Connectivity Repair."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

from pydantic import Field

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._curve import Curve, CurveProgram, reestimate_batch_norm
from bbfast.defenses.mitigation._finetune import DIGITS_LR, TINY, FinetuneConfig, batch_size_for, finetune
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView

__all__ = ["MCR", "MCRConfig"]

_BATCH = 128


class MCRConfig(FinetuneConfig):
    """Settings of MCR; ``scheduler``, ``t_max`` and ``amp`` are those of the far end's fine-tuning.

    Args:
        num_bends: Points that make the curve, both ends included.
        curve: ``bezier`` or ``polychain`` (straight pieces).
        t: Where the repaired model lies on the curve: 0 is the model under suspicion, 1 the fine-tuned one.
        ft_epochs: Epochs of the endpoint's fine-tuning (200 on Tiny ImageNet).
        ft_lr: Its learning rate.
        curve_epochs: Epochs of the curve's training (200 on Tiny ImageNet).
        lr: Its learning rate, falling linearly to a hundredth between half and nine tenths of the epochs.
        batch_size: Samples a step. None is 256 for the endpoint and 128 for the curve, and on small hold-outs a smaller
            power of two (:func:`batch_size_for`).
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {"batch_size": 128}, "paper": {}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"ft_epochs": 200, "curve_epochs": 200, **TINY},
        "digits": {"ft_lr": DIGITS_LR},
    }

    num_bends: int = Field(3, ge=3)
    curve: Literal["bezier", "polychain"] = "bezier"
    t: float = Field(0.1, ge=0, le=1)
    ft_epochs: int = Field(100, ge=0)
    ft_lr: float = Field(0.01, gt=0)
    curve_epochs: int = Field(100, ge=0)
    lr: float = Field(0.01, gt=0)


@register_defense("mcr")
class MCR(Defense):
    """Leave the attacked weights along a curve of good models to a fine-tuned copy.

    1. The far end ``w_1``: a copy of the model, fine-tuned on the clean hold-out.
    2. Between it and the model ``w_0`` a quadratic Bezier curve ``phi(t) = (1-t)^2 w_0 + 2t(1-t) theta + t^2 w_1``.
       Only ``theta`` is trained, from the midpoint, on the hold-out: every batch at a ``t`` drawn from U(0, 1).
    3. The repaired model is ``phi(0.1)``, its BatchNorm statistics taken anew over the hold-out.

    ``t`` is fixed beforehand: accuracy on clean data, the only thing a defender could choose it by, favours the ends.

    Source: Zhao et al., ICLR 2020, arXiv 2005.00060, section 3. Deviations: see the card.
    """

    card = DefenseCard(
        title="Mode Connectivity Repair",
        paper="Zhao et al., Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness, ICLR 2020",
        year=2020,
        arxiv="2005.00060",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Takes a point on a trained curve between the model and a fine-tuned copy.",
        deviations=(
            "Gradients are of one batch; the reference never clears those of its network and steps along their sum, at "
            "a learning rate of 3e-5.",
            "BatchNorm statistics are taken anew from the hold-out; the reference goes on from what they were.",
            "With more than three points every inner one has weights of its own; in the reference they are one object.",
            "On hold-outs under about 1,000 images the batch shrinks so that an epoch keeps about 8 steps.",
        ),
    )
    Config = MCRConfig

    def run(self, view: DefenderView) -> DefenseResult:
        config: MCRConfig = self.config
        model, clean = view.model, view.clean
        far = copy.deepcopy(model)
        rows = finetune(
            far, clean, view, config, epochs=config.ft_epochs, lr=config.ft_lr, tag="endpoint", slower=("ft_lr",)
        )
        history = _of("endpoint", rows)
        curve = Curve(model, far, config.num_bends, config.curve)
        history += _of("curve", self._train(view, curve, clean))
        curve.put(model, config.t)
        recipe = config.recipe(view, len(clean), 1, config.lr)
        loader = BatchLoader(
            clean,
            min(_BATCH, len(clean)),
            seed=view.derive_seed("batch norm"),
            device=view.device,
            augment=recipe.augment,
            padding=recipe.padding,
            flip=recipe.flip,
            merge_single=True,
        )
        layers = reestimate_batch_norm(model, loader)
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            history=history,
            selection={"criterion": "fixed t", "t": config.t},
            info={
                "t": config.t,
                "batch_norm_layers": layers,
                "moved": float((curve.point(config.t).detach() - curve.near).norm()),
                "ends_apart": float((curve.far - curve.near).norm()),
            },
        )

    def _train(self, view: DefenderView, curve: Curve, clean: ImageSet) -> list[dict[str, Any]]:
        config: MCRConfig = self.config
        # The curve is trained in float32 and at a constant rate that its program lowers.
        settings = config.model_copy(
            update={
                "batch_size": config.batch_size or min(_BATCH, batch_size_for(len(clean))),
                "amp": "off",
                "scheduler": "constant",
            }
        )
        program = CurveProgram(config.curve_epochs)
        return finetune(
            curve, clean, view, settings, epochs=config.curve_epochs, lr=config.lr, tag="curve", program=program
        )


def _of(phase: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"phase": phase, **row} for row in rows]
