"""Run a defense: hand out what it may see, time it, and judge it with what it may not see."""

from __future__ import annotations

import dataclasses
import numbers
import time
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbfast._record import method_version, versions
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.defenses._applicable import check_model, check_outputs, training_set, warn_of_absent_classes
from bbfast.defenses._benign import run_once, triggerless
from bbfast.defenses._judge import judge
from bbfast.defenses._measure import peak_memory
from bbfast.defenses.base import Defense, create
from bbfast.defenses.features import FeatureCache
from bbfast.defenses.holdout import StreamTruth, draw_holdout, draw_reserve, make_stream, without_ids
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream, private_copy
from bbfast.errors import UnknownNameError
from bbfast.store import Store

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult
    from bbfast.training import Recipe

__all__ = ["Population", "build_view", "check_run", "check_seed", "defend", "resolve_attack", "run_and_judge"]

_SHARED = ".shared"
"""In a store, the store of what defenses make alike."""


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """What the runner judges on. It never reaches the defense.

    Args:
        test: Clean test images, the reserve removed.
        backdoor_test: Triggered test images, those of the reserve removed.
        whole: Whether nothing was removed, so that the attack's own metrics are of the same images.
        stream: Truth about the stream, if one was given.
        draws: For each granted source, what tells this draw of it from another.
    """

    test: ImageSet
    backdoor_test: BackdoorSet
    whole: bool
    stream: StreamTruth | None
    draws: dict[str, Hashable]


def defend(
    defense: str | Defense,
    attack_result: AttackResult | str | Path,
    clean_fraction: float | None = 0.05,
    seed: int = 0,
    device: str | torch.device = "auto",
    *,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    cache: FeatureCache | None = None,
    recipe: Recipe | None = None,
    store: Store | str | Path | None = None,
    oracle: bool = False,
) -> DefenseResult:
    """Run a defense on an attacked model and measure what it achieved.

    The defense gets a :class:`DefenderView` with copies of what its card names and nothing else; the ground truth is
    used only here, afterwards.

    Args:
        defense: Name or alias, or a defense with settings (:func:`bbfast.defenses.create`).
        attack_result: Result of an attack, or its folder.
        clean_fraction: Part of the clean training set that the defender holds, in ``(0, 1]``; None is the method's own
            default.
        seed: Seed of the hold-out, the reserve and everything random in the defense.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        checkpoint: Folder for the state of methods that train for long: a killed run called again goes on from there.
        progress: Show progress bars: None decides by the terminal.
        cache: Features shared with other defenses of the same attack.
        recipe: Recipe for methods that train a model anew; default the one the attack was trained with.
        store: Where what several runs make alike is kept and found: the self-supervised encoder of DBD and NAB, which
            then is in the ``seconds`` of the first alone; at ratio 0 (:func:`bbfast.attacks.control`) what a defense
            makes of the clean model, whichever trigger it is judged by. None keeps nothing.
        oracle: Hand the method an evaluator of the test sets, for settings that choose by the ground truth as published
            tables did (``anp``'s ``selection="oracle_asr"``). The result is marked ``selection["oracle"]``: no honest
            figure.

    Returns:
        The result with ``metrics``: of a model ``c_acc``, ``asr``, ``r_acc``, ``der``, ``rir`` and the undefended
        model's ``c_acc_before``, ``asr_before``, ``r_acc_before``; of flags ``tpr``, ``fpr``, ``precision``, ``f1``,
        ``auroc`` and more, of scores of the training set ``precision_top_01`` and ``_05``;
        always ``seconds`` and ``peak_memory_bytes``.

    Raises:
        ValueError: if ``clean_fraction`` lies outside ``(0, 1]`` or ``seed`` is negative.
        UnknownNameError: if there is no such defense.
        DataRequirementError: if the attack does not provide what the defense needs, or too little of it: fewer clean
            images than classes; a class of which the hold-out has none, if the method cannot do without (others go on,
            with a warning in the log).
        UnsupportedModelError: if the defense cannot work on this model, or it has another number of outputs than the
            data have classes. Both are raised before any work.
        DivergedError: if a loss stops being finite; the attack's model is left as it was.
    """
    from bbfast.evaluation import evaluate
    from bbfast.training.device import resolve_device

    attack = resolve_attack(attack_result)
    if isinstance(defense, str):
        defense = create(defense)
    if not isinstance(defense, Defense):
        raise TypeError(f"defense must be a name or a Defense, got {type(defense).__qualname__}")
    check_seed(seed)
    target = resolve_device(device)
    store = Store(store) if isinstance(store, str | Path) else store
    defense = defense.for_dataset(_facts(attack).name)
    view, population = build_view(
        defense,
        attack,
        clean_fraction,
        seed,
        target,
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        progress=progress,
        cache=cache,
        recipe=recipe,
        store=store,
    )
    if oracle:
        defense.evaluator = partial(
            evaluate, test=population.test, backdoor_test=population.backdoor_test, device=target
        )
    check_run(defense, attack, view)
    result = run_and_judge(defense, attack, view, population, clean_fraction, store)
    if oracle:
        result.selection["oracle"] = True
    if cache is not None:
        cache.put(attack.model, population.draws, view.computed_features())
    return result


