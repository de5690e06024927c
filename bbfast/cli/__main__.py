"""``python -m bbfast.cli``: the command without an installed script."""

from __future__ import annotations

from bbfast.cli.app import main

main()
