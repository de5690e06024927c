"""Ready studies: a question, the small grid and the tools that answer it, one figure and what to read in it."""

from __future__ import annotations

from bbfast.studies.base import (
    DataConfig,
    Listed,
    Study,
    StudyCard,
    StudyConfig,
    available,
    create,
    find,
    info,
    register_study,
)
from bbfast.studies.results import Results, Row
from bbfast.studies.run import StudyResult, run

__all__ = [
    "DataConfig",
    "Listed",
    "Results",
    "Row",
    "Study",
    "StudyCard",
    "StudyConfig",
    "StudyResult",
    "available",
    "create",
    "find",
    "info",
    "register_study",
    "run",
]
