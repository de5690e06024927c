"""BNP: BatchNorm-statistics pruning, and MBNS, the name of its early form."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._norms import Norms, input_statistics, running_statistics, some
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView

__all__ = ["BNP", "MBNS", "BNPConfig", "MBNSConfig", "gaussian_kl"]


class BNPConfig(DefenseConfig):
    """Settings of BNP.

    Args:
        u: Channels whose divergence lies more than this many standard deviations above their layer's mean are pruned (4
            on Tiny ImageNet).
        num_samples: Clean images that the moments are taken over; None is the whole hold-out, the reference has 256.
        prune_bias: Set BatchNorm's bias to zero too; the authors' code leaves it.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"num_samples": 256},
        "official": {"num_samples": 500, "prune_bias": False},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"tiny_imagenet": {"u": 4.0}}

    u: float = Field(3.0, ge=0)
    num_samples: int | None = Field(None, ge=2)
    prune_bias: bool = True
    stratified: bool = False


@register_defense("bnp")
class BNP(Defense):
    """Prune the channels whose clean moments differ most from those that BatchNorm met in the poisoned training.

    1. Mean and unbiased variance of what each BatchNorm channel receives from clean images (eval mode, test transform),
       beside its running mean and variance, which hold the poisoned mixture's.
    2. ``KL(N(mean, var) || N(running mean, running var))`` of each channel.
    3. Weight and bias of the channels more than ``u`` standard deviations above their layer's mean become zero.

    One forward pass, no training. LayerNorm keeps no running statistics, so models without BatchNorm are refused.

    Source: Zheng, Tang, Li, Liu, Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022.
    Deviations: see the card.
    """

    card = DefenseCard(
        title="BatchNorm-statistics Pruning",
        paper="Zheng, Tang, Li, Liu, NeurIPS 2022",
        year=2022,
        arxiv="",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean", "batch_norm"}),
        summary="Prunes channels whose clean moments differ from BatchNorm's running ones.",
        deviations=(
            "The logarithm is of standard deviations, as the formula says; the reference leaves out the root and "
            "doubles its weight.",
            "The clean moments are those of clean images; in the reference a second pass overwrites them with those of "
            "a poisoned training batch.",
            "They are taken over the whole hold-out without crops and flips; the reference takes one augmented batch "
            "of 256 (num_samples=256).",
            "BatchNorm's eps is added to both variances, so that a constant channel has a finite divergence.",
            "No LayerNorm form: it compares with a batch of the poisoned training set, which this method is not "
            "granted.",
        ),
    )
    Config = BNPConfig
    version = 2  # 1 drew some of many samples by their place in storage

    def check(self, view: DefenderView) -> None:
        running_statistics(Norms.find(view.model, self.name), self.name)

    def run(self, view: DefenderView) -> DefenseResult:
        config: BNPConfig = self.config
        model = view.model
        norms = Norms.find(model, self.name)
        images = some(view.clean, config.num_samples, view.generator("moments"))
        clean = input_statistics(norms, images)
        mean, var, eps = running_statistics(norms, self.name)
        divergence = gaussian_kl(clean.mean, clean.var + eps, mean, var + eps)
        pruned = norms.outliers(divergence, config.u, "high")
        norms.zero(pruned, biases=config.prune_bias)
        info = {
            "pruned": int(pruned.sum()),
            "channels": len(norms),
            "pruned_channels": norms.listed(pruned),
            "samples": len(images),
            "not_finite": int((~divergence.isfinite()).sum()),
        }
        selection = {"criterion": f"divergence above mean + {config.u:g} std of the layer", "u": config.u}
        return DefenseResult(kind=self.card.kinds[0], model=model, selection=selection, info=info)


class MBNSConfig(BNPConfig):
    """Settings of MBNS: those of :class:`BNPConfig`, the moments of 256 images."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {}}

    num_samples: int | None = Field(256, ge=2)


@register_defense("mbns")
class MBNS(BNP):
    """BNP under the name of its early form: the moments of 256 clean images, weight and bias zeroed.

    The reference's code of that name is BNP's; there is no other algorithm. On the same batch it prunes what
    :class:`BNP` with ``num_samples=256`` prunes, so a table needs one of the two.

    Source: as :class:`BNP`.
    """

    card = DefenseCard(
        title="Mismatched BatchNorm Statistics",
        paper="Zheng, Tang, Li, Liu, NeurIPS 2022",
        year=2022,
        arxiv="",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean", "batch_norm"}),
        summary="BNP's early form: one batch of 256 clean images.",
        deviations=(*BNP.card.deviations[:2], *BNP.card.deviations[3:4]),
    )
    Config = MBNSConfig


def gaussian_kl(mean1: Tensor, var1: Tensor, mean2: Tensor, var2: Tensor) -> Tensor:
    """``KL(N(mean1, var1) || N(mean2, var2))``, elementwise; 0 where they agree, never below it but for rounding."""
    return 0.5 * torch.log(var2 / var1) + (var1 + (mean1 - mean2).square()) / (2 * var2) - 0.5
