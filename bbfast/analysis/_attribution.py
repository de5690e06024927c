"""What the attribution tools share: the pairs that they show, where the trigger is, how an image is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import short_name
from bbfast.analysis.subject import Pairs, Subject
from bbfast.errors import BBFastError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SIDES", "captured", "mean_finite", "picture", "shown", "top_gradient", "trigger_mask"]

SIDES = ("clean", "bd")


def shown(subject: Subject, n: int) -> tuple[Pairs, dict[str, np.ndarray]]:
    """The pairs that every attribution tool shows for this seed, and what is known of them.

    Returns:
        The pairs and arrays: ``id`` i32, ``label``, ``pred_clean``, ``pred_bd`` i16, ``prob_clean``, ``prob_bd`` f32
        (of the predicted class), all ``[n]``; ``image_clean``, ``image_bd`` u8 ``[n, C, H, W]``.
    """
    pairs = subject.pairs(n)
    known: dict[str, np.ndarray] = {
        "id": pairs.ids.numpy().astype(np.int32),
        "label": pairs.labels.numpy().astype(np.int16),
    }
    for side, images in zip(SIDES, (pairs.clean, pairs.triggered), strict=True):
        best = subject.logits(images).softmax(1).max(1)
        known[f"pred_{side}"] = best.indices.numpy().astype(np.int16)
        known[f"prob_{side}"] = best.values.numpy()
        known[f"image_{side}"] = images.numpy()
    return pairs, known


def trigger_mask(pairs: Pairs, grow: int = 1) -> Tensor:
    """Pixels that the trigger changes in any channel, and those up to ``grow`` beside them: bool ``[n, H, W]``."""
    changed = (pairs.clean != pairs.triggered).any(dim=1, keepdim=True).float()
    return F.max_pool2d(changed, 2 * grow + 1, stride=1, padding=grow)[:, 0] > 0


@contextmanager
def captured(subject: Subject, layer: str) -> Iterator[list[Tensor]]:
    """While the block lasts, gradients start at what ``layer`` puts out, which comes into the list at every pass.

    What follows gets a copy, so that an activation that works in place cannot change what was kept.
    """
    kept: list[Tensor] = []

    def hook(_: Any, __: Any, out: Any) -> Any:
        rest = out[1:] if isinstance(out, tuple) else None
        kept.append((out if rest is None else out[0]).detach().requires_grad_())
        return kept[-1].clone() if rest is None else (kept[-1].clone(), *rest)

    handle = subject.model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


def top_gradient(subject: Subject, images: Tensor, then: Callable[[Tensor], Any], size: int = 128) -> list[Any]:
    """``then`` of the gradient of the largest logit with respect to the normalised pixels, batch by batch."""
    out = []
    for x in subject.batches(images, size):
        x.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(subject.model(x).amax(1).sum(), x)
        if not bool(gradient.isfinite().all()):
            raise BBFastError("the gradient of the model's largest logit with respect to the pixels is not finite")
        out.append(then(gradient.float()))
    return out


def mean_finite(values: np.ndarray) -> float:
    """Mean of what is a number; NaN without a warning if nothing is."""
    good = values[np.isfinite(values)]
    return float(good.mean()) if good.size else float("nan")


def picture(axis: Axes, numbers: Numbers, row: int, side: str) -> None:
    """Image ``row`` of a side, titled with its true class, what the model says, and how sure it is."""
    arrays, names = numbers.arrays, numbers.meta["class_names"]
    image = arrays[f"image_{side}"][row]
    grey = image.shape[0] != 3
    axis.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
    true, said = (names[int(arrays[key][row])] for key in ("label", f"pred_{side}"))
    sure = float(arrays[f"prob_{side}"][row])
    axis.set_title(f"true {short_name(true)}\nsaid {short_name(said)} ({sure:.2f})", fontsize=9)
    axis.set(xticks=[], yticks=[])
