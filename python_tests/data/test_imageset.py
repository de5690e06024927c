"""ImageSet and BackdoorSet: what is checked, what subsets keep, save and load."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbfast import BackdoorSet, ImageSet
from bbfast.errors import ArtifactError, CorruptArtifactError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def images(n: int = 6, channels: int = 3, size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def sample(n: int = 6) -> ImageSet:
    return ImageSet(images(n), torch.arange(n) % 3, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), ids=10 * torch.arange(n))


def backdoor(n: int = 6) -> BackdoorSet:
    return BackdoorSet(images(n), torch.zeros(n, dtype=torch.int64), original_labels=1 + torch.arange(n) % 3)


def same(a: ImageSet, b: ImageSet) -> bool:
    fields = [f.name for f in dataclasses.fields(a)]
    return type(a) is type(b) and all(
        torch.equal(getattr(a, f), getattr(b, f))
        if isinstance(getattr(a, f), torch.Tensor)
        else getattr(a, f) == getattr(b, f)
        for f in fields
    )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


class TestConstruction:
    def test_defaults(self) -> None:
        made = ImageSet(images(), torch.zeros(6, dtype=torch.int64))
        assert len(made) == 6 and made.image_size == (3, 4, 4) and made.device == torch.device("cpu")
        assert made.mean == (0.0,) * 3 and made.std == (1.0,) * 3 and made.ids.tolist() == list(range(6))

    def test_values_are_plain_floats(self) -> None:
        made = ImageSet(images(), torch.zeros(6, dtype=torch.int64), mean=np.float32([0, 0.5, 1]), std=torch.ones(3))
        assert made.mean == (0.0, 0.5, 1.0) and made.std == (1.0,) * 3
        assert all(type(value) is float for value in (*made.mean, *made.std))

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_empty_and_other_channels(self, channels: int) -> None:
        made = ImageSet(images(0, channels), torch.zeros(0, dtype=torch.int64))
        assert len(made) == 0 and made.image_size == (channels, 4, 4) and len(made.mean) == channels

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            sample().labels = torch.zeros(6, dtype=torch.int64)  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"images": images().float()},
                TypeError,
                r"images must be a uint8 tensor \[N, C, H, W\], got float32 tensor",
            ),
            ({"images": images().numpy()}, TypeError, "images must be a uint8 tensor.*got ndarray"),
            ({"images": images()[0]}, ValueError, r"images must have four dimensions.*got shape \[3, 4, 4\]"),
            ({"labels": torch.zeros(6)}, TypeError, r"labels must be an int64 tensor \[N\], got float32 tensor"),
            ({"labels": torch.zeros(6, dtype=torch.int32)}, TypeError, "labels must be an int64 tensor.*got int32"),
            ({"labels": [0] * 6}, TypeError, "labels must be an int64 tensor.*got list"),
            (
                {"labels": torch.zeros(5, dtype=torch.int64)},
                ValueError,
                r"labels must have one entry for each of 6 images",
            ),
            ({"labels": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, r"labels .*got shape \[6, 1\]"),
            ({"labels": torch.arange(6) - 2}, ValueError, "labels must be class numbers >= 0, got -2"),
            (
                {"labels": torch.zeros(6, dtype=torch.int64, device="meta")},
                ValueError,
                "labels must be on the device.*cpu",
            ),
            ({"ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "ids must have one entry for each of 6"),
            ({"ids": torch.zeros(6)}, TypeError, "ids must be an int64 tensor"),
            ({"mean": (0.5,)}, ValueError, r"mean and std must have one value for each of 3 channels, got \(0\.5,\)"),
            ({"std": (1.0,) * 4}, ValueError, "mean and std must have one value for each of 3 channels"),
            ({"std": (1.0, 0.0, 1.0)}, ValueError, "std finite and positive"),
            ({"std": (1.0, -1.0, 1.0)}, ValueError, "std finite and positive"),
            ({"std": (1.0, math.nan, 1.0)}, ValueError, "std finite and positive"),
            ({"mean": (math.inf, 0.0, 1.0)}, ValueError, "mean must be finite"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        good = {"images": images(), "labels": torch.zeros(6, dtype=torch.int64)}
        with pytest.raises(error, match=message):
            ImageSet(**{**good, **change})

    @pytest.mark.parametrize(
        ("original", "error", "message"),
        [
            (None, TypeError, "original_labels must be an int64 tensor.*got NoneType"),
            (torch.zeros(5, dtype=torch.int64), ValueError, "original_labels must have one entry for each of 6"),
            (torch.zeros(6), TypeError, "original_labels must be an int64 tensor"),
            (torch.arange(6) - 1, ValueError, "original_labels must be class numbers >= 0, got -1"),
        ],
    )
    def test_bad_original_labels(self, original: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            BackdoorSet(images(), torch.zeros(6, dtype=torch.int64), original_labels=original)

    @pytest.mark.parametrize(
        ("exact", "error", "message"),
        [
            (images(), TypeError, "exact must be a float32 tensor .* or None, got uint8 tensor"),
            (images(5).float(), ValueError, r"exact must have the shape and device of the images, \[6, .* got \[5, "),
        ],
    )
    def test_bad_exact_pixels(self, exact: torch.Tensor, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            dataclasses.replace(backdoor(), exact=exact)


class TestSelection:
    @given(index=st.lists(st.integers(0, 5), max_size=10))
    def test_index(self, index: list[int]) -> None:
        whole, part = sample(), sample()[torch.tensor(index, dtype=torch.int64)]
        assert part.ids.tolist() == [10 * i for i in index] and part.labels.tolist() == [i % 3 for i in index]
        assert torch.equal(part.images, whole.images[index]) and (part.mean, part.std) == (whole.mean, whole.std)

    @given(mask=st.lists(st.booleans(), min_size=6, max_size=6))
    def test_mask_equals_index(self, mask: list[bool]) -> None:
        chosen = torch.tensor(mask)
        assert same(sample()[chosen], sample().subset(chosen.nonzero().flatten()))

    @given(start=st.integers(-8, 8), stop=st.integers(-8, 8), step=st.integers(1, 3))
    def test_slice_equals_index(self, start: int, stop: int, step: int) -> None:
        key = slice(start, stop, step)
        assert same(sample()[key], sample()[torch.arange(6)[key]])

    def test_slices_share_memory_and_indices_copy(self) -> None:
        whole = sample()
        assert whole[2:4].images.data_ptr() == whole.images[2].data_ptr()
        copied = whole[torch.tensor([2, 3])]
        copied.images.zero_()
        assert whole.images[2:4].any()

    def test_backdoor_sets_keep_their_original_labels(self) -> None:
        part = backdoor()[torch.tensor([3, 0])]
        assert isinstance(part, BackdoorSet) and part.original_labels.tolist() == [1, 1]
        assert backdoor()[1:3].original_labels.tolist() == [2, 3]  # type: ignore[attr-defined]

    def test_exact_pixels_stay_with_their_samples(self, tmp_path: Path) -> None:
        whole = dataclasses.replace(backdoor(), exact=backdoor().images / 255)
        saved = ImageSet.load(whole.save(tmp_path / "set"))
        for part in (whole[torch.tensor([3, 0])], saved[torch.tensor([3, 0])], whole.with_labels(whole.labels)[::3]):
            assert isinstance(part, BackdoorSet) and part.exact is not None
            assert torch.equal(part.exact, part.images / 255)

    def test_subsets_of_subsets_keep_the_first_numbers(self) -> None:
        assert sample()[2:][torch.tensor([3, 0])].ids.tolist() == [50, 20]

    @pytest.mark.parametrize(
        ("index", "error", "message"),
        [
            (3, TypeError, "index must be a slice, an int64 tensor or a bool mask, got int 3"),
            ([0, 1], TypeError, "index must be a slice.*got list"),
            (np.array([0]), TypeError, "index must be a slice.*got ndarray"),
            (torch.tensor([0.0]), TypeError, "index must be a slice.*got float32 tensor"),
            (torch.tensor([0, 6]), IndexError, r"index must lie in 0\.\.5, got 0\.\.6"),
            (torch.tensor([-1]), IndexError, r"index must lie in 0\.\.5, got -1\.\.-1"),
            (torch.tensor([[0]]), IndexError, r"index must have one dimension, got shape \[1, 1\]"),
            (torch.tensor(2), IndexError, "index must have one dimension"),
            (torch.ones(5, dtype=torch.bool), IndexError, "a mask for 6 samples must have as many entries, got 5"),
        ],
    )
    def test_bad_index(self, index: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            sample()[index]

    def test_nothing_to_choose_from(self) -> None:
        empty = sample(0)
        assert len(empty[torch.zeros(0, dtype=torch.int64)]) == 0 == len(empty[:3])
        with pytest.raises(IndexError, match="index must lie in"):
            empty[torch.tensor([0])]


class TestChanges:
    def test_with_labels(self) -> None:
        changed = backdoor().with_labels(torch.full((6,), 2))
        assert isinstance(changed, BackdoorSet) and changed.labels.tolist() == [2] * 6
        assert torch.equal(changed.original_labels, backdoor().original_labels)
        with pytest.raises(ValueError, match="labels must have one entry"):
            sample().with_labels(torch.zeros(3, dtype=torch.int64))

    def test_to_the_same_device_is_the_same_set(self) -> None:
        made = sample()
        assert made.to("cpu") is made

    def test_to(self, device: torch.device) -> None:
        moved = backdoor().to(device)
        assert isinstance(moved, BackdoorSet)
        tensors = (moved.images, moved.labels, moved.ids, moved.original_labels)
        assert all(tensor.device.type == device.type for tensor in tensors)
        assert same(moved.to("cpu"), backdoor())
        assert same(moved[torch.tensor([1, 2])].to("cpu"), backdoor()[1:3])

    def test_copies(self) -> None:
        assert same(copy.deepcopy(backdoor()), backdoor())


class TestStorage:
    @pytest.mark.parametrize("made", [sample(), backdoor(), sample(0), sample()[::2]])
    def test_round_trip(self, tmp_path: Path, made: ImageSet) -> None:
        folder = made.save(tmp_path / "set")
        assert same(ImageSet.load(folder), made) and same(BackdoorSet.load(str(folder)), made)

    def test_saved_once(self, tmp_path: Path) -> None:
        sample().save(tmp_path / "set")
        with pytest.raises(ArtifactError, match="there already"):
            sample().save(tmp_path / "set")

    def test_damage_is_found(self, tmp_path: Path) -> None:
        path = sample().save(tmp_path / "set") / "data.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptArtifactError, match=r"data\.safetensors is damaged"):
            ImageSet.load(tmp_path / "set")

    def test_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="no result at"):
            ImageSet.load(tmp_path / "nowhere")

    def test_cuda(self, tmp_path: Path, device: torch.device) -> None:
        assert same(ImageSet.load(sample().to(device).save(tmp_path / "set")), sample())
