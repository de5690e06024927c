"""Feature map: what each channel of a layer puts out for one image, without and with the trigger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.analysis._layers import finite, spatial
from bbfast.analysis._named import usable_layer
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure, short_name
from bbfast.analysis.subject import Pairs, Subject
from bbfast.errors import DataRequirementError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FeatureMap", "FeatureMapConfig"]

_ACROSS = 6
"""Channels in a row of the figure."""
_TILE, _GAP, _SPACE, _HEAD = 64, 4, 22, 26
"""Pixels of a map's side, between a channel's three maps, between channels, above them."""


class FeatureMapConfig(ToolConfig):
    """Settings of the feature maps.

    Args:
        layer: Name or role of the layer.
        id: Number of the test image, one that has a triggered twin; None takes one by the seed.
        channels: How many are shown, those that change most.
    """

    layer: str = "last_conv"
    id: int | None = Field(None, ge=0)
    channels: int = Field(64, ge=1, le=256)


@register_tool("feature_map")
class FeatureMap(Tool):
    """The maps of every channel of a layer for a test image and its triggered twin, and how far they differ.

    Arrays (C channels): ``clean``, ``bd`` float32 ``[C, h, w]``, the layer's output to the bit; ``diff`` float32
    ``[C]``, L2 norm of the difference; ``order`` int32 ``[C]``, largest difference first; ``image_clean``,
    ``image_bd`` uint8 ``[c, H, W]``. Table: the channels shown.
    """

    card = ToolCard(
        title="Feature map",
        question="What does each channel make of an image, and of its triggered twin?",
        deviations=(
            "A pair is shown instead of one image, which BackdoorBench draws at random without a seed.",
            "Channels are sorted by how far they differ, and 64 are shown.",
            "Maps are kept in float32, so that they equal the layer's output.",
        ),
        quick=True,
    )
    Config = FeatureMapConfig

    def check(self, subject: Subject) -> None:
        usable_layer(subject, self.name, self.config.layer, _has_maps)
        self._pair(subject)

    def measure(self, subject: Subject) -> Numbers:
        config: FeatureMapConfig = self.config
        name, layer = subject.layer(config.layer)
        pair = self._pair(subject)
        kept: list[Tensor] = []
        with torch.no_grad(), subject.watching({name: lambda out: kept.append(out.clone())}):
            subject.model(subject.pixels(torch.cat([pair.clean, pair.triggered])))
        maps = spatial(layer, kept[0])
        assert maps is not None  # as checked
        clean, bad = finite(name, self.name, maps).cpu()
        diff = (bad.double() - clean.double()).flatten(1).norm(dim=1)
        order = diff.argsort(descending=True, stable=True)
        top = order[: config.channels].tolist()
        return Numbers(
            arrays={
                "clean": clean.numpy(),
                "bd": bad.numpy(),
                "diff": diff.float().numpy(),
                "order": order.int().numpy(),
                "image_clean": pair.clean[0].numpy(),
                "image_bd": pair.triggered[0].numpy(),
            },
            table=[{"channel": j, "diff": float(diff[j])} for j in top],
            summary={
                "id": int(pair.ids[0]),
                "top_channel": top[0],
                "largest_diff": float(diff[top[0]]),
                "median_diff": float(diff.median()),
                "channels": len(diff),
            },
            meta={"layer": name, "true_class": subject.class_names[int(pair.labels[0])]},
        )

    def _pair(self, subject: Subject) -> Pairs:
        wanted = self.config.id
        if wanted is None:
            return subject.pairs(1)
        whole = subject.pairs()
        found = (whole.ids == wanted).nonzero().flatten()[:1]
        if not len(found):
            some = ", ".join(map(str, whole.ids[:5].tolist()))
            raise DataRequirementError(
                f"{self.name}: id must be the number of a test image with a triggered twin ({some}, ...), got {wanted}"
            )
        return Pairs(*(getattr(whole, key)[found] for key in ("clean", "triggered", "labels", "targets", "ids")))

    @classmethod
    def common(cls, parts: Sequence[Numbers]) -> dict[str, Any]:
        return {"limit": max(_limit(part) for part in parts)}

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        arrays, meta = numbers.arrays, numbers.meta
        shown = _shown(numbers)
        gap = arrays["bd"][shown].astype(float) - arrays["clean"][shown]
        limit = meta.get("limit") or _limit(numbers)
        sheet, places = _sheet([arrays[key][shown].astype(float) for key in ("clean", "bd")], gap, limit)
        with figure(10.4, 1.0 + 8.2 * sheet.shape[0] / sheet.shape[1], meta["caption"]) as made:
            left, right = made.subplots(1, 2, width_ratios=(1.1, 8.6))
            band = np.full_like(arrays["image_clean"][:, :2], 255)
            pair = np.concatenate([arrays["image_clean"], band, arrays["image_bd"]], axis=1).transpose(1, 2, 0)
            left.imshow(pair[..., 0] if pair.shape[2] == 1 else pair, cmap="gray", vmin=0, vmax=255)
            side = arrays["image_clean"].shape[1]
            left.set_xticks([])
            left.set_yticks([side / 2, 1.5 * side + 2], ["clean", "triggered"], rotation=90, va="center")
            left.tick_params(length=0)
            left.spines[:].set_visible(False)
            left.set_title(f"image {numbers.summary['id']}\n{short_name(meta['true_class'], 15)}", fontsize=9)
            right.imshow(sheet, interpolation="none")
            right.axis("off")
            for j, (x, y) in zip(shown, places, strict=True):
                right.text(x, y, f"channel {j}", ha="center", va="bottom", fontsize=7.5)
            right.set_title(
                f"{meta['layer']}: {len(shown)} of {len(arrays['diff'])} channels, each clean | triggered | difference"
            )
            import matplotlib
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import Normalize

            colours = ScalarMappable(Normalize(-limit, limit), matplotlib.colormaps["coolwarm"])
            made.colorbar(colours, ax=right, label="triggered - clean", shrink=0.9, pad=0.01, aspect=40)
        return made


def _shown(numbers: Numbers) -> list[int]:
    channels: list[int] = numbers.arrays["order"][: numbers.meta["options"]["channels"]].tolist()
    return channels


def _limit(numbers: Numbers) -> float:
    """The largest difference shown; 1 if there is none."""
    shown = _shown(numbers)
    return float(np.abs(numbers.arrays["bd"][shown].astype(float) - numbers.arrays["clean"][shown]).max()) or 1.0


def _has_maps(layer: nn.Module, shape: tuple[int, ...]) -> str:
    if spatial(layer, torch.empty(shape)) is not None:
        return ""
    return f"it puts out {list(shape)}, no maps [N, C, H, W] and no square of tokens [N, T, C]"


def _sheet(pair: list[np.ndarray], gap: np.ndarray, limit: float) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """All maps in one picture ``[h, w, 3]``, a channel's two in grey on one scale; and where the names go."""
    import matplotlib

    grey, signed = matplotlib.colormaps["gray"], matplotlib.colormaps["coolwarm"]
    across = min(_ACROSS, len(gap))
    wide, high = 3 * _TILE + 2 * _GAP + _SPACE, _TILE + _HEAD
    rows = -(-len(gap) // across)
    sheet = np.ones((rows * high, across * wide - _SPACE, 3))
    places: list[tuple[float, float]] = []
    pick = [np.arange(_TILE) * side // _TILE for side in gap.shape[1:]]
    for i, maps in enumerate(zip(*pair, gap, strict=True)):
        y, x = (i // across) * high + _HEAD, (i % across) * wide
        low = min(maps[0].min(), maps[1].min())
        span = max(maps[0].max(), maps[1].max()) - low or 1.0
        tiles: list[Any] = [grey((one - low) / span) for one in maps[:2]]
        tiles.append(signed(0.5 + maps[2] / (2 * limit)))
        for n, tile in enumerate(tiles):
            at = x + n * (_TILE + _GAP)
            sheet[y : y + _TILE, at : at + _TILE] = tile[pick[0]][:, pick[1], :3]
        places.append((x + 1.5 * _TILE + _GAP, y - 3))
    return sheet, places
