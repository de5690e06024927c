"""The fifteen common corruptions in five severities, on batches of images, wherever these lie."""

from __future__ import annotations

from bbfast.defenses._corruptions.table import CORRUPTIONS, SEVERITIES, corrupt

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]
