"""Where a trigger lies among the frequencies, and which frequencies a model decides by, without and with it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bbfast.analysis import create
from bbfast.analysis.subject import Subject
from bbfast.analysis.tools.frequency_saliency import rings

__all__ = ["saliency", "trigger_energy"]


def trigger_energy(subject: Subject, n: int) -> tuple[NDArray[np.float64], float]:
    """The power of what the trigger changes, by distance from zero frequency.

    Args:
        subject: Whose attack's triggered test images.
        n: How many of them.

    Returns:
        Share of the energy on each ring of 0, 1, ... cycles an image, ``[R]``, as far as a ring lies wholly inside the
        spectrum, the corners beyond the last in the last; and the share beyond a quarter of the shorter side. NaN where
        nothing is changed.
    """
    pairs = subject.pairs(n)
    residual = (pairs.triggered.float() - pairs.clean.float()) / 255
    power = torch.fft.fftshift(torch.fft.fft2(residual).abs().square().double().sum((0, 1))).cpu().numpy()
    height, width = power.shape
    radius, last = rings(height, width), min(height, width) // 2
    total = power.sum() or float("nan")
    share = np.bincount(np.minimum(np.rint(radius).astype(int), last).ravel(), power.ravel(), last + 1) / total
    return share, float(power[radius > min(height, width) / 4].sum() / total)


def saliency(subject: Subject, n: int) -> tuple[NDArray[np.float64], dict[str, float]]:
    """How strongly the largest logit answers to each frequency, as the tool frequency_saliency measures it.

    Returns:
        Mean amplitude on each ring without and with the trigger, ``[2, R]``; and ``fsm_high_clean``,
        ``fsm_high_triggered`` (share of the energy beyond a quarter of the shorter side) and ``fsm_js``
        (Jensen-Shannon distance of the two profiles, 0..1).
    """
    found = create("frequency_saliency", n_stat=n, shown=1).measure(subject)
    facts = found.summary
    return found.arrays["radial"].astype(np.float64), {
        "fsm_high_clean": float(facts["high_frequency_share_clean"]),
        "fsm_high_triggered": float(facts["high_frequency_share_bd"]),
        "fsm_js": float(facts["js_distance"]),
    }
