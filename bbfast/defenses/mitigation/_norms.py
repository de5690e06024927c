"""The norm layers of a model as one flat vector of channels: masks, outliers and statistics of all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bbfast import ops
from bbfast.data.imageset import ImageSet
from bbfast.defenses._content import content_order
from bbfast.defenses.features import normalised
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.prediction import evaluating

__all__ = ["NormKind", "Norms", "channels_first", "input_statistics", "running_statistics", "some", "spatial_maxima"]

NormKind = Literal["batchnorm", "layernorm"]
"""``layernorm``: the weights of LayerNorm layers take the part of BatchNorm's. LayerNorm has no running statistics, and
as it mixes the channels, a weight of zero removes the scale of one channel only."""

_TYPES: dict[str, type[nn.Module]] = {"batchnorm": nn.BatchNorm2d, "layernorm": nn.LayerNorm}


@dataclasses.dataclass(frozen=True, eq=False)
class Norms:
    """The ``T`` channels of all affine norm layers of a model, layer after layer in the order of the network.

    Args:
        model: The model.
        names: Dotted names of the layers.
        sizes: Their channels.
    """

    model: nn.Module
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def find(cls, model: nn.Module, method: str, kind: NormKind = "batchnorm") -> Norms:
        """The norm layers of ``model``.

        Raises:
            UnsupportedModelError: if there is none of that kind with weights.
        """
        from bbfast.models import roles

        table = roles(model)
        wanted = _TYPES[kind]
        found = {name: model.get_submodule(name) for name in (table.names("norms") if table.has("norms") else [])}
        layers = {name: layer for name, layer in found.items() if isinstance(layer, wanted)}
        if not layers:
            hint = "choose a model with BatchNorm, such as preactresnet18 or vgg19_bn"
            if kind == "layernorm":
                hint = "leave norm='batchnorm'" if found else "choose a model with norm layers"
            elif found and method not in ("clp", "bnp", "mbns"):
                hint += ", or norm='layernorm', which is no part of the paper"
            reason = f"it has no {wanted.__name__} layer with weights"
            raise UnsupportedModelError(method, table.label, reason, hint)
        return cls(model, tuple(layers), tuple(_weight(layer).numel() for layer in layers.values()))

    def __len__(self) -> int:
        """T, the number of channels of all layers."""
        return sum(self.sizes)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return [self.model.get_submodule(name) for name in self.names]

    def weights(self) -> Tensor:
        """Copy of all weights, ``[T]``."""
        return torch.cat([_weight(layer).detach() for layer in self.layers])

    def biases(self) -> Tensor:
        """Copy of all biases, ``[T]``; 0 where a layer has none."""
        pairs = [(_weight(layer).detach(), _bias(layer)) for layer in self.layers]
        return torch.cat([torch.zeros_like(weight) if bias is None else bias.detach() for weight, bias in pairs])

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views ``[..., C]`` of each layer's part of ``flat`` ``[..., T]``."""
        return flat.split(self.sizes, dim=-1)

    def call(self, x: Tensor, weights: Tensor, biases: Tensor | None = None, model: nn.Module | None = None) -> Tensor:
        """The network's output with other weights (and biases) in its norm layers; differentiable in both.

        Args:
            x: Normalised images.
            weights: ``[T]``.
            biases: ``[T]``; None leaves them.
            model: A copy of the model to run instead; its running statistics change if it is in training mode.
        """
        swapped = {f"{n}.weight": part for n, part in zip(self.names, self.split(weights), strict=True)}
        if biases is not None:
            parts = zip(self.names, self.layers, self.split(biases), strict=True)
            swapped |= {f"{name}.bias": part for name, layer, part in parts if _bias(layer) is not None}
        out: Tensor = functional_call(self.model if model is None else model, swapped, (x,))
        return out

    @torch.no_grad()
    def zero(self, pruned: Tensor, biases: bool) -> None:
        """Set the weights (and biases) of the channels in bool ``[T]`` to zero, in the model itself."""
        for layer, mask in zip(self.layers, self.split(pruned), strict=True):
            _weight(layer).masked_fill_(mask, 0)
            bias = _bias(layer)
            if biases and bias is not None:
                bias.masked_fill_(mask, 0)

    def outliers(self, score: Tensor, u: float, side: Literal["high", "low"]) -> Tensor:
        """Channels more than ``u`` standard deviations (unbiased) above or below the mean of their layer: bool ``[T]``.

        Channels whose score is not finite are outliers of nothing and stay out of mean and deviation.
        """
        score = score.double() if side == "high" else -score.double()
        lengths = torch.tensor(self.sizes, device=score.device)
        good = score.isfinite()
        count = _sums(good.double(), lengths)
        mean = (_sums(score.where(good, 0), lengths) / count.clamp(min=1)).repeat_interleave(lengths)
        away = (score - mean).where(good, 0)
        std = (_sums(away.square(), lengths) / (count - 1).clamp(min=1)).sqrt().repeat_interleave(lengths)
        # u = inf prunes nothing, in a layer without spread too, where the product would be NaN.
        return good & (away > torch.nan_to_num(u * std, nan=torch.inf))

    def listed(self, pruned: Tensor) -> dict[str, list[int]]:
        """The pruned channels of each layer that has any."""
        parts = zip(self.names, self.split(pruned), strict=True)
        return {name: torch.nonzero(mask).flatten().tolist() for name, mask in parts if bool(mask.any())}


