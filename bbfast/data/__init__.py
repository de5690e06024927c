"""Images in memory and on disk: sets, pairs of them, data sets by name, resizing and normalisation."""

from __future__ import annotations

from bbfast.data.datapair import DataPair
from bbfast.data.imageset import BackdoorSet, ImageSet

__all__ = ["BackdoorSet", "DataPair", "ImageSet"]
