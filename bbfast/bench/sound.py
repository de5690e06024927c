"""Results that a run may count on: what is damaged is put aside, so that it is made anew."""

from __future__ import annotations

from collections.abc import Mapping

from bbfast import artifact
from bbfast.bench.index import opened
from bbfast.bench.outcomes import Outcome
from bbfast.store import Store

__all__ = ["sound"]


def sound(store: Store, known: Mapping[str, Outcome], verify: bool = False) -> dict[str, Outcome]:
    """The outcomes whose results can be read.

    Args:
        store: Where they lie.
        known: Stage to outcome.
        verify: Compare every file with its checksum. Without it those are looked at that the index could not take in
            since it last did, whose settings or figures are damaged; tensors are checked where they are used.

    Raises:
        NewerFormatError: if a newer bbfast wrote one; nothing is touched.
        ArtifactError: if the store cannot be read.
    """
    if not store.root.is_dir():
        return dict(known)
    with opened(store) as (_, damaged):
        suspects = {o.folder for o in known.values() if o.status == "done" and (verify or o.folder in damaged)}
    # One that is gone by now is no damage: another runner has put it aside.
    broken = {f for f in sorted(suspects) if not artifact.exists(store.root / f) or not store.check(store.root / f)}
    return {key: outcome for key, outcome in known.items() if outcome.folder not in broken}
