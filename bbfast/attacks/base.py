"""What every attack is made of: settings, a trigger, and the protocol around it.

An attack is one file with one registered class. A poison-only attack gives :meth:`Attack.fit` (make the trigger) and
:meth:`Attack.apply` (put it on images); everything else is here. A training-controlled attack also gives
:meth:`Attack.program`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from bbfast._config import build_config
from bbfast._registry import Registry
from bbfast.attacks._picture import file_digest
from bbfast.attacks.card import Card
from bbfast.attacks.config import AttackConfig
from bbfast.attacks.poisoning import LabelRule, PoisonedSet, Role, check_seed, draw_index, poison_count
from bbfast.attacks.prerequisites import AttackContext, default_context
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["Attack", "AttackConfig", "AttackContext", "Stage", "register_attack", "registry"]

Stage = Literal["train", "test"]
A = TypeVar("A", bound="type[Attack]")
_CHUNK = 4096
"""Images poisoned by one call: enough to keep the kernels busy, small beside the data set."""

registry: Registry[type[Attack]] = Registry(
    "attack",
    packages=("bbfast.attacks",),
    entry_points="bbfast.attacks",
    aliases={"badnet": "badnets", "inputaware": "input_aware", "ftrojann": "ftrojan"},
)


def register_attack(name: str) -> Callable[[A], A]:
    """Class decorator: make an attack known under ``name``, which becomes its ``name`` attribute.

    Raises:
        ValueError: if the name is taken.
    """

    def decorate(cls: A) -> A:
        registry.register(name)(cls)
        cls.name = name
        return cls

    return decorate


class Attack(ABC):
    """A backdoor attack.

    Args:
        config: Settings; None builds them from ``settings``.
        **settings: Fields of ``Config``.

    Class attributes:
        name: Registered name.
        version: Raised when a change of the method changes its results: they are then found by other keys.
        card: Facts.
        Config: Settings class.
        fits_data: True if the trigger is made from the training images, not from their size alone;
            :meth:`prepare` must then see the training set before the trigger can be used.
        needs_context: True if the trigger has prerequisites; :meth:`fit` then always gets a context. Implies
            ``fits_data``.
        selects_after_fit: True if :meth:`select` reads what :meth:`fit` made (it is called before too, to check the
            settings).
        learns_trigger: True if training changes the trigger; the backdoor test set is then made after training.

    Raises:
        ConfigError: naming the setting, what was expected and what came.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    card: ClassVar[Card]
    Config: ClassVar[type[AttackConfig]] = AttackConfig
    fits_data: ClassVar[bool] = False
    needs_context: ClassVar[bool] = False
    selects_after_fit: ClassVar[bool] = False
    learns_trigger: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.fits_data = cls.fits_data or cls.needs_context

    def __init__(self, config: AttackConfig | None = None, **settings: Any) -> None:
        owner = self.name or type(self).__name__
        if config is not None and settings:
            raise ConfigError(f"{owner}: give a config or settings, not both")
        self.config = build_config(self.Config, owner, settings) if config is None else config
        if not isinstance(self.config, self.Config):
            raise ConfigError(f"{owner}: config must be a {self.Config.__qualname__}, got {type(config).__name__}")
        if self.config.label_mode not in self.card.label_modes:
            modes = ", ".join(self.card.label_modes)
            raise ConfigError(f"{owner}: label_mode must be one of {modes}, got {self.config.label_mode!r}")
        self.seed = 0
        self.image_size: tuple[int, int, int] | None = None
        self.tensors: dict[str, Tensor] = {}
        """What :meth:`fit` made: all that :meth:`apply` may read besides the settings and the seed."""
        self._fitted_to: str | None = None

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.config.model_dump().items() if v != self._defaults().get(k)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    # What a method gives ----------------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        """Make the trigger's parameters for images of the size of ``data``.

        Called by :meth:`prepare`. Only an attack with ``fits_data`` may look at the pixels or need ``context``.
        """

    @abstractmethod
    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        """Put the trigger on a batch.

        Reads ``config``, ``tensors`` and ``seed`` only. Random numbers come from
        :mod:`bbfast.attacks.randomness`, keyed by seed, stage and ``index``, so that any subset can be made again.

        Args:
            images: uint8 or float (0..1) ``[B, C, H, W]``; float is neither quantised nor detached.
            index: Sample numbers, int64 ``[B]``, same device.
            stage: Training images or test images.

        Returns:
            Same shape, dtype and device, new memory.
        """

    def cover(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        """Put on a batch what cross or cover samples carry; the trigger unless a method says otherwise."""
        return self.apply(images, index, stage)

    def cover_rows(self, data: ImageSet, rows: Tensor, stage: Stage) -> Tensor:
        """:meth:`cover` for samples of a set; methods whose cross samples need other images of the set override it.

        Args:
            data: The clean set.
            rows: Positions in it, int64 ``[B]``.
            stage: Training images or test images.
        """
        return self.cover(data.images[rows], data.ids[rows], stage)

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        """Choose the training samples to poison and those that carry the trigger under their true label.

        Returns:
            Positions int64 ``[P]`` and int64 ``[Q]``, disjoint.

        Raises:
            ValueError: if the settings ask for no sample or for more than there are.
        """
        return self._select_poison(labels, rule, seed), labels.new_empty(0)

    def program(self, rule: LabelRule) -> Program | None:
        """The training loop's hooks of a training-controlled attack; None: the loop is the ordinary one."""
        return None

    def poisoned_program(self, poisoned: PoisonedSet) -> Program | None:
        """The training loop's hooks that go with a poisoned set; None: the loop is the ordinary one.

        For attacks that assume something of the victim's training besides the data (BATT: what benign images are
        augmented by). Asked where :meth:`program` gives None.
        """
        return None

    def export_train(self, train: ImageSet, seed: int, num_classes: int, batch_size: int) -> PoisonedSet:
        """The poisoned training set that data-based defenses are given; for poison-only attacks the one trained on."""
        return self.poison(train, seed, num_classes)

    def extra_tests(self, test: ImageSet, seed: int = 0, num_classes: int | None = None) -> dict[str, ImageSet]:
        """Further test sets by the name of their metric, which is the accuracy on them.

        ``leak`` (one2one only): triggered images of the classes that should not be affected, labelled with the target.
        """
        rule = self.rule(test.labels, num_classes)
        self._make_ready(test, seed)
        leaking = rule.leaking(test.labels).nonzero().flatten()
        return {"leak": self._triggered(test, leaking, rule)} if leaking.numel() else {}

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        """Settings of the paper preset that this attack's own paper replaces."""
        return {}

    def files(self) -> dict[str, str]:
        """Files that the settings name, with their sha256: a changed file is another attack."""
        paths = [v for v in self.config.model_dump().values() if isinstance(v, Path)]
        return {str(path): file_digest(path) for path in paths if path.is_file()}

    # What the library does with it ------------------------------------------------------------------------------------

    def rule(self, labels: Tensor, num_classes: int | None = None) -> LabelRule:
        """The label rule for these labels; ``num_classes`` None takes the largest label + 1.

        Raises:
            ValueError: if the settings do not fit the number of classes or a label lies outside it.
        """
        c = self.config
        known = int(labels.max()) + 1 if num_classes is None and labels.numel() else num_classes or 0
        try:
            rule = LabelRule(c.label_mode, known, c.target, c.shift, c.source_classes)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        rule.check_labels(labels)
        return rule

    def check(self, train: ImageSet, num_classes: int | None = None, seed: int = 0, batch_size: int = 128) -> None:
        """Raise what is wrong with the settings for this data, before any work."""
        check_seed(seed)
        self.select(train.labels, self.rule(train.labels, num_classes), seed)

    def prepare(
        self, data: ImageSet, num_classes: int | None = None, seed: int = 0, context: AttackContext | None = None
    ) -> None:
        """Make the trigger; does nothing if it is already made for this seed, image size and data.

        Args:
            data: The training set.
            num_classes: K; None takes the largest label + 1.
            seed: Seed of the attack.
            context: Where prerequisites are made and kept. None, for an attack that has some: PreAct-ResNet18 and the
                paper's recipe, unless the settings name another surrogate, kept in the user's cache folder. That may
                train a network for hours without a GPU; :func:`bbfast.attack` takes the victim's model and recipe.
        """
        check_seed(seed)
        wanted = f"{seed} {data.image_size}" + (f" {num_classes} {_digest(data)}" if self.fits_data else "")
        # A context that is given may bring another victim; what it already made is read back from its store.
        if self._fitted_to == wanted and not (self.needs_context and context is not None):
            return
        known = num_classes or int(data.labels.max()) + 1
        if self.needs_context and context is None:
            context = default_context(data, known, self.config.compat)
        self.tensors = self.fit(data, known, seed, context)
        self.seed, self.image_size, self._fitted_to = seed, data.image_size, wanted

    def trigger(self, images: Tensor, index: Tensor | None = None, stage: Stage = "test") -> Tensor:
        """Put the trigger on every image.

        Args:
            images: uint8 ``[B, C, H, W]``, or float in 0..1: then the result is not quantised and gradients flow.
            index: Sample numbers, int64 ``[B]``, that per-sample randomness derives from; None means ``0..B-1``.
            stage: ``train`` or ``test``: some attacks use different strengths.

        Returns:
            Same shape, dtype and device, new memory.

        Raises:
            TypeError, ValueError: if arguments do not fit.
            DataRequirementError: if the trigger is made from data that it has not seen.
        """
        _check_trigger_arguments(images, index, stage)
        size = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        if self.image_size is None:
            blank = ImageSet(torch.zeros((1, *size), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
            self._make_ready(blank, seed=0)
        if size != self.image_size:
            raise ValueError(f"{self.name}: the trigger was made for images of {self.image_size}, got {size}")
        if index is None:
            index = torch.arange(images.shape[0], device=images.device)
        return self.apply(images, index.to(images.device), stage)

    def poison(self, train: ImageSet, seed: int = 0, num_classes: int | None = None) -> PoisonedSet:
        """Poison a training set.

        Args:
            train: The clean training set.
            seed: Seed of the choice of samples and of the trigger.
            num_classes: K; None takes the largest label + 1.

        Returns:
            The poisoned set and its ground truth.

        Raises:
            TypeError: if ``train`` is no ImageSet.
            ValueError: if the settings do not fit the data.
        """
        _check_set("train", train)
        rule = self.rule(train.labels, num_classes)
        poison, cross = self.select(train.labels, rule, seed)
        self.prepare(train, rule.num_classes, seed)
        if self.selects_after_fit:
            poison, cross = self.select(train.labels, rule, seed)
        return self._materialise(train, rule, poison, cross)

    def backdoor_test(self, test: ImageSet, seed: int = 0, num_classes: int | None = None) -> BackdoorSet:
        """The triggered test images that ASR and R-Acc are measured on.

        Raises:
            TypeError: if ``test`` is no ImageSet.
            ValueError: if no test image qualifies or the settings do not fit the data.
            DataRequirementError: if the trigger is made from training data that it has not seen.
        """
        _check_set("test", test)
        rule = self.rule(test.labels, num_classes)
        keep = rule.testable(test.labels).nonzero().flatten()
        if not keep.numel():
            raise ValueError(f"{self.name}: no test image qualifies for label_mode {rule.mode!r}")
        self._make_ready(test, seed)
        return self._triggered(test, keep, rule)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to apply the trigger again, as CPU tensors."""
        if self.image_size is None:
            raise self._not_ready()
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return {**own, "seed": torch.tensor(self.seed), "image_size": torch.tensor(self.image_size)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            ValueError: if the seed or the image size is missing.
        """
        own = dict(tensors)
        if not {"seed", "image_size"} <= own.keys():
            raise ValueError(f"{self.name}: trigger state must hold seed and image_size, got {sorted(own)}")
        self.seed = int(own.pop("seed"))
        channels, height, width = own.pop("image_size").tolist()
        self.image_size, self.tensors = (channels, height, width), own
        self._fitted_to = None if self.fits_data else f"{self.seed} {self.image_size}"

    # Helpers for methods ----------------------------------------------------------------------------------------------

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A parameter of the trigger on the device of ``like``."""
        return self.tensors[name].to(like.device)

    def _make_ready(self, data: ImageSet, seed: int) -> None:
        """Make a trigger that needs no training data if there is none; one that was made stays, whatever its seed."""
        if self.image_size is None:
            if self.fits_data:
                raise self._not_ready()
            self.prepare(data, seed=seed)

    def _not_ready(self) -> DataRequirementError:
        return DataRequirementError(f"{self.name}: the trigger is not made yet; call prepare(train) or poison(train)")

    def _select_poison(self, labels: Tensor, rule: LabelRule, seed: int) -> Tensor:
        c, total = self.config, int(labels.shape[0])
        try:
            number = poison_count(total, c.ratio, c.count)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        candidates = rule.trainable(labels).nonzero().flatten()
        available = int(candidates.shape[0])
        if number > available and not (c.clip_to_class and available):
            classes = [rule.target] if rule.mode == "clean_label" else list(rule.source_classes)
            raise ValueError(
                f"{self.name}: label_mode {rule.mode!r} asks for {number} of {total} samples, but class {classes} has "
                f"{available}; use a ratio of at most {available / total:.4g} or clip_to_class=True"
            )
        return draw_index(candidates, min(number, available), seed, c.index_rng)

    def _materialise(self, train: ImageSet, rule: LabelRule, poison: Tensor, cross: Tensor) -> PoisonedSet:
        images, labels = train.images.clone(), train.labels.clone()
        role = torch.zeros_like(labels, dtype=torch.int8)
        role[poison], role[cross] = int(Role.POISON), int(Role.CROSS)
        for part in poison.split(_CHUNK):
            images[part] = self.apply(train.images[part], train.ids[part], "train")
        for part in cross.split(_CHUNK):
            images[part] = self.cover_rows(train, part, "train")
        labels[poison] = rule.given(train.labels[poison])
        return PoisonedSet(
            images=images,
            labels=labels,
            poisoned=role == int(Role.POISON),
            original_labels=train.labels.clone(),
            role=role,
            mean=train.mean,
            std=train.std,
            ids=train.ids,
        )

    def _triggered(self, test: ImageSet, keep: Tensor, rule: LabelRule) -> BackdoorSet:
        truth = test.labels[keep]
        parts = [self.trigger(test.images[part], test.ids[part], "test") for part in keep.split(_CHUNK)]
        return BackdoorSet(
            torch.cat(parts),
            rule.wanted(truth),
            mean=test.mean,
            std=test.std,
            ids=test.ids[keep],
            original_labels=truth,
        )

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        fields = cls.Config.model_fields.items()
        return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


def _check_set(name: str, images: object) -> None:
    if not isinstance(images, ImageSet):
        raise TypeError(f"{name} must be an ImageSet, got {type(images).__name__}")
    if not len(images):
        raise ValueError(f"{name} must hold at least one image, got an empty set")


def _check_trigger_arguments(images: object, index: object, stage: object) -> None:
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        came = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a uint8 or float tensor [B, C, H, W], got {came}")
    if images.dim() != 4:
        raise ValueError(f"images must have four dimensions [B, C, H, W], got shape {list(images.shape)}")
    if stage not in ("train", "test"):
        raise ValueError(f"stage must be 'train' or 'test', got {stage!r}")
    if index is None:
        return
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor [B], got {getattr(index, 'dtype', type(index).__name__)}")
    if index.shape != images.shape[:1]:
        raise ValueError(
            f"index must have one entry for each of {images.shape[0]} images, got shape {list(index.shape)}"
        )


def _digest(data: ImageSet) -> str:
    """Short content hash: all labels and a spread of images."""
    spread = data.images[:: max(1, len(data) // 64)].cpu().contiguous()
    digest = hashlib.blake2b(data.labels.cpu().numpy().tobytes(), digest_size=16)
    digest.update(spread.numpy().tobytes())
    return digest.hexdigest()
