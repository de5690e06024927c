"""P8: which triggers other than its own open the backdoor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.subject import Pairs, Subject
from bbfast.bench.grid import NO_DEFENSE
from bbfast.data.imageset import ImageSet
from bbfast.errors import UnknownNameError
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described, with_none
from bbfast.studies.perspectives._trigger_figure import drawn
from bbfast.studies.perspectives._trigger_table import as_row, findings
from bbfast.studies.perspectives._variants import FAMILIES, families, triggered
from bbfast.studies.results import Results, Row
from bbfast.studies.statistics import nanmean
from bbfast.training import predict_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.attacks import Attack, AttackResult
    from bbfast.bench import Grid

__all__ = ["TriggerGeneralisation"]

_MAPS = (("size", "opacity"), ("location", "opacity"), ("frequency", "opacity"), ("strength", "opacity"),
         ("partial", "opacity"))  # fmt: skip


class TriggerGeneralisationConfig(DataConfig):
    """Settings of the study of trigger generalisation.

    Args:
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratio: Share of the training set that is poisoned.
        defenses: Defenses that repair a model; none is always added.
        families: Ways to change the trigger; those that an attack's trigger does not have are left out.
        values: Family to the values that are tried, instead of its own.
        n: Test images.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(
        ("badnets", "blended", {"name": "sig", "label": "sig, dirty", "set": {"label_mode": "all2one"}}), min_length=1
    )
    ratio: Share = 0.1
    defenses: Listed = ("ft", "fp")
    families: tuple[str, ...] = Field(tuple(FAMILIES), min_length=1)
    values: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    n: int = Field(500, ge=1)

    @field_validator("families", "values")
    @classmethod
    def _known(cls, names: Any) -> Any:
        for name in names:
            if name not in FAMILIES:
                raise UnknownNameError("trigger family", name, list(FAMILIES))
        return names


