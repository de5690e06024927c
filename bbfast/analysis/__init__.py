"""Tools that look into attacked and defended models; each gives a figure and the numbers behind it."""

from __future__ import annotations

from bbfast.analysis.base import Tool, ToolCard, ToolConfig, available, create, find, info, register_tool
from bbfast.analysis.compare import compare
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.run import AnalysisResult, run
from bbfast.analysis.several import Outcome, run_all
from bbfast.analysis.subject import Pairs, Subject, View

__all__ = [
    "AnalysisResult",
    "Numbers",
    "Outcome",
    "Pairs",
    "Subject",
    "Tool",
    "ToolCard",
    "ToolConfig",
    "View",
    "available",
    "compare",
    "create",
    "find",
    "info",
    "register_tool",
    "run",
    "run_all",
]
