"""MOTH: model orthogonalization."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bbfast._progress import bar
from bbfast.data.loader import Batch, BatchLoader, derive_seed
from bbfast.defenses._diverged import lower
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._distances import Distances
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.mitigation._keep import Keeper
from bbfast.defenses.mitigation._masks import crops
from bbfast.defenses.mitigation._pair_inversion import PairSettings, PairTriggers, Problems, invert_pairs
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, DivergedError
from bbfast.training.device import choose_numerics, placed
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import deterministic, keep_freed_memory

__all__ = ["MOTH", "MOTHConfig", "pair_problems", "universal_problems"]

_PERIOD = 3


class MOTHConfig(DefenseConfig):
    """Settings of MOTH.

    Args:
        harden_iters: Steps of the model against pairs: two passes over CIFAR-10 (150 on the digits).
        lr: Learning rate of the model (0.005 on the digits).
        momentum: Nesterov momentum.
        batch_size: Images a step; the size of a smaller hold-out.
        pairs: Pairs of classes hardened at a time, their triggers inverted in one batch; 1 in the paper.
        trigger_lr: Adam's learning rate of triggers.
        universal_iters: Steps of the inversion of one trigger a class before the hardening (100 on the digits).
        universal_threshold: Success rate, in 0..1, that such a trigger must reach.
        universal_images: Images a class it is inverted on.
        universal_share: Part of the other classes' images of a batch that carries it in the warm-up.
        first_iters: Steps of a pair's inversion when it is chosen, or after a failure.
        next_iters: Steps in the two model steps after that, from the trigger before.
        first_cost: Weight of the mask's size at first.
        next_cost: The same in the two steps after.
        pair_threshold: Success rate, in 0..1, that a pair's trigger must reach.
        patience: Steps of success (failure) in a row after which the weight rises (falls).
        multiplier: Factor by which it rises; it falls by ``multiplier ** 1.5``.
        random_share: How often the pair is drawn at random.
        portion: Part of the smaller class of a pair, in the batch, that carries its trigger; at least one image.
        largest_share: Triggers of more than this part of the image are not stamped.
        train_mode: Run BatchNorm in train mode in the steps of the model.
        chunk: Stamped images in one forward pass; None is what fits.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: a fifth of the steps, for time, at five times the rate.
        "digits": {"universal_iters": 100, "harden_iters": 150, "lr": 0.005},
    }

    harden_iters: int = Field(782, ge=0)
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, gt=0, lt=1)
    batch_size: int = Field(128, ge=2)
    pairs: int = Field(1, ge=1)
    trigger_lr: float = Field(0.1, gt=0)
    universal_iters: int = Field(500, ge=1)
    universal_threshold: float = Field(0.99, gt=0, le=1)
    universal_images: int = Field(10, ge=1)
    universal_share: float = Field(0.5, ge=0, le=1)
    first_iters: int = Field(200, ge=1)
    next_iters: int = Field(50, ge=1)
    first_cost: float = Field(1e-3, gt=0)
    next_cost: float = Field(1e-2, gt=0)
    pair_threshold: float = Field(0.9, gt=0, le=1)
    patience: int = Field(10, ge=1)
    multiplier: float = Field(1.5, gt=1)
    random_share: float = Field(0.3, ge=0, le=1)
    portion: float = Field(0.1, gt=0, le=1)
    largest_share: float = Field(0.25, gt=0, le=1)
    train_mode: bool = False
    chunk: int | None = Field(None, ge=1)
    stratified: bool = False

    def inversion(self, steps: int, cost: float, threshold: float) -> PairSettings:
        """Settings of one batched inversion."""
        return PairSettings(steps, self.trigger_lr, cost, threshold, self.patience, self.multiplier, self.chunk)


def universal_problems(x: Tensor, labels: Tensor, num_classes: int) -> Problems:
    """For every class the problem of turning the images of all others into it."""
    rows = [torch.nonzero(labels != c).flatten() for c in range(num_classes)]
    return _problems(x, rows, torch.arange(num_classes, device=x.device))


def pair_problems(x: Tensor, labels: Tensor, pairs: Tensor) -> Problems:
    """For every directed pair ``[P, 2]`` of classes the problem of turning the images of the first into the second."""
    rows = [torch.nonzero(labels == s).flatten() for s in pairs[:, 0].tolist()]
    return _problems(x, rows, pairs[:, 1].to(x.device))


