"""Shapley values: which pixels speak for which class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.analysis._attribution import SIDES, mean_finite, picture, shown, trigger_mask
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure, short_name
from bbfast.analysis.subject import Subject
from bbfast.errors import BBFastError, DataRequirementError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shapley", "expected_gradients"]


def expected_gradients(
    model: nn.Module, x: Tensor, background: Tensor, classes: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """Attribution of one image: ``phi = E[(x - b) dz_c(b + a (x - b))]`` over backgrounds ``b`` and ``a ~ U(0, 1)``.

    Draws come in pairs ``(a, 1 - a)`` of the same background, which halves the variance; backgrounds are taken in
    random order, each as often as any other.

    Args:
        model: In eval mode.
        x: Normalised image ``[C, H, W]``.
        background: Normalised images ``[B, C, H, W]``.
        classes: int64 ``[R]``.
        draws: An even number.
        generator: On the CPU.

    Returns:
        float32 ``[R, C, H, W]``; over all pixels it adds up to about ``z_c(x) - mean z_c(b)``.
    """
    half = draws // 2
    rounds = -(-half // len(background))
    order = torch.cat([torch.randperm(len(background), generator=generator) for _ in range(rounds)])[:half]
    a = torch.rand(half, generator=generator)
    index, share = torch.cat([order, order]), torch.cat([a, 1 - a]).view(-1, 1, 1, 1)
    total = torch.zeros(len(classes), *x.shape, device=x.device)
    for rows, weights in zip(index.split(256), share.split(256), strict=True):
        base = background[rows.to(x.device)]
        mixed = (base + weights.to(x.device) * (x - base)).requires_grad_()
        with torch.enable_grad():
            logits = model(mixed)[:, classes].sum(0)
            for i in range(len(classes)):
                (slope,) = torch.autograd.grad(logits[i], mixed, retain_graph=i + 1 < len(classes))
                total[i] += ((x - base) * slope).sum(0)
    return total / draws


@register_tool("shapley")
class Shapley(Tool):
    """Which pixels speak for (red) and against (blue) the classes that the model finds likeliest.

    Expected gradients, whose limit are the Aumann-Shapley values with the background's mean as the baseline:
    ``phi = E[(x - b) * dz_c(b + a (x - b)) / dx]``, ``b`` clean test images, ``a`` uniform. Summed over pixels they
    give ``z_c(x) - E z_c(b)``; ``err`` says by how much they miss it.

    Arrays: ``phi`` f16 ``[2 n, R, H, W]`` (summed over channels; first the n images without, then with the trigger),
    ``cls`` i16 and ``err`` f32 ``[2 n, R]`` (share of the gap), ``share`` f32 ``[2 n]``: of the positive attribution to
    the attacker's class, how much is on the trigger's pixels, grown by one (NaN if it is not among the R);
    ``background`` i32: ids of the backgrounds; ``id``, ``label``, ``pred_*``, ``prob_*``, ``image_*`` as in all
    attribution tools. Table: a row for each image.

    Source: Erion et al., Nature Machine Intelligence 2021, arXiv 1906.10670, eq. 3; Lundberg and Lee, NeurIPS 2017.
    """

    card = ToolCard(
        title="Shapley values",
        question="Which pixels speak for which class, and is the trigger all that speaks for the target?",
        paper="G. Erion et al., axiomatic attribution priors and expected gradients, 2021, arXiv 1906.10670",
        deviations=(
            "Pixels are explained; BackdoorBench explains the activations of a layer.",
            "Backgrounds are clean images; BackdoorBench takes them from the images shown, poisoned ones among them.",
            "Draws come in antithetic pairs, and what the sum misses is told; BackdoorBench does neither.",
            "The same images are explained without and with the trigger; BackdoorBench explains unrelated ones.",
        ),
    )

    class Config(ToolConfig):
        """Settings of the Shapley values.

        Args:
            nsamples: Draws for each image; an odd number is raised by one.
            background: Clean images that stand for "no evidence".
            ranked: Classes explained, the likeliest first; the attacker's takes the last place if it is not there.
            shown: Pairs that are explained.
        """

        nsamples: int = Field(200, ge=2)
        background: int = Field(200, ge=1)
        ranked: int = Field(5, ge=1)
        shown: int = Field(4, ge=1, le=16)

    def check(self, subject: Subject) -> None:
        subject.pairs(1)
        if len(subject.attack.test) <= min(self.config.shown, len(subject.attack.backdoor_test)):
            raise DataRequirementError("shapley needs clean test images besides those shown, as the background")

    def measure(self, subject: Subject) -> Numbers:
        config = self.config
        pairs, arrays = shown(subject, config.shown)
        view = subject.view("clean_test", config.background + len(pairs))
        view = view.take((~torch.isin(view.ids, pairs.ids)).nonzero().flatten()[: config.background])
        background, wanted = subject.pixels(view.images), min(config.ranked, subject.num_classes)
        base = subject.logits(view.images).mean(0)
        mask = trigger_mask(pairs)
        targets = pairs.targets
        maps, classes, errors, shares, table = [], [], [], [], []
        for side, images in zip(SIDES, (pairs.clean, pairs.triggered), strict=True):
            logits, pixels = subject.logits(images), subject.pixels(images)
            for i in range(len(pairs)):
                chosen = logits[i].argsort(descending=True, stable=True)[:wanted]
                target = int(targets[i])
                if target not in chosen.tolist():
                    chosen[-1] = target
                # The same draws for both sides: their maps differ by the trigger alone.
                generator = subject.generator(f"shapley {int(pairs.ids[i])}")
                draws = config.nsamples + config.nsamples % 2
                phi = expected_gradients(
                    subject.model, pixels[i], background, chosen.to(pixels.device), draws, generator
                ).cpu()
                if not bool(phi.isfinite().all()):
                    raise BBFastError("the gradients of the model's logits between images are not finite")
                flat = phi.sum(1)
                gap = (logits[i] - base)[chosen]
                error = (flat.sum((1, 2)) - gap).abs() / gap.abs().clamp_min(1e-12)
                positive = flat[chosen.tolist().index(target)].clamp_min(0)
                share = float((positive * mask[i]).sum() / positive.sum()) if float(positive.sum()) > 0 else np.nan
                maps.append(flat)
                classes.append(chosen)
                errors.append(error)
                shares.append(share)
                name = subject.class_names
                row = {"images": side, "id": int(pairs.ids[i]), "class": name[int(chosen[0])], "error": float(error[0])}
                table.append({**row, "mask_share": share})
        count = len(pairs)
        arrays |= {
            "phi": torch.stack(maps).numpy().astype(np.float16),
            "cls": torch.stack(classes).numpy().astype(np.int16),
            "err": torch.stack(errors).numpy(),
            "share": np.array(shares, dtype=np.float32),
            "background": view.ids.numpy().astype(np.int32),
        }
        summary: dict[str, Any] = {
            "mask_share_clean": mean_finite(arrays["share"][:count]),
            "mask_share_bd": mean_finite(arrays["share"][count:]),
            "completeness_error": float(np.median(arrays["err"])),
        }
        return Numbers(arrays, table, summary, {"nsamples": config.nsamples, "backgrounds": len(view)})

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        arrays, names = numbers.arrays, numbers.meta["class_names"]
        phi, count = arrays["phi"].astype(float), len(arrays["id"])
        columns = phi.shape[1] + 1
        scale = max(float(np.quantile(np.abs(phi), 0.999)), 1e-6)
        note = f"{numbers.meta['caption']}; {numbers.meta['nsamples']} draws from {numbers.meta['backgrounds']} clean "
        words = f"{note}images; panels: the likeliest classes, rows in turn without and with the trigger"
        with figure(1.5 * columns + 1.4, 1.72 * 2 * count + 0.7, words) as made:
            axes = made.subplots(2 * count, columns, squeeze=False)
            for i in range(count):
                for offset, side in enumerate(SIDES):
                    row, which = 2 * i + offset, i + offset * count
                    picture(axes[row, 0], numbers, i, side)
                    first = axes[row, 0].get_title().replace(", ", "\n")
                    axes[row, 0].set_title(first, fontsize=8)
                    axes[row, 0].set_ylabel("with trigger" if side == "bd" else "without trigger", fontsize=9)
                    for column in range(1, columns):
                        axis = axes[row, column]
                        drawn = axis.imshow(phi[which, column - 1], cmap="coolwarm", vmin=-scale, vmax=scale)
                        name = names[int(arrays["cls"][which, column - 1])]
                        axis.set_title(f"for {short_name(name, 14)}", fontsize=8)
                        axis.set(xticks=[], yticks=[])
            made.colorbar(drawn, ax=axes, label="attribution to the logit, for (+) or against (-)", shrink=0.4)
        return made
