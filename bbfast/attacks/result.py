"""What an attack leaves behind: the model, the poisoned data with its ground truth, and how it all was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbfast import artifact
from bbfast.attacks.base import Attack, Stage, registry
from bbfast.attacks.poisoning import Role
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.errors import ArtifactError, DataRequirementError
from bbfast.models import ModelSpec
from bbfast.models.state import load_state, model_state

__all__ = ["AttackResult"]

KIND = "attack"


@dataclasses.dataclass(eq=False)
class AttackResult:
    """A backdoored model and everything about it.

    Args:
        model: The model after the last epoch, in eval mode.
        train: The poisoned training set, as the learner saw it; of a training-controlled attack the exported one.
        poisoned: Which training samples are poisoned, bool ``[N]``.
        original_labels: True labels, int64 ``[N]``.
        role: int8 ``[N]``: 0 clean, 1 poison, 2 cross or cover.
        clean_images: Original pixels of the samples with ``role != 0``, uint8 ``[M, C, H, W]``, in order.
        test: The clean test set.
        backdoor_test: Triggered test images, labelled as the attacker wants, with ``original_labels``.
        metrics: ``c_acc``, ``asr``, ``r_acc`` (fractions), ``seconds``, ``seconds_per_epoch``; ``cross_acc`` and
            ``leak`` where the attack has them.
        config: ``attack``, ``attack_config``, ``attack_files``, ``model``, ``recipe``, ``data``, ``seed``,
            ``device``, ``versions``.
        history: One row of figures an epoch.
        trigger_state: Parameters of the trigger, from :meth:`Attack.state`.
    """

    model: nn.Module
    train: ImageSet
    poisoned: Tensor
    original_labels: Tensor
    role: Tensor
    clean_images: Tensor
    test: ImageSet
    backdoor_test: BackdoorSet
    metrics: dict[str, float]
    config: dict[str, Any]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trigger_state: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def target(self) -> int:
        """The target class (meaningless for ``all2all``)."""
        return int(self.config["attack_config"]["target"])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.config["data"]["num_classes"])

    @property
    def clean_train(self) -> ImageSet:
        """The training set before it was poisoned, rebuilt."""
        images = self.train.images.clone()
        images[self.role != int(Role.CLEAN)] = self.clean_images.to(images.device)
        return dataclasses.replace(self.train, images=images, labels=self.original_labels)

    def attack(self) -> Attack:
        """The attack with its settings and its trigger, ready to be applied to other images.

        Raises:
            UnknownNameError: if the package that brought the attack is not installed.
            DataRequirementError: if the result holds no trigger, as one imported from another program.
        """
        if not self.trigger_state:
            raise DataRequirementError(
                "this result holds no trigger that could be put on other images: it was imported, and the file has none"
            )
        settings = dict(self.config["attack_config"])
        if settings.get("ratio") == 0:
            del settings["ratio"]  # of a control, whose trigger is that of any ratio
        method = registry.get(self.config["attack"])(**settings)
        method.load_state(self.trigger_state)
        return method

    def trigger(self, images: Tensor, index: Tensor | None = None, stage: Stage = "test") -> Tensor:
        """Put this result's trigger on other images; see :meth:`bbfast.attacks.Attack.trigger`."""
        return self.attack().trigger(images, index, stage)

    def save(self, folder: str | Path, *, images: bool = True, overwrite: bool = False) -> Path:
        """Write the result: JSON and safetensors, whole or not at all.

        Args:
            folder: Where it shall stand.
            images: False leaves out every image that the clean data set holds, which :meth:`load` must then be given;
                the poisoned ones are always kept.
            overwrite: Replace a result that is there.

        Raises:
            ArtifactError: if something stands there already, or the disk is full or read-only.
        """
        changed = self.role != int(Role.CLEAN)
        train = {
            "labels": self.train.labels,
            "ids": self.train.ids,
            "poisoned": self.poisoned,
            "original_labels": self.original_labels,
            "role": self.role,
        }
        test = {"labels": self.test.labels, "ids": self.test.ids}
        if images:
            train |= {"images": self.train.images, "clean_images": self.clean_images}
            test |= {"images": self.test.images}
        else:
            train |= {"changed_images": self.train.images[changed]}
        bad = self.backdoor_test
        return artifact.write(
            folder,
            KIND,
            config=self.config,
            metrics=self.metrics,
            tensors={
                "model": model_state(self.model),
                "train": train,
                "test": test,
                "backdoor_test": {
                    "images": bad.images,
                    "labels": bad.labels,
                    "ids": bad.ids,
                    "original_labels": bad.original_labels,
                    **({} if bad.exact is None else {"exact": bad.exact}),
                },
                "trigger": self.trigger_state,
            },
            extra={"mean": self.train.mean, "std": self.train.std, "images": images},
            log=self.history,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, folder: str | Path, *, model: nn.Module | None = None, data: DataPair | None = None) -> AttackResult:
        """Read a result; every file is checked against its checksum, images are memory-mapped.

        Args:
            folder: What :meth:`save` wrote.
            model: A module to load the weights into, for results whose model was not built by
                :func:`bbfast.models.build`.
            data: The clean data, for results saved with ``images=False``.

        Raises:
            ArtifactError: if there is no attack result, or it is damaged or from a newer bbfast.
            DataRequirementError: if ``model`` or ``data`` is needed and was not given, or is not the one used.
        """
        found = artifact.read(folder, KIND)
        stored = {stem: found.tensors(stem) for stem in ("model", "train", "test", "backdoor_test", "trigger")}
        train, test = stored["train"], stored["test"]
        try:
            norm: dict[str, Any] = {"mean": tuple(found.extra["mean"]), "std": tuple(found.extra["std"])}
            backdoor: dict[str, Any] = stored["backdoor_test"]
            if not found.extra["images"]:
                _fill_images(train, test, _matching(data, found.config, Path(folder)))
            return cls(
                model=_restored(model, found.config, stored["model"], Path(folder)),
                train=ImageSet(train["images"], train["labels"], ids=train["ids"], **norm),
                poisoned=train["poisoned"],
                original_labels=train["original_labels"],
                role=train["role"],
                clean_images=train["clean_images"],
                test=ImageSet(test["images"], test["labels"], ids=test["ids"], **norm),
                backdoor_test=BackdoorSet(**backdoor, **norm),
                metrics=found.metrics,
                config=found.config,
                history=found.log,
                trigger_state=stored["trigger"],
            )
        except KeyError as error:
            raise ArtifactError(f"{folder} is no complete attack result: {error} is missing; make it again") from None


