"""C-Acc, ASR, R-Acc of a model, and DER and RIR against the model before a defense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bbfast import metrics
from bbfast.data.imageset import ImageSet

__all__ = ["evaluate"]

_NAN = float("nan")
_NEEDED = ("c_acc", "asr", "r_acc")


def evaluate(
    model: nn.Module,
    test: ImageSet,
    backdoor_test: ImageSet | None = None,
    baseline: Mapping[str, Any] | object | None = None,
    *,
    device: torch.device | str = "auto",
    batch_size: int = 512,
) -> dict[str, Any]:
    """The protocol's metrics, from one pass over each set; R-Acc comes from the same predictions as ASR.

    Args:
        model: Takes normalised images ``[B, C, H, W]``, gives logits ``[B, K]``; used in evaluation mode.
        test: Clean test images.
        backdoor_test: Test images that carry the trigger, with ``labels`` the attacker wants and ``original_labels``
            (:class:`bbfast.BackdoorSet`); of an all-to-one attack without those whose true label is the target. None or
            empty if there are none, as for a benign model.
        baseline: The model before the defense on the same sets: a mapping with ``c_acc``, ``asr`` and ``r_acc``, or a
            result whose ``metrics`` is one.
        device: Where to run; "auto" takes a GPU if there is one.
        batch_size: Images per forward pass.

    Returns:
        ``c_acc``, ``asr``, ``r_acc``, and ``der`` and ``rir`` if there is a baseline: fractions in 0..1, or NaN where
        not defined. ``reason``, a text, is there only when something is NaN for want of images.

    Raises:
        TypeError: if a set is not an ImageSet, ``backdoor_test`` has no ``original_labels``, or ``baseline`` is neither
            a mapping nor a result.
        ValueError: if ``baseline`` lacks a metric, or a label is not one of the model's classes.

    Source: Wu et al., BackdoorBench, arXiv 2401.15002.
    """
    before = None if baseline is None else _baseline(baseline)
    _check_set("test", test)
    reasons = [] if len(test) else ["c_acc: the test set is empty"]
    result: dict[str, Any] = dict.fromkeys(_NEEDED, _NAN)
    if backdoor_test is not None:
        _check_set("backdoor_test", backdoor_test)
        original = _original_labels(backdoor_test)
    if len(test):
        result["c_acc"] = metrics.c_acc(_predict("test", model, test, test.labels, device, batch_size), test.labels)
    if backdoor_test is not None and len(backdoor_test):
        wanted = torch.cat([backdoor_test.labels.cpu(), original.cpu()])
        predicted = _predict("backdoor_test", model, backdoor_test, wanted, device, batch_size)
        result["asr"] = metrics.asr(predicted, backdoor_test.labels)
        result["r_acc"] = metrics.r_acc(predicted, original)
    else:
        reasons.append("asr, r_acc: there are no backdoor test images")
    if before is not None:
        result["der"] = metrics.der(before["c_acc"], before["asr"], result["c_acc"], result["asr"])
        result["rir"] = metrics.rir(before["c_acc"], before["r_acc"], result["c_acc"], result["r_acc"])
    if reasons:
        result["reason"] = "; ".join(reasons)
    return result


def _predict(
    name: str, model: nn.Module, images: ImageSet, labels: Tensor, device: torch.device | str, batch_size: int
) -> Tensor:
    # Imported when needed: results are read and compared on machines that never run a model.
    from bbfast.training import predict

    logits = predict(model, images, batch_size=batch_size, device=device)
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"{name} must have labels in 0..{logits.shape[1] - 1}, the model's {logits.shape[1]} classes, got"
            f" {int(labels.max())}"
        )
    return logits.argmax(dim=1)


def _check_set(name: str, images: object) -> None:
    if not isinstance(images, ImageSet):
        raise TypeError(f"{name} must be a bbfast.ImageSet, got {type(images).__name__}")


def _original_labels(backdoor_test: ImageSet) -> Tensor:
    original = getattr(backdoor_test, "original_labels", None)
    if not isinstance(original, Tensor):
        raise TypeError("backdoor_test must be a bbfast.BackdoorSet, with original_labels beside the wanted labels")
    return original


def _baseline(baseline: Mapping[str, Any] | object) -> dict[str, float]:
    found = baseline if isinstance(baseline, Mapping) else getattr(baseline, "metrics", None)
    if not isinstance(found, Mapping):
        raise TypeError(f"baseline must be a mapping of metrics or a result with them, got {type(baseline).__name__}")
    missing = [key for key in _NEEDED if key not in found]
    if missing:
        raise ValueError(f"baseline must have {', '.join(_NEEDED)}; it lacks {', '.join(missing)}")
    return {key: _NAN if found[key] is None else float(found[key]) for key in _NEEDED}
