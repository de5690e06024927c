"""The numbers of the evaluation protocol, from predictions, labels and scores: fractions in 0..1, NaN if undefined.

How visible a trigger is: :func:`psnr` and :func:`ssim` of images before and after.
"""

from __future__ import annotations

from bbfast.metrics._anomaly import anomaly_index
from bbfast.metrics._classification import accuracy_per_class, asr, c_acc, der, r_acc, rir
from bbfast.metrics._detection import detection
from bbfast.metrics._image import psnr, ssim

__all__ = ["accuracy_per_class", "anomaly_index", "asr", "c_acc", "der", "detection", "psnr", "r_acc", "rir", "ssim"]
