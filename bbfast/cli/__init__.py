"""The ``bbfast`` command."""

from __future__ import annotations

from bbfast.cli.app import main

__all__ = ["main"]