def _problems(x: Tensor, rows: list[Tensor], targets: Tensor) -> Problems:
    sizes = torch.tensor([len(r) for r in rows], device=x.device)
    owner = torch.arange(len(rows), device=x.device).repeat_interleave(sizes)
    return Problems(x, torch.cat(rows), owner, targets)


@register_defense("moth")
class MOTH(Defense):
    """Push the classes apart: invert the smallest trigger between pairs of classes and train against it.

    The distance from class s to t is the L1 size of the smallest mask whose pattern turns the images of s into t; a
    backdoor makes the distances to its target short.

    1. Warm-up: one universal trigger a class, all in one batch, on ten images of every class. How much it lowers the
       loss of the images of s is the first estimate of how near s lies. Then one step of the model a class, half of the
       other classes' images of a batch carrying its trigger under their true labels.
    2. Hardening, in periods of three steps: a pair is chosen, at random three times in ten, else by what the estimates
       and the growth so far promise (:meth:`Distances.choose`); its triggers in both directions are inverted on the
       batch, in one batched problem, in the second and third step from those before; a tenth of the images of either
       class carry them; the model takes a step of SGD.

    Nothing is selected, and nothing is held back.

    Source: Tao et al., Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security, IEEE
    S&P 2022; numbers as in backdoor-toolbox. Deviations: see the card.
    """

    card = DefenseCard(
        title="Model Orthogonalization",
        paper="Tao, Liu, Shen, Xu, An, Zhang, Zhang, IEEE S&P 2022",
        year=2022,
        arxiv="",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Enlarges the distances between classes by training against inverted triggers between pairs of them.",
        deviations=(
            "The scheduling of pairs is the public toolbox's, not checked against the paper's text.",
            "The universal triggers are inverted in one batch on the model as it came; the toolbox takes a step of the "
            "model between one class and the next.",
            "A step of an inversion is one step of Adam on all its images; the toolbox splits more than 32.",
            "The drop of the loss under a universal trigger is that at the best trigger; in the toolbox it is 1 for "
            "every pair when the images make more than one batch.",
            "Triggers are kept by direction; the toolbox stacks the two by class number and reads them by choice.",
            "Sizes and gains of the distances are apart; the toolbox makes one name of both when a pair is new.",
            "At least one image of each class is stamped; a tenth of less than ten is none.",
            "The model takes its steps on the hold-out, over and over; the toolbox has the whole clean training set.",
        ),
    )
    Config = MOTHConfig

    def check(self, view: DefenderView) -> None:
        counts = torch.bincount(view.clean.labels.cpu(), minlength=view.num_classes)[: view.num_classes]
        missing = torch.nonzero(counts == 0).flatten().tolist()
        if missing or view.num_classes < 2:
            raise DataRequirementError(
                f"moth measures distances between all classes, but the hold-out of {len(view.clean)} images has none "
                f"of class {missing[0] if missing else 1}; raise clean_fraction or draw with stratified=True"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        config: MOTHConfig = self.config
        model = view.model
        history: list[dict[str, Any]] = []
        if config.harden_iters == 0:
            return DefenseResult(kind=self.card.kinds[0], model=model)
        numerics = choose_numerics("fp32", "auto", model, view.device)
        with (
            trainable(model),
            placed(model, view.device, numerics.memory_format),
            deterministic(view.recipe is not None and view.recipe.deterministic),
            keep_freed_memory(view.device),
        ):
            hardening = _Hardening(view, config, numerics.channels_last)
            history = hardening.run()
        known, seen = hardening.known, hardening.known.counts > 0
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            history=history,
            info={
                "hardened_pairs": int(seen.triu(1).sum()),
                "first_distance": float(known.first[seen].mean()) if bool(seen.any()) else None,
                "last_distance": float(known.size[seen].mean()) if bool(seen.any()) else None,
                "universal_size": hardening.universal,
            },
        )


