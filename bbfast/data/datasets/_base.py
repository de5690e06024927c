"""What the built-in data sets share: options, caching, normalisation, download, and the words of their errors."""

from __future__ import annotations

import abc
import dataclasses
import logging
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bbfast._config import MethodConfig, build_config
from bbfast._registry import Registry
from bbfast.data.cache import Decoded, cache_root, cached
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import NORMALIZATION, channel_mean_std
from bbfast.errors import ConfigError, DatasetError

__all__ = [
    "DATASETS",
    "Archive",
    "Dataset",
    "DatasetInfo",
    "DatasetOptions",
    "DownloadOptions",
    "FileOptions",
    "Side",
    "fetch_archive",
    "register",
]

_log = logging.getLogger(__name__)

DATASETS: Registry[Any] = Registry(
    "data set",
    packages=("bbfast.data.datasets",),
    entry_points="bbfast.datasets",
    aliases={"tiny": "tiny_imagenet"},
)


def register(name: str) -> Any:
    """Class decorator: make a data set known as ``name`` to ``load``, the command line and the grid.

    The class is made without arguments and offers ``load(root, **options) -> DataPair``; an attribute ``info``
    (:class:`DatasetInfo` or a dict) describes it. Deriving from :class:`Dataset` gives options, caching and errors.

    Raises:
        TypeError: if the class has no ``load``.
        ValueError: if the name is taken.
    """

    def decorate(cls: type[Any]) -> type[Any]:
        if not callable(getattr(cls, "load", None)):
            raise TypeError(f"data set {name!r} must have a method load(root, **options) -> DataPair, got {cls!r}")
        DATASETS.register(name)(cls)
        cls.name = name
        return cls

    return decorate


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a data set is: shown by ``bbfast list`` and ``bbfast info``.

    Args:
        title: Full name.
        year: Of publication.
        paper: Reference.
        summary: One sentence.
        layout: What ``root`` must hold.
        num_classes: As published; None if it depends on the files, here and below.
        image_size: ``(C, H, W)``.
        train: Training images.
        test: Test images.
    """

    title: str
    summary: str
    layout: str
    year: int | None = None
    paper: str = ""
    num_classes: int | None = None
    image_size: tuple[int, int, int] | None = None
    train: int | None = None
    test: int | None = None


Side = Annotated[int, Field(ge=1)]
"""A number of pixels."""


class DatasetOptions(MethodConfig):
    """Options of every built-in data set. None of those declared here changes what is decoded."""

    normalize: Literal["auto", "none", "cifar10", "cifar100", "gtsrb", "tiny_imagenet"] | None = Field(
        None,
        description="mean and std that models expect: a data set's, none (0 and 1), or auto: of the training images",
    )
    mean: tuple[float, ...] | None = Field(None, description="mean of every channel, 0..1; overrides normalize")
    std: tuple[float, ...] | None = Field(None, description="standard deviation of every channel; overrides normalize")
    flip: bool | None = Field(None, description="flip images horizontally in training; default: only cifar10")
    padding: int = Field(4, ge=0, description="zero padding of the random training crop, in pixels")
    classes: int | None = Field(None, ge=2, description="keep only the images of the first so many classes")
    cache: bool | Path | None = Field(
        None, description="folder for the decoded copy, false for none; default: BBFAST_CACHE"
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> DatasetOptions:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise ValueError(f"std must hold positive numbers, got {self.std}")
        return self

    def decoding(self) -> dict[str, Any]:
        """The options that change pixels, labels or their order."""
        return self.model_dump(mode="json", exclude={*DatasetOptions.model_fields, "download", "dataset_name"})


class DownloadOptions(DatasetOptions):
    """Options of a data set that can be fetched."""

    download: bool = Field(False, description="fetch the files if they are not there")


class FileOptions(DatasetOptions):
    """Options of a data set of the user's own."""

    dataset_name: str | None = Field(
        None, min_length=1, description="what to call it; recipes go by it; default: name of the file or folder"
    )


