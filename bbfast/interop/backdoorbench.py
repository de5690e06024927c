"""Results of BackdoorBench: its ``attack_result.pt`` with the folders of poisoned images beside it.

The file is a pickle. It is read by an interpreter of our own that makes plain values, tensors, arrays and pictures and
refuses everything else, so a file from anywhere can be opened. See docs/interop.md.
"""

from __future__ import annotations

from bbfast.interop._load import load_attack_result
from bbfast.interop._save import save_attack_result

__all__ = ["load_attack_result", "save_attack_result"]
