"""A store as a web site that opens from a file: leaderboard, heat maps, coverage, and a page for each run."""

from __future__ import annotations

from bbfast.report.site.write import Site, write_site

__all__ = ["Site", "write_site"]
