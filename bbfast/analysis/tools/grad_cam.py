"""Grad-CAM: where in the image the evidence for the predicted class is, without and with the trigger."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast.analysis._attribution import SIDES, captured, mean_finite, picture, shown, trigger_mask
from bbfast.analysis._fullgrad import fullgrad
from bbfast.analysis._layers import finite, spatial
from bbfast.analysis._named import usable_layer
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.analysis.subject import Subject
from bbfast.errors import UnsupportedModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradCAM", "cam", "overlap"]

_AREA = 0.15


def cam(maps: Tensor, gradients: Tensor, size: tuple[int, int], method: str = "gradcam") -> Tensor:
    """Class activation maps.

    ``gradcam``: ``relu(sum_c w_c A_c)`` with ``w_c`` the gradient's mean over space; ``hirescam``: ``relu(sum_c g_c
    A_c)``; ``layercam``: ``relu(sum_c relu(g_c) A_c)``. Then bilinear to the image, and least to most of each image.

    Args:
        maps: What a layer puts out, ``[n, c, h, w]``.
        gradients: Of the class's logit with respect to it, same shape.
        size: Height and width of the images.
        method: One of the three.

    Returns:
        float32 ``[n, H, W]``, 0..1; zero where the map is the same all over.
    """
    if method == "gradcam":
        gradients = gradients.mean((2, 3), keepdim=True)
    elif method == "layercam":
        gradients = gradients.relu()
    small = (gradients * maps).sum(1, keepdim=True).relu()
    return _scaled(F.interpolate(small, size, mode="bilinear", align_corners=False)[:, 0])


def overlap(maps: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How much of each map ``[n, H, W]`` lies on the mask (bool, same shape): the share of its sum there, and the
    intersection over union of its highest 15 % of pixels with the mask. float32 ``[n]`` each, NaN for a blank map."""
    flat, on = maps.flatten(1), mask.flatten(1)
    total = flat.sum(1)
    energy = (flat * on).sum(1) / total
    area = math.ceil(_AREA * flat.shape[1])
    top = torch.zeros_like(on).scatter_(1, flat.sort(dim=1, descending=True, stable=True).indices[:, :area], True)
    iou = (top & on).sum(1) / (top | on).sum(1)
    return energy.numpy(), torch.where(total > 0, iou, torch.nan).numpy()


