"""The view holds what was declared and nothing else; the draws of clean images are as the protocol says."""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import Defense, DefenseCard, DefenseResult, FeatureCache
from bbfast.defenses.card import NEEDS
from bbfast.defenses.holdout import draw_holdout, draw_reserve, make_stream, split_stratified, without_ids
from bbfast.defenses.run import build_view
from bbfast.defenses.view import DefenderView, private_copy
from bbfast.errors import AccessDeniedError, DataRequirementError
from bbfast.store import Store

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
CPU = torch.device("cpu")


def defense_with(*needs: str, run: Callable[[DefenderView], Any] = lambda view: None, **config: Any) -> Defense:
    """A defense that needs ``needs`` and calls ``run``; never registered."""

    class Probe(Defense):
        name = "probe"
        card = DefenseCard("Probe", "none", None, "", ("mitigation",), frozenset(needs), "For tests.")

        def run(self, view: DefenderView) -> DefenseResult:
            run(view)
            return DefenseResult("mitigation")

    return Probe(**config)


def reachable(root: object) -> Iterator[object]:
    """Every object that can be reached from ``root`` by references, without passing through modules, classes and code.

    A function is entered by its closure and defaults, not by its globals: those are the module's, everybody's.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, types.ModuleType | type | types.CodeType | types.BuiltinFunctionType):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, types.FunctionType):
            stack.extend([item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__])
        elif isinstance(item, types.FrameType):
            raise AssertionError("a frame can be reached from the view")
        else:
            stack.extend(gc.get_referents(item))
            if isinstance(item, Tensor) and item.grad_fn is not None:
                raise AssertionError("a tensor with an autograd graph can be reached from the view")


def secrets(result: AttackResult) -> dict[str, Tensor]:
    return {
        "poisoned": result.poisoned,
        "original_labels": result.original_labels,
        "role": result.role,
        "clean_images": result.clean_images,
        "test images": result.test.images,
        "test labels": result.test.labels,
        "backdoor images": result.backdoor_test.images,
        "backdoor labels": result.backdoor_test.labels,
        "backdoor original labels": result.backdoor_test.original_labels,
        "train images": result.train.images,
        "train labels": result.train.labels,
        **{f"model {name}": value for name, value in result.model.state_dict().items() if value.numel()},
    }


@pytest.mark.parametrize("name", [*defenses.available(), "everything"])
def test_no_secret_can_be_reached(toy_attack: MakeAttack, name: str) -> None:
    result = toy_attack()
    # A hook is part of a module and may hold anything: here the attack's result itself.
    result.model.register_forward_hook(lambda module, args, out, leak=result: None)
    probe = defense_with(*NEEDS) if name == "everything" else defenses.create(name, **tiny(name))
    view, _ = build_view(probe, result, 0.2, 0, CPU, cache=FeatureCache())
    for source in sorted({"poisoned_train", "clean", "reserve", "stream"} & view.needs)[:1]:
        if "model" in view.needs:
            view.features("penultimate", source)
    memory = {value.untyped_storage().data_ptr(): key for key, value in secrets(result).items()}
    truth = {key: value for key, value in secrets(result).items() if not key.startswith(("model", "train"))}
    objects = list(reachable(view))
    assert len(objects) > 20
    for item in objects:
        assert item is not result and not isinstance(item, AttackResult | FeatureCache)
        assert not (isinstance(item, dict) and {"attack_config", "target"} & set(map(str, item)))
        if isinstance(item, Tensor):
            if item.numel():
                assert item.untyped_storage().data_ptr() not in memory, memory.get(item.untyped_storage().data_ptr())
            for key, value in truth.items():
                same = item.shape == value.shape and item.dtype == value.dtype and torch.equal(item, value)
                assert not same, f"{key} can be reached"


def test_the_store_of_results_cannot_be_reached(toy_attack: MakeAttack, tmp_path: Path) -> None:
    """What a view keeps and finds lies in a store of its own, where no attack is."""
    store = Store(tmp_path)
    toy_attack().save(store.path("attack", "toy", "0" * 64))
    view, _ = build_view(defense_with(*NEEDS), toy_attack(), 0.2, 0, CPU, checkpoint=tmp_path / ".work", store=store)
    view.obtain("thing", {}, lambda folder: {"x": torch.zeros(1)}, seed=0)
    stores = [item for item in reachable(view) if isinstance(item, Store)]
    assert [entry.name for one in stores for entry in one.list()] == ["thing"] and store.list("attack")


def test_the_walk_finds_a_leak(toy_attack: MakeAttack) -> None:
    """The test above can fail: a closure, a weak attribute or a plain reference is found."""
    result = toy_attack()
    view, _ = build_view(defense_with("clean"), result, 0.2, 0, CPU)
    view.progress = lambda: result  # type: ignore[assignment]
    assert any(item is result for item in reachable(view))


@pytest.mark.parametrize("need", [n for n in NEEDS if n not in ("batch_norm", "fresh_model")])
def test_what_is_not_declared_is_denied(toy_attack: MakeAttack, need: str) -> None:
    others = [n for n in NEEDS if n != need]
    view, _ = build_view(defense_with(*others), toy_attack(), 0.2, 0, CPU)
    with pytest.raises(AccessDeniedError, match=f"asked for '{need}'"):
        getattr(view, need)
    with pytest.raises(AccessDeniedError):
        view.features(source="clean" if need == "model" else need)
    assert not any(key == need for key in view._held)


def test_fresh_model_is_denied_unless_declared(toy_attack: MakeAttack) -> None:
    view, _ = build_view(defense_with("model"), toy_attack(), 0.2, 0, CPU)
    with pytest.raises(AccessDeniedError, match="fresh_model"):
        view.fresh_model()


@pytest.mark.parametrize(
    "name", ["poisoned", "original_labels", "target", "test", "backdoor_test", "attack_result", "role"]
)
def test_a_cheating_defense_is_stopped(toy_attack: MakeAttack, name: str) -> None:
    cheat = defense_with("model", "clean", "poisoned_train", "stream", run=lambda view: getattr(view, name))
    with pytest.raises(AccessDeniedError, match=name):
        defenses.defend(cheat, toy_attack(), 0.2, device="cpu")


def test_the_model_is_a_private_copy(toy_attack: MakeAttack) -> None:
    result = toy_attack()
    first = next(result.model.parameters())
    first.requires_grad_(False)
    result.model.train()
    result.model.register_forward_pre_hook(lambda module, args: None)
    before = {key: value.clone() for key, value in result.model.state_dict().items()}
    copy = private_copy(result.model, "cpu")
    assert not copy.training and result.model.training
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in result.model.parameters()]
    assert not any(module._forward_pre_hooks for module in copy.modules())
    assert len(result.model._forward_pre_hooks) == 1
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())


def test_changing_granted_images_changes_nothing_else(toy_attack: MakeAttack) -> None:
    result = toy_attack()
    view, _ = build_view(defense_with("clean", "poisoned_train", "reserve", "stream"), result, 0.2, 0, CPU)
    before = {key: value.clone() for key, value in secrets(result).items()}
    for granted in (view.clean, view.poisoned_train, view.reserve, view.stream):
        granted.images.zero_()
    assert all(torch.equal(value, before[key]) for key, value in secrets(result).items())


def test_granted_sets(toy_attack: MakeAttack) -> None:
    result = toy_attack()
    view, population = build_view(defense_with("clean", "poisoned_train", "reserve"), result, 0.25, 3, CPU)
    assert len(view.clean) == 50 and view.clean.ids.tolist() == list(range(50))
    assert torch.equal(view.poisoned_train.images, result.train.images)
    assert torch.equal(view.poisoned_train.labels, result.train.labels)
    # H is drawn from the training set before it was poisoned: no image of it carries the trigger.
    assert not (view.clean.images[:, :, -3:, -3:] == 255).flatten(1).all(dim=1).any()
    assert torch.bincount(view.reserve.labels).tolist() == [10] * 4
    assert len(population.test) == len(result.test) - 40
    held = {image.numpy().tobytes() for image in view.reserve.images}
    assert not any(image.numpy().tobytes() in held for image in population.test.images)
    assert not torch.isin(population.backdoor_test.ids, population.test.ids).logical_not().any()
    assert not population.whole


def test_holdout_draw() -> None:
    labels = torch.arange(1437) % 10
    index = draw_holdout(labels, 0.05, 10, seed=0)
    assert len(index) == 71 and len(set(index.tolist())) == 71
    assert torch.equal(index, draw_holdout(labels, 0.05, 10, seed=0))
    assert not torch.equal(index, draw_holdout(labels, 0.05, 10, seed=1))
    assert index.tolist() != sorted(index.tolist())
    stratified = draw_holdout(labels, 0.05, 10, seed=0, stratified=True)
    assert torch.bincount(labels[stratified]).tolist() == [7] * 10


def test_holdout_is_uniform() -> None:
    """Each of 40 images is drawn in about a quarter of 400 draws: within five standard deviations."""
    hits = torch.zeros(40)
    for seed in range(400):
        hits[draw_holdout(torch.arange(40) % 2, 0.25, 2, seed)] += 1
    assert (hits - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_too_small_a_holdout_says_how_small() -> None:
    with pytest.raises(DataRequirementError, match=r"5 images for 10 classes.*0\.05 of 100.*>= 0\.1"):
        draw_holdout(torch.arange(100) % 10, 0.05, 10, seed=0)
    lopsided = torch.cat([torch.zeros(97, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    with pytest.raises(DataRequirementError, match="10 images of each class, but class 1 has 3"):
        draw_holdout(lopsided, 0.2, 2, seed=0, stratified=True)
    with pytest.raises(DataRequirementError, match=r"10 test images of each class.*class 1 has 3"):
        draw_reserve(lopsided, 10, 2, seed=0)


def test_split_by_class() -> None:
    labels = torch.arange(71) % 10
    fit, val = split_stratified(labels, 0.2, 10, torch.Generator().manual_seed(0))
    assert sorted([*fit.tolist(), *val.tolist()]) == list(range(71))
    assert torch.bincount(labels[val], minlength=10).tolist() == [2, *[1] * 9]
    for n, take in ((2, 1), (3, 1), (8, 2), (100, 20)):
        pair = torch.arange(2 * n) % 2
        fit, val = split_stratified(pair, 0.2, 2, torch.Generator().manual_seed(0))
        assert torch.bincount(pair[val]).tolist() == [take, take]
    with pytest.raises(DataRequirementError, match="at least two of each of 3 classes, but class 2: 1"):
        split_stratified(torch.tensor([0, 0, 1, 1, 2]), 0.2, 3, torch.Generator())
    with pytest.raises(DataRequirementError, match="class 2: 0"):
        split_stratified(torch.tensor([0, 0, 1, 1]), 0.2, 3, torch.Generator())
    with pytest.raises(ValueError, match="val_fraction"):
        split_stratified(labels, 0.0, 10, torch.Generator())


def test_the_views_split_is_stable(toy_view: MakeView, toy_images: Callable[..., ImageSet]) -> None:
    clean = toy_images(40, 4)
    fit, val = toy_view(clean=clean, seed=5).split_clean(0.2)
    again, _ = toy_view(clean=clean, seed=5).split_clean(0.2)
    other, _ = toy_view(clean=clean, seed=6).split_clean(0.2)
    assert torch.equal(fit.ids, again.ids) and not torch.equal(fit.ids, other.ids)
    assert len(fit) + len(val) == 40 and torch.equal(clean.images[val.ids], val.images)


def test_stream_pairs_each_backdoor_image_with_its_clean_copy(toy_attack: MakeAttack) -> None:
    result = toy_attack()
    reserve = result.test.subset(draw_reserve(result.test.labels, 10, 4, 0))
    test, bad = without_ids(result.test, reserve.ids), without_ids(result.backdoor_test, reserve.ids)
    stream = make_stream(test, bad, seed=0)
    assert stream.images.shape[0] == 2 * len(bad) and int(stream.triggered.sum()) == len(bad)
    assert stream.triggered.tolist() != sorted(stream.triggered.tolist())
    corner = (stream.images[:, :, -3:, -3:] == 255).flatten(1).all(dim=1)
    assert torch.equal(corner, stream.triggered)
    assert (stream.wanted[stream.triggered] == 1).all()
    assert (stream.wanted[~stream.triggered] != 1).all()
    whole = {image.numpy().tobytes(): int(label) for image, label in zip(test.images, test.labels, strict=True)}
    for image, wanted, bad_one in zip(stream.images, stream.wanted, stream.triggered, strict=True):
        if not bad_one:
            assert whole[image.numpy().tobytes()] == int(wanted)
    broken = dataclasses.replace(result.backdoor_test, ids=result.backdoor_test.ids + 1000)
    with pytest.raises(DataRequirementError, match=r"backdoor_test\.ids"):
        make_stream(result.test, broken, 0)


def test_features_are_computed_once_and_handed_out_as_copies(toy_attack: MakeAttack) -> None:
    view, _ = build_view(defense_with("model", "clean", "poisoned_train"), toy_attack(), 0.2, 0, CPU)
    calls: list[int] = []
    hook = view.model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    first = view.features(source="clean")
    count = len(calls)
    hook.remove()
    assert count >= 1 and first.shape[0] == len(view.clean) and first.dtype == torch.float32
    expected = first.clone()
    first.zero_()
    assert torch.equal(view.features(source="clean"), expected)
    assert len(calls) == count
    with torch.no_grad():
        next(view.model.parameters()).mul_(2)
    assert torch.equal(view.features(source="clean"), expected)
    with pytest.raises(RuntimeError, match=r"after view\.model was changed"):
        view.features(source="poisoned_train")
    with pytest.raises(ValueError, match="source"):
        view.features(source="test")


def test_features_are_shared_between_defenses_that_may_see_them(toy_attack: MakeAttack) -> None:
    result, cache = toy_attack(), FeatureCache()
    seen: dict[str, Any] = {}

    def read(view: DefenderView) -> None:
        seen["held"] = dict(view._features)
        seen["features"] = view.features(source="poisoned_train") if "poisoned_train" in view.needs else None

    both = defense_with("model", "poisoned_train", "clean", run=read)
    defenses.defend(both, result, 0.2, device="cpu", cache=cache)
    assert len(cache) == 1 and not seen["held"]
    first = seen["features"]
    defenses.defend(both, result, 0.2, seed=1, device="cpu", cache=cache)
    assert ("poisoned_train", "penultimate") in seen["held"] and torch.equal(seen["features"], first)
    defenses.defend(defense_with("model", "clean", run=read), result, 0.2, device="cpu", cache=cache)
    assert not seen["held"], "features of a set that was not granted were handed out"
    with torch.no_grad():
        next(result.model.parameters()).mul_(2)
    defenses.defend(both, result, 0.2, device="cpu", cache=cache)
    assert not seen["held"] and not torch.equal(seen["features"], first)


def test_generators_do_not_disturb_one_another(toy_view: MakeView) -> None:
    view = toy_view(seed=1)
    a = torch.rand(3, generator=view.generator("a"))
    torch.rand(3, generator=view.generator("b"))
    assert torch.equal(a, torch.rand(3, generator=view.generator("a")))
    assert not torch.equal(a, torch.rand(3, generator=view.generator("b")))
    assert not torch.equal(a, torch.rand(3, generator=toy_view(seed=2).generator("a")))


def test_fresh_model_is_new_and_seeded(toy_attack: MakeAttack) -> None:
    result = toy_attack()
    view, _ = build_view(defense_with("fresh_model"), result, 0.2, 0, CPU)
    state = torch.get_rng_state()
    one, two = view.fresh_model(), view.fresh_model()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), result.model.parameters(), strict=True))
    assert isinstance(one, nn.Module) and one is not two


def tiny(name: str) -> dict[str, Any]:
    """Settings that make any method quick and content with little: one of everything that is counted."""
    counted = ("epochs", "iters", "rounds")
    defaults = defenses.info(name)["defaults"]
    reserve = {"reserve_per_class": 10} if "reserve_per_class" in defaults else {}
    return {**{key: 1 for key in defaults if key.endswith(counted)}, **reserve}


LONG = ("mm_bd",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in defenses.available()]
)
def test_no_peeking(toy_attack: MakeAttack, name: str) -> None:
    """It runs where the truth is not in memory, reads only what was declared, and gives the same bits as with another
    truth and the same data."""
    defense = defenses.create(name, **tiny(name))
    other = toy_attack()
    lies = torch.rand(200, generator=torch.Generator().manual_seed(9)) < 0.3
    changed = dataclasses.replace(
        other, poisoned=lies, config={**other.config, "attack": "unknown", "attack_config": {"target": 3}}
    )
    if "clean" not in defense.card.needs:
        changed = dataclasses.replace(changed, role=lies.to(torch.int8), original_labels=other.original_labels.flip(0))
    if "stream" not in defense.card.needs:
        changed = dataclasses.replace(changed, backdoor_test=other.backdoor_test.subset(torch.arange(5)))  # type: ignore[arg-type]
    two = defenses.defend(defense, changed, 0.5, device="cpu", progress=False)

    result = toy_attack()
    view, population = build_view(defense, result, 0.5, 0, CPU, progress=False)
    kept = [weakref.ref(thing) for thing in (result, result.test, result.backdoor_test, result.model)]
    del result, population
    gc.collect()
    assert all(thing() is None for thing in kept)
    defense.check(view)
    one = defense.run(view)
    assert isinstance(one, DefenseResult) and set(two.info["data_used"]) <= defense.card.needs
    for field in ("scores", "flags"):
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None and b is None) or torch.equal(a.nan_to_num(nan=-1e9), b.nan_to_num(nan=-1e9))
    assert (one.model is None) == (two.model is None)
    if one.model is not None and two.model is not None:
        x, y = one.model.state_dict(), two.model.state_dict()
        assert all(torch.equal(x[key], y[key]) for key in x)
    assert one.verdict == two.verdict
