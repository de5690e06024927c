"""LF: a smooth universal perturbation (Zeng et al., arXiv 2104.03413; spec/attacks section 5)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast import _progress, ops
from bbfast.attacks._deepfool import targeted_deepfool
from bbfast.attacks._units import class_sample, draw_rows, unit_images
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.attacks.randomness import make_key
from bbfast.attacks.surrogate import Classifier, SurrogateConfig, clean_surrogate, set_hash
from bbfast.data.imageset import ImageSet
from bbfast.errors import BBFastError

__all__ = ["LF", "load_pattern", "smooth", "smoothing_matrix", "smoothing_taps"]

_TAPS, _SPACING, _WIDTH = 30, 5.0, 30.0
_EVALUATED_PER_CLASS = 10
_SETTLED, _SETTLED_PASSES = 0.01, 5


@register_attack("lf")
class LF(Attack):
    """Adds one smooth pattern: DeepFool steps towards the target, low-pass filtered and stretched to a fixed range."""

    card = Card(
        title="LF",
        paper="Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
        year=2021,
        arxiv="2104.03413",
        threat="poison-only",
        label_modes=LABEL_MODES,
        needs=("surrogate",),
        summary="A smooth, low-frequency pattern is added to the whole image.",
        deviations=(
            "The surrogate sees normalised images, as it was trained; the reference crafts on unnormalised ones "
            "(compat='reference' does so).",
            "The pattern keeps its fractions and sums are rounded; the reference cuts both off (compat='reference' "
            "does so, bit for bit).",
            "A float pattern file with values up to 1 is taken as 0..1 and multiplied by 255; the reference adds it to "
            "0..255 images as it is, which leaves them unchanged (trigger_units='levels' does so).",
            "DeepFool takes the gradients of the two classes that it uses, and works on chunk images at once with the "
            "pattern held; the reference takes one image at a time (chunk=1 does so).",
            "The fooling rate is measured on 10 test images of each class, or training images if there is no test set; "
            "the reference means to but picks them wrongly.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of LF.

        Args:
            trigger: ``optimised`` (needs the surrogate) or ``random_lowpass`` (filtered noise, needs nothing).
            trigger_path: Your own pattern, ``.npy`` ``[H, W]``, ``[H, W, C]`` or ``[N, H, W, C]`` (the first), of the
                images' size; replaces ``trigger``.
            trigger_units: ``auto`` multiplies a float pattern of values up to 1 by 255, with a warning; ``levels``
                takes every file as it is.
            strength: Largest value of the pattern, in levels of 0..255; the smallest is 0.
            images: Training images that the pattern is made with.
            deepfool_steps: Largest number of DeepFool steps of an image.
            overshoot: By which share DeepFool crosses the boundary.
            passes: Largest number of passes over the images.
            delta: The search ends when the pattern changes ``1 - delta`` of the surrogate's predictions.
            chunk: Images whose steps are computed at once; 1 is the sequential algorithm.
        """

        trigger: Literal["optimised", "random_lowpass"] = "optimised"
        trigger_path: Path | None = None
        trigger_units: Literal["auto", "levels"] = "auto"
        strength: float = Field(51.0, gt=0, le=255)
        images: int = Field(100, ge=1)
        deepfool_steps: int = Field(200, ge=2)
        overshoot: float = Field(0.02, ge=0)
        passes: int = Field(50, ge=1)
        delta: float = Field(0.8, ge=0, lt=1)
        chunk: int = Field(16, ge=1)

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c = self.config
        if c.trigger_path is not None:
            return {"pattern": load_pattern(c.trigger_path, data.image_size, c.trigger_units)}
        if c.trigger == "random_lowpass":
            return {"pattern": self._finished(_random_lowpass(data.image_size, seed))}
        assert context is not None
        surrogate = clean_surrogate(context, data, num_classes, c, seed)
        if c.compat == "reference":
            surrogate = surrogate.unnormalised()
        made_with = data.subset(draw_rows(len(data), c.images, "lf", seed))
        judged_on = class_sample(context.test or data, num_classes, _EVALUATED_PER_CLASS, seed)
        identity: dict[str, Any] = {
            "surrogate": surrogate.describe(),
            "images": [set_hash(made_with), set_hash(judged_on)],
            "target": c.target,
            "settings": {
                k: getattr(c, k) for k in ("strength", "deepfool_steps", "overshoot", "passes", "delta", "chunk")
            },
        }
        stored = context.obtain(
            "lf_pattern",
            identity,
            lambda _: {"pattern": self._search(surrogate, made_with, judged_on, seed, context.progress)},
            seed=seed,
        )
        return {"pattern": self._finished(stored["pattern"])}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern = self.tensor("pattern", images)
        if images.is_floating_point():
            return ops.add(images, pattern.to(images.dtype) / 255)
        return ops.add(images, pattern, rounding="truncate" if self.config.compat == "reference" else "nearest")

    def _finished(self, pattern: Tensor) -> Tensor:
        """The pattern ``[C, H, W]`` in levels, stretched from 0 to the strength; whole levels in reference mode."""
        levels = _stretched(pattern) * self.config.strength
        return levels.floor() if self.config.compat == "reference" else levels

    def _search(
        self, surrogate: Classifier, made_with: ImageSet, judged_on: ImageSet, seed: int, progress: bool | None
    ) -> Tensor:
        """Universal DeepFool with a filter: the pattern ``[C, H, W]``, from 0 to 1."""
        c = self.config
        images, judged = (unit_images(part.images, surrogate.device) for part in (made_with, judged_on))
        with torch.no_grad():
            truth, before = surrogate(images).argmax(1), surrogate(judged).argmax(1)
        pattern, rates, moved = torch.zeros_like(images[0]), [], False
        with _progress.bar("trigger of LF", c.passes, progress) as bar:
            for number in range(c.passes):
                order = draw_rows(len(images), len(images), "lf pass", seed, number).to(images.device)
                for rows in order.split(c.chunk):
                    with torch.no_grad():
                        rows = rows[surrogate(images[rows] + pattern).argmax(1) == truth[rows]]
                    changes, steps = targeted_deepfool(
                        surrogate, images[rows] + pattern, c.target, c.deepfool_steps, overshoot=c.overshoot
                    )
                    for change in changes[steps < c.deepfool_steps - 1]:
                        wanted = smooth(pattern + smooth(change))
                        # Nothing to stretch as long as every image was of the target class by itself.
                        if float(wanted.amax() - wanted.amin()) > 0:
                            pattern, moved = _stretched(wanted) * (c.strength / 255), True
                with torch.no_grad():
                    rates.append(float((surrogate(judged + pattern).argmax(1) != before).double().mean()))
                bar.advance()
                last = rates[-_SETTLED_PASSES:]
                if rates[-1] >= 1 - c.delta or (len(last) == _SETTLED_PASSES and max(last) - min(last) < _SETTLED):
                    break
        if not moved:
            raise BBFastError(
                f"lf: DeepFool moved none of {len(images)} images to class {c.target} in {c.deepfool_steps} steps; is "
                f"the surrogate trained? Raise deepfool_steps or images, or use trigger='random_lowpass'"
            )
        return _stretched(pattern)


