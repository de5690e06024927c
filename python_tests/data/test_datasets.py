from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bbfast import DataPair, ImageSet, datasets
from bbfast.data.datasets._base import DATASETS
from bbfast.errors import ConfigError, DatasetError, UnknownNameError

BUILT_IN = ["cifar10", "cifar100", "digits", "gtsrb", "image_folder", "npz", "tiny_imagenet"]


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names that a test registers, taken out again after it."""
    names: list[str] = []
    yield names
    for name in names:
        DATASETS._entries.pop(name, None)


def tiny_pair() -> DataPair:
    images = ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    return DataPair(images, images, name="mine")


def test_built_in_names_and_cards() -> None:
    assert set(BUILT_IN) <= set(datasets.available())
    for name in BUILT_IN:
        card = datasets.info(name)
        assert card["name"] == name and card["title"] and card["summary"] and card["layout"]
        assert card["options"]["padding"] == 4 and all(card["option_help"].values())
    assert datasets.info("tiny")["name"] == "tiny_imagenet"


@pytest.mark.parametrize(
    ("name", "mean", "flip", "classes", "size"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), True, 10, 32),
        ("cifar100", (0.5071, 0.4865, 0.4409), False, 100, 32),
        ("gtsrb", (0.0, 0.0, 0.0), False, 43, 32),
        ("tiny_imagenet", (0.4802, 0.4481, 0.3975), False, 200, 64),
    ],
)
def test_protocol_of_the_paper(name: str, mean: tuple[float, ...], flip: bool, classes: int, size: int) -> None:
    entry = DATASETS.get(name)
    from bbfast.data.normalize import NORMALIZATION

    assert NORMALIZATION[entry.normalize][0] == mean and entry.flip is flip
    assert entry.info.num_classes == classes and entry.info.image_size == (3, size, size)


class TestDigits:
    def test_split_and_pixels(self) -> None:
        from sklearn.datasets import load_digits

        pair = datasets.load("digits")
        raw = load_digits()
        assert (len(pair.train), len(pair.test)) == (1442, 355)
        assert pair.image_size == (3, 32, 32) and pair.num_classes == 10 and pair.class_names == tuple("0123456789")
        assert pair.train.images.max() == 255 and pair.train.images.min() == 0
        assert torch.equal(pair.train.images[:, 0], pair.train.images[:, 2])
        # The first four images of class 3 train, the fifth tests.
        of_class = [index for index, label in enumerate(raw.target) if label == 3]
        trained = pair.train.images[pair.train.labels == 3]
        for k, index in enumerate(of_class[:4]):
            assert _correlation(trained[k, 0], raw.images[index]) > 0.9
        assert _correlation(pair.test.images[pair.test.labels == 3][0, 0], raw.images[of_class[4]]) > 0.9

    def test_stratified(self) -> None:
        pair = datasets.load("digits")
        train, test = (torch.bincount(part.labels, minlength=10) for part in (pair.train, pair.test))
        assert torch.equal(test, (train + test) // 5)

    def test_same_everywhere(self) -> None:
        pair = datasets.load("digits")
        assert pair.fingerprint == "eb14cf0336936939433e381552e3785f0657e7f09580c2a4f21c16d1b4ca6961"
        assert (pair.mean, pair.std) == ((0.3054,) * 3, (0.3237,) * 3)
        assert not pair.flip and pair.padding == 4

    def test_no_files_are_written(self, cache: Path) -> None:
        datasets.load("digits", None)
        datasets.load("digits", "/nowhere")
        assert not cache.exists()


def _correlation(large: torch.Tensor, small: Any) -> float:
    pooled = torch.nn.functional.avg_pool2d(large[None].double(), 4).flatten()
    return float(torch.corrcoef(torch.stack([pooled, torch.from_numpy(small).flatten()]))[0, 1])


class TestOptions:
    def test_normalisation(self) -> None:
        assert datasets.load("digits", normalize="none").std == (1.0,) * 3
        assert datasets.load("digits", normalize="cifar100").mean == (0.5071, 0.4865, 0.4409)
        given = datasets.load("digits", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), flip=True, padding=0)
        assert given.train.mean == (0.1, 0.2, 0.3) and given.test.std == (0.4, 0.5, 0.6)
        assert given.flip and given.padding == 0

    def test_the_first_classes_alone(self) -> None:
        whole, part = datasets.load("digits"), datasets.load("digits", classes=3)
        assert part.num_classes == 3 and part.class_names == ("0", "1", "2") and part.name == "digits"
        for of_part, of_whole in ((part.train, whole.train), (part.test, whole.test)):
            kept = of_whole.labels < 3
            assert torch.equal(of_part.images, of_whole.images[kept])
            assert torch.equal(of_part.labels, of_whole.labels[kept])
        assert part.fingerprint != whole.fingerprint == datasets.load("digits", classes=10).fingerprint
        assert part.mean != whole.mean

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"classes": 11}, "classes must be at most the 10 there are, got 11"),
            ({"classes": 1}, "classes"),
            ({"normalise": "none"}, r"data set 'digits': unknown setting 'normalise'; did you mean normalize"),
            ({"normalize": "imagenet"}, "normalize"),
            ({"mean": (0.5,) * 3}, "mean and std must be given together"),
            ({"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "std must hold positive numbers"),
            ({"mean": (0.5,), "std": (1.0,)}, "one value for each of 3 channels"),
            ({"padding": -1}, "padding"),
            ({"download": True}, "unknown setting 'download'"),
        ],
    )
    def test_bad_options_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            datasets.load("digits", **options)


class TestErrors:
    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown data set 'cifar'; did you mean 'cifar10'"):
            datasets.load("cifar")
        with pytest.raises(UnknownNameError, match="unknown data set"):
            datasets.info("cifar")

    @pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "digits"])
    def test_no_root_and_an_empty_root(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=rf"data set '{name}' needs root=.*bbfast.datasets.load\('{name}'"):
            datasets.load(name)
        with pytest.raises(
            DatasetError, match=rf"data set '{name}': {tmp_path}/absent.* is missing.*--dataset {name} "
        ):
            datasets.load(name, tmp_path / "absent")

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny_imagenet"])
    def test_the_command_that_fetches(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DatasetError) as caught:
            datasets.load(name, tmp_path)
        assert f"bbfast.datasets.load({name!r}, root={str(tmp_path)!r}, download=True)" in str(caught.value)
        assert f"bbfast attack badnets --dataset {name} --root {tmp_path} --download" in str(caught.value)

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny_imagenet"])
    def test_a_download_without_network(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import urllib.error
        import urllib.request

        def offline(*args: Any, **kwargs: Any) -> None:
            raise urllib.error.URLError("no network")

        monkeypatch.setattr(urllib.request, "urlopen", offline)
        with pytest.raises(
            DatasetError, match=r"fetching http.* failed \(URLError.*no network.*or put the file \(MD5 "
        ):
            datasets.load(name, tmp_path, download=True)


class TestThirdParty:
    def test_a_class_with_load_is_enough(self, registered: list[str]) -> None:
        registered.append("mine")

        @datasets.register("mine")
        class Mine:
            info = {"title": "Mine"}  # noqa: RUF012 - what a user would write

            def load(self, root: object, shift: int = 0) -> DataPair:
                return tiny_pair()

        assert "mine" in datasets.available() and datasets.info("mine") == {"name": "mine", "title": "Mine"}
        assert datasets.load("mine", shift=1).name == "mine"

    def test_taken_names_and_wrong_classes(self, registered: list[str]) -> None:
        registered.append("bad")
        with pytest.raises(ValueError, match="data set name 'digits' is taken"):
            datasets.register("digits")(type("Other", (), {"load": lambda self, root: None}))
        with pytest.raises(TypeError, match="must have a method load"):
            datasets.register("bad")(type("Other", (), {}))
        datasets.register("bad")(type("Other", (), {"load": lambda self, root: 3}))
        with pytest.raises(TypeError, match="data set 'bad' must load a DataPair, got int"):
            datasets.load("bad")

    def test_entry_points(self, tmp_path: Path) -> None:
        (tmp_path / "plugin.py").write_text(
            "import torch\n"
            "from bbfast import DataPair, ImageSet, datasets\n"
            "@datasets.register('plugged')\n"
            "class Plugged:\n"
            "    def load(self, root):\n"
            "        images = ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4))\n"
            "        return DataPair(images, images)\n"
        )
        meta = tmp_path / "plugin-1.0.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
        (meta / "entry_points.txt").write_text("[bbfast.datasets]\nplugged = plugin\n")
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "from bbfast import datasets\n"
            "assert 'plugged' in datasets.available()\n"
            "assert datasets.load('plugged').num_classes == 4\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_importing_the_names_is_cheap() -> None:
    code = (
        "import sys\nfrom bbfast import datasets, models\n"
        "slow = {'torchvision', 'sklearn', 'scipy'} & set(sys.modules)\nassert not slow, slow\n"
        "datasets.available(); models.available()\n"
        "slow = {'torchvision', 'sklearn', 'scipy'} & set(sys.modules)\nassert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
