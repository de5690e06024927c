"""The layers whose channels are looked at one by one, and the strip that shows them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bbfast.analysis.subject import Pairs, Subject
from bbfast.errors import UnsupportedModelError

__all__ = [
    "by_channel",
    "channel_layers",
    "finite",
    "joined",
    "log_ticks",
    "paired_pass",
    "spatial",
    "split",
    "strip",
    "strip_width",
]

_ROWS = 240
"""Of the strip's picture: a layer with more channels shows the largest of several in a row."""


def channel_layers(model: nn.Module, tool: str) -> dict[str, nn.Module]:
    """Every convolution, linear and 2-D BatchNorm layer by name, in the order of the network.

    Raises:
        UnsupportedModelError: if there is none.
    """
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    found: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not found:
        from bbfast.models import roles

        raise UnsupportedModelError(tool, roles(model).label, "it has no convolution, linear or BatchNorm layer")
    return found


def by_channel(layer: nn.Module, out: Tensor) -> Tensor:
    """What a layer puts out as ``[B, C, S]``, S places.

    Maps come as ``[B, C, H, W]``, tokens as ``[B, T, C]``, vectors as ``[B, C]``. A linear layer's channels come last,
    also in maps (ConvNeXt's blocks are such).
    """
    if out.dim() > 2 and (out.dim() == 3 or isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm):
        return out.flatten(1, -2).transpose(1, 2)
    return out.flatten(2) if out.dim() > 2 else out.unsqueeze(-1)


def spatial(layer: nn.Module, out: Tensor) -> Tensor | None:
    """A layer's output as maps ``[B, C, h, w]``; None if it has no places.

    Tokens ``[B, T, C]`` are laid out as the square that they come from, without the class token if there is one. A
    linear layer's channels come last.
    """
    if out.dim() == 4:
        return out.permute(0, 3, 1, 2) if isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm else out
    if out.dim() == 3:
        side = math.isqrt(out.shape[1])
        tokens = out[:, out.shape[1] - side**2 :]
        if out.shape[1] - side**2 <= 1:
            return tokens.transpose(1, 2).unflatten(2, (side, side))
    return None


def finite(name: str, tool: str, values: Tensor, what: str = "values") -> Tensor:
    """``values``, float32.

    Raises:
        UnsupportedModelError: naming the layer, if one is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise UnsupportedModelError(tool, f"layer {name!r}", f"it puts out {what} that are not finite")
    return values.float()


@torch.no_grad()
def paired_pass(
    subject: Subject, pairs: Pairs, names: Mapping[str, Callable[[Tensor, Tensor], None]], size: int = 128
) -> None:
    """One pass over clean and triggered images side by side; each layer's callback gets ``(clean, triggered)`` output.

    Nothing is kept: a callback sums up what it is given before the network goes on and may change it in place.
    """

    def halves(callback: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], None]:
        return lambda out: callback(*out.chunk(2))

    with subject.watching({name: halves(callback) for name, callback in names.items()}):
        for start in range(0, len(pairs), size):
            both = torch.cat([pairs.clean[start : start + size], pairs.triggered[start : start + size]])
            subject.model(subject.pixels(both))


def joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of all layers end to end, and int32 ``[L + 1]`` where each starts."""
    offsets = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)
    return offsets, np.concatenate(list(parts))


def split(values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """The layers' arrays again."""
    return np.split(values, offsets[1:-1])


def strip_width(layers: int) -> float:
    """Inches of a figure with one column a layer, whose names are to be read."""
    return max(7.0, 0.19 * layers + 2.2)


def strip(axis: Any, columns: Sequence[np.ndarray], cmap: str, low: float, high: float) -> Any:
    """A column a layer, a row a channel, each layer stretched to the full height; missing values are grey."""
    import matplotlib

    picture = np.full((_ROWS, len(columns)), np.nan)
    for i, values in enumerate(columns):
        picture[:, i] = list(_rows(np.asarray(values, dtype=float)))
    colours = matplotlib.colormaps[cmap].with_extremes(bad="#D0D0D0")
    box = (-0.5, len(columns) - 0.5, 1, 0)
    shown = axis.imshow(
        np.ma.masked_invalid(picture),
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect="auto",
        extent=box,
        interpolation="none",
    )
    for edge in range(1, len(columns)):
        axis.axvline(edge - 0.5, color="w", lw=0.8)
    axis.set(ylabel="channel, as a share of the layer", yticks=[0, 0.25, 0.5, 0.75, 1])
    axis.spines[:].set_visible(True)
    return shown


def _rows(values: np.ndarray) -> Iterator[float]:
    for i in range(_ROWS):
        first = i * len(values) // _ROWS
        last = max(first + 1, (i + 1) * len(values) // _ROWS)
        part = values[first:last]
        yield float(np.nanmax(part)) if np.isfinite(part).any() else np.nan


def log_ticks(axis: Any, which: str, values: Sequence[np.ndarray]) -> None:
    """Give axis ``x`` or ``y`` a logarithmic scale with ticks that do not run into one another, for what it shows."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = np.concatenate([np.ravel(part) for part in values])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    wide = len(shown) > 0 and float(shown.max() / shown.min()) > 300
    axis.set(**{f"{which}scale": "log"})
    ticks = getattr(axis, f"{which}axis")
    if not wide:
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())