@register_tool("grad_cam")
class GradCAM(Tool):
    """Where in the image the evidence for the predicted class is, and how much of it is on the trigger.

    For the class ``y`` that the model predicts: ``w_c = mean over space of dz_y / dA_c``, ``CAM = relu(sum_c w_c
    A_c)``, bilinear to the image, scaled from least to most of each image. Tokens are laid out as a grid, without the
    class token; a transformer's last block is looked at where its tokens still bear on the class: behind its first
    norm. The map is as coarse as the layer: on 32 pixels the last convolution has 4 x 4 places, and a patch of 3 shows
    better at an earlier layer (``layer="stage2"``). ``fullgrad`` takes the gradients of the input and of all biases
    instead, as fine as the image; how far they add up to the logit is measured.

    Arrays: ``cam_clean``, ``cam_bd`` f16 ``[shown, H, W]``; of all pairs ``energy_clean``, ``energy_bd`` (share of the
    map on the trigger's pixels, grown by one) and ``iou_clean``, ``iou_bd`` (of its highest 15 % with them) f32
    ``[n]``, NaN where a map is blank; ``mean_clean``, ``mean_bd``, ``mask`` (share of pairs whose trigger is there) f32
    ``[H, W]``; ``id``, ``label``, ``pred_*``, ``prob_*``, ``image_*`` of the pairs shown. The table of ``fullgrad``
    has ``completeness_error``: the median over pairs of ``|sum of the parts - logit| / |logit|``.

    Source: Selvaraju et al., ICCV 2017, arXiv 1610.02391, eq. 1 and 2; FullGrad: Srinivas and Fleuret, NeurIPS 2019,
    arXiv 1905.00780; HiResCAM: Draelos and Carin, arXiv 2011.08891; LayerCAM: Jiang et al., IEEE TIP 30, 2021.
    """

    card = ToolCard(
        title="Grad-CAM",
        question="Where does the model look, and does the trigger take over?",
        paper="R. R. Selvaraju et al., Grad-CAM, ICCV 2017, arXiv 1610.02391",
        deviations=(
            "It is Grad-CAM at the layer named; BackdoorBench's script of that name computes FullGrad and ignores the "
            "layer, which method=fullgrad gives.",
            "Biases of layers without places count in FullGrad's sum and not in its map, as in its paper.",
            "Clean and triggered versions of the same images are shown; BackdoorBench shows unrelated ones.",
            "The share of the map on the trigger is measured over 500 pairs; BackdoorBench measures nothing.",
        ),
        quick=True,
    )

    class Config(ToolConfig):
        """Settings of Grad-CAM.

        Args:
            method: ``gradcam``; ``hirescam``: gradient times activation, pixel by pixel; ``layercam``: the same with
                positive gradients only; ``fullgrad``: gradients of the input and of all biases.
            layer: Name or role of the layer; ``fullgrad`` has none.
            shown: Pairs in the figure.
            n_stat: Pairs that are measured.
        """

        method: Literal["gradcam", "hirescam", "layercam", "fullgrad"] = "gradcam"
        layer: str = "last_conv"
        shown: int = Field(4, ge=1, le=16)
        n_stat: int = Field(500, ge=1)

        @model_validator(mode="after")
        def _all_layers(self) -> GradCAM.Config:
            if self.method == "fullgrad" and self.layer != "last_conv":
                raise ValueError("layer: fullgrad looks at all layers and takes none")
            return self

    def check(self, subject: Subject) -> None:
        name = "all layers"
        if self.config.method != "fullgrad":
            name, _ = usable_layer(subject, self.name, self._layer(subject), _places)
        self._cams(subject, name, subject.pairs(1).clean)

    def measure(self, subject: Subject) -> Numbers:
        name = "all layers" if self.config.method == "fullgrad" else self._layer(subject)
        few, arrays = shown(subject, self.config.shown)
        pairs = subject.pairs(self.config.n_stat)
        mask = trigger_mask(pairs)
        arrays["mask"] = mask.float().mean(0).numpy()
        table: list[dict[str, Any]] = []
        summary: dict[str, Any] = {}
        for side, images, many in zip(SIDES, (few.clean, few.triggered), (pairs.clean, pairs.triggered), strict=True):
            arrays[f"cam_{side}"] = self._cams(subject, name, images)[0].numpy().astype(np.float16)
            maps, gap = self._cams(subject, name, many)
            energy, iou = overlap(maps, mask)
            arrays |= {f"energy_{side}": energy, f"iou_{side}": iou, f"mean_{side}": maps.mean(0).numpy()}
            blank = int((maps.flatten(1).sum(1) == 0).sum())
            row = {"energy": mean_finite(energy), "iou": mean_finite(iou), "blank": blank}
            row |= {"completeness_error": float(gap.median())} if self.config.method == "fullgrad" else {}
            table.append({"images": side, "pairs": len(pairs), **row})
            summary |= {f"{key}_{side}": value for key, value in row.items()}
        return Numbers(arrays, table, summary, {"layer": name, "method": self.config.method, "pairs": len(pairs)})

    def _layer(self, subject: Subject) -> str:
        name, _ = subject.layer(self.config.layer)
        inner = f"{name}.ln_1"
        # The head reads the class token alone: behind the last block no other token has a gradient.
        return inner if self.config.layer == "last_conv" and inner in dict(subject.model.named_modules()) else name

    def _cams(self, subject: Subject, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps float32 ``[n, H, W]``, and how far FullGrad's parts miss the logit, ``[n]``, zero of others; on the
        CPU."""
        size, full = (images.shape[2], images.shape[3]), self.config.method == "fullgrad"
        parts = [
            self._full(subject, x) if full else self._cam(subject, layer, x, size) for x in subject.batches(images, 128)
        ]
        maps, gaps = (torch.cat(same).cpu() for same in zip(*parts, strict=True))
        return maps, gaps

    def _cam(self, subject: Subject, layer: str, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        module = subject.model.get_submodule(layer)
        with captured(subject, layer) as kept, torch.enable_grad():
            best = subject.model(x).amax(1).sum()
            (gradient,) = torch.autograd.grad(best, kept[0], allow_unused=True)
        if gradient is None:
            raise UnsupportedModelError(self.name, f"layer {layer!r}", "the logits do not depend on it")
        maps, slopes = (
            finite(layer, self.name, part, what) for part, what in ((kept[0].detach(), "values"), (gradient, "slopes"))
        )
        maps, slopes = (cast(Tensor, spatial(module, part)) for part in (maps, slopes))
        return cam(maps, slopes, size, self.config.method), maps.new_zeros(len(maps))

    def _full(self, subject: Subject, x: Tensor) -> tuple[Tensor, Tensor]:
        maps, total, logit = fullgrad(subject.model, x)
        if not bool(maps.isfinite().all() & logit.isfinite().all()):
            raise UnsupportedModelError(self.name, "this model", "its gradients or logits are not finite")
        tiny = torch.finfo(logit.dtype).tiny
        return _scaled(maps.float()), (total - logit).abs() / logit.abs().clamp_min(tiny)

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        arrays, meta = numbers.arrays, numbers.meta
        rows = len(arrays["id"])
        caption = f"{meta['caption']}; {meta['method']} of the predicted class at {meta['layer']}"
        with figure(7.6, 1.75 * rows + 2.6, f"{caption}; outlined: the trigger's pixels, grown by one") as made:
            axes = made.subplots(rows + 1, 4, squeeze=False)
            for row in range(rows):
                for column, side in ((0, "clean"), (2, "bd")):
                    picture(axes[row, column], numbers, row, side)
                    picture(axes[row, column + 1], numbers, row, side)
                    axes[row, column + 1].set_title("without trigger" if side == "clean" else "with trigger")
                    axes[row, column + 1].imshow(
                        arrays[f"cam_{side}"][row].astype(float), cmap="viridis", vmin=0, vmax=1, alpha=0.6
                    )
            for column, side, words in ((0, "clean", "without"), (2, "bd", "with")):
                axis = axes[rows, column]
                axis.imshow(arrays[f"mean_{side}"], cmap="viridis", vmin=0, vmax=1)
                if (arrays["mask"] > 0.5).any() and not (arrays["mask"] > 0.5).all():
                    axis.contour(arrays["mask"], levels=[0.5], colors="w", linewidths=1.2)
                axis.set(title=f"mean of {meta['pairs']} {words}", xticks=[], yticks=[])
                axes[rows, column + 1].axis("off")
                energy, iou = (numbers.summary[f"{key}_{side}"] for key in ("energy", "iou"))
                text = f"on the trigger:\n{100 * energy:.1f} % of the map\nIoU of top 15 %: {iou:.2f}"
                axes[rows, column + 1].text(0, 0.5, text, va="center", fontsize=9)
            # Not of the overlay itself, whose bar would be as pale as it is.
            scale = ScalarMappable(Normalize(0, 1), "viridis")
            made.colorbar(scale, ax=axes, label="evidence, share of each image's most", shrink=0.5)
        return made


def _scaled(maps: Tensor) -> Tensor:
    """Least to most of each map ``[n, H, W]`` as 0..1; zero where it is the same all over."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def _places(layer: nn.Module, shape: tuple[int, ...]) -> str:
    maps = spatial(layer, torch.empty(shape))
    if maps is None:
        return f"what it puts out, {list(shape)}, is no map"
    return "its map has a single pixel; name an earlier one" if maps.shape[2:] == (1, 1) else ""
