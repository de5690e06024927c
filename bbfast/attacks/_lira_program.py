"""The training of LIRA: generator and classifier in turn, then the classifier alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.attacks._augment import TensorAugment, keep_layout
from bbfast.attacks._networks import TrainedNetwork, initial, refuse_fp16
from bbfast.attacks.poisoning import LabelRule
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

if TYPE_CHECKING:
    from bbfast.attacks.lira import Lira

__all__ = ["LiraProgram"]


class LiraProgram(Program):
    """Both stages of LIRA.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    augments_itself = True
    drop_last = False

    def __init__(self, attack: Lira, rule: LabelRule) -> None:
        self.attack, self.rule = attack, rule

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config), "rule": repr(self.rule)}

    def schedule_start(self, recipe: Recipe) -> int:
        return self.attack.first_stage(recipe)

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        refuse_fp16(recipe, self.attack.name)
        self.first_stage = self.attack.first_stage(recipe)
        self.augment = TensorAugment(
            c.random_crop, c.random_rotation, recipe.flip, per_sample=c.compat == "paper", p_crop=1.0, p_rotation=1.0
        )
        build = self.attack.network(train.image_size[0])
        # New ones, whatever the attack holds: a run is a function of its seed.
        working, self.fixed = (initial(build, self.attack.name, seed).to(device) for _ in range(2))
        self.working = TrainedNetwork("working", working, torch.optim.Adam(working.parameters(), lr=c.lr_generator))
        self.fixed.eval().requires_grad_(False)
        self.attack.tensors = {**self.attack.tensors, **self._published()}
        self.stage_one: dict[str, Tensor] = {}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self.learning = epoch < self.first_stage
        self.working.network.train(self.learning)
        # Stage 1 has no weight decay, and stage 2 begins with an optimiser as new.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0 if self.learning else self.recipe.weight_decay
        if epoch == self.first_stage:
            self.optimizer.state.clear()
        self.obeyed, self.seen = torch.zeros((), device=self.device), 0

    def make_batch(self, batch: Batch) -> Batch:
        if not self.recipe.augment:
            return batch
        x = self.augment(batch.x, batch.index, seed=self.seed, epoch=batch.epoch, step=batch.step)
        return batch.replace(x=keep_layout(x, batch.x))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        # In bf16 a change of 0.01 is lost beside a value of 2.
        with torch.autocast(self.device.type, enabled=False):
            wanted = self.rule.given(batch.y)
            # BatchNorm of the generator's narrowest layer cannot train on one image of 16 x 16.
            if self.learning and len(batch) > 1:
                self._teach(model, batch.x, wanted)
            return self._mixed(model, batch, wanted)

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        last_of_stage = epoch == self.first_stage - 1
        if self.learning and ((epoch + 1) % self.attack.config.fix_generator_epoch == 0 or last_of_stage):
            self.fixed.load_state_dict(self.working.network.state_dict())
        if self.attack.config.compat == "reference":
            if last_of_stage:
                self.stage_one = {name: value.clone() for name, value in model.state_dict().items()}
            if epoch == self.recipe.epochs - 1:
                model.load_state_dict(self.stage_one)
        return {"train_asr": float(self.obeyed) / self.seen}

    def state(self) -> dict[str, Tensor]:
        stage_one = {f"stage_one.{name}": value for name, value in self.stage_one.items()}
        return {**self.working.state(), **self._published(), **stage_one}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.working.load_state(tensors)
        for name, value in self._published().items():
            value.copy_(tensors[name])
        prefix = "stage_one."
        self.stage_one = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    def _published(self) -> dict[str, Tensor]:
        """The generator that the classifier learns, under the names of the attack's tensors."""
        return {f"generator.{name}": value for name, value in self.fixed.state_dict().items()}

    def _teach(self, model: nn.Module, x: Tensor, wanted: Tensor) -> None:
        """A step of the generator against the classifier."""
        triggered = self.attack.perturbed(x, self.working.network(x), self.attack.config.eps)
        value = F.cross_entropy(model(triggered).float(), wanted)
        if self.attack.config.compat == "reference":
            value.backward()  # the classifier's gradients stay, and the engine's backward adds to them
        else:
            parameters = list(self.working.network.parameters())
            for p, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                p.grad = gradient
        self.working.step()

    def _mixed(self, model: nn.Module, batch: Batch, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's loss on clean and triggered images."""
        c = self.attack.config
        eps, alpha = (c.eps, c.alpha) if self.learning else (self.attack.strength("test"), c.test_alpha)
        with torch.no_grad():
            triggered = keep_layout(self.attack.perturbed(batch.x, self.fixed(batch.x), eps), batch.x)
        if c.joint_forward:
            clean, bad = model(torch.cat([batch.x, triggered])).chunk(2)
        else:
            clean, bad = model(batch.x), model(triggered)
        self.obeyed += (bad.detach().argmax(1) == wanted).sum()
        self.seen += len(batch)
        smoothing = self.recipe.label_smoothing
        first, second = (
            F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
            for logits, y in ((clean, batch.y), (bad, wanted))
        )
        value = alpha * first + (1 - alpha) * second
        if self.recipe.flooding:
            value = (value - self.recipe.flooding).abs() + self.recipe.flooding
        return value, clean
