"""How a model is trained: one validated, frozen record, with the paper's recipes and quick ones as presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bbfast._config import MethodConfig, build_config

__all__ = ["Recipe"]


class Recipe(MethodConfig):
    """Settings of a training run.

    Args:
        epochs: Passes over the training set; 0 leaves the model as it is.
        batch_size: Samples a step.
        lr: Learning rate (the highest one of ``onecycle``).
        optimizer: ``sgd``, ``adam``, ``adamw`` or ``adadelta``.
        momentum: Momentum of SGD.
        nesterov: Nesterov momentum of SGD.
        betas: Decay rates of Adam and AdamW.
        amsgrad: AMSGrad variant of Adam and AdamW.
        weight_decay: L2 penalty (decoupled for AdamW).
        schedule: ``constant``; ``cosine`` (to ``eta_min`` over ``t_max`` epochs); ``plateau`` (times ``gamma`` after
            ``patience`` epochs whose mean training loss did not fall); ``multistep`` (times ``gamma`` at each of
            ``milestones``); ``step`` (times ``gamma`` every ``step_size`` epochs); ``onecycle`` (per step: cosine from
            ``lr/25`` up to ``lr`` over the first ``pct_start`` of all steps, cosine down to ``lr/250000``). All but
            ``onecycle`` change once an epoch.
        t_max: Half period of ``cosine`` in epochs; None is ``epochs``. The reference implementation has 100 whatever
            the number of epochs (``Recipe.preset(..., compat="reference")``).
        eta_min: Last learning rate of ``cosine``.
        milestones: Epochs at which ``multistep`` decays.
        step_size: Epochs between the decays of ``step``.
        gamma: Decay factor of ``multistep``, ``step`` and ``plateau``.
        patience: Epochs that ``plateau`` waits.
        pct_start: Share of the steps in which ``onecycle`` rises.
        label_smoothing: Share of the target spread over all classes.
        flooding: Flood level b: the loss is |L - b| + b; 0 switches it off.
        clip_grad_norm: Largest norm of the gradient; None does not clip.
        augment: Random crops (``padding``) and flips (``flip``) of the training images.
        padding: Zero padding of the random crop, in pixels.
        flip: Horizontal flips; the protocol flips cifar10 only.
        drop_last: Leave out an incomplete last batch.
        precision: ``fp32``; ``bf16`` or ``fp16`` (autocast; master weights stay float32); ``auto`` is bf16 where the
            device gains from it, else fp32.
        channels_last: Memory layout; ``auto`` is True where the device gains.
        compile: Run the model through ``torch.compile``.
        cuda_graphs: Capture forward and backward in a CUDA graph; where device, model or program do not allow it the
            run goes on without and the log says why. None lets the engine choose: off, until measured on a GPU.
        deterministic: Same seed, same bits: deterministic kernels only.
        eval_every: Measure the test sets every so many epochs and after the last; 0 never.
    """

    epochs: int = Field(100, ge=0)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(0.01, gt=0)
    optimizer: Literal["sgd", "adam", "adamw", "adadelta"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    amsgrad: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["constant", "cosine", "plateau", "multistep", "step", "onecycle"] = "cosine"
    t_max: int | None = Field(None, ge=1)
    eta_min: float = Field(0.0, ge=0)
    milestones: tuple[int, ...] = ()
    step_size: int = Field(30, ge=1)
    gamma: float = Field(0.1, gt=0, le=1)
    patience: int = Field(10, ge=0)
    pct_start: float = Field(0.3, gt=0, lt=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    flooding: float = Field(0.0, ge=0)
    clip_grad_norm: float | None = Field(None, gt=0)
    augment: bool = True
    padding: int = Field(4, ge=0)
    flip: bool = False
    drop_last: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    compile: bool = False
    cuda_graphs: bool | None = None
    deterministic: bool = False
    eval_every: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise ValueError("nesterov needs optimizer='sgd' and momentum > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.schedule == "multistep" and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, got {self.milestones}")
        if self.compile and self.cuda_graphs:
            raise ValueError("compile and cuda_graphs cannot both be on; torch.compile handles its own graphs")
        return self

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some settings changed, validated again.

        Raises:
            ConfigError: naming the setting, what was expected and what came.
        """
        return build_config(type(self), "recipe", {**self.model_dump(), **changes})

    @classmethod
    def preset(
        cls,
        name: str,
        dataset: str | None = None,
        model: str | None = None,
        *,
        compat: Literal["paper", "reference"] = "paper",
        **changes: Any,
    ) -> Recipe:
        """A named recipe: ``paper`` (the published settings) or ``quick`` (small machines, small sets).

        Args:
            name: ``"paper"`` or ``"quick"``.
            dataset: Name of the data set, spelled freely ("cifar10_small", "tiny-imagenet-200"); None or an unknown
                name gives the preset's documented default.
            model: Name of the model.
            compat: ``"reference"`` keeps the quirk of the reference implementation that cosine has T_max = 100 whatever
                the number of epochs (gtsrb then ends at half the learning rate).
            **changes: Settings that replace the preset's.

        Raises:
            UnknownNameError: if there is no such preset.
            ConfigError: if a changed setting is unknown or out of range.
        """
        from bbfast.training.presets import preset

        return build_config(cls, "recipe", {**preset(name, dataset, model, compat=compat), **changes})
