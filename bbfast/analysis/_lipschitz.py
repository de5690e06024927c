"""How much each channel can amplify: which convolution feeds which BatchNorm, and what bounds the pair."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from bbfast import ops

__all__ = ["Pairing", "agreement", "channel_bounds", "factor", "operator_norm", "paired"]

_log = logging.getLogger(__name__)
_ALL_UP_TO = 512
"""Rows or columns of a matrix all of whose singular values are cheap."""
_FEW = 0.05
"""Share of the channels in the comparison of the largest bounds with the largest changes."""
_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which convolution feeds which BatchNorm.

    Args:
        convs: BatchNorm to convolution; a BatchNorm behind a sum, a concatenation or a pooling is not in it.
        how: ``fx``: read from the traced graph; ``hook``: from the order of execution.
    """

    convs: Mapping[str, str]
    how: str


def paired(model: nn.Module, image_size: tuple[int, int, int]) -> Pairing:
    """The convolution whose output a BatchNorm gets as it is, through nothing but identities and dropout.

    Read from the graph of ``torch.fx``. Where the model cannot be traced (control flow), a BatchNorm is paired with
    the layer that runs directly before it, if that is a convolution of as many channels.

    Args:
        model: The model, in eval mode.
        image_size: ``(C, H, W)``.
    """
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        _log.info("lipschitz: no graph of the model (%s); layers are paired in the order in which they run", error)
        return Pairing(_by_execution(model, image_size), "hook")
    known, found = dict(model.named_modules()), {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(known[str(node.target)], nn.BatchNorm2d):
            source = node.args[0]
            while isinstance(source, fx.Node) and source.op == "call_module":
                module = known[str(source.target)]
                if isinstance(module, nn.Conv2d):
                    found[str(node.target)] = str(source.target)
                if not isinstance(module, _THROUGH):
                    break
                source = source.args[0]
    return Pairing(found, "fx")


def _by_execution(model: nn.Module, image_size: tuple[int, int, int]) -> dict[str, str]:
    ran: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: ran.append((name, m)))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *image_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    kept = [(name, module) for name, module in ran if not isinstance(module, _THROUGH)]
    return {
        norm: conv
        for (conv, before), (norm, module) in itertools.pairwise(kept)
        if isinstance(module, nn.BatchNorm2d)
        and isinstance(before, nn.Conv2d)
        and before.out_channels == module.num_features
    }


def factor(norm: nn.BatchNorm2d) -> Tensor:
    """``gamma / sqrt(var + eps)`` of each channel, float64; without running statistics that of variance one."""
    ones = torch.ones(norm.num_features, dtype=torch.float64, device=next(iter(norm.parameters())).device)
    gamma = ones if norm.weight is None else norm.weight.detach().double()
    var = ones if norm.running_var is None else norm.running_var.double()
    return gamma / (var + norm.eps).sqrt()


def channel_bounds(layer: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """The bound of each channel, float64 ``[C]`` on the CPU.

    Args:
        layer: A convolution (largest singular value of the channel's kernel as ``[C_in, kh kw]`` matrix), a linear
            layer (length of the row) or a BatchNorm (``|gamma| / sqrt(var + eps)``).
        conv: The convolution that feeds the BatchNorm: the bound is that of the two together.
    """
    if isinstance(layer, nn.BatchNorm2d):
        scale = factor(layer)
        return scale.abs().cpu() if conv is None else _gain(conv, scale)
    return _gain(layer, None)


def _gain(layer: nn.Module, scale: Tensor | None) -> Tensor:
    return ops.channel_lipschitz(layer.get_parameter("weight").detach().double(), scale).cpu()


def operator_norm(layer: nn.Module, shape: tuple[int, ...], steps: int, generator: torch.Generator) -> float:
    """Spectral norm of the whole layer as an operator on inputs of a shape, without its bias.

    Of a convolution by power iteration on the convolution and its transpose, so a lower bound that rises with
    ``steps``; otherwise exact.

    Args:
        layer: A convolution, linear or BatchNorm layer.
        shape: Of its input.
        steps: Of the power iteration.
        generator: Of its start.
    """
    if isinstance(layer, nn.BatchNorm2d):
        return float(factor(layer).abs().max())
    weight = layer.get_parameter("weight").detach()
    if not isinstance(layer, nn.Conv2d):
        return _largest_singular(weight, generator)
    x = torch.randn(1, *shape[1:], generator=generator).to(weight)
    norm = 0.0
    for _ in range(steps):
        length = x.norm()
        if not float(length):
            return 0.0
        x = (x / length).requires_grad_(True)
        with torch.enable_grad():
            y = layer._conv_forward(x, weight, None)
        norm = float(y.detach().norm())
        (x,) = torch.autograd.grad(y, x, y.detach())
        x = x.detach()
    return norm


def _largest_singular(weight: Tensor, generator: torch.Generator) -> float:
    """Of a matrix: of a large one by Lanczos, as all singular values of VGG19's 4096 x 25088 take minutes."""
    if min(weight.shape) <= _ALL_UP_TO:
        return float(torch.linalg.matrix_norm(weight.double(), 2))
    from scipy.sparse.linalg import svds

    start = torch.randn(min(weight.shape), generator=generator).numpy()
    found = svds(weight.float().cpu().numpy(), k=1, v0=start, return_singular_vectors=False)
    return float(found[0])


def agreement(bounds: dict[str, np.ndarray], tac: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """Rank correlation over all channels and within layers, and the overlap of the largest few."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        mean: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[place]
        return mean

    def rho(a: np.ndarray, b: np.ndarray) -> float:
        if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        return float(np.corrcoef(ranks(a), ranks(b))[0, 1])

    found = [(bounds[name], tac[name]) for name in names]
    found = [(a[good], b[good]) for a, b in found for good in [np.isfinite(a) & np.isfinite(b)] if good.any()]
    if not found:
        return {}
    a, b = (np.concatenate(part) for part in zip(*found, strict=True))
    few = max(1, round(_FEW * len(a)))
    best = [set(np.argsort(-values, kind="stable")[:few].tolist()) for values in (a, b)]
    inside = [value for value in (rho(*pair) for pair in found) if np.isfinite(value)]
    return {
        "spearman_tac": rho(a, b),
        "spearman_tac_within_layers": float(np.mean(inside)) if inside else float("nan"),
        "jaccard_top_5_percent": len(best[0] & best[1]) / len(best[0] | best[1]),
    }
