"""BadNets: golden images, the square at every size, own triggers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bbfast import attacks
from bbfast.attacks.badnets import BadNets
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
@pytest.mark.parametrize("trigger", ["white_square", "grid", "colour"])
@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_golden_images(golden: Golden, tmp_path: Path, prefix: str, trigger: str, compat: str) -> None:
    stored = golden("badnet")
    images, expected = chw(stored[f"{prefix}images"]), chw(stored[f"{prefix}out_{trigger}"])
    from_tensor = BadNets.with_trigger(chw(stored[f"trigger_{trigger}"]), compat=compat)
    assert torch.equal(from_tensor.trigger(images), expected)
    Image.fromarray(stored[f"trigger_{trigger}"]).save(tmp_path / "trigger.png")
    from_file = attacks.create("badnets", pattern_path=tmp_path / "trigger.png", compat=compat)
    assert torch.equal(from_file.trigger(images), expected)
    if trigger != "colour":
        built_in = attacks.create("badnets", pattern="grid" if trigger == "grid" else "square", compat=compat)
        assert torch.equal(built_in.trigger(images), expected)


@pytest.mark.parametrize(("size", "side"), [(16, 2), (28, 3), (32, 3), (64, 6), (224, 21)])
def test_square_scales_with_the_image(size: int, side: int) -> None:
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    out = attacks.create("badnets").trigger(black)
    assert out[..., -side:, -side:].eq(255).all()
    assert int(out.bool().sum()) == 3 * side * side


def test_reference_enlarges_the_small_picture() -> None:
    black = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    out = attacks.create("badnets", compat="reference").trigger(black)
    small = np.zeros((32, 32, 3), dtype=np.uint8)
    small[29:, 29:] = 255
    large = np.array(Image.fromarray(small).resize((64, 64), Image.Resampling.BILINEAR))
    assert torch.equal(out[0], torch.where(chw(large) > 0, chw(large), black[0]))
    assert int(((out != 100) & (out != 255)).sum()) > 0  # the soft edge


def test_place_and_size() -> None:
    black = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    attack = attacks.create("badnets", square_size=4, distance_to_right=5, distance_to_bottom=2)
    rows, columns = attack.trigger(black)[0, 0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (26, 29, 23, 26)
    with pytest.raises(ValueError, match=r"a square of 40 pixels.*does not fit into 32 x 32"):
        attacks.create("badnets", square_size=40).trigger(black)


def test_grid_has_no_transparent_cell() -> None:
    out = attacks.create("badnets", pattern="grid").trigger(torch.full((1, 1, 32, 32), 7, dtype=torch.uint8))
    assert out[0, 0, 29:, 29:].tolist() == [[255, 1, 255], [1, 255, 1], [255, 1, 255]]


def test_a_mask_makes_black_possible(tmp_path: Path) -> None:
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    dot = black.clone()
    dot[0, 0, 0] = 255
    assert int((BadNets.with_trigger(dot).trigger(images) != images).sum()) == 2, "without one, black is transparent"
    mask = torch.zeros(32, 32)
    mask[:4, :4] = 1
    out = BadNets.with_trigger(black, mask).trigger(images)
    assert out[..., :4, :4].eq(0).all() and int((out != 200).sum()) == 2 * 3 * 16
    Image.fromarray(black.permute(1, 2, 0).numpy()).save(tmp_path / "black.png")
    Image.fromarray((mask * 255).to(torch.uint8).numpy()).save(tmp_path / "mask.png")
    attack = attacks.create("badnets", pattern_path=tmp_path / "black.png", mask_path=tmp_path / "mask.png")
    assert torch.equal(attack.trigger(images), out)
    assert set(attack.files()) == {str(tmp_path / "black.png"), str(tmp_path / "mask.png")}


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("badnets").trigger(x).sum().backward()
    assert x.grad is not None
    assert x.grad[..., 29:, 29:].eq(0).all() and x.grad[..., :29, :].eq(1).all()


def test_bad_triggers(tmp_path: Path, make_set: MakeSet) -> None:
    data = make_set(20)
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        attacks.create("badnets", pattern_path=tmp_path / "none.png").poison(data)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        attacks.create("badnets", pattern_path=tmp_path / "text.png").poison(data)
    with pytest.raises(ConfigError, match="mask_path needs pattern_path"):
        attacks.create("badnets", mask_path=tmp_path / "mask.png")
    with pytest.raises(TypeError, match="pattern must be a uint8 tensor"):
        BadNets.with_trigger(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"mask must lie in 0\.\.1"):
        BadNets.with_trigger(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((32, 32), 2.0))
    with pytest.raises(ValueError, match=r"mask must be .* got \[16, 16\]"):
        BadNets.with_trigger(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"the pattern is \(3, 16, 16\), but the images are \(3, 32, 32\)"):
        BadNets.with_trigger(torch.ones(3, 16, 16, dtype=torch.uint8)).poison(data)


def test_a_mask_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="mask must be a tensor or None, got list"):
        BadNets.with_trigger(torch.full((3, 32, 32), 255, dtype=torch.uint8), [1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [None, torch.zeros(32, 32)])
def test_a_trigger_that_changes_nothing_is_an_error(mask: Tensor | None) -> None:
    black = BadNets.with_trigger(torch.zeros(3, 32, 32, dtype=torch.uint8), mask)
    with pytest.raises(ValueError, match="badnets: the trigger changes nothing, its mask is 0 everywhere"):
        black.trigger(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_trigger_of_tensors_outlives_saving(make_set: Callable[..., ImageSet]) -> None:
    """Another seed, and what the store finds a result by, must not fall back to the square of the settings."""
    pattern = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pattern[:, :5, :5] = 200
    given = BadNets.with_trigger(pattern)
    given.prepare(make_set(20), seed=0)
    loaded = BadNets(given.config)
    loaded.load_state(given.state())
    assert loaded.files() == given.files() != {}
    poisoned = loaded.poison(make_set(20), seed=1)
    assert bool((poisoned.images[poisoned.poisoned][:, :, :5, :5] == 200).all())

    square = BadNets()
    square.prepare(make_set(20), seed=0)
    loaded = BadNets()
    loaded.load_state(square.state())
    assert loaded.files() == {}
    loaded.poison(make_set(20, size=16), seed=1)
