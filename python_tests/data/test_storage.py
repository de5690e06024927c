from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bbfast import BackdoorSet, ImageSet, artifact
from bbfast.errors import ArtifactError, CorruptArtifactError


def image_set(n: int = 5) -> ImageSet:
    return ImageSet(
        torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2),
        torch.arange(n) % 2,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        ids=torch.arange(n) * 10,
    )


@pytest.mark.parametrize("n", [0, 5])
def test_image_set_round_trip(tmp_path: Path, n: int) -> None:
    saved = image_set(n)
    assert saved.save(tmp_path / "set") == tmp_path / "set"
    loaded = ImageSet.load(tmp_path / "set")
    assert type(loaded) is ImageSet
    assert (loaded.mean, loaded.std) == (saved.mean, saved.std)
    for name in ("images", "labels", "ids"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name)), name


def test_backdoor_set_keeps_its_class_and_true_labels(tmp_path: Path) -> None:
    plain = image_set()
    saved = BackdoorSet(plain.images, torch.zeros(5, dtype=torch.int64), original_labels=plain.labels)
    saved.save(tmp_path / "set")
    loaded = ImageSet.load(tmp_path / "set")
    assert isinstance(loaded, BackdoorSet)
    assert torch.equal(loaded.original_labels, plain.labels) and loaded.labels.max() == 0


def test_views_are_saved_without_the_rest_of_their_memory(tmp_path: Path) -> None:
    image_set(200)[10:12].save(tmp_path / "set")
    loaded = ImageSet.load(tmp_path / "set")
    assert loaded.ids.tolist() == [100, 110]
    assert next((tmp_path / "set").glob("*.safetensors")).stat().st_size < 1000


def test_a_result_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    image_set().save(tmp_path / "set")
    with pytest.raises(ArtifactError, match="is there already"):
        image_set(2).save(tmp_path / "set")
    assert len(ImageSet.load(tmp_path / "set")) == 5


def test_damage_and_other_kinds_are_errors(tmp_path: Path) -> None:
    image_set().save(tmp_path / "set")
    tensors = tmp_path / "set" / "data.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-3])
    with pytest.raises(CorruptArtifactError, match=r"data.safetensors"):
        ImageSet.load(tmp_path / "set")
    artifact.write(tmp_path / "other", "attack", config={})
    with pytest.raises(ArtifactError, match="kind 'attack', expected 'imageset'"):
        ImageSet.load(tmp_path / "other")
    artifact.write(tmp_path / "odd", "imageset", config={"class": "Mystery", "mean": [], "std": []})
    with pytest.raises(CorruptArtifactError, match="unknown class 'Mystery'"):
        ImageSet.load(tmp_path / "odd")