def check_run(defense: Defense, attack: AttackResult, view: DefenderView) -> None:
    """Refuse what would fail in the middle of the work. Raises as :func:`defend` does."""
    defense.check(view)
    # Last: a model of the user's own is run on an image for it, which the checks of a method never do.
    check_outputs(defense.name, defense.card.needs, attack.model, view.num_classes, attack.test[:1])


def run_and_judge(
    defense: Defense,
    attack: AttackResult,
    view: DefenderView,
    population: Population,
    clean_fraction: float | None,
    store: Store | None = None,
) -> DefenseResult:
    """Run a defense on the view that :func:`build_view` made, and measure what it achieved."""
    if store is not None and triggerless(attack, defense):
        result = run_once(store, defense, attack, view, partial(_timed_run, defense, view))
    else:
        result = _timed_run(defense, view)
    if "poisoned_train" in result.info["data_used"] and bool(attack.poisoned.any()) and _changed_every_epoch(attack):
        result.info["static_snapshot"] = True
    result.config = _config(defense, attack, view, clean_fraction)
    # The ground truth has the last word: a figure of that name from the defense itself is only its own opinion.
    result.metrics = {**result.metrics, **judge(result, attack, population, view.device)}
    return result


def build_view(
    defense: Defense,
    attack: AttackResult,
    clean_fraction: float | None,
    seed: int,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    progress: bool | None = None,
    cache: FeatureCache | None = None,
    recipe: Recipe | None = None,
    store: Store | None = None,
) -> tuple[DefenderView, Population]:
    """The view of one run and what it is judged on. Raises as :func:`defend` does."""
    card, facts = defense.card, _facts(attack)
    fraction = _check_fraction(card.clean_fraction if clean_fraction is None else clean_fraction)
    check_model(defense.name, card.needs, attack.model)
    held: dict[str, Any] = {}
    draws: dict[str, Hashable] = {}
    test, backdoor_test, whole = attack.test, attack.backdoor_test, True
    if "poisoned_train" in card.needs:
        train = training_set(defense, attack)
        held["poisoned_train"] = _granted(train, facts, device)
        draws["poisoned_train"] = ()
    if "clean" in card.needs:
        training_set(defense, attack)
        clean = attack.clean_train
        stratified = bool(getattr(defense.config, "stratified", False))
        index = draw_holdout(clean.labels, fraction, facts.num_classes, seed, stratified)
        warn_of_absent_classes(defense.name, clean.labels[index], facts.num_classes)
        held["clean"] = _granted(clean.subset(index), facts, device)
        draws["clean"] = (fraction, seed, stratified)
    if "reserve" in card.needs:
        per_class = int(getattr(defense.config, "reserve_per_class", card.reserve_per_class))
        reserve = test.subset(draw_reserve(test.labels, per_class, facts.num_classes, seed))
        test, backdoor_test = without_ids(test, reserve.ids), without_ids(backdoor_test, reserve.ids)
        held["reserve"], whole = _granted(reserve, facts, device), False
        draws["reserve"] = (per_class, seed)
    truth = None
    if "stream" in card.needs:
        truth = make_stream(test, backdoor_test, seed)
        held["stream"] = Stream(truth.images.to(device, copy=True))
        draws["stream"] = (seed, draws.get("reserve"))
    if "model" in card.needs:
        held["model"] = private_copy(attack.model, device)
    if "fresh_model" in card.needs:
        held["model_spec"] = getattr(attack.model, "bbfast_spec", None)
    if cache is not None and "model" in card.needs:
        held["features"] = cache.take(attack.model, draws)
    view = DefenderView(
        defense.name,
        card.needs,
        facts,
        Grants(**held),
        recipe=recipe if recipe is not None else _recipe(attack),
        seed=seed,
        device=device,
        progress=progress,
        checkpoint=checkpoint,
        # Not the store of the results: the attack's own lies there.
        store=None if store is None else Store(store.root / _SHARED),
    )
    return view, Population(test, backdoor_test, whole, truth, draws)


