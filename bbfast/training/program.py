"""What happens inside a training step: the hooks of training-controlled attacks and in-training defenses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed

if TYPE_CHECKING:
    from bbfast.training.recipe import Recipe

__all__ = ["Batch", "Program", "derive_seed"]


class Program:
    """Plain supervised training; subclass it and override what differs.

    The engine calls, in this order: :meth:`start` once; then for each epoch :meth:`epoch_start`; for each batch
    :meth:`make_batch`, :meth:`loss` (under autocast), backward, :meth:`after_backward`, optimiser step,
    :meth:`after_step`; and :meth:`epoch_end`. Torch's global generators are seeded from ``(seed, epoch)`` before each
    epoch, so a program may draw from them and stays resumable. A program that keeps anything else across epochs gives
    it in :meth:`state`.

    Class attributes:
        augments_itself: True switches the loader's crops and flips off, for programs that augment after poisoning
            (WaNet, BPP: spec/attacks 0.6); :attr:`Recipe.augment` then tells the program whether it should.
        drop_last: Overrides the recipe's ``drop_last``; None keeps it.
        graph_safe: Whether :meth:`loss` may be captured in a CUDA graph: same operations each step, nothing read on the
            host, no state changed on the host. A subclass that overrides :meth:`loss` is taken as unsafe unless it says
            otherwise. A captured loss must not use ``batch.epoch`` and ``batch.step``.
        classifies: False for programs whose model does not give one logit a class (self-supervised stages): labels
            are not checked against the model's outputs.
    """

    augments_itself: ClassVar[bool] = False
    drop_last: ClassVar[bool | None] = None
    graph_safe: ClassVar[bool] = True
    classifies: ClassVar[bool] = True

    recipe: Recipe
    train: ImageSet
    seed: int
    device: torch.device
    optimizer: torch.optim.Optimizer
    """The model's optimiser, there from :meth:`start` on; the engine sets its learning rate before each step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "loss" in cls.__dict__ and "graph_safe" not in cls.__dict__:
            cls.graph_safe = False

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        """Called once before the first epoch, also of a resumed run (then :meth:`load_state` follows).

        Args:
            model: The model, on ``device``.
            train: The training set, on ``device``.
            recipe: The recipe in force.
            seed: Seed of the run.
            device: Where training happens.
        """
        self.train, self.recipe, self.seed, self.device = train, recipe, seed, device

    def schedule_start(self, recipe: Recipe) -> int:
        """Epoch in which the recipe's schedule begins; it spans the rest, and the rate is ``recipe.lr`` before.

        For programs that begin with a stage of their own. Called before :meth:`start`; may refuse the recipe.
        """
        return 0

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        """Called before the first batch of an epoch of ``steps`` batches; draw an epoch's random numbers here."""

    def make_batch(self, batch: Batch) -> Batch:
        """Change a batch before the forward pass: poison it, relabel it, set ``role`` and ``weight``.

        ``batch.x`` is float32 and normalised for a program that overrides this hook. Runs without gradient.
        """
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Loss (scalar, float32) and logits ``[B, K]`` of a batch (None: nothing to take an accuracy from).

        Cross-entropy, averaged with ``batch.weight`` as factors; the recipe's label smoothing and flooding apply.
        """
        logits = model(batch.x)
        smoothing = self.recipe.label_smoothing
        if batch.weight is None:
            value = F.cross_entropy(logits.float(), batch.y, label_smoothing=smoothing)
        else:
            each = F.cross_entropy(logits.float(), batch.y, label_smoothing=smoothing, reduction="none")
            value = (each * batch.weight).mean()
        if self.recipe.flooding:
            value = (value - self.recipe.flooding).abs() + self.recipe.flooding
        return value, logits

    def after_backward(self, model: nn.Module) -> None:
        """Gradients are complete (and unscaled); the optimiser has not stepped yet."""

    def after_step(self, model: nn.Module) -> None:
        """The optimiser has stepped."""

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Called after the last batch of an epoch; what it returns is added to that epoch's history row."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What makes this program what it is, fit for JSON; a checkpoint of another description is not used."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}"}

    def state(self) -> dict[str, Tensor]:
        """Everything the program carries from one epoch to the next, for checkpoints."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        if tensors:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(tensors)}")
