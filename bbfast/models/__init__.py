"""The benchmark's models by name, and their layers by role."""

from __future__ import annotations

from bbfast.models._registry import add, available, build, info, register
from bbfast.models._roles import Roles, features, forward_features, roles
from bbfast.models._spec import ModelSpec
from bbfast.models._weights import WeightsError
from bbfast.models.state import load_state, model_state

__all__ = [
    "ModelSpec",
    "Roles",
    "WeightsError",
    "add",
    "available",
    "build",
    "features",
    "forward_features",
    "info",
    "load_state",
    "model_state",
    "register",
    "roles",
]