def _fill_images(train: dict[str, Tensor], test: dict[str, Tensor], data: DataPair) -> None:
    changed = train["role"] != int(Role.CLEAN)
    train["clean_images"] = data.train.images[changed].cpu()
    train["images"] = data.train.images.cpu().clone()
    train["images"][changed] = train.pop("changed_images")
    test["images"] = data.test.images.cpu()


def _matching(data: DataPair | None, config: Mapping[str, Any], folder: Path) -> DataPair:
    name = config["data"]["name"]
    if data is None:
        raise DataRequirementError(
            f"{folder} was saved without the clean images of {name!r}; pass them: load(folder, data=...)"
        )
    if data.fingerprint != config["data"]["fingerprint"]:
        raise DataRequirementError(
            f"{folder} was made from {name!r} with fingerprint {config['data']['fingerprint'][:12]}, "
            f"the data given ({data.name!r}) has {data.fingerprint[:12]}; pass the same data set"
        )
    return data


def _restored(model: nn.Module | None, config: Mapping[str, Any], state: dict[str, Tensor], folder: Path) -> nn.Module:
    if model is None:
        spec = config["model"]
        if "num_classes" not in spec:
            raise DataRequirementError(
                f"{folder} holds the weights of a {spec['name']}, which bbfast cannot build; pass one: load(folder, "
                f"model=...)"
            )
        with torch.random.fork_rng(devices=[]):
            model = ModelSpec.from_dict(spec).build(weights=False)
    load_state(model, state)
    return model.eval()
