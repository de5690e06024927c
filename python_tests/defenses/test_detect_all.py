"""Several detectors on one pass: the same results, one pass, and nobody's failure is another's."""

from __future__ import annotations

import contextlib
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bbfast
from bbfast import defenses
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenderView, Defense, DefenseCard, DefenseResult, FeatureReader, Reader
from bbfast.defenses import run as run_module
from bbfast.errors import DataRequirementError, DetectionError, UnknownNameError

SHARING = ("ac", "ss", "scan", "spectre")


def beatrix() -> Defense:
    return defenses.create("beatrix", stage="train")


def asset() -> Defense:
    return defenses.create("asset", epochs=1, discriminator_steps=2)


def test_results_are_those_of_each_alone(digits_attack: AttackResult) -> None:
    methods = {name: defenses.create(name, **defenses.find(name).Config.detect_only) for name in SHARING}
    methods |= {"beatrix": beatrix(), "asset": asset()}
    found = bbfast.detect_all(digits_attack, methods.values(), seed=1, device="cpu")
    assert list(found) == [*SHARING, "beatrix", "asset"]
    for name, method in methods.items():
        expected = bbfast.defend(method, digits_attack, seed=1, device="cpu")
        assert expected.scores is not None and expected.flags is not None
        torch.testing.assert_close(found[name].scores, expected.scores, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found[name].flags, expected.flags)
        assert found[name].config == expected.config
        told = {"seconds", "seconds_shared", "peak_memory_bytes"}
        ours, theirs = ({k: v for k, v in r.metrics.items() if k not in told} for r in (found[name], expected))
        assert pickle.dumps(ours) == pickle.dumps(theirs)  # NaN is not equal to itself
        assert found[name].metrics["seconds_shared"] > 0 and found[name].model is None


def test_every_set_is_read_once(digits_attack: AttackResult, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, seen = type(digits_attack.model), []
    forward = kind.forward

    def counting(self: nn.Module, x: Tensor) -> Any:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", counting)
    total = len(digits_attack.train)
    quick = ("ac", "ss", "scan")
    defenses.detect_all(digits_attack, [*quick, beatrix()], device="cpu")
    # The training set, scan's reserve of 10 images a class and beatrix's of 30.
    reserves = 10 * 10 + 10 * 30
    assert sum(seen) == total + reserves
    seen.clear()
    for method in (*(defenses.create(n, **defenses.find(n).Config.detect_only) for n in quick), beatrix()):
        defenses.defend(method, digits_attack, device="cpu")
    assert sum(seen) == 4 * total + reserves


def test_sets_are_held_once_however_many_detectors(
    toy_attack: Callable[..., AttackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: every detector's copy of the sets and of the model was alive from the first pass to its turn."""
    held: list[weakref.ref[Any]] = []
    peaks: list[int] = []

    def counted(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            thing = make(*args)
            held.append(weakref.ref(thing))
            peaks.append(sum(each() is not None for each in held))
            return thing

        return made

    for name in ("_granted", "private_copy"):
        monkeypatch.setattr(run_module, name, counted(getattr(run_module, name)))
    attack = toy_attack(n=100)

    def peak(*detectors: str | Defense) -> int:
        held.clear()
        peaks.clear()
        with contextlib.suppress(DetectionError):
            defenses.detect_all(attack, detectors, device="cpu")
        return max(peaks)

    alone = peak(defenses.create("scan", reserve_per_class=5))
    assert alone == 3  # training set, reserve, model
    scans = [defenses.create("scan", reserve_per_class=5) for _ in range(4)]
    for number, scan in enumerate(scans):
        scan.name = f"scan_{number}"  # type: ignore[misc]
    assert peak(*scans, "ss", broken("readers"), broken("pass"), broken("run"), "spectre") == alone


CARD = DefenseCard(
    title="Made up",
    paper="none",
    year=None,
    arxiv="",
    kinds=("detection",),
    needs=frozenset({"model", "poisoned_train"}),
    summary="For tests.",
)


class Refusing(FeatureReader):
    def batch(self, *args: Any) -> None:
        raise ArithmeticError("no such number")


def broken(where: str) -> Defense:
    class Broken(Defense):
        name = f"broken_{where}"
        card = CARD

        def readers(self, view: DefenderView, source: str) -> list[Reader]:
            if where == "readers":
                raise ArithmeticError("no readers")
            # A reader of another key than the others', so that it is the one that is asked.
            return [Refusing("stage1" if where == "pass" else "penultimate")] if where != "run" else []

        def run(self, view: DefenderView) -> DefenseResult:
            raise ArithmeticError("no result")

    return Broken()


@pytest.mark.parametrize("where", ["readers", "pass", "run"])
def test_a_failure_leaves_the_others_their_results(digits_attack: AttackResult, where: str) -> None:
    with pytest.raises(DetectionError, match=f"1 of 3 detectors failed: broken_{where}: no ") as caught:
        defenses.detect_all(digits_attack, ["ss", broken(where), "scan"], device="cpu")
    error = caught.value
    assert list(error.results) == ["ss", "scan"] and list(error.failures) == [f"broken_{where}"]
    assert isinstance(error.failures[f"broken_{where}"], ArithmeticError)
    expected = defenses.detect_all(digits_attack, ["scan"], device="cpu")["scan"]
    assert torch.equal(error.results["scan"].flags, expected.flags)


def test_readers_of_one_kind_share_even_what_is_not_a_feature(toy_attack: Callable[..., AttackResult]) -> None:
    class Counting(Reader):
        made = 0
        roles = ()
        key = "images"

        def begin(self, total: int, device: torch.device) -> None:
            type(self).made += 1
            self.index: list[Tensor] = []

        def batch(self, index: Tensor, found: Any, logits: Tensor) -> None:
            assert found == {} and logits.shape[0] == len(index)
            self.index.append(index)

        def outcome(self) -> Tensor:
            return torch.cat(self.index)

    class Counts(Defense):
        card = CARD

        def readers(self, view: DefenderView, source: str) -> list[Reader]:
            return [Counting()] if source == "poisoned_train" else []

        def run(self, view: DefenderView) -> DefenseResult:
            index = view.read("poisoned_train", Counting())
            assert torch.equal(index.sort().values, torch.arange(len(view.poisoned_train)))
            return DefenseResult(kind="detection", scores=index.float())

    one, two = Counts(), Counts()
    one.name, two.name = "one", "two"  # type: ignore[misc]
    result = toy_attack()
    found = defenses.detect_all(result, [one, two], device="cpu")
    assert Counting.made == 1 and torch.equal(found["one"].scores, found["two"].scores)
    defenses.defend(one, result, device="cpu")
    assert Counting.made == 2


def test_bad_calls(digits_attack: AttackResult) -> None:
    with pytest.raises(ValueError, match="at least one detector, got none"):
        defenses.detect_all(digits_attack, [])
    with pytest.raises(ValueError, match="'ss' twice"):
        defenses.detect_all(digits_attack, ["ss", "spectral"], device="cpu")
    with pytest.raises(UnknownNameError, match="spektre"):
        defenses.detect_all(digits_attack, ["ss", "spektre"])
    with pytest.raises(TypeError, match="names or defenses, got int"):
        defenses.detect_all(digits_attack, [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="seed"):
        defenses.detect_all(digits_attack, ["ss"], seed=-1)
    # Refused before the first one works.
    with pytest.raises(DataRequirementError, match="reserve"):
        defenses.detect_all(digits_attack, ["ss", defenses.create("scan", reserve_per_class=10_000)], device="cpu")
