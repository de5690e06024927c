"""Views and layers: which images a tool sees, and that they are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from bbfast.analysis import Subject
from bbfast.analysis._embedding import sample
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.errors import UnknownNameError

CPU = torch.device("cpu")


def test_pairs_are_the_same_images(badnets: AttackResult) -> None:
    pairs = Subject(badnets, None, CPU).pairs(50)
    assert len(pairs) == 50 and bool((pairs.targets == 0).all()) and bool((pairs.labels != 0).all())
    changed = (pairs.clean != pairs.triggered).any(dim=1)
    assert not bool(changed[:, :-3].any()) and bool(changed[:, -3:, -3:].any(dim=(1, 2)).all())
    assert torch.equal(badnets.test.images[pairs.ids], pairs.clean)
    again = Subject(badnets, None, CPU).pairs(50)
    assert torch.equal(again.ids, pairs.ids)
    assert not torch.equal(Subject(badnets, None, CPU, seed=1).pairs(50).ids, pairs.ids)


def test_views(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    mixed = subject.view("mixed")
    assert len(mixed) == len(badnets.test) and int(mixed.poisoned.sum()) == 20
    assert mixed.ids.unique().numel() == len(mixed)
    train = subject.view("bd_train")
    assert torch.equal(train.poisoned, badnets.poisoned) and torch.equal(train.given, badnets.train.labels)
    some = subject.view("bd_train", 500)
    assert len(some) == 500 and int(some.poisoned.sum()) == int(badnets.poisoned.sum())
    counts = torch.bincount(some.labels[~some.poisoned], minlength=10)
    assert int(counts.max() - counts.min()) <= 1
    clean = subject.view("clean_train", 100)
    assert not bool(clean.poisoned.any()) and torch.equal(clean.given, clean.labels)
    with pytest.raises(UnknownNameError, match="unknown view 'mixd'; did you mean 'mixed'"):
        subject.view("mixd")


def test_the_record_of_what_was_handed_out(badnets: AttackResult, tuned: DefenseResult) -> None:
    """The same for every model, another for other samples; what is chosen from a view counts, not the view alone."""
    made = []
    for defense, seed, n in ((None, 0, 9), (tuned, 0, 9), (None, 1, 9), (None, 0, 8)):
        subject = Subject(badnets, defense, CPU, seed)
        assert subject.taken.sha256() is None
        subject.view("mixed")
        whole = subject.taken.sha256()
        subject.pairs(n)
        made.append(subject.taken.sha256())
        assert len({whole, made[-1], None}) == 3
    assert made[0] == made[1] and len(set(made)) == 3
    embedded = []
    for n in (50, 60, 50):
        subject.taken.clear()
        sample(subject, "mixed", n, 10)
        embedded.append(subject.taken.sha256())
    assert embedded[0] == embedded[2] != embedded[1]


def test_layers(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    name, layer = subject.layer("classifier")
    assert layer is subject.model.get_submodule(name) and subject.layer(name)[1] is layer
    with pytest.raises(UnknownNameError, match="unknown layer 'layer9'"):
        subject.layer("layer9")
    seen: list[torch.Size] = []
    with subject.watching({name: lambda out: seen.append(out.shape)}):
        logits = subject.logits(badnets.test.images[:7], size=4)
    assert seen == [torch.Size((4, 10)), torch.Size((3, 10))] and logits.shape == (7, 10)
    assert not subject.model.get_submodule(name)._forward_hooks


def test_the_model_is_a_frozen_copy(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    assert subject.model is not badnets.model and not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert any(parameter.requires_grad for parameter in badnets.model.parameters())
