"""A model without a backdoor, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bbfast.attacks.prerequisites import seeded_model
from bbfast.models.state import load_state, model_state
from bbfast.store import Content
from bbfast.studies.perspectives._recorded import STAGE
from bbfast.training import Recipe, train

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.studies.results import Results

__all__ = ["benign_model"]


def benign_model(attack: AttackResult, results: Results, seed: int) -> nn.Module:
    """The model of an attack's recipe, data and seed trained on the clean training set; in the store or made now."""
    data = attack.config["data"]
    name = str(attack.config["model"]["name"])
    settings = {key: attack.config[key] for key in ("model", "recipe", "data")}
    model = seeded_model(name, attack.num_classes, attack.test.image_size, seed)

    def make(work: Path) -> Content:
        train(
            model,
            attack.clean_train,
            Recipe(**attack.config["recipe"]).replace(eval_every=0),
            seed=seed,
            device=results.device,
            checkpoint=work,
            progress=False,
            description=f"benign {name} on {data['name']}",
        )
        return Content(STAGE, settings, tensors={"model": model_state(model)})

    kept = results.store.get_or_make(STAGE, "benign", settings, make, seed=seed, kind=STAGE)
    load_state(model, kept.tensors("model"))
    return model.eval()