class Dataset(abc.ABC):
    """A data set that is read from files.

    Subclasses say which files (:meth:`sources`) and what is in them (:meth:`decode`); this class validates options,
    uses the cache and makes the pair.
    """

    name: ClassVar[str] = ""
    info: ClassVar[DatasetInfo]
    Options: ClassVar[type[DatasetOptions]] = DatasetOptions
    normalize: ClassVar[str] = "auto"
    flip: ClassVar[bool] = False

    @abc.abstractmethod
    def sources(self, root: Path, options: Any) -> list[Path]:
        """Every file that :meth:`decode` reads.

        Raises:
            DatasetError: naming what is missing and how to get it.
        """

    @abc.abstractmethod
    def decode(self, root: Path, options: Any) -> Decoded:
        """Read the files.

        Raises:
            DatasetError: naming the file that is damaged and how to get it again.
        """

    def fetch(self, root: Path) -> None:
        """Download into ``root`` what is not there; only called for data sets with :class:`DownloadOptions`."""
        raise DatasetError(f"data set {self.name!r} cannot be downloaded; {self.info.layout}")

    def load(self, root: str | Path | None = None, **options: Any) -> DataPair:
        """Read, or take from the cache, the data set below ``root``. See :func:`bbfast.datasets.load`."""
        settings = build_config(self.Options, f"data set {self.name!r}", options)
        if root is None:
            raise DatasetError(f"data set {self.name!r} needs root=, {self.info.layout}; {self.remedy(None)}")
        folder = Path(root).expanduser()
        if getattr(settings, "download", False):
            self.fetch(folder)
        decoded = cached(
            self.name,
            folder,
            settings.decoding(),
            self.sources(folder, settings),
            lambda: self.decode(folder, settings),
            cache_root(settings.cache),
        )
        name = self.name
        if isinstance(settings, FileOptions):
            place = folder.absolute()
            name = settings.dataset_name or (place.stem if place.is_file() else place.name) or name
        return self.pair(decoded, settings, name)

    def pair(self, decoded: Decoded, settings: DatasetOptions, name: str) -> DataPair:
        """The pair with normalisation, flip and padding as chosen."""
        for part, expected in (("train", self.info.train), ("test", self.info.test)):
            found = len(getattr(decoded, f"{part}_labels"))
            if expected is not None and found != expected:
                _log.warning("%s has %d %s images, %d were published", self.name, found, part, expected)
        if settings.classes is not None:
            decoded = self._first_classes(decoded, settings.classes)
        channels = decoded.train_images.shape[1]
        if settings.mean is not None and settings.std is not None:
            mean, std = settings.mean, settings.std
        else:
            mean, std = _preset(settings.normalize or self.normalize, decoded, channels)
        if len(mean) != channels or len(std) != channels:
            raise ConfigError(
                f"data set {self.name!r}: mean and std must have one value for each of {channels} channels, "
                f"got {mean} and {std}"
            )
        return DataPair(
            train=ImageSet(decoded.train_images, decoded.train_labels),
            test=ImageSet(decoded.test_images, decoded.test_labels),
            name=name,
            num_classes=len(decoded.class_names),
            class_names=decoded.class_names,
            mean=mean,
            std=std,
            flip=self.flip if settings.flip is None else settings.flip,
            padding=settings.padding,
            fingerprint=decoded.fingerprint,
        )

    def _first_classes(self, decoded: Decoded, count: int) -> Decoded:
        if count > len(decoded.class_names):
            raise ConfigError(
                f"data set {self.name!r}: classes must be at most the {len(decoded.class_names)} there are, got {count}"
            )
        train, test = decoded.train_labels < count, decoded.test_labels < count
        return Decoded(
            decoded.train_images[train],
            decoded.train_labels[train],
            decoded.test_images[test],
            decoded.test_labels[test],
            decoded.class_names[:count],
        )

    def remedy(self, root: Path | None) -> str:
        """The command that gets the files, for the end of a message."""
        place = "DIR" if root is None else str(root)
        if not issubclass(self.Options, DownloadOptions):
            call = f"bbfast.datasets.load({self.name!r}, root={place!r})"
            return f"give the place as {call} or --dataset {self.name} --root {shlex.quote(place)}"
        return (
            f"fetch it with bbfast.datasets.load({self.name!r}, root={place!r}, download=True) "
            f"or bbfast attack badnets --dataset {self.name} --root {shlex.quote(place)} --download"
        )

    def missing(self, path: Path, root: Path) -> DatasetError:
        """The error for a file or folder that is not there."""
        return DatasetError(f"data set {self.name!r}: {path} is missing; {self.info.layout}; {self.remedy(root)}")

    def damaged(self, path: Path, reason: str, root: Path) -> DatasetError:
        """The error for a file that is there but cannot be used."""
        return DatasetError(f"data set {self.name!r}: {path} is damaged: {reason}; {self.remedy(root)}")


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file: where it is fetched from and its MD5 checksum."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def fetch_archive(dataset: str, archives: Sequence[Archive], folder: Path) -> None:
    """Download and unpack archives with torchvision's downloader; one that is there and intact is only unpacked.

    Raises:
        DatasetError: if an archive cannot be fetched, is not the published one, or cannot be unpacked.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    for archive in archives:
        try:
            download_and_extract_archive(archive.url, str(folder), filename=archive.name, md5=archive.md5)
        except (OSError, RuntimeError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise DatasetError(
                f"data set {dataset!r}: fetching {archive.url} failed ({type(error).__name__}: {error}); check the "
                f"network and the space on the disk, or put the file (MD5 {archive.md5}) at {folder / archive.name} "
                "and try again"
            ) from error


def _preset(choice: str, decoded: Decoded, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if choice == "none":
        return (0.0,) * channels, (1.0,) * channels
    if choice == "auto":
        return channel_mean_std(decoded.train_images)
    return NORMALIZATION[choice]
