"""EP: entropy-based pruning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._norms import NormKind, Norms, some, spatial_maxima
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView

__all__ = ["EP", "EPConfig", "histogram_entropy", "standardised"]

_BUDGET = 1 << 22
"""Values that are counted at a time."""


class EPConfig(DefenseConfig):
    """Settings of EP.

    Args:
        u: Channels whose entropy lies more than this many standard deviations below their layer's mean are pruned (4 on
            Tiny ImageNet).
        bin_width: Width of a bin of the histogram, in standard deviations of the channel.
        num_samples: Training samples that are looked at; None is all. The reference's 256 hold 2 or 3 poisoned ones at
            a poisoning ratio of 1 %.
        strict_bins: The reference's counting: values on an edge fall in no bin, and those above the last whole bin in
            none either.
        prune_bias: Set the norm layer's bias to zero too; the authors' code leaves it.
        norm: ``layernorm`` takes LayerNorm's channels instead: no part of the paper.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"num_samples": 256, "strict_bins": True},
        "official": {"num_samples": 500, "bin_width": 0.01, "prune_bias": False},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"tiny_imagenet": {"u": 4.0}}

    u: float = Field(3.0, ge=0)
    bin_width: float = Field(0.1, gt=0)
    num_samples: int | None = Field(2048, ge=2)
    strict_bins: bool = False
    prune_bias: bool = True
    norm: NormKind = "batchnorm"


@register_defense("ep")
class EP(Defense):
    """Prune the channels whose pre-activations on poisoned data fall in two heaps.

    1. The largest value over all positions of what each norm channel receives from some of the training samples (eval
       mode, test transform), standardised by channel.
    2. Entropy of its histogram. A channel that the trigger drives far out has its clean values in few bins.
    3. Weight and bias of the channels with an entropy more than ``u`` standard deviations below their layer's mean
       become zero.

    One forward pass, no clean data, no training. It lives on the share of poisoned samples: at 1 % the second heap is
    hardly there.

    Source: Zheng, Tang, Li, Liu, Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022. Also
    known as DDE, differential entropy. Deviations: see the card.
    """

    card = DefenseCard(
        title="Entropy-based Pruning",
        paper="Zheng, Tang, Li, Liu, NeurIPS 2022",
        year=2022,
        arxiv="",
        kinds=("mitigation",),
        needs=frozenset({"model", "poisoned_train"}),
        summary="Prunes channels whose pre-activations on training samples have low entropy.",
        deviations=(
            "2,048 training samples without crops and flips; the reference takes 256 augmented ones (num_samples=256).",
            "Bins are half open and the last one counts; the reference drops values on an edge and above the last "
            "whole bin (strict_bins=True).",
            "A constant channel is all zeros after standardisation; the reference's BatchNorm form divides by its "
            "deviation of 0.",
            "LayerNorm's channels (norm='layernorm') are told from positions; the reference mixes them.",
        ),
    )
    Config = EPConfig
    version = 2  # 1 drew some of many samples by their place in storage

    def check(self, view: DefenderView) -> None:
        Norms.find(view.model, self.name, self.config.norm)

    def run(self, view: DefenderView) -> DefenseResult:
        config: EPConfig = self.config
        model = view.model
        norms = Norms.find(model, self.name, config.norm)
        images = some(view.poisoned_train, config.num_samples, view.generator("samples"))
        maxima = spatial_maxima(norms, images)
        entropy = torch.cat([histogram_entropy(standardised(a), config.bin_width, config.strict_bins) for a in maxima])
        pruned = norms.outliers(entropy, config.u, "low")
        norms.zero(pruned, biases=config.prune_bias)
        info = {
            "pruned": int(pruned.sum()),
            "channels": len(norms),
            "pruned_channels": norms.listed(pruned),
            "samples": len(images),
        }
        selection = {"criterion": f"entropy below mean - {config.u:g} std of the layer", "u": config.u}
        return DefenseResult(kind=self.card.kinds[0], model=model, selection=selection, info=info)


def standardised(values: Tensor) -> Tensor:
    """Each row of ``[C, B]`` minus its mean, over its unbiased deviation, float64; a constant row is zeros."""
    values = values.double()
    away = values - values.mean(dim=1, keepdim=True)
    std = away.square().sum(dim=1, keepdim=True).div(max(values.shape[1] - 1, 1)).sqrt()
    # A constant row's deviation is rounding noise, which must not be blown up.
    constant = values.amax(dim=1, keepdim=True) == values.amin(dim=1, keepdim=True)
    return torch.where(constant, 0, away / std.masked_fill(constant, 1))


def histogram_entropy(values: Tensor, width: float, strict: bool = False) -> Tensor:
    """Entropy in nats of each row's histogram, float64 ``[C]``: ``-sum p log p`` with ``p = count / B``.

    Args:
        values: ``[C, B]``, a layer's channels; not finite values give their row NaN.
        width: Width of a bin; bins begin at the smallest value of the whole layer.
        strict: Count only what lies strictly inside the whole bins, see :class:`EPConfig`.
    """
    good = values.isfinite().all(dim=1)
    if not bool(good.any()):
        return values.new_full((values.shape[0],), torch.nan, dtype=torch.float64)
    low, high = values[good].min(), values[good].max()
    position = (values.where(good[:, None], low) - low) / width
    index = position.floor().long()
    whole = int(float(high - low) / width)
    counted = torch.ones_like(good).expand(values.shape[1], -1).T
    if strict:
        counted = (index < whole) & (position != index)
    entropy = [
        _entropy(i, c, whole + 1, values.shape[1])
        for i, c in zip(index.split(_rows(index)), counted.split(_rows(index)), strict=True)
    ]
    return torch.cat(entropy).where(good, torch.nan)


def _entropy(index: Tensor, counted: Tensor, bins: int, samples: int) -> Tensor:
    """Of rows at once: every row has bins of its own, and one more for what is not counted."""
    rows = index.shape[0]
    index = torch.where(counted, index.clamp(max=bins - 1), bins)
    offset = torch.arange(rows, device=index.device)[:, None] * (bins + 1)
    counts = torch.bincount((index + offset).flatten(), minlength=rows * (bins + 1)).view(rows, -1)[:, :-1]
    return torch.special.entr(counts.double() / samples).sum(dim=1)


def _rows(index: Tensor) -> int:
    return max(1, _BUDGET // max(index.shape[1], 1))