@register_study("trigger_generalisation")
class TriggerGeneralisation(Study):
    """The attack's own trigger with one setting changed, or two, on test images; nothing is trained again. ``radius``
    of a family: distance from the trained value to the nearest value that was tried with an ASR below 50 % (NaN: none).

    Families, see ``_variants.FAMILIES``: location (a shift up and to the left, around the border for triggers over the
    whole image), size, opacity, colour, frequency, strength, JPEG, blur, partial, another image's instance. ASR counts
    images of other classes than the target; several seeds are averaged.

    Arrays (a: place of the attack, from 0; D defenses, none first; V values): ``values_FAMILY_a`` f64 ``[V]``;
    ``asr_FAMILY_a`` f64 ``[D, V]``, NaN for a cell without a model; ``map_a`` f64 ``[rows, columns]``: ASR of the
    undefended model over two families, and ``map_rows_a``, ``map_columns_a``. Table: a row an attack, defense and
    family.
    """

    card = StudyCard(
        title="Trigger generalisation",
        question="How far may a trigger differ from the trained one and still open the backdoor?",
        reading=(
            "A block is an attack. Each small panel changes one property of its trigger; the dotted line is the "
            "trained value, a line a defense, black none. A line that stays high far from the dotted line is a "
            "backdoor that many triggers open: whoever looks for the exact trigger finds one of many. A narrow peak is "
            "one that needs its own. Where a defended line lies below the black one at the dotted line but not "
            "elsewhere, the defense has closed that trigger and left its neighbours open. The map has the ASR of the "
            "undefended model over two properties, its line is 50 %, the star the trained trigger."
        ),
    )
    Config = TriggerGeneralisationConfig

    def grids(self) -> Sequence[Grid]:
        config = self.config
        return [
            config.grid(
                self.name,
                models=[config.model],
                attacks=config.attacks,
                ratios=[config.ratio],
                defenses=with_none(config.defenses),
            )
        ]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        attacks = [entry.label for entry in grid.attacks]
        defenses = [entry.label for entry in grid.defenses]
        arrays: dict[str, NDArray[Any]] = {}
        table, owns, maps = [], [], []
        for i, attack in enumerate(attacks):
            cells = [row for row in results.rows if row["attack"] == attack]
            curves, own, pair = self._attack(cells, defenses, results)
            owns.append(own)
            maps.append(pair)
            arrays |= {f"{name}_{i}": values for name, values in curves.items()}
            for family, trained in own.items():
                values, asr = curves[f"values_{family}"], curves[f"asr_{family}"]
                for j, defense in enumerate(defenses):
                    if np.isfinite(asr[j]).any():
                        table.append(as_row(attack, defense, family, values, asr[j], trained))
        plain = [row for row in table if row["defense"] == NO_DEFENSE]
        summary: dict[str, Any] = {"attacks": len(attacks), "variants": sum(row["values"] for row in plain)}
        for family in self.config.families:
            found = [row["lowest"] for row in plain if row["family"] == family]
            if found:
                summary[f"lowest_asr_{family}"] = float(nanmean(found))
        return Numbers(
            arrays,
            table,
            summary,
            {
                "attacks": attacks,
                "defenses": defenses,
                "own": owns,
                "maps": maps,
                "caption": f"{described(grid)}; up to {self.config.n} test images",
                "findings": findings(table, attacks),
            },
        )

    def _attack(
        self, cells: Sequence[Row], defenses: Sequence[str], results: Results
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float], list[str]]:
        """Curves and map of an attack, the trained values, and the map's families; means over seeds."""
        config = self.config
        runs: list[dict[str, NDArray[Any]]] = []
        own: dict[str, float] = {}
        pair: list[str] = []
        for seed in dict.fromkeys(row["seed"] for row in cells if row["status"] == "done"):
            models = {row["defense"]: row for row in cells if row["seed"] == seed and row["status"] == "done"}
            result = results.attack(next(iter(models.values())))
            attack, pairs = result.attack(), Subject(result, None, results.device, config.seeds[0]).pairs(config.n)
            networks = [_model(models.get(defense), result, results) for defense in defenses]

            def asr(
                changes: Mapping[str, float],
                networks: Sequence[nn.Module | None],
                result: AttackResult = result,
                attack: Attack = attack,
                pairs: Pairs = pairs,
                seed: int = seed,
            ) -> list[float]:
                images = triggered(result, attack, changes, pairs.clean, pairs.ids, seed)
                return [_share(net, images, pairs.targets, result, results.device) for net in networks]

            kept: dict[str, NDArray[Any]] = {}
            own = {name: FAMILIES[name].own(attack) for name in families(attack, config.families)}
            for name in own:
                values = self._values(attack, name)
                kept[f"values_{name}"] = values
                kept[f"asr_{name}"] = np.array([asr({name: v}, networks) for v in values.tolist()]).T
            pair = list(next((two for two in _MAPS if set(two) <= own.keys()), ()))
            if pair:
                rows, columns = (self._values(attack, name) for name in pair)
                found = [[asr(dict(zip(pair, (r, c), strict=True)), networks[:1])[0] for c in columns] for r in rows]
                kept |= {"map": np.array(found), "map_rows": rows, "map_columns": columns}
            runs.append(kept)
        if not runs:
            return {}, {}, []
        return {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}, own, pair

    def _values(self, attack: Attack, family: str) -> NDArray[np.float64]:
        given = self.config.values.get(family, FAMILIES[family].values(attack))
        return np.array(sorted({*map(float, given), FAMILIES[family].own(attack)}))

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return drawn(numbers)


def _model(row: Row | None, result: AttackResult, results: Results) -> nn.Module | None:
    """The model of a cell; None if it has none."""
    if row is None:
        return None
    if row["defense"] == NO_DEFENSE:
        return result.model
    defense = results.defense(row)
    return None if defense is None else defense.model


def _share(net: nn.Module | None, images: Tensor, wanted: Tensor, result: AttackResult, device: torch.device) -> float:
    if net is None:
        return float("nan")
    given = ImageSet(images, wanted, mean=result.test.mean, std=result.test.std)
    return float((predict_labels(net, given, device=device) == wanted).double().mean())