class _Hardening:
    """The loop: the model, its optimiser, and what is known of the distances."""

    def __init__(self, view: DefenderView, config: MOTHConfig, channels_last: bool) -> None:
        self.view, self.config, self.model, self.images = view, config, view.model, view.clean
        self.seed = view.derive_seed("hardening")
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=config.momentum, nesterov=True)
        padding, flip = crops(view)
        self.loader = BatchLoader(
            self.images,
            min(config.batch_size, len(self.images)),
            seed=self.seed,
            padding=padding,
            flip=flip,
            channels_last=channels_last,
            merge_single=True,
        )
        channels, height, width = view.image_size
        self.known = Distances((1 + channels, height, width), view.num_classes)
        self.largest = config.largest_share * height * width
        self.universal: list[float | None] = []
        self._mean, self._std = (
            torch.tensor(v, device=view.device).view(-1, 1, 1) for v in (self.images.mean, self.images.std)
        )

    def run(self) -> list[dict[str, Any]]:
        """Warm-up and hardening, or what a killed run left of it; a row a period."""
        view, total = self.view, self.config.harden_iters
        folder = view.checkpoint / "hardening" if view.checkpoint is not None else None
        kept = Keeper(folder, self.model, self.images, {**self.config.model_dump(mode="json"), "seed": self.seed})
        history: list[dict[str, Any]] = []
        if (found := kept.find()) is not None:
            self._load(found[0])
            history = found[1]
        done = sum(row["steps"] for row in history if row["phase"] == "hardening")
        with bar(f"{view.method}: hardening", total, view.progress, done=done) as shown:
            if not history:
                history.append(self._warm_up())
                kept.offer(self._state(), history)
            while done < total:
                steps = min(_PERIOD, total - done)
                history.append(self._period(done, steps))
                done += steps
                shown.advance(steps)
                shown.show({"loss": history[-1]["loss"]})
                kept.offer(self._state(), history)
        self.universal = history[0]["sizes"]
        return history

    def _warm_up(self) -> dict[str, Any]:
        config, k = self.config, self.view.num_classes
        x, labels = self._few()
        problems = universal_problems(x, labels, k)
        found = self._invert(problems, config.universal_iters, config.first_cost, config.universal_threshold, -1, None)
        classes = torch.arange(k)
        drop = found.loss_drop.cpu().double()
        source, owner = labels[problems.rows].cpu(), problems.owner.cpu()
        for t in range(k):
            for s in classes[classes != t].tolist():
                self.known.drop[s, t] = drop[(owner == t) & (source == s)].mean()
                self.known.trigger[s, t] = found.trigger[t].cpu()
                self.known.size[s, t] = found.size[t] if found.found[t] else 0.0
        # In units of the largest: the gains that follow are relative.
        self.known.gain = self.known.size / self.known.size.max().clamp(min=1e-12)
        losses = []
        for t in range(k):
            batch = self._batch(t)
            others = torch.nonzero(batch.y != t).flatten().cpu()
            take = int(config.universal_share * len(others))
            carriers = others[self._shuffled(len(others), "warm-up", t)[:take]]
            trigger = found.trigger[t] if found.found[t] and found.size[t] < self.largest else None
            losses.append(self._step(batch, [(carriers, trigger)]))
        sizes = [float(size) if math.isfinite(size) else None for size in found.size.tolist()]
        return {"phase": "warmup", "steps": k, "loss": sum(losses) / k, "sizes": sizes}

    def _period(self, done: int, steps: int) -> dict[str, Any]:
        """Some steps of the model against the same pairs."""
        config, known = self.config, self.known
        chosen = known.choose(done, config.pairs, config.random_share, self.seed)
        pairs = torch.stack([chosen, chosen.flip(1)], dim=1).flatten(0, 1)
        start = known.trigger[pairs[:, 0], pairs[:, 1]].to(self.view.device)
        sums, counts = torch.zeros(2, len(pairs), dtype=torch.float64).unbind(0)
        losses, fresh = [], True
        for step in range(done, done + steps):
            batch = self._batch(self.view.num_classes + step)
            here = torch.isin(pairs, batch.y.cpu()).all(dim=1)
            index = torch.nonzero(here).flatten()
            carriers: list[tuple[Tensor, Tensor | None]] = []
            if len(index):
                settings = (config.first_iters, config.first_cost) if fresh else (config.next_iters, config.next_cost)
                problems = pair_problems(batch.x, batch.y, pairs[index])
                found = self._invert(problems, *settings, config.pair_threshold, step, start[index.to(start.device)])
                fresh = not bool(found.found.all())
                for j, row in enumerate(index.tolist()):
                    if not found.found[j]:
                        continue
                    start[row] = found.trigger[j]
                    sums[row] += found.size[j]
                    counts[row] += 1
                    trigger = found.trigger[j] if found.size[j] < self.largest else None
                    carriers.append((self._carriers(batch, pairs[row], step), trigger))
            losses.append(self._step(batch, carriers))
        for row, (s, t) in enumerate(pairs.tolist()):
            # The larger trigger is where the next inversion of the pair begins.
            if start[row, 0].sum() > known.trigger[s, t, 0].sum():
                known.trigger[s, t] = start[row].cpu()
        sizes = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
        known.record(pairs, sizes)
        return {
            "phase": "hardening",
            "steps": steps,
            "loss": sum(losses) / steps,
            "pairs": pairs.tolist(),
            "sizes": [size if math.isfinite(size) else None for size in sizes.tolist()],
        }

    def _carriers(self, batch: Batch, pair: Tensor, step: int) -> Tensor:
        """Images of the first class of a pair that carry the trigger."""
        sizes = [int((batch.y == c).sum()) for c in pair.tolist()]
        take = max(1, int(self.config.portion * min(sizes)))
        own = torch.nonzero(batch.y == pair[0]).flatten().cpu()
        return own[self._shuffled(len(own), "carriers", step, *pair.tolist())[:take]]

    def _invert(
        self, problems: Problems, steps: int, cost: float, threshold: float, turn: int, start: Tensor | None
    ) -> PairTriggers:
        settings = self.config.inversion(steps, cost, threshold)
        seed = derive_seed("inversion", self.seed, turn)
        with evaluating(self.model), trainable(self.model, False):
            try:
                return invert_pairs(self.model, self.images, problems, settings, seed=seed, start=start)
            except DivergedError as error:
                where = "warm-up" if turn < 0 else f"hardening, step {turn}"
                raise DivergedError(f"moth, {where}: {error.what}", error.remedy or lower(self.config, "lr")) from error

    def _step(self, batch: Batch, carriers: list[tuple[Tensor, Tensor | None]]) -> float:
        """One step of the model on a batch some images of which carry triggers; labels stay."""
        x = batch.x.clone()
        for rows, trigger in carriers:
            if trigger is not None and len(rows):
                rows = rows.to(x.device)
                pattern = (trigger[1:] - self._mean) / self._std
                x[rows] = torch.lerp(x[rows], pattern.expand_as(x[rows]), trigger[:1].expand_as(x[rows]))
        self.model.train(self.config.train_mode)
        loss = F.cross_entropy(self.model(x).float(), batch.y)
        value = float(loss.detach())
        if not math.isfinite(value):
            self.model.eval()
            step = batch.epoch * len(self.loader) + batch.step
            raise DivergedError(
                f"moth, hardening: the training loss became {value} in step {step} (the first {self.view.num_classes} "
                "are the warm-up's)",
                lower(self.config, "lr"),
            )
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self.model.eval()
        return value

    def _few(self) -> tuple[Tensor, Tensor]:
        """The first images of every class, as many of each, as they are stored."""
        labels = self.images.labels
        counts = torch.bincount(labels, minlength=self.view.num_classes)
        each = min(self.config.universal_images, int(counts.min()))
        rows = torch.cat([torch.nonzero(labels == c).flatten()[:each] for c in range(self.view.num_classes)])
        few = self.images.subset(rows)
        (batch,) = BatchLoader(few, len(few), augment=False, shuffle=False).epoch(0)
        return batch.x, batch.y

    def _batch(self, number: int) -> Batch:
        epoch, at = divmod(number, len(self.loader))
        return next(batch for batch in self.loader.epoch(epoch) if batch.step == at)

    def _shuffled(self, n: int, *tags: int | str) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(*tags, self.seed)))

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"sgd.{name}": value for name, value in optimizer_state(self.sgd).items()}
        return state | {f"known.{name}": value for name, value in self.known.tensors().items()}

    def _load(self, state: dict[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}

        self.model.load_state_dict(part("model"))
        load_optimizer_state(self.sgd, part("sgd"))
        for name, value in part("known").items():
            setattr(self.known, name, value.clone())
