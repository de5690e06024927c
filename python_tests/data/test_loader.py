from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbfast import ops
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader, derive_seed


def make_set(n: int, size: int = 6, channels: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return ImageSet(images, torch.arange(n) % 7, mean=mean, std=std)


def order(loader: BatchLoader, epoch: int) -> torch.Tensor:
    return torch.cat([batch.index for batch in loader.epoch(epoch)])


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    drop_last=st.booleans(),
    merge_single=st.booleans(),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_batches_cover_the_set_once(
    n: int, batch_size: int, drop_last: bool, merge_single: bool, shuffle: bool
) -> None:
    loader = BatchLoader(
        make_set(n), batch_size, drop_last=drop_last, merge_single=merge_single, shuffle=shuffle, augment=False
    )
    batches = list(loader.epoch(3))
    assert len(batches) == len(loader)
    sizes = [len(batch) for batch in batches]
    seen = torch.cat([batch.index for batch in batches])
    assert len(seen.unique()) == len(seen)
    full = n // batch_size
    if drop_last and full:
        assert sizes == [batch_size] * full
    else:
        assert len(seen) == n
    if merge_single and n > 1 and batch_size > 1:
        assert min(sizes) > 1
    if not shuffle:
        assert seen.tolist() == list(range(len(seen)))
    assert [batch.step for batch in batches] == list(range(len(batches)))


def test_a_batch_is_what_the_reference_op_makes_of_its_samples() -> None:
    images = make_set(9)
    for batch in BatchLoader(images, 4, augment=False, shuffle=True, seed=5).epoch(2):
        expected = ops.reference.gather_augment(images.images, batch.index, mean=images.mean, std=images.std)
        torch.testing.assert_close(batch.x, expected, rtol=0, atol=1e-6)
        assert torch.equal(batch.y, images.labels[batch.index])


def test_epochs_do_not_depend_on_what_was_drawn_before() -> None:
    images = make_set(20)
    settings_ = {"seed": 3, "padding": 2, "flip": True}
    used = BatchLoader(images, 6, **settings_)  # type: ignore[arg-type]
    for epoch in range(4):
        list(used.epoch(epoch))
    torch.manual_seed(123)
    fresh = BatchLoader(images, 6, **settings_)  # type: ignore[arg-type]
    for a, b in zip(used.epoch(4), fresh.epoch(4), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.index, b.index)
    assert not torch.equal(order(used, 4), order(used, 5))


def test_a_sample_is_augmented_the_same_whatever_the_batch_size() -> None:
    images = make_set(30)
    rows = []
    for batch_size in (1, 7, 30):
        loader = BatchLoader(images, batch_size, seed=1, padding=3, flip=True)
        batches = list(loader.epoch(2))
        x, index = torch.cat([b.x for b in batches]), torch.cat([b.index for b in batches])
        rows.append(x[index.argsort()])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_global_generators_are_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(BatchLoader(make_set(10), 4, flip=True).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_other_seed_other_order() -> None:
    images = make_set(32)
    assert not torch.equal(order(BatchLoader(images, 8, seed=0), 0), order(BatchLoader(images, 8, seed=1), 0))


def test_crop_and_flip_have_the_right_law() -> None:
    # One white pixel in the middle of each image tells where the crop was; a left-right gradient tells the flip.
    n, size, padding = 4000, 9, 2
    picture = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    picture[:, 0, 4, 3] = 255
    loader = BatchLoader(ImageSet(picture, torch.zeros(n, dtype=torch.int64)), n, padding=padding, flip=True)
    (batch,) = loader.epoch(0)
    found = batch.x[:, 0].nonzero()
    assert len(found) == n
    rows, columns = found[:, 1], found[:, 2]
    # Moved by -2..2 rows, each equally often: 800 +- 5 standard deviations of 25.
    counts = torch.bincount(rows, minlength=size)
    assert counts[2:7].min() > 670 and counts[2:7].max() < 930 and counts.sum() == counts[2:7].sum()
    # Unflipped the pixel lies in columns 1..5, flipped in 3..7: 1, 2 are never flipped and 6, 7 always.
    columns_seen = torch.bincount(columns, minlength=size)
    assert columns_seen[0] == columns_seen[8] == 0
    for column, expected in {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 5: 0.2, 6: 0.1, 7: 0.1}.items():
        assert abs(int(columns_seen[column]) / n - expected) < 0.035, column
    # Rows and columns are drawn independently.
    corner = ((rows == 2) & (columns == 1)).float().mean()
    assert abs(float(corner) - 0.2 * 0.1) < 0.012


def test_no_augmentation_without_augment() -> None:
    images = make_set(6)
    loader = BatchLoader(images, 6, augment=False, padding=4, flip=True, shuffle=False)
    (batch,) = loader.epoch(0)
    expected = ops.reference.gather_augment(images.images, torch.arange(6), mean=images.mean, std=images.std)
    torch.testing.assert_close(batch.x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_type_and_layout(dtype: torch.dtype, channels_last: bool) -> None:
    batch = next(BatchLoader(make_set(8), 8, dtype=dtype, channels_last=channels_last).epoch(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.x.dtype == dtype and batch.x.is_contiguous(memory_format=layout)
    assert batch.y.dtype == batch.index.dtype == torch.int64


def test_one_image() -> None:
    (batch,) = BatchLoader(make_set(1), 128, drop_last=True, merge_single=True).epoch(0)
    assert len(batch) == 1


def test_empty_set_has_no_batches() -> None:
    empty = make_set(3)[:0]
    loader = BatchLoader(empty, 4)
    assert len(loader) == 0 and list(loader.epoch(0)) == []


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("padding", -1)])
def test_bad_arguments(argument: str, value: int) -> None:
    arguments: dict[str, int] = {"batch_size": 4, argument: value}
    with pytest.raises(ValueError, match=f"{argument} must be at least .*got {value}"):
        BatchLoader(make_set(4), **arguments)  # type: ignore[arg-type]


def test_derive_seed_depends_on_every_part_and_on_nothing_else() -> None:
    # The value is part of the protocol: another one would change every result.
    assert derive_seed("loader", 0, "order", 0) == 5624501829865029468
    parts = [("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), ("a", "1", 3)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= derive_seed(*part) < 2**63 for part in parts)


def test_replace_changes_only_what_is_named() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), torch.tensor([5, 6]), epoch=3, step=4)
    changed = batch.replace(y=torch.tensor([0, 0]))
    assert changed.y.tolist() == [0, 0] and changed.x is batch.x and changed.epoch == 3 and changed.step == 4
    assert len(batch) == 2
