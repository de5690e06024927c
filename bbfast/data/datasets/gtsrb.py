"""German Traffic Sign Recognition Benchmark in its published folders, which torchvision keeps below ``gtsrb``."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import torch
from pydantic import Field

from bbfast.data.cache import Decoded
from bbfast.data.datasets._base import Archive, Dataset, DatasetInfo, DownloadOptions, fetch_archive, register
from bbfast.data.decode import image_files, read_images

__all__ = ["GTSRB"]

_log = logging.getLogger(__name__)
_HOST = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_NUM_CLASSES = 43
_NAMES = tuple(
    """Speed limit 20, Speed limit 30, Speed limit 50, Speed limit 60, Speed limit 70, Speed limit 80, End of speed
    limit 80, Speed limit 100, Speed limit 120, No passing, No passing for vehicles over 3.5 t, Right of way at
    next intersection, Priority road, Yield, Stop, No vehicles, Vehicles over 3.5 t prohibited, No entry,
    General caution, Dangerous curve left, Dangerous curve right, Double curve, Bumpy road, Slippery road, Road
    narrows on the right, Road work, Traffic signals, Pedestrians, Children crossing, Bicycles crossing, Beware
    of ice or snow, Wild animals crossing, End of all speed and passing limits, Turn right ahead, Turn left
    ahead, Ahead only, Go straight or right, Go straight or left, Keep right, Keep left, Roundabout mandatory,
    End of no passing, End of no passing for vehicles over 3.5 t""".replace("\n    ", " ").split(", ")
)

Samples = list[tuple[Path, int]]


class GTSRBOptions(DownloadOptions):
    """Options of GTSRB."""

    size: int = Field(32, ge=8, description="side of the images in pixels")


@register("gtsrb")
class GTSRB(Dataset):
    """GTSRB: 39,209 training and 12,630 test images of 43 traffic signs.

    The whole rectangle of each file is used (the region of interest in the tables is not) and resized with Pillow's
    BILINEAR. Order: training by class folder, then row of the folder's csv file (by file name where there is none);
    test by row of its csv file (attacks.md 0.1). Below ``root``, or ``root/gtsrb``:

    - ``GTSRB/Final_Training/Images/<00000..00042>/`` (the full release, which ``download=True`` fetches) or
      ``GTSRB/Training/<00000..00042>/`` (torchvision's own download, a subset of 26,640 images);
    - ``GTSRB/Final_Test/Images/`` and ``GT-final_test.csv``.
    """

    info = DatasetInfo(
        title="German Traffic Sign Recognition Benchmark",
        year=2012,
        paper="J. Stallkamp, M. Schlipsing, J. Salmen, C. Igel, Man vs. computer, Neural Networks 32, 2012",
        summary="Photographs of 43 traffic signs, resized to 32x32.",
        layout="the folder that holds gtsrb/GTSRB and gtsrb/GT-final_test.csv as torchvision unpacks them",
        num_classes=_NUM_CLASSES,
        image_size=(3, 32, 32),
        train=39_209,
        test=12_630,
    )
    Options = GTSRBOptions
    normalize = "gtsrb"
    training_archive = Archive(_HOST + "GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3")
    test_archives = (
        Archive(_HOST + "GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
        Archive(_HOST + "GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
    )

    def fetch(self, root: Path) -> None:
        """Download the full release: torchvision's class fetches the smaller one, its downloader fetches either."""
        base = _base(root)
        if not (base / "GTSRB" / "Final_Training" / "Images").is_dir():
            fetch_archive(self.name, [self.training_archive], base)
        if not (base / "GT-final_test.csv").is_file() or not (base / "GTSRB" / "Final_Test" / "Images").is_dir():
            fetch_archive(self.name, self.test_archives, base)

    def sources(self, root: Path, options: GTSRBOptions) -> list[Path]:
        """Every image and every table."""
        train, tables = self._train(root)
        test, table = self._test(root)
        return [*tables, table, *(path for path, _ in (*train, *test))]

    def decode(self, root: Path, options: GTSRBOptions) -> Decoded:
        """Decode and resize every image."""
        size, remedy = (options.size, options.size), self.remedy(root)
        (train, _), (test, _) = self._train(root), self._test(root)
        return Decoded(
            read_images([path for path, _ in train], size, remedy),
            torch.tensor([label for _, label in train], dtype=torch.int64),
            read_images([path for path, _ in test], size, remedy),
            torch.tensor([label for _, label in test], dtype=torch.int64),
            _NAMES,
        )

    def _train(self, root: Path) -> tuple[Samples, list[Path]]:
        base = _base(root)
        folder = base / "GTSRB" / "Final_Training" / "Images"
        if not folder.is_dir() and (base / "GTSRB" / "Training").is_dir():
            folder = base / "GTSRB" / "Training"
        if not folder.is_dir():
            raise self.missing(folder, root)
        samples: Samples = []
        tables: list[Path] = []
        for label in range(_NUM_CLASSES):
            class_folder = folder / f"{label:05d}"
            if not class_folder.is_dir():
                raise self.missing(class_folder, root)
            table = class_folder / f"GT-{label:05d}.csv"
            if table.is_file():
                tables.append(table)
                rows = self._rows(table, class_folder, root)
                if any(found != label for _, found in rows):
                    raise self.damaged(table, f"it has rows of other classes than {label}", root)
                samples += rows
            else:
                samples += [(path, label) for path in image_files(class_folder)]
        if len(tables) < _NUM_CLASSES:
            _log.warning("%s has class folders without GT-*.csv; their images are taken by file name", folder)
        if not samples:
            raise self.damaged(folder, "it holds no images", root)
        return samples, tables

    def _test(self, root: Path) -> tuple[Samples, Path]:
        base = _base(root)
        folder = base / "GTSRB" / "Final_Test" / "Images"
        if not folder.is_dir():
            raise self.missing(folder, root)
        places = [base / "GT-final_test.csv", folder / "GT-final_test.csv"]
        table = next((place for place in places if place.is_file()), None)
        if table is None:
            raise self.missing(places[0], root)
        return self._rows(table, folder, root), table

    def _rows(self, table: Path, folder: Path, root: Path) -> Samples:
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
            samples = [(folder / row["Filename"], int(row["ClassId"])) for row in rows]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            reason = f"it is not a table with the columns Filename and ClassId ({type(error).__name__}: {error})"
            raise self.damaged(table, reason, root) from error
        if not samples:
            raise self.damaged(table, "it has no rows", root)
        for path, label in samples:
            if not 0 <= label < _NUM_CLASSES:
                raise self.damaged(table, f"ClassId must lie in 0..{_NUM_CLASSES - 1}, got {label}", root)
            if not path.is_file():
                raise self.missing(path, root)
        return samples


def _base(root: Path) -> Path:
    return root if (root / "GTSRB").is_dir() and not (root / "gtsrb").is_dir() else root / "gtsrb"
