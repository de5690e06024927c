"""SAU: shared adversarial unlearning."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import lower
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import batch_size_for, trainable
from bbfast.defenses.mitigation._optimise import float32_recipe, optimise
from bbfast.defenses.mitigation._perturb import project_, start
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.training.prediction import evaluating, predict_labels
from bbfast.training.program import Batch, Program, derive_seed

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["SAU", "SAUConfig", "SharedUnlearning", "attack_losses", "divergence", "unlearning_loss"]

_FLOOR = 1e-8


class SAUConfig(DefenseConfig):
    """Settings of SAU.

    Args:
        rounds: Passes over the hold-out (20 on Tiny ImageNet).
        adv_steps: Steps of the search for shared adversarial examples.
        adv_lr: Their length, in 0..1 units of pixels (0.5 on the digits).
        bound: Bound of the perturbation in the norm ``norm_type`` (0.5 on the digits).
        norm_type: Its norm; ``none`` does not bound it.
        init: Where it starts: ``max`` is ``+bound`` at every pixel, which counts as a step.
        beta_adv: Weight of fooling each model.
        beta_share: Weight of their agreement.
        lambdas: Weights of the clean loss, the loss on the adversarial examples with true labels, and the unlearning.
        outer_steps: Steps of the weights a batch.
        lr: Adam's learning rate (1e-3 on the digits).
        train_mode: BatchNorm normalises by the batch and moves its statistics in the steps of the weights; by default
            the model stays in eval mode.
        batch_size: Samples a step. None is 256 on hold-outs of the paper's sizes and less on smaller ones.
        channels_last: Memory layout; ``auto`` where the device gains.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {"batch_size": 256}, "paper": {}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"rounds": 20},
        # Ours: strokes on a black ground have more contrast than photos; within 0.2 a quarter of the hold-out finds a
        # shared example in the first round at this rate, within 0.5 four fifths do.
        "digits": {"lr": 1e-3, "bound": 0.5, "adv_lr": 0.5},
    }

    rounds: int = Field(100, ge=0)
    adv_steps: int = Field(5, ge=0)
    adv_lr: float = Field(0.2, gt=0)
    bound: float = Field(0.2, ge=0)
    norm_type: Literal["linf", "l2", "l1", "none"] = "linf"
    init: Literal["max", "zero", "random", "min"] = "max"
    beta_adv: float = Field(0.01, ge=0)
    beta_share: float = Field(1.0, ge=0)
    lambdas: tuple[float, float, float] = (1.0, 0.0, 1.0)
    outer_steps: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    train_mode: bool = False
    batch_size: int | None = Field(None, ge=2)
    channels_last: bool | Literal["auto"] = "auto"
    stratified: bool = False

    @field_validator("lambdas")
    @classmethod
    def _weights(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(values) < 0 or not any(values):
            raise ValueError(f"expected three numbers >= 0, not all 0, got {values}")
        return values

    def recipe(self, view: DefenderView, size: int) -> Recipe:
        """Adam with AMSGrad at a constant rate, in float32, on images as they are stored."""
        return float32_recipe(
            view,
            epochs=self.rounds,
            batch_size=self.batch_size or batch_size_for(size),
            lr=self.lr,
            optimizer="adam",
            amsgrad=True,
            weight_decay=0.0,
            channels_last=self.channels_last,
        )


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows ``[B, K]`` of probabilities, in nats, ``[B]``."""
    p, q = p.clamp(min=_FLOOR), q.clamp(min=_FLOOR)
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(dim=1) + (q * (q.log() - middle)).sum(dim=1)) / 2


def attack_losses(
    logits: tuple[Tensor, Tensor], guesses: tuple[Tensor, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the perturbation descends.

    Args:
        logits: Of the model and of the backdoored one on the perturbed images, ``[B, K]``.
        guesses: Their predictions on the clean images, int64 ``[B]``.
        labels: True labels.

    Returns:
        ``L_adv``: minus the mean cross-entropy of the samples that do not fool a model yet, over both models;
        ``L_share``: the summed divergence of the samples that are not shared, over B; and which are shared, bool
        ``[B]``: both models changed their prediction, to the same class.

    Source: Wei et al., NeurIPS 2023, eq. 5 and 6.
    """
    n = len(labels)
    now = [z.detach().argmax(dim=1) for z in logits]
    fooled = [new != old for new, old in zip(now, guesses, strict=True)]
    adversarial = logits[0].new_zeros(())
    for z, done in zip(logits, fooled, strict=True):
        adversarial = adversarial - (F.cross_entropy(z, labels, reduction="none") * ~done).sum() / (2 * n)
    shared = fooled[0] & fooled[1] & (now[0] == now[1])
    probabilities = [z.softmax(dim=1) for z in logits]
    return adversarial, (divergence(*probabilities) * ~shared).sum() / n, shared


def unlearning_loss(logits: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """Push the model away from the class that the backdoored model sees.

    Args:
        logits: Of the model on the perturbed images, ``[B, K]``.
        wanted: Classes s that the backdoored model predicts there, int64 ``[B]``.
        chosen: Samples that count, bool ``[B]``.

    Returns:
        ``1 / 2B`` times the sum of ``-log(1e-6 + min(1 - p_s, .999)) - log(1 + 1e-6 - max(p_s, .001))``: two equal
        terms, each kept in range at one end.
    """
    p = logits.softmax(dim=1)
    own = p.gather(1, wanted[:, None])[:, 0]
    others = p.scatter(1, wanted[:, None], 0.0).sum(dim=1)
    each = -(1e-6 + others.clamp(max=0.999)).log() - (1 + 1e-6 - own.clamp(min=0.001)).log()
    return (each * chosen).sum() / (2 * len(wanted))


class SharedUnlearning(Program):
    """For each batch a search for perturbations that fool both models alike, and a step against them.

    Args:
        frozen: The backdoored model, never changed.
        config: Settings.
    """

    def __init__(self, frozen: nn.Module, config: SAUConfig) -> None:
        self._frozen, self._config = frozen, config

    def describe(self) -> dict[str, Any]:
        settings = self._config.model_dump(mode="json", exclude={"rounds", "preset"})
        return {**super().describe(), "settings": settings, "frozen": content_hash(self._frozen.state_dict())}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._model = model
        self._std = torch.tensor(train.std, device=device).view(1, -1, 1, 1)
        # It sees the same images in every epoch: its predictions on them are made once.
        self._frozen_guess = predict_labels(self._frozen, train, device=device).to(device)

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        if not self._config.train_mode:
            self._model.eval()
        self._counts = torch.zeros(3, device=self.device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        with evaluating(model):
            delta = self._search(model, batch)
        x = batch.x + delta / self._std
        with torch.no_grad():
            wanted = self._frozen(x).argmax(dim=1)
        chosen = (wanted != batch.y) & (wanted != self._frozen_guess[batch.index])
        self._last = (batch, x, wanted, chosen)
        self._counts += torch.stack([self._shared.sum(), chosen.sum(), chosen.new_tensor(len(batch), dtype=torch.long)])
        return self._outer(model)

    def after_step(self, model: nn.Module) -> None:
        for _ in range(self._config.outer_steps - 1):
            self.optimizer.zero_grad(set_to_none=True)
            self._outer(model)[0].backward()
            self.optimizer.step()

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        shared, chosen, total = self._counts.tolist()
        return {"shared": shared / total, "unlearned": chosen / total}

    def _outer(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The loss of the weights; clean and perturbed images in one pass."""
        batch, x, wanted, chosen = self._last
        weights = self._config.lambdas
        logits, perturbed = model(torch.cat([batch.x, x])).split(len(batch))
        value = weights[0] * F.cross_entropy(logits, batch.y)
        if weights[1]:
            value = value + weights[1] * F.cross_entropy(perturbed, batch.y)
        if weights[2]:
            value = value + weights[2] * unlearning_loss(perturbed, wanted, chosen)
        return value, logits

    def _search(self, model: nn.Module, batch: Batch) -> Tensor:
        """Perturbations ``[B, C, H, W]`` in 0..1 units; gradients by the perturbation only."""
        config = self._config
        seed = derive_seed("sau", self.seed, batch.epoch, batch.step)
        delta = start(batch.x, config.init, config.norm_type, config.bound, seed)
        with torch.no_grad():
            guesses = (model(batch.x).argmax(dim=1), self._frozen_guess[batch.index])
        self._shared = torch.zeros(len(batch), dtype=torch.bool, device=batch.x.device)
        for _ in range(config.adv_steps):
            leaf = delta.requires_grad_()
            x = batch.x + leaf / self._std
            adversarial, share, self._shared = attack_losses((model(x), self._frozen(x)), guesses, batch.y)
            if bool(self._shared.all()):
                delta = leaf.detach()
                break
            (gradient,) = torch.autograd.grad(config.beta_adv * adversarial + config.beta_share * share, leaf)
            delta = project_(leaf.detach() - config.adv_lr * gradient.sign(), config.norm_type, config.bound)
        return delta.detach()


@register_defense("sau")
class SAU(Defense):
    """Find adversarial examples that the model shares with its backdoored self, and unlearn them.

    For each batch of the clean hold-out, with f the model and f0 a frozen copy of it as it came:

    1. per-sample perturbations within 0.2 of every pixel, by sign steps, that turn both models to one wrong class
       (:func:`attack_losses`): a backdoored model's own trigger is such a one;
    2. a step of f on the clean cross-entropy plus a push away from the class that f0 sees there
       (:func:`unlearning_loss`).

    Eval mode and float32; no augmentation; perturbed images are not clipped to 0..1. Nothing is selected.

    Source: Wei et al., NeurIPS 2023, arXiv 2307.10562, algorithm 1. Deviations: see the card.
    """

    card = DefenseCard(
        title="Shared Adversarial Unlearning",
        paper="Wei, Zhang, Zha, Wu, NeurIPS 2023",
        year=2023,
        arxiv="2307.10562",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Unlearns adversarial examples that the model shares with its backdoored copy.",
        deviations=(
            "Predictions of the backdoored model on clean images are made once and those of the other once a batch; "
            "the reference makes both anew in every step of the search.",
            "The search differentiates by the perturbation alone; in the reference the weights' gradients pile up and "
            "are cleared before the step.",
            "On hold-outs under about 1,500 images the batch shrinks so that an epoch keeps about 8 steps "
            "(preset='reference' keeps 256).",
        ),
    )
    Config = SAUConfig

    def run(self, view: DefenderView) -> DefenseResult:
        config: SAUConfig = self.config
        model, clean = view.model, view.clean
        frozen = copy.deepcopy(model).eval()
        with trainable(frozen, False):
            history = optimise(
                model,
                clean,
                view,
                config.recipe(view, len(clean)),
                SharedUnlearning(frozen, config),
                tag="unlearning",
                remedy=f"{lower(config, 'lr')} or the third of lambdas (now {config.lambdas[2]:g})",
            )
        return DefenseResult(kind=self.card.kinds[0], model=model, history=history)
