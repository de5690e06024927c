"""SFT: super-fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from bbfast.defenses._diverged import lower
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import FinetuneConfig, batch_size_for
from bbfast.defenses.mitigation._optimise import optimise
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.training.program import Program

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["SFT", "SFTConfig", "Triangles", "triangle"]

_BATCH = 128


class SFTConfig(DefenseConfig):
    """Settings of super-fine-tuning.

    Args:
        epochs: Passes over the hold-out (400 on the digits).
        first_phase: Passes with the high peak (160 on the digits); the rest has the low one.
        lr_base: Learning rate between the peaks.
        lr_first: Peak of the first phase, which makes the model forget (0.625 on the digits).
        lr_second: Peak of the second phase, which makes it settle.
        up_steps: Steps from the base to the peak.
        down_steps: Steps from the peak to the base.
        batch_size: Samples a step. None is 128 on hold-outs of the paper's sizes and less on smaller ones.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        amp: Precision of the network: ``auto`` is bfloat16 where the device gains, ``off`` is float32.
        channels_last: Memory layout; ``auto`` where the device gains.
        cuda_graphs: Capture the step in a CUDA graph; None where it pays.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "paper": {"batch_size": _BATCH},
        "low_rate": {"lr_base": 3e-3, "lr_first": 0.25, "lr_second": 5e-3},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: 72 images are five steps an epoch, 5 % of CIFAR-10 twenty: as many steps, and as many peaks. At a peak
        # of 2.5 or half of it the loss becomes NaN within four epochs: halved until it does not.
        "digits": {"epochs": 400, "first_phase": 160, "lr_first": 0.625},
    }

    epochs: int = Field(100, ge=0)
    first_phase: int = Field(40, ge=0)
    lr_base: float = Field(3e-2, gt=0)
    lr_first: float = Field(2.5, gt=0)
    lr_second: float = Field(5e-2, gt=0)
    up_steps: int = Field(10, ge=1)
    down_steps: int = Field(10, ge=1)
    batch_size: int | None = Field(None, ge=2)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | None = None
    stratified: bool = False

    @model_validator(mode="after")
    def _peaks_above(self) -> SFTConfig:
        if min(self.lr_first, self.lr_second) < self.lr_base:
            raise ValueError(
                f"lr_first and lr_second must be at least lr_base, got {self.lr_first:g}, {self.lr_second:g} and "
                f"{self.lr_base:g}"
            )
        return self

    def recipe(self, view: DefenderView, size: int) -> Recipe:
        """SGD as in fine-tuning, with the crops and flips that the model was trained with."""
        common = {name: getattr(self, name) for name in ("momentum", "weight_decay", "amp", "channels_last")}
        batch = self.batch_size or min(_BATCH, batch_size_for(size))
        frame = FinetuneConfig(batch_size=batch, scheduler="constant", cuda_graphs=self.cuda_graphs, **common)
        return frame.recipe(view, size, self.epochs, self.lr_base)


def triangle(step: int, base: float, peak: float, up: int = 10, down: int = 10) -> float:
    """Learning rate of a step, counted from 0: from ``base`` up to ``peak`` and down again, over and over."""
    at = step % (up + down)
    return base + (peak - base) * (at / up if at < up else (up + down - at) / down)


class Triangles(Program):
    """Plain training at the rate of :func:`triangle`.

    Args:
        config: Settings.
    """

    def __init__(self, config: SFTConfig) -> None:
        self._config = config

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._config.model_dump(mode="json", exclude={"preset"})}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._epoch, self._step = epoch, epoch * steps

    def after_backward(self, model: nn.Module) -> None:
        config = self._config
        peak = config.lr_first if self._epoch < config.first_phase else config.lr_second
        rate = triangle(self._step, config.lr_base, peak, config.up_steps, config.down_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._step += 1


@register_defense("sft")
class SFT(Defense):
    """Fine-tune with a learning rate that climbs to a very high peak and back every 20 steps, then to a low one.

    Step i has the rate ``base + (peak - base) r`` with ``r = (i mod 20) / 10`` on the way up and
    ``(20 - i mod 20) / 10`` on the way down; the peak is 2.5 in the first 40 epochs, 0.05 afterwards. Plain SGD on all
    parameters and the whole hold-out; nothing is selected.

    Source: Sha et al., Fine-Tuning Is All You Need to Mitigate Backdoor Attacks, 2022, arXiv 2212.09067, section on
    super-fine-tuning; numbers as in backdoor-toolbox. Deviations: see the card.
    """

    card = DefenseCard(
        title="Super-fine-tuning",
        paper="Sha, He, Berrang, Humbert, Zhang, 2022",
        year=2022,
        arxiv="2212.09067",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Fine-tunes on the clean hold-out with a rate that cycles between a low base and a very high peak.",
        deviations=(
            "Step i is taken at the rate of step i; the toolbox sets it after the step, one step late.",
            "On hold-outs under about 750 images the batch shrinks so that an epoch keeps about 8 steps "
            "(preset='paper' keeps 128).",
        ),
    )
    Config = SFTConfig

    def run(self, view: DefenderView) -> DefenseResult:
        config: SFTConfig = self.config
        model, clean = view.model, view.clean
        remedy = f"{lower(config, 'lr_first')}; preset='low_rate' has 0.25"
        recipe = config.recipe(view, len(clean))
        history = optimise(model, clean, view, recipe, Triangles(config), tag="fine-tuning", remedy=remedy)
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model,
            history=history,
            info={"epochs": len(history), "batch_size": recipe.batch_size},
        )
