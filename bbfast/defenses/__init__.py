"""Defenses: found by name, run on a view that grants only what their threat model does."""

from __future__ import annotations

from bbfast.defenses.base import Defense, DefenseConfig, available, create, find, info, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.compose import filter_and_retrain, unlearn
from bbfast.defenses.detect import detect_all
from bbfast.defenses.features import FeatureCache, FeatureReader, Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.run import defend
from bbfast.defenses.support import refusal
from bbfast.defenses.view import DefenderView

__all__ = [
    "DefenderView",
    "Defense",
    "DefenseCard",
    "DefenseConfig",
    "DefenseResult",
    "FeatureCache",
    "FeatureReader",
    "Reader",
    "available",
    "create",
    "defend",
    "detect_all",
    "filter_and_retrain",
    "find",
    "info",
    "refusal",
    "register_defense",
    "unlearn",
]
