"""What a defense may see. Nothing else is reachable from here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast._prerequisite import obtain
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.defenses.features import FeatureReader, Reader, read_set
from bbfast.defenses.holdout import split_stratified
from bbfast.errors import AccessDeniedError, UnsupportedModelError
from bbfast.models.state import model_state

if TYPE_CHECKING:
    from bbfast.store import Store
    from bbfast.training import Recipe

__all__ = ["DataFacts", "DefenderView", "Grants", "Readings", "Stream", "private_copy"]

_SOURCES = ("poisoned_train", "clean", "reserve", "stream")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Incoming images at inference time: uint8 ``[M, C, H, W]``, no labels, order shuffled by the runner."""

    images: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What everybody knows about the data set: public facts, granted to every defense.

    Args:
        name: Name of the data set ("cifar10").
        num_classes: Number of classes K.
        image_size: ``(C, H, W)``.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        flip: Whether training flips images horizontally.
        padding: Zero padding of the training crop, in pixels.
    """

    name: str
    num_classes: int
    image_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    padding: int = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Grants:
    """What a view may hand out. The runner fills in what the card's ``needs`` names and leaves the rest None."""

    model: nn.Module | None = None
    model_spec: Any = None
    clean: ImageSet | None = None
    reserve: ImageSet | None = None
    poisoned_train: ImageSet | None = None
    stream: Stream | None = None
    features: Mapping[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Readings:
    """What a view has read so far, without the sets and the model that it was read of.

    Args:
        features: By source and role.
        others: What other readers made, by source and the reader's key.
        used: Names of the granted things that were asked for.
    """

    features: dict[tuple[str, str], Tensor]
    others: dict[tuple[str, Hashable], Any]
    used: set[str]

    def keep(self, source: str, reader: Reader, outcome: Any) -> None:
        """Take what a pass gave ``reader``."""
        if isinstance(reader, FeatureReader):
            self.features[source, reader.roles[0]] = outcome
        else:
            self.others[source, reader.key] = outcome


class DefenderView:
    """All that a defense sees.

    It is made of copies: no tensor here shares memory with, and no object refers to, the attack's result. What
    ``needs`` does not name is not merely forbidden but absent. Poison flags, original labels, the target class, the
    clean test set's evaluation part and the backdoor test set are never given.

    Args:
        method: Name of the defense, for messages.
        needs: What was declared, of :data:`bbfast.defenses.card.NEEDS`.
        facts: Public facts of the data set.
        grants: The granted objects; those not in ``needs`` are ignored.
        recipe: The recipe that the model was trained with, for methods that train again.
        seed: Seed of everything random in the defense.
        device: Where the model is and where work is done.
        progress: Show progress bars: None decides by the terminal.
        checkpoint: Folder in which a method that trains for long keeps its state; None keeps none.
        store: Where :meth:`obtain` keeps and finds things; None keeps none.
    """

    def __init__(
        self,
        method: str,
        needs: Iterable[str],
        facts: DataFacts,
        grants: Grants,
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: bool | None = None,
        checkpoint: Path | None = None,
        store: Store | None = None,
    ) -> None:
        self.method = method
        self.needs = frozenset(needs)
        self.facts = facts
        self.recipe = recipe
        self.seed = seed
        self.device = torch.device(device)
        self.progress = progress
        self.checkpoint = checkpoint
        self._obtain = partial(obtain, store)
        held = {name: getattr(grants, name) for name in ("model", *_SOURCES) if name in self.needs}
        self._held: dict[str, Any] = {name: value for name, value in held.items() if value is not None}
        self._spec = grants.model_spec if "fresh_model" in self.needs else None
        self._features = {key: value for key, value in grants.features.items() if key[0] in self._held}
        self._readings: dict[tuple[str, Hashable], Any] = {}
        self._used: set[str] = set()
        self._model_version = _version(self._held.get("model"))

    @property
    def num_classes(self) -> int:
        return self.facts.num_classes

    @property
    def image_size(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the data set's images."""
        return self.facts.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.facts.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.facts.std

    @property
    def data_name(self) -> str:
        return self.facts.name

    @property
    def flip(self) -> bool:
        return self.facts.flip

    @property
    def padding(self) -> int:
        return self.facts.padding

    @property
    def model(self) -> nn.Module:
        """The model under suspicion: a private copy in eval mode on ``device``, the defense's to change."""
        model: nn.Module = self._get("model")
        return model

    @property
    def clean(self) -> ImageSet:
        """The hold-out H: clean training images with true labels, in random order; ``ids`` are ``0..n_H-1``."""
        held: ImageSet = self._get("clean")
        return held

    @property
    def reserve(self) -> ImageSet:
        """Clean test images with true labels, as many for each class; removed from every evaluation."""
        held: ImageSet = self._get("reserve")
        return held

    @property
    def poisoned_train(self) -> ImageSet:
        """The training set, labels as given; ``ids`` are positions ``0..N-1``, and flags are returned in this order."""
        held: ImageSet = self._get("poisoned_train")
        return held

    @property
    def stream(self) -> Stream:
        """Incoming images without labels; scores and flags are returned in this order."""
        held: Stream = self._get("stream")
        return held

    @property
    def used(self) -> tuple[str, ...]:
        """Which granted things have been read so far, sorted."""
        return tuple(sorted(self._used))

    def fresh_model(self, *, empty: bool = False) -> nn.Module:
        """A newly initialised model of the same architecture on ``device``, seeded by the view's seed.

        Args:
            empty: Build its layers without memory for their weights (device ``meta``): for checks before any work.

        Raises:
            AccessDeniedError: if the card does not name ``fresh_model``.
            UnsupportedModelError: if the model was not built by :func:`bbfast.models.build`, so that its plan
                is unknown.
        """
        self._demand("fresh_model")
        if self._spec is None:
            raise UnsupportedModelError(
                self.method, "this model", "it carries no plan to build it anew", "build it with bbfast.models.build"
            )
        self._used.add("fresh_model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.derive_seed("fresh_model"))
            if empty:
                with torch.device("meta"):
                    layers: nn.Module = self._spec.build(weights=False)
                return layers
            model: nn.Module = self._spec.build()
        return model.to(self.device)

    def derive_seed(self, tag: str) -> int:
        """A seed in ``0..2**63-1`` that depends on the view's seed and ``tag`` only."""
        return derive_seed("defense", self.seed, tag)

    def generator(self, tag: str) -> torch.Generator:
        """A CPU generator of its own for each ``tag``, so that one use of randomness does not shift another."""
        return torch.Generator().manual_seed(self.derive_seed(tag))

    def obtain(
        self, kind: str, config: Mapping[str, Any], make: Callable[[Path], Mapping[str, Tensor]], *, seed: int
    ) -> dict[str, Tensor]:
        """What other methods on the same data make in the same way: found in the run's store, or made now and kept.

        Args:
            kind: What it is ("simclr").
            config: Everything it depends on, fit for JSON, the data it is made from included (``content_hash``).
            make: Makes it; called with a folder for checkpoints.
            seed: Of its random numbers.

        Returns:
            Its tensors on the CPU. Do not write to them.

        Raises:
            ArtifactError: if the store cannot be read or written.
        """
        work = None if self.checkpoint is None else self.checkpoint / kind
        return self._obtain(kind, config, make, seed=seed, work=work)

    def fingerprint(self) -> dict[str, str]:
        """Hash of each granted model and image set, by name: equal for views that show the same."""
        found = {}
        for name, held in self._held.items():
            if name == "model":
                found[name] = content_hash(model_state(held))
            else:
                labels = {} if isinstance(held, Stream) else {"labels": held.labels}
                found[name] = content_hash({"images": held.images, **labels})
        return found

    def split_clean(self, val_fraction: float) -> tuple[ImageSet, ImageSet]:
        """H in two parts by class: ``(fit, val)``, each with at least one sample of every class, in the order of H.

        Args:
            val_fraction: Part that goes to ``val``, in ``(0, 1)``.

        Raises:
            DataRequirementError: if a class has fewer than two samples in H.
        """
        clean = self.clean
        fit, val = split_stratified(clean.labels, val_fraction, self.num_classes, self.generator("split_clean"))
        return clean.subset(fit), clean.subset(val)

    def features(self, role: str = "penultimate", source: str = "poisoned_train") -> Tensor:
        """Features of a granted set by the granted model: eval mode, no augmentation, in the set's order; computed
        once.

        Args:
            role: Layer role, see :func:`bbfast.models.roles`; ``penultimate`` is the input of the last Linear layer.
            source: ``poisoned_train``, ``clean``, ``reserve`` or ``stream``.

        Returns:
            float32 ``[N, d]`` for ``penultimate``, the layer's output ``[N, ...]`` for other roles; on ``device``, a
            copy that the caller may change.

        Raises:
            AccessDeniedError: if the model or the source is not granted.
            UnsupportedModelError: if the model has no layer of that role.
            RuntimeError: if the model has been changed since it was granted.
        """
        self._source(source)
        key = (source, role)
        if key not in self._features:
            self._features[key] = self._read_now(source, [FeatureReader(role)])[0]
        return self._features[key].to(self.device, copy=True)

    def read(self, source: str, reader: Reader) -> Any:
        """What ``reader`` makes of a granted set: of a pass that other defenses shared (:func:`bbfast.detect_all`), or
        of one made now.

        Args:
            source: ``poisoned_train``, ``clean``, ``reserve`` or ``stream``.
            reader: See :class:`bbfast.defenses.Reader`.

        Raises:
            AccessDeniedError, UnsupportedModelError, RuntimeError: as :meth:`features` does.
        """
        self._source(source)
        key = (source, reader.key)
        if key not in self._readings:
            self._readings[key] = self._read_now(source, [reader])[0]
        return self._readings[key]

    def _source(self, source: str) -> Tensor:
        if source not in _SOURCES:
            raise ValueError(f"source must be one of {_SOURCES}, got {source!r}")
        images: Tensor = self._get(source).images
        return images

    def _read_now(self, source: str, readers: Sequence[Reader]) -> list[Any]:
        """One pass over a granted set for all ``readers``; their outcomes."""
        images, model = self._source(source), self.model
        if _version(model) != self._model_version:
            raise RuntimeError(
                f"{self.method}: {source!r} was to be read after view.model was changed; "
                "take the features first or change a copy.deepcopy of the model"
            )
        read_set(model, images, readers, self.mean, self.std, self.device)
        return [reader.outcome() for reader in readers]

    def readings(self) -> Readings:
        """What was read so far: for the next view of the same defense on the same grants; the runner's."""
        return Readings(dict(self._features), dict(self._readings), set(self._used))

    def go_on(self, earlier: Readings) -> None:
        """Begin where an earlier view of the same defense on the same grants ended; the runner's."""
        self._features.update(earlier.features)
        self._readings.update(earlier.others)
        self._used.update(earlier.used)

    def computed_features(self) -> dict[tuple[str, str], Tensor]:
        """The features held so far by (source, role): what the runner keeps for the next defense on the same model."""
        return dict(self._features)

    def _demand(self, name: str) -> None:
        if name not in self.needs:
            raise AccessDeniedError(
                f"defense {self.method!r} asked for {name!r}, which its card does not name: {sorted(self.needs)}"
            )

    def _get(self, name: str) -> Any:
        self._demand(name)
        if name not in self._held:
            raise AccessDeniedError(f"defense {self.method!r} asked for {name!r}, which this run does not provide")
        self._used.add(name)
        return self._held[name]

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that do not exist: a defense that guesses at the ground truth is told so by name.
        if name.startswith("_"):
            raise AttributeError(name)
        raise AccessDeniedError(f"a DefenderView has no {name!r}: no defense is granted it")


def private_copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A deep copy on ``device`` in eval mode, without hooks and gradients, with the original's ``requires_grad``."""
    # A hook's closure or bound object may hold anything, the attack's result included: hooks are left out of the copy.
    memo: dict[int, Any] = {
        id(value): type(value)()
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, dict) and name.startswith("_") and "_hooks" in name
    }
    return copy.deepcopy(model, memo).to(device).eval()


def _version(model: nn.Module | None) -> tuple[int, ...]:
    """Changes whenever a parameter or buffer is written in place or replaced by another number of writes."""
    if model is None:
        return ()
    return tuple(tensor._version for tensor in (*model.parameters(), *model.buffers()))
