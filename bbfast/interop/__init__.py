"""Results of other programs, in and out."""

from __future__ import annotations

from bbfast.interop import backdoorbench

__all__ = ["backdoorbench"]
