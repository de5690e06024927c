"""Pages that show results: static, self-contained, readable without a network."""

from __future__ import annotations
