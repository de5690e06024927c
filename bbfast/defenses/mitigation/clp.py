"""CLP: Channel-Lipschitzness Pruning."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import ops
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._norms import Norms, running_statistics
from bbfast.defenses.mitigation._pairs import by_dataflow, by_registration
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError

__all__ = ["CLP", "CLPConfig", "channel_bounds"]

_log = logging.getLogger(__name__)


class CLPConfig(DefenseConfig):
    """Settings of CLP.

    Args:
        u: Channels whose bound lies more than this many standard deviations above their layer's mean are pruned (5 on
            Tiny ImageNet). A layer of n channels can reach ``(n - 1) / sqrt(n)`` at most: at 3 it takes 11 channels.
        pairing: Which convolution belongs to a BatchNorm: the one registered last before it, as the reference
            has it, or (``dataflow``) the one whose output reaches it.
        eps: Number under the root of the running variance: ``bn`` is the layer's own, 0 is the reference's.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {"eps": 0}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"tiny_imagenet": {"u": 5.0}}

    u: float = Field(3.0, ge=0)
    pairing: Literal["registration", "dataflow"] = "registration"
    eps: Literal["bn", 0] = "bn"


@register_defense("clp")
class CLP(Defense):
    """Prune the channels that can change their output most: no data, no training.

    1. For each channel j of a convolution followed by BatchNorm, the upper bound of its Lipschitz constant
       ``s_j = sigma_max(W_j) |gamma_j| / sqrt(var_j + eps)``, ``W_j`` its kernel as a ``[C_in, kh kw]`` matrix.
    2. Weight and bias of the BatchNorm channels with ``s_j > mean + u std`` of their layer (unbiased) become zero.

    BatchNorms without a convolution of their width (behind a concatenation, say) are left alone and listed.

    Source: Zheng, Tang, Li, Liu, ECCV 2022, arXiv 2208.03111. Deviations: see the card.
    """

    card = DefenseCard(
        title="Channel-Lipschitzness Pruning",
        paper="Zheng, Tang, Li, Liu, ECCV 2022",
        year=2022,
        arxiv="2208.03111",
        kinds=("mitigation",),
        needs=frozenset({"model", "batch_norm"}),
        summary="Prunes BatchNorm channels with an outlying Lipschitz bound, without data.",
        deviations=(
            "BatchNorm's eps is added to the running variance; without it (eps=0, the reference) a channel of variance "
            "0 turns its layer's mean and deviation into NaN.",
            "A channel whose bound is not finite is left out of mean and deviation and not pruned, with a warning.",
            "A model without BatchNorm is refused; the reference returns it unchanged.",
            "A BatchNorm whose convolution has another width is left alone; the reference breaks off.",
        ),
    )
    Config = CLPConfig

    def check(self, view: DefenderView) -> None:
        norms = Norms.find(view.model, self.name)
        running_statistics(norms, self.name)
        if self.config.pairing == "registration":
            _demand(by_registration(view.model, norms.names), view.model)

    def run(self, view: DefenderView) -> DefenseResult:
        config: CLPConfig = self.config
        model = view.model
        norms = Norms.find(model, self.name)
        if config.pairing == "registration":
            pairs = by_registration(model, norms.names)
        else:
            pairs = by_dataflow(model, norms.names, view.image_size)
        _demand(pairs, model)
        bounds = channel_bounds(norms, pairs, 0.0 if config.eps == 0 else None)
        unscored = [name for name in norms.names if name not in pairs]
        silent = int((~bounds.isfinite()).sum()) - sum(norms.sizes[norms.names.index(name)] for name in unscored)
        if silent:
            _log.warning("clp: %d channels have no finite bound (running variance 0?) and are left alone", silent)
        pruned = norms.outliers(bounds, config.u, "high")
        norms.zero(pruned, biases=True)
        info = {
            "pruned": int(pruned.sum()),
            "channels": len(norms),
            "pruned_channels": norms.listed(pruned),
            "pairs": pairs,
            "unpaired": unscored,
            "not_finite": silent,
        }
        selection = {"criterion": f"bound above mean + {config.u:g} std of the layer", "u": config.u}
        return DefenseResult(kind=self.card.kinds[0], model=model, selection=selection, info=info)


@torch.no_grad()
def channel_bounds(norms: Norms, pairs: dict[str, str], eps: float | None = None) -> Tensor:
    """Upper bound of each norm channel's Lipschitz constant, float64 ``[T]``; NaN for layers without a convolution.

    Args:
        norms: The BatchNorm layers.
        pairs: Norm layer to convolution.
        eps: Added to the running variance; None is each layer's own.
    """
    _, var, bn_eps = running_statistics(norms, "clp")
    scales = norms.split(norms.weights().double() / (var + (bn_eps if eps is None else eps)).sqrt())
    return torch.cat(
        [
            ops.channel_lipschitz(norms.model.get_submodule(pairs[name]).get_parameter("weight").double(), scale)
            if name in pairs
            else torch.full_like(scale, torch.nan)
            for name, scale in zip(norms.names, scales, strict=True)
        ]
    )


def _demand(pairs: dict[str, str], model: nn.Module) -> None:
    if not pairs:
        from bbfast.models import roles

        reason = "no BatchNorm2d layer has a convolution of its width before it"
        raise UnsupportedModelError("clp", roles(model).label, reason, "choose a model of convolutions with BatchNorm")