def _timed_run(defense: Defense, view: DefenderView) -> DefenseResult:
    """Run under generators of its own: same seed, same result, and the caller's random state is left alone."""
    device = view.device
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), peak_memory(device) as memory:
        torch.manual_seed(view.derive_seed("global"))
        start = time.perf_counter()
        result = defense.run(view)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    if not isinstance(result, DefenseResult):
        raise TypeError(f"{defense.name}: run must return a DefenseResult, got {type(result).__qualname__}")
    result.seconds = seconds
    result.metrics = {**result.metrics, "seconds": seconds, "peak_memory_bytes": memory.bytes}
    result.info.setdefault("data_used", list(view.used))
    if result.model is not None:
        result.model.eval()
    return result


def _granted(images: ImageSet, facts: DataFacts, device: torch.device) -> ImageSet:
    """A copy on ``device`` sharing no memory with the attack's sets, numbered anew: ids could give away samples."""
    return ImageSet(
        images.images.to(device, copy=True),
        images.labels.to(device, copy=True),
        mean=facts.mean,
        std=facts.std,
        ids=torch.arange(len(images), device=device),
    )


def _changed_every_epoch(attack: AttackResult) -> bool:
    """Whether the attack poisoned each batch anew, so that its training set is one draw of many: a defense that trains
    on it has an easier task than the attacked model's training was (the result says so)."""
    from bbfast import attacks

    try:
        method = attacks.create(attack.config["attack"], **attack.config["attack_config"])
        rule = method.rule(attack.original_labels, int(attack.config["data"]["num_classes"]))
    except (KeyError, ValueError, UnknownNameError):  # made by hand, or the attack's package is not installed
        return False
    return method.program(rule) is not None


def _facts(attack: AttackResult) -> DataFacts:
    data = attack.config["data"]
    channels, height, width = attack.test.image_size
    return DataFacts(
        name=str(data["name"]),
        num_classes=int(data["num_classes"]),
        image_size=(channels, height, width),
        mean=tuple(float(value) for value in data["mean"]),
        std=tuple(float(value) for value in data["std"]),
        flip=bool(data.get("flip", False)),
        padding=int(data.get("padding", 4)),
    )


def _recipe(attack: AttackResult) -> Recipe | None:
    from bbfast.training import Recipe

    stored = attack.config.get("recipe")
    return Recipe(**stored) if stored else None


def _config(defense: Defense, attack: AttackResult, view: DefenderView, clean_fraction: float | None) -> dict[str, Any]:
    card = defense.card
    config: dict[str, Any] = {
        "defense": defense.name,
        "defense_config": defense.config.model_dump(mode="json"),
        **method_version("defense", defense.version),
        "clean_fraction": card.clean_fraction if clean_fraction is None else clean_fraction,
        "seed": view.seed,
        "device": str(view.device),
        "needs": sorted(card.needs),
        "attack": attack.config,
        "versions": versions(defense.version, view.device),
    }
    if "clean" in card.needs:
        labels = view.clean.labels
        counts = torch.bincount(labels.cpu(), minlength=view.num_classes).tolist()
        config["clean"] = {"size": len(labels), "per_class": counts}
    if "reserve" in card.needs:
        config["reserve"] = {"size": len(view.reserve)}
    return config


def _check_fraction(fraction: object) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < float(fraction) <= 1:
        raise ValueError(f"clean_fraction must lie in (0, 1], got {fraction!r}")
    return float(fraction)


def check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")


def resolve_attack(attack_result: AttackResult | str | Path) -> AttackResult:
    from bbfast.attacks.result import AttackResult

    if isinstance(attack_result, str | Path):
        return AttackResult.load(attack_result)
    if not isinstance(attack_result, AttackResult):
        raise TypeError(f"attack_result must be an AttackResult or its folder, got {type(attack_result).__qualname__}")
    return attack_result