@torch.no_grad()
def input_statistics(norms: Norms, images: ImageSet, batch_size: int = 256) -> ops.ChannelStats:
    """Statistics of what all norm layers receive, over samples and positions: ``[T]`` each, from one pass.

    Eval mode, test transform. Every layer's input is reduced when it comes and not kept; the sums are float64, so the
    moments are those of the whole set however it is cut into batches.
    """
    state: dict[int, ops.ChannelStats] = {}

    def reduce(i: int, x: Tensor) -> None:
        state[i] = ops.channel_stats(x, state=state.get(i))

    _pass(norms, images, batch_size, reduce)
    return ops.ChannelStats(*(torch.cat([state[i][field] for i in range(len(norms.sizes))]) for field in range(6)))


@torch.no_grad()
def spatial_maxima(norms: Norms, images: ImageSet, batch_size: int = 256) -> list[Tensor]:
    """Largest value over all positions of what each norm layer receives: float32 ``[C, N]`` a layer, from one pass."""
    parts: list[list[Tensor]] = [[] for _ in norms.sizes]

    def reduce(i: int, x: Tensor) -> None:
        if x.dim() == 4:
            x = x.amax((2, 3))
        elif x.dim() == 3:
            x = x.amax(1)
        parts[i].append(x.float().T)

    _pass(norms, images, batch_size, reduce)
    return [torch.cat(part, dim=1) for part in parts]


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """A norm layer's input as ``[N, C]``, ``[N, T, C]`` or ``[N, C, H, W]``.

    LayerNorm takes maps as ``[N, H, W, C]``; reshaping that to ``[C, -1]``, as the reference does, mixes channels with
    positions. A subclass with a forward of its own (torchvision's LayerNorm2d) takes ``[N, C, H, W]``.
    """
    if x.dim() == 4 and type(layer).forward is nn.LayerNorm.forward:
        return x.permute(0, 3, 1, 2)
    return x


def running_statistics(norms: Norms, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance and eps of BatchNorm channels, float64 ``[T]`` each.

    Raises:
        UnsupportedModelError: if a layer keeps no running statistics.
    """
    from bbfast.models import roles

    rows = []
    for name, layer in zip(norms.names, norms.layers, strict=True):
        if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None or layer.running_var is None:
            reason = f"its norm layer {name!r} keeps no running statistics"
            raise UnsupportedModelError(method, roles(norms.model).label, reason)
        mean, var = layer.running_mean.double(), layer.running_var.double()
        rows.append(torch.stack([mean, var, torch.full_like(var, layer.eps)]))
    mean, var, eps = torch.cat(rows, dim=1)
    return mean, var, eps


def some(images: ImageSet, count: int | None, generator: torch.Generator) -> ImageSet:
    """``count`` of the images, drawn without replacement over an order in which storage has no part; all of them as
    they are if there are no more, or for None."""
    if count is None or count >= len(images):
        return images
    order = content_order(images.images, images.labels)
    return images.subset(order[torch.randperm(len(images), generator=generator)[:count].to(order.device)])


def _pass(norms: Norms, images: ImageSet, batch_size: int, reduce: Callable[[int, Tensor], None]) -> None:
    """Give ``reduce`` the number of each norm layer and what it receives, batch by batch."""
    if not len(images):
        raise DataRequirementError("statistics of norm layers need at least one image, got none")

    def hook_of(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reduce(i, channels_first(layer, inputs[0].detach()))

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(i)) for i, layer in enumerate(norms.layers)]
    try:
        with evaluating(norms.model):
            for start in range(0, len(images), batch_size):
                norms.model(normalised(images.images, start, batch_size, images.mean, images.std))
    finally:
        for hook in hooks:
            hook.remove()


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias
