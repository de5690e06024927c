"""Which reflections work best: the candidate ranking of Refool (arXiv 2007.02343, section 3.3)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bbfast._hashing import content_hash
from bbfast.attacks.poisoning import draw_index
from bbfast.attacks.prerequisites import AttackContext
from bbfast.attacks.surrogate import Classifier, set_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.training import predict_labels, train

__all__ = ["Lay", "Ranking", "rank_reflections"]

Lay = Callable[[Tensor, Tensor, Tensor, str], Tensor]
"""Lays reflections over images: images, numbers of the reflections, sample numbers, key of the random optics."""

_LEAST_WEIGHT = 1e-3
"""What a reflection that never fooled the surrogate is still drawn with."""
_IMAGES = 4096


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Settings of the ranking.

    Args:
        target: Target class.
        iterations: Times that the surrogate is fine-tuned.
        ratio: Share of the target class that carries reflections.
        epochs: Epochs of each fine-tuning.
        images: Images of other classes that a reflection's success is measured on.
        optics: How reflections are laid over; part of what the result is found by.
    """

    target: int
    iterations: int
    ratio: float
    epochs: int
    images: int
    optics: str


def rank_reflections(
    context: AttackContext, data: ImageSet, surrogate: Classifier, pool: Tensor, lay: Lay, ranking: Ranking, seed: int
) -> Tensor:
    """Weights of the reflections of ``pool``, uint8 ``[M, C, H, W]``: the larger the better, float64 ``[M]``.

    All start at 1. In each iteration reflections are drawn by weight and laid over part of the target class, labels
    unchanged; a copy of the surrogate is fine-tuned on that; each drawn reflection's weight becomes the share of other
    images that it turns into the target, and the others get the median of these.

    Args:
        context: Where to work and keep the result.
        data: The clean training set.
        surrogate: Trained on it.
        pool: The candidates.
        lay: Lays them over images.
        ranking: Settings.
        seed: Of everything drawn.
    """
    recipe = context.recipe.replace(
        epochs=ranking.epochs,
        optimizer="sgd",
        lr=1e-3,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        schedule="constant",
        eval_every=0,
    )
    identity = {
        **dataclasses.asdict(ranking),
        "data": set_hash(data),
        "pool": content_hash({"pool": pool}),
        "surrogate": content_hash(surrogate.network.state_dict()),
        "recipe": recipe.model_dump(mode="json"),
    }

    def make(_: object) -> dict[str, Tensor]:
        weight = torch.ones(len(pool), dtype=torch.float64)
        hosts = (data.labels == ranking.target).nonzero().flatten()
        others = (data.labels != ranking.target).nonzero().flatten()
        probe = data.subset(draw_index(others, min(ranking.images, len(others)), derive_seed("probe", seed) % 2**32))
        count = max(1, round(ranking.ratio * len(hosts)))
        for iteration in range(ranking.iterations):
            generator = torch.Generator().manual_seed(derive_seed("refool rank", seed, iteration))
            chance = weight.clamp(min=_LEAST_WEIGHT)
            drawn = torch.multinomial(chance, count, replacement=count > len(pool), generator=generator)
            rows = hosts[torch.randperm(len(hosts), generator=generator)[:count].to(hosts.device)]
            images, key = data.images.clone(), f"rank {iteration}"
            images[rows] = lay(images[rows], drawn, data.ids[rows], key)
            network = copy.deepcopy(surrogate.network).requires_grad_(True)
            train(
                network,
                dataclasses.replace(data, images=images),
                recipe,
                seed=derive_seed("refool rank", seed, iteration) % 2**32,
                device=context.device,
                progress=context.progress,
                description=f"ranking of reflections, {iteration + 1} of {ranking.iterations}",
            )
            used = drawn.unique()
            success = torch.cat(
                [
                    _success(network, probe, part, lay, ranking.target, key, context.device)
                    for part in used.split(max(1, _IMAGES // len(probe)))
                ]
            )
            weight.fill_(float(success.median()))
            weight[used] = success
        return {"weight": weight}

    return context.obtain("refool_ranking", identity, make, seed=seed)["weight"]


def _success(
    network: torch.nn.Module,
    probe: ImageSet,
    used: Tensor,
    lay: Lay,
    target: int,
    key: str,
    device: torch.device,
) -> Tensor:
    """Share of the images that each of some reflections turns into the target, float64."""
    rows = torch.arange(len(probe), device=probe.device).repeat(len(used))
    images = lay(probe.images[rows], used.repeat_interleave(len(probe)), probe.ids[rows], f"{key} probe")
    triggered = ImageSet(images, probe.labels[rows], mean=probe.mean, std=probe.std)
    fooled = predict_labels(network, triggered, device=device) == target
    return fooled.view(len(used), len(probe)).double().mean(1)
