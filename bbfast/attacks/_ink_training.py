"""How Poison Ink's injector and extractor are trained, kept and judged (spec/attacks section 11)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.attacks._encoding import Adversary, unit_set
from bbfast.attacks._ink import ink_image, move_grids, random_colours
from bbfast.attacks._networks import initial
from bbfast.attacks._poison_ink_nets import Discriminator, Extractor, InkNets
from bbfast.attacks.prerequisites import AttackContext
from bbfast.attacks.surrogate import set_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.models import load_state, model_state
from bbfast.training import Program, Recipe, train

if TYPE_CHECKING:
    from bbfast.attacks.poison_ink import PoisonInk

__all__ = ["PRESETS", "InkProgram", "obtain_ink_nets", "read_ink"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 200,
        "batch_size": 32,
        "lr": 2e-4,
        "beta": 0.999,
        "curve": "step",
        "injector_width": 64,
        "extractor_width": 128,
    },
    "quick": {
        "epochs": 6,
        "batch_size": 16,
        "lr": 1e-3,
        "beta": 0.99,
        "curve": "onecycle",
        "injector_width": 16,
        "extractor_width": 32,
    },
}
_LOSS_SCALE, _EDGE, _CLEAN = 1e4, 13.0, 100.0


def obtain_ink_nets(context: AttackContext, data: ImageSet, config: PoisonInk.Config, seed: int) -> InkNets:
    """Injector and extractor trained on the clean training set, from the context's store or trained now.

    Args:
        context: Where to work and keep them.
        data: The clean training set.
        config: The attack's settings.
        seed: Of weights, batches, colours and moves.

    Returns:
        The networks in eval mode.
    """
    channels = data.image_size[0]
    width = config.training("extractor_width")
    networks = initial(lambda: InkNets(config.injector(channels), Extractor(channels, width)), "poison ink", seed)
    assert isinstance(networks, InkNets)
    against = initial(lambda: Discriminator(channels), "poison ink", seed) if "adv" in config.stages else None
    programs = [InkProgram(stage, config.threshold, against if stage == "adv" else None) for stage in config.stages]
    preset = PRESETS[config.encoder_preset]
    recipe = Recipe(
        epochs=config.training("epochs"),
        batch_size=config.training("batch_size"),
        lr=config.training("lr"),
        optimizer="adam",
        betas=(0.5, preset["beta"]),
        weight_decay=0,
        schedule=preset["curve"],
        step_size=80,
        gamma=0.1,
        augment=False,
        eval_every=0,
    )
    identity = {
        "initial_weights": content_hash(networks.state_dict()),
        "recipe": recipe.model_dump(mode="json"),
        "data": set_hash(data),
        "programs": [program.describe() for program in programs],
    }

    def make(work: Path) -> dict[str, Tensor]:
        for program in programs:
            train(
                networks,
                unit_set(data),
                recipe,
                seed=seed,
                device=context.device,
                program=program,
                checkpoint=work / program.stage,
                progress=context.progress,
                description=f"ink of the attacker, stage {program.stage}",
            )
        return model_state(networks)

    load_state(networks, context.obtain("ink_nets", identity, make, seed=seed))
    return networks.eval()


def read_ink(
    networks: InkNets, images: Tensor, marked: Tensor, colour: Tensor, threshold: float
) -> tuple[float, float]:
    """How well the ink is read back.

    Args:
        networks: Trained, in eval mode.
        images: Clean images, uint8 ``[N, C, H, W]``.
        marked: The same images with ink.
        colour: ``[C]``, 0..255.
        threshold: Of the edges.

    Returns:
        Mean absolute error, in 0..1, of the ink that the extractor finds on the edges of ``marked``; the mean of what
        it finds in ``images``, where white (1) is right.
    """
    device = next(networks.parameters()).device
    with torch.no_grad():
        x, drawn = images.to(device).float() / 255, marked.to(device).float() / 255
        ink, mask = ink_image(drawn, colour, threshold)
        found = torch.cat([networks.extractor(part) for part in drawn.split(256)])
        error = ((found - ink).abs() * mask).sum() / (mask.sum() * images.shape[1]).clamp_min(1)
        white = torch.cat([networks.extractor(part) for part in x.split(256)]).mean()
    return float(error), float(white)


class InkProgram(Program):
    """One stage of the networks' training.

    ``MSE(c, x) + 13 edge + back + 100 clean``, times 10^4: ``edge`` and ``back`` are the errors of the ink read from
    the moved container ``c`` on and off the edges it has then, ``clean`` that of white read from the moved image. Stage
    ``adv`` adds ``MSE(D(c), 1)``.

    Args:
        stage: One of :data:`~bbfast.attacks._ink.STAGES`.
        threshold: Of the edges.
        discriminator: Network of the discriminator, for the stage ``adv``.
    """

    classifies = False

    def __init__(self, stage: str, threshold: float, discriminator: nn.Module | None = None) -> None:
        self.stage, self.threshold, self.discriminator = stage, threshold, discriminator

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self.sums = torch.zeros(5, device=device)
        self.adversary: Adversary | None = None
        if self.discriminator is not None:
            network = self.discriminator.to(device).train()
            optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr, betas=recipe.betas)
            self.adversary = Adversary(network, optimizer, _discriminator_loss)

    def describe(self) -> dict[str, Any]:
        weights = None if self.discriminator is None else content_hash(self.discriminator.state_dict())
        return {**super().describe(), "stage": self.stage, "threshold": self.threshold, "discriminator": weights}

    def make_batch(self, batch: Batch) -> Batch:
        key = (self.seed, self.stage, batch.epoch)
        self.colour = random_colours(batch.index, batch.x.shape[1], *key)
        self.moves = move_grids(batch.index, (batch.x.shape[2], batch.x.shape[3]), self.stage, *key)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        networks, x, number = cast(InkNets, model), batch.x, len(batch)
        ink, _ = ink_image(x, self.colour, self.threshold)
        drawn = networks.injector(torch.cat([x, ink], 1))
        moved = ops.warp(torch.cat([drawn, x]), self.moves.repeat(2, 1, 1, 1))
        found, blank = networks.extractor(moved).split(number)
        wanted, mask = ink_image(moved[number:], self.colour, self.threshold)
        invisible = F.mse_loss(drawn, x)
        edge = F.mse_loss(found * mask, wanted * mask)
        back = F.mse_loss(found * (1 - mask), (1 - mask).expand_as(found))
        clean = F.mse_loss(blank, torch.ones_like(blank))
        total = invisible + _EDGE * edge + back + _CLEAN * clean
        self.sums += torch.stack([invisible, edge, back, clean, torch.ones_like(clean)]).detach()
        if self.adversary is not None:
            total = total + (self.adversary.judge(x, drawn) - 1).square().mean()
        return _LOSS_SCALE * total, None

    def after_step(self, model: nn.Module) -> None:
        if self.adversary is not None:
            self.adversary.step()

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        *errors, steps = self.sums.tolist()
        self.sums.zero_()
        return {name: e / steps for name, e in zip(("invisible", "edge", "back", "clean"), errors, strict=True)}

    def state(self) -> dict[str, Tensor]:
        return {} if self.adversary is None else self.adversary.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.adversary is not None:
            self.adversary.load_state(tensors)


def _discriminator_loss(clean: Tensor, drawn: Tensor) -> Tensor:
    return 0.5 * ((clean - 1).square().mean() + drawn.square().mean())
