"""Selection of samples and labels: golden index sets, label tables, and every way to ask for too much."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbfast import attacks
from bbfast.attacks.poisoning import IndexRng, LabelRule, Role, draw_index, poison_count
from bbfast.data.imageset import ImageSet

Golden = Callable[[str], dict[str, np.ndarray]]
LABELS = torch.arange(10)


def test_spec_vector() -> None:
    """spec/attacks section 30."""
    everything = torch.arange(50_000)
    small, large = draw_index(everything, 500, 0), draw_index(everything, 5000, 0)
    assert large[:8].tolist() == [11841, 19602, 45519, 25747, 42642, 31902, 30346, 12363]
    assert torch.equal(small, large[:500])
    assert int(large.sum()) == 126459119 and int(small.sum()) == 12671404


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("all2one_p0.1", {"ratio": 0.1}),
        ("all2one_p0.01", {"ratio": 0.01}),
        ("all2one_n50", {"count": 50, "ratio": 0.3}),
        ("all2all_p0.05", {"ratio": 0.05, "label_mode": "all2all"}),
        ("all2all_n30", {"count": 30, "label_mode": "all2all"}),
        ("clean_p0.01", {"ratio": 0.01, "label_mode": "clean_label"}),
        ("clean_n20", {"count": 20, "label_mode": "clean_label"}),
    ],
)
def test_golden_indices(golden: Golden, key: str, settings: dict[str, object], seed: int) -> None:
    stored = golden("poison_index")
    labels = torch.from_numpy(stored["labels"])
    attack = attacks.create("badnets", **settings)
    poison, cross = attack.select(labels, attack.rule(labels, 10), seed)
    assert np.array_equal(np.sort(poison.numpy()), stored[f"{key}_seed{seed}"])
    assert cross.numel() == 0


def test_golden_labels_and_test_sets(golden: Golden) -> None:
    stored = golden("poison_index")
    assert LabelRule("all2one", 10).wanted(LABELS).tolist() == stored["label_all2one"].tolist()
    for shift in (1, 3, 12):
        wanted = LabelRule("all2all", 10, shift=shift).wanted(LABELS)
        assert wanted.tolist() == stored[f"label_all2all_shift{shift}"].tolist()
    labels = torch.from_numpy(stored["test_labels"])
    for mode in ("all2one", "all2all"):
        keep = LabelRule(mode, 10).testable(labels).nonzero().flatten()
        assert np.array_equal(keep.numpy(), stored[f"test_{mode}"])


def test_label_table() -> None:
    """mode -> (wanted, given, may be poisoned, tested), for ten classes, target 3, source classes 1 and 5."""
    t = torch.tensor
    rules = {mode: LabelRule(mode, 10, 3, 2, (1, 5) if mode == "one2one" else ()) for mode in
             ("all2one", "all2all", "clean_label", "one2one")}  # fmt: skip
    assert rules["all2one"].wanted(LABELS).eq(3).all() and rules["all2one"].given(LABELS).eq(3).all()
    assert rules["all2one"].trainable(LABELS).all()
    assert rules["all2one"].testable(LABELS).tolist() == [c != 3 for c in range(10)]
    assert torch.equal(rules["all2all"].wanted(LABELS), (LABELS + 2) % 10)
    assert torch.equal(rules["all2all"].given(LABELS), (LABELS + 2) % 10)
    assert rules["all2all"].trainable(LABELS).all() and rules["all2all"].testable(LABELS).all()
    assert rules["clean_label"].wanted(LABELS).eq(3).all()
    assert torch.equal(rules["clean_label"].given(LABELS), LABELS)
    assert rules["clean_label"].trainable(LABELS).nonzero().tolist() == [[3]]
    assert rules["clean_label"].testable(LABELS).tolist() == [c != 3 for c in range(10)]
    assert rules["one2one"].given(LABELS).eq(3).all()
    assert torch.equal(rules["one2one"].trainable(LABELS).nonzero().flatten(), t([1, 5]))
    assert torch.equal(rules["one2one"].testable(LABELS).nonzero().flatten(), t([1, 5]))
    assert torch.equal(rules["one2one"].leaking(LABELS).nonzero().flatten(), t([0, 2, 4, 6, 7, 8, 9]))
    assert not rules["all2one"].leaking(LABELS).any()


@given(
    n=st.integers(1, 300),
    share=st.floats(0.001, 1),
    seed=st.integers(0, 2**32 - 1),
    rng=st.sampled_from(["numpy_legacy", "torch"]),
)
def test_drawn_indices_are_a_prefix_without_repeats(n: int, share: float, seed: int, rng: IndexRng) -> None:
    candidates = torch.arange(n) * 3
    count = round(share * n)
    drawn = draw_index(candidates, count, seed, rng)
    assert drawn.unique().numel() == count and set(drawn.tolist()) <= set(candidates.tolist())
    assert torch.equal(drawn, draw_index(candidates, n, seed, rng)[:count])


def test_numpy_legacy_is_choice() -> None:
    candidates = torch.arange(500) * 2
    expected = np.random.RandomState(7).choice(candidates.numpy(), 50, replace=False)
    assert draw_index(candidates, 50, 7).tolist() == expected.tolist()


def test_count_uses_bankers_rounding_of_the_whole_set() -> None:
    assert [poison_count(n, 0.5, None) for n in (3, 5, 7)] == [2, 2, 4]
    assert poison_count(100, 0.1, 7) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0.0, None), "ratio must be above 0"),
        ((100, 1.2, None), "at most 1, got 1.2"),
        ((100, -0.1, None), "above 0"),
        ((100, 0.001, None), "poisons none; use at least 0.01"),
        ((100, None, None), "one of ratio and count"),
        ((100, 0.1, 101), r"count must lie in 1\.\.100"),
        ((100, 0.1, 0), "count must lie in"),
        ((0, 0.1, None), "training set is empty"),
    ],
)
def test_impossible_counts(arguments: tuple[int, float | None, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison_count(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all2one", 10, 10), r"target must be a class in 0\.\.9, got 10"),
        (("all2one", 10, -1), "target"),
        (("all2all", 10, 0, 20), "shift must not be a multiple of the 10 classes"),
        (("one2one", 10, 0, 1, ()), "source_classes must name classes"),
        (("one2one", 10, 0, 1, (11,)), r"0\.\.9"),
        (("one2one", 10, 2, 1, (1, 2)), "must not hold the target 2"),
        (("all2two", 10), "label_mode must be one of"),
        (("all2one", 1), "num_classes"),
    ],
)
def test_impossible_rules(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelRule(*arguments)  # type: ignore[arg-type]


def test_labels_outside_the_classes() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got 5 at sample 5"):
        LabelRule("all2one", 5).check_labels(LABELS)


def test_clean_label_larger_than_the_class(make_set: Callable[..., ImageSet]) -> None:
    data = make_set(200, size=8)
    with pytest.raises(ValueError, match=r"asks for 60 of 200 samples, but class \[0\] has 20; use .* at most 0.1"):
        attacks.create("badnets", label_mode="clean_label", ratio=0.3).poison(data)
    with pytest.raises(ValueError, match=r"class \[1, 2\] has 40"):
        attacks.create("badnets", label_mode="one2one", source_classes=(1, 2), ratio=0.3).poison(data)
    clipped = attacks.create("badnets", label_mode="clean_label", ratio=0.3, clip_to_class=True).poison(data)
    assert int(clipped.poisoned.sum()) == 20 and clipped.ratio == 0.1
    with pytest.raises(ValueError, match=r"class \[9\] has 0"):
        attacks.create("badnets", label_mode="clean_label", target=9, clip_to_class=True).poison(
            data[:9], num_classes=10
        )


def test_seed_is_checked(make_set: Callable[..., ImageSet]) -> None:
    attack = attacks.create("badnets")
    with pytest.raises(ValueError, match="seed must lie in"):
        attack.poison(make_set(50, size=8), seed=-1)
    with pytest.raises(TypeError, match="seed must be an integer, got float"):
        attack.poison(make_set(50, size=8), seed=0.5)  # type: ignore[arg-type]


def test_roles_are_what_the_importer_expects() -> None:
    assert [int(r) for r in (Role.CLEAN, Role.POISON, Role.CROSS)] == [0, 1, 2]
