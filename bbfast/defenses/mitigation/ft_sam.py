"""FT-SAM: fine-tuning with sharpness-aware minimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import REFERENCE, FinetuneConfig, finetune
from bbfast.defenses.mitigation._sam import SharpnessAware
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["FTSAM", "FTSAMConfig"]

_PERIOD = 100
"""Half period in steps of the reference's cosine."""

_DIGITS_LR = 0.05
"""On the digits, for which nothing is published: the mean rate of the quick recipe, whose one cycle peaks at 0.1. The
paper too fine-tunes at the rate that its models were trained with."""


class FTSAMConfig(FinetuneConfig):
    """Settings of FT-SAM.

    Args:
        epochs: Passes over the hold-out (50 on GTSRB).
        lr: Learning rate (0.05 on the digits).
        rho: Length of the ascent in relative weight change (8 on GTSRB and Tiny ImageNet; 0 is plain fine-tuning).
            These are the paper's and the reference's values, tuned for each data set.
        adaptive: Scale the ascent by the size of each weight.
        smoothing: Share of the target spread over the other classes, s/(K-1) each (0 on GTSRB and Tiny ImageNet).
        decompose_alpha: Weight of the gradient decomposition of GSAM; 0 is none.
        step_scheduler: Step the cosine after each ``epoch``, or after each ``iteration`` as the reference does: then
            ``t_max`` (default 100) counts steps, and the rate falls to 0 and rises again all the time.
        stratified: Draw the hold-out by class, as the reference does.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {**REFERENCE, "step_scheduler": "iteration"},
        "paper": {},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "gtsrb": {"rho": 8.0, "smoothing": 0.0, "epochs": 50},
        "tiny_imagenet": {"rho": 8.0, "smoothing": 0.0},
        "digits": {"lr": _DIGITS_LR},
    }

    epochs: int = Field(100, ge=0)
    lr: float = Field(0.01, gt=0)
    rho: float = Field(2.0, ge=0)
    adaptive: bool = True
    smoothing: float = Field(0.1, ge=0, lt=1)
    decompose_alpha: float = Field(0.0, ge=0)
    step_scheduler: Literal["epoch", "iteration"] = "epoch"
    stratified: bool = True

    @model_validator(mode="after")
    def _check(self) -> FTSAMConfig:
        if self.step_scheduler == "iteration" and self.scheduler != "cosine":
            raise ValueError(f"step_scheduler='iteration' needs scheduler='cosine', got {self.scheduler!r}")
        if self.amp == "fp16":
            raise ValueError("amp='fp16' would lose the small gradients of the first pass; use 'bf16', 'auto' or 'off'")
        return self

    def recipe(self, view: DefenderView, size: int, epochs: int, lr: float) -> Recipe:
        """As in fine-tuning, with the smoothed targets."""
        # torch spreads its share over all K classes, the true one included.
        spread = self.smoothing * view.num_classes / max(view.num_classes - 1, 1)
        return super().recipe(view, size, epochs, lr).replace(label_smoothing=spread)


@register_defense("ft_sam")
class FTSAM(Defense):
    """Fine-tune on the clean hold-out towards flat minima, which shrinks the large weights a backdoor rests on.

    For each batch, with w the weights and l the smoothed cross-entropy: ``g = grad l(w)`` in train mode;
    ``e = rho w^2 g / | |w| g |`` over all parameters together; ``g' = grad l(w + e)`` with BatchNorm's statistics left
    alone; an SGD step from w with g'. Two forward and two backward passes a step. Nothing is selected: all of the
    hold-out is trained on and the last epoch is returned.

    Source: Zhu et al., ICCV 2023, arXiv 2304.11823, section 4.2 and algorithm 1. Deviations: see the card.
    """

    card = DefenseCard(
        title="Fine-tuning with sharpness-aware minimisation",
        paper="Zhu, Wei, Shen, Fan, Wu, ICCV 2023",
        year=2023,
        arxiv="2304.11823",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Fine-tunes on the clean hold-out with adaptive sharpness-aware minimisation.",
        deviations=(
            "The cosine is stepped after each epoch and ends with the last; the reference steps it after each batch "
            "with a half period of 100, so that the rate rises again (preset='reference').",
            "On Tiny ImageNet the cosine; the reference's plateau schedule is stepped without a metric and crashes.",
            "The second pass leaves every buffer of BatchNorm alone; the reference keeps counting num_batches_tracked.",
            "The loss in the history is the one that is minimised, at w + e; the reference logs the one at w (ours: "
            "loss_before).",
            "The loss is the cross-entropy with the smoothed targets; the reference's divergence differs from it by a "
            "constant.",
            "On hold-outs under about 1,500 images the batch shrinks so that an epoch keeps about 8 steps "
            "(preset='reference' keeps 256).",
            "bf16 where the device gains; the reference runs in float32 (amp='off').",
        ),
    )
    Config = FTSAMConfig

    def check(self, view: DefenderView) -> None:
        largest = 1 - 1 / max(view.num_classes, 2)
        if self.config.smoothing > largest:
            raise ConfigError(
                f"defense ft_sam: smoothing must be at most {largest:.3g} with {view.num_classes} classes, got "
                f"{self.config.smoothing}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        config: FTSAMConfig = self.config
        model = view.model
        cosine = (config.t_max or _PERIOD) if config.step_scheduler == "iteration" else None
        program = SharpnessAware(config.rho, config.adaptive, config.decompose_alpha, cosine)
        try:
            history = finetune(
                model,
                view.clean,
                view,
                config,
                epochs=config.epochs,
                lr=config.lr,
                tag="fine-tuning",
                slower=("lr", "rho"),
                program=program,
            )
        finally:
            program.release()
        return DefenseResult(kind=self.card.kinds[0], model=model, history=history, info={"rho": config.rho})
