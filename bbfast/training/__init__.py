"""Training: recipes, the engine, programs for training-controlled methods, prediction."""

from __future__ import annotations

from bbfast.training.callbacks import EpochInfo, StartInfo, StepInfo
from bbfast.training.device import resolve_device
from bbfast.training.engine import TrainResult, train
from bbfast.training.prediction import predict, predict_labels
from bbfast.training.program import Batch, Program
from bbfast.training.recipe import Recipe
from bbfast.training.recorder import SampleRecorder

__all__ = [
    "Batch",
    "EpochInfo",
    "Program",
    "Recipe",
    "SampleRecorder",
    "StartInfo",
    "StepInfo",
    "TrainResult",
    "predict",
    "predict_labels",
    "resolve_device",
    "train",
]