def load_pattern(path: Path, image_size: tuple[int, int, int], units: str = "auto") -> Tensor:
    """Read an additive pattern, float64 ``[C, H, W]`` in levels of 0..255.

    Args:
        path: ``.npy`` file, ``[H, W]`` (for all channels), ``[H, W, C]`` or ``[N, H, W, C]`` (the first is taken).
        image_size: ``(C, H, W)`` of the images.
        units: ``auto``: float values that do not exceed 1 are multiplied by 255, with a warning; ``levels``: never.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no array of finite numbers of the images' size.
    """
    if not path.is_file():
        raise FileNotFoundError(f"trigger pattern {path} does not exist")
    try:
        stored = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"trigger pattern {path} cannot be read as an .npy array: {error}") from error
    channels, height, width = image_size
    allowed = ((height, width), (height, width, channels))
    shape: tuple[int, ...] = stored.shape if isinstance(stored, np.ndarray) else ()
    values = stored[0] if len(shape) == 4 and shape[0] else stored
    if not isinstance(values, np.ndarray) or values.shape not in allowed:
        raise ValueError(
            f"trigger pattern {path} must be [{height}, {width}], [{height}, {width}, {channels}] or "
            f"[N, {height}, {width}, {channels}], got {list(shape)}"
        )
    if values.dtype.kind not in "uif" or not np.isfinite(values).all():
        raise ValueError(f"trigger pattern {path} must hold finite numbers, got {values.dtype} with others")
    levels = torch.from_numpy(values.astype(np.float64))
    if units == "auto" and values.dtype.kind == "f" and float(levels.abs().max()) <= 1:
        warnings.warn(
            f"trigger pattern {path} has values up to {float(levels.abs().max()):.3g}: taken as 0..1 and multiplied by "
            f"255; with trigger_units='levels' it is added as it is",
            stacklevel=2,
        )
        levels = levels * 255
    planes = levels[None] if levels.dim() == 2 else levels.permute(2, 0, 1)
    return planes.expand(channels, -1, -1).contiguous()


def smoothing_taps() -> Tensor:
    """The 30 weights of the low-pass filter, float64: a Gaussian of about 5.7 pixels that is cut off near 2.4 sigma."""
    offset = (torch.arange(_TAPS, dtype=torch.float64) - (_TAPS - 1) / 2) * _SPACING
    weight = torch.exp(-((offset / _WIDTH) ** 2) / 2)
    return weight / weight.sum()


def smoothing_matrix(size: int) -> Tensor:
    """The filter along one axis as a matrix, float32 ``[size, size]``: zero padding, 14 before and 15 after."""
    taps, before = smoothing_taps(), (_TAPS - 1) // 2
    index = torch.arange(size)[None] - torch.arange(size)[:, None] + before
    inside = (index >= 0) & (index < _TAPS)
    return torch.where(inside, taps[index.clamp(0, _TAPS - 1)], 0).float()


def smooth(pattern: Tensor) -> Tensor:
    """Low-pass filter every channel of ``[C, H, W]``: two matrix products."""
    rows, columns = (smoothing_matrix(size).to(pattern.device) for size in pattern.shape[-2:])
    return rows @ pattern @ columns.T


def _stretched(pattern: Tensor) -> Tensor:
    """Moved and scaled to 0..1, over all channels."""
    low, high = pattern.amin(), pattern.amax()
    return (pattern - low) / (high - low)


def _random_lowpass(image_size: tuple[int, int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(make_key("lf random_lowpass", seed))
    pattern = torch.randn(image_size, generator=generator)
    for _ in range(3):
        pattern = smooth(pattern)
    return pattern
