"""Cover samples: training images that carry the trigger under their true label (TaCT, the adaptive attacks)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from bbfast.attacks.config import AttackConfig
from bbfast.attacks.poisoning import draw_index
from bbfast.data.loader import derive_seed

__all__ = ["CoverConfig", "draw_cover"]


class CoverConfig(AttackConfig):
    """Settings that attacks with cover samples share.

    Args:
        ratio: Share of the whole training set to poison.
        cover_rate: Share of the whole training set to make cover samples; None: the paper's proportion to the poisoned
            ones, so that a change of ``ratio`` changes both.
    """

    ratio: float | None = Field(0.003, gt=0, le=1)
    cover_rate: float | None = Field(None, ge=0, le=1)


def draw_cover(
    owner: str, config: CoverConfig, total: int, poisoned: int, per_poisoned: float, candidates: Tensor, seed: int
) -> Tensor:
    """Choose the cover samples.

    Args:
        owner: Name of the attack, for messages.
        config: Its settings.
        total: Size of the training set.
        poisoned: Number of poisoned samples.
        per_poisoned: Cover samples for each poisoned one where ``cover_rate`` is None.
        candidates: Positions that may become cover samples, int64 ``[M]``, ascending.
        seed: Seed of the attack.

    Returns:
        int64 ``[Q]``.

    Raises:
        ValueError: if a ``cover_rate`` above 0 gives no sample, or there are fewer candidates than wanted and
            ``clip_to_class`` is off.
    """
    rate, available = config.cover_rate, int(candidates.shape[0])
    wanted = round(per_poisoned * poisoned) if rate is None else round(rate * total)
    if rate and not wanted:
        raise ValueError(
            f"{owner}: cover_rate {rate} of {total} samples gives no cover sample; use at least {1 / total:.3g}, or 0 "
            "for none"
        )
    if wanted > available and not config.clip_to_class:
        raise ValueError(
            f"{owner}: {wanted} cover samples are wanted for {poisoned} poisoned ones of {total}, but {available} may "
            f"become one; use a smaller ratio, a cover_rate of at most {available / total:.4g} or clip_to_class=True"
        )
    return draw_index(candidates, min(wanted, available), derive_seed("cover", seed) % 2**32, config.index_rng)
