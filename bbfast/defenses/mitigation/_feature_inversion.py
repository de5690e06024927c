"""Triggers and their feature masks for all classes in one batch: the optimisation of FeatureRE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from bbfast._progress import bar
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader, derive_seed
from bbfast.defenses.mitigation._inversion import adam_step, squash
from bbfast.defenses.mitigation._keep import Keeper
from bbfast.defenses.mitigation._split import Split
from bbfast.errors import DivergedError
from bbfast.models._unet import UNet
from bbfast.training.device import Numerics

__all__ = ["FeatureInversion", "FeatureSettings"]

_TERMS = ("cosine", "success", "image", "std", "mask", "loss")


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """See :class:`bbfast.defenses.mitigation.feature_re.FeatureREConfig`, which documents them."""

    warmup_epochs: int
    epochs: int
    generator_lr: float
    mask_lr: float
    image_bound: float
    std_bound: float
    success_bound: float
    mask_share: float
    patience: int | None


class FeatureInversion:
    """One generator and one mask a class, with Adam's moments; rows of stacked tensors.

    Classes do not touch one another: images, their order and the reference features drawn for them are common, losses
    are summed, and every mean is over the images of other classes. So a class ends as it would alone.

    Args:
        split: The frozen model, in eval mode.
        images: Clean images, every class among them.
        classes: Classes to invert, int64 ``[K]``, on the images' device.
        generators: K networks from images to images, of one form.
        settings: Settings.
        chunk: Classes in one forward pass.
        numerics: Number format.
        loader: Batches of the images.
    """

    def __init__(
        self,
        split: Split,
        images: ImageSet,
        classes: Tensor,
        generators: list[UNet],
        settings: FeatureSettings,
        *,
        chunk: int,
        numerics: Numerics,
        loader: BatchLoader,
    ) -> None:
        self._split, self._classes, self._settings = split, classes, settings
        self._chunk, self._numerics, self._loader = chunk, numerics, loader
        self._form = generators[0]
        self.features = self._read(images)
        labels = images.labels
        self._centres = torch.stack([self.features[labels == c].mean(dim=0) for c in classes.tolist()])
        k = len(classes)
        made, _ = stack_module_state(generators)
        self._names = list(made)
        raw = torch.ones(k, *self.features.shape[1:], device=classes.device)
        self._rows = [*(made[name].detach() for name in self._names), raw]
        self._first = [torch.zeros_like(value) for value in self._rows]
        self._second = [torch.zeros_like(value) for value in self._rows]
        # Weights of the violated bounds: image, std, success.
        self._weights = torch.ones(3, k, device=classes.device)
        self.best = torch.full((k,), torch.inf, dtype=torch.float64)
        self._best_raw = raw.clone()
        self.last = torch.full((k,), torch.inf, dtype=torch.float64)
        self._stale = torch.zeros(k, dtype=torch.int64)
        self.done = torch.zeros(k, dtype=torch.bool)
        self.epoch = 0

    @property
    def masks(self) -> Tensor:
        """``[K, ...]`` in 0..1, after the last pass."""
        return squash(self._rows[-1])

    @property
    def best_masks(self) -> Tensor:
        """``[K, ...]`` in 0..1, each after the pass that scored ``best``."""
        return squash(self._best_raw)

    @property
    def mask_bound(self) -> int:
        """L1 norm that a mask may have."""
        return int(self._settings.mask_share * self.features[0].numel())

    @torch.no_grad()
    def generate(self, row: int, x: Tensor) -> Tensor:
        """What the generator of a class makes of normalised images."""
        own = {name: value[row] for name, value in zip(self._names, self._rows, strict=False)}
        made: Tensor = functional_call(self._form, own, (x,))
        return made

    def run(self, kept: Keeper, progress: bool | None, description: str) -> list[dict[str, Any]]:
        """All epochs, or those that a killed run left; a row each."""
        settings, history = self._settings, list[dict[str, Any]]()
        if (found := kept.find()) is not None:
            self._load(found[0])
            history = found[1]
        total = settings.warmup_epochs + settings.epochs
        with bar(description, total, progress, done=self.epoch) as shown:
            while self.epoch < total and not bool(self.done.all()):
                history.append(self._pass(self.epoch < settings.warmup_epochs))
                shown.advance()
                shown.show({"classes left": int((~self.done).sum()), "lowest score": float(self.best.min())})
                kept.offer(self._state(), history)
        return history

    def _pass(self, warm: bool) -> dict[str, Any]:
        """One pass over the images for the classes that are left."""
        active = torch.nonzero(~self.done).flatten()
        index = active.to(self._classes.device)
        whole = len(active) == len(self.done)
        work = [self._rows, self._first, self._second]
        if not whole:
            # Compacted copies: finished classes cost nothing.
            work = [[value[index] for value in group] for group in work]
        sums = torch.zeros(len(_TERMS), len(active), device=index.device)
        for batch in self._loader.epoch(self.epoch):
            for start in range(0, len(active), self._chunk):
                piece = slice(start, start + self._chunk)
                sums[:, piece] += self._step(batch, [[v[piece] for v in group] for group in work], index[piece], warm)
        if not whole:
            for group, values in zip((self._rows, self._first, self._second), work, strict=True):
                for target, value in zip(group, values, strict=True):
                    target[index] = value
        self.epoch += 1
        return self._score(active, (sums / len(self._loader)).double().cpu(), warm)

    def _step(self, batch: Batch, work: list[list[Tensor]], index: Tensor, warm: bool) -> Tensor:
        """A step of Adam on the generators of some classes, then one on their masks; the terms ``[6, A]``."""
        rows, first, second = work
        settings, classes = self._settings, self._classes[index]
        leaves = [value.detach().requires_grad_() for value in rows[:-1]]
        mask = squash(rows[-1])
        loss, terms = self._generator_loss(batch, leaves, mask, index, warm)
        terms[5] = loss.detach()
        count = self.epoch * len(self._loader) + batch.step + 1
        for i, gradient in enumerate(torch.autograd.grad(loss.sum(), leaves)):
            adam_step(rows[i], gradient, first[i], second[i], count, settings.generator_lr)
        if warm:
            return terms
        raw = rows[-1].detach().requires_grad_()
        with torch.no_grad(), self._numerics.autocast(batch.x.device):
            made = self._make(rows[:-1], batch.x)
        ce, _ = self._mixed(made, batch, squash(raw), classes, 1)[:2]
        size = squash(raw).flatten(1).abs().sum(dim=1)
        loss = ce + torch.where(size > self.mask_bound, size, 0.0)
        (gradient,) = torch.autograd.grad(loss.sum(), raw)
        done = count - settings.warmup_epochs * len(self._loader)
        adam_step(rows[-1], gradient, first[-1], second[-1], done, settings.mask_lr)
        terms[4] = size.detach()
        return terms

    def _generator_loss(
        self, batch: Batch, leaves: list[Tensor], mask: Tensor, index: Tensor, warm: bool
    ) -> tuple[Tensor, Tensor]:
        settings, classes = self._settings, self._classes[index]
        others = _others(batch.y, classes)
        with self._numerics.autocast(batch.x.device):
            made = self._make(leaves, batch.x)
        image = _mean((made.float() - batch.x).square().flatten(2).mean(dim=2), others)
        ce, success, z = self._mixed(made, batch, None if warm else mask, classes, 0)
        ones = (1,) * (z.dim() - 2)
        weights = others.view(*others.shape, *ones)
        count = others.sum(dim=1).view(-1, *ones)
        centre = (weights * z).sum(dim=1) / count
        cosine = F.cosine_similarity(centre.flatten(1), self._centres[index].flatten(1), dim=1)
        variance = (weights * (z - centre[:, None]).square()).sum(dim=1) / (count - 1).clamp(min=1)
        std = (mask * variance.clamp(min=1e-12).sqrt()).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)
        terms = torch.stack([cosine, success, image, std, *(torch.zeros_like(std),) * 2]).detach()
        if warm:
            return ce + torch.where(image > settings.image_bound, 100 * image, 0.0), terms
        violated = self._weights[:, index]
        loss = 5 * cosine.clamp(min=0)
        loss = loss + torch.where(std > settings.std_bound, 10 * (1 + violated[1]) * std, 0.0)
        loss = loss + torch.where(image > settings.image_bound, 10 * (1 + violated[0]) * image, 0.0)
        return loss + torch.where(success < settings.success_bound, (1 + violated[2]) * ce, 0.0), terms

    def _make(self, rows: list[Tensor], x: Tensor) -> Tensor:
        """Images ``[A, B, C, H, W]`` of A generators."""
        own = dict(zip(self._names, rows, strict=True))
        made: Tensor = vmap(lambda values: functional_call(self._form, values, (x,)))(own)
        return made

    def _mixed(
        self, made: Tensor, batch: Batch, mask: Tensor | None, classes: Tensor, draw: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy to the classes ``[A]``, success ``[A]`` and features ``[A, B, ...]`` of generated images.

        With a mask, the features outside it are those of images drawn at random.
        """
        a, b = made.shape[:2]
        change = None if mask is None else self._exchange(mask, batch, draw)
        with self._numerics.autocast(made.device):
            z, logits = self._split.both(made.flatten(0, 1), change)
        others = _others(batch.y, classes)
        wanted = classes.repeat_interleave(b)
        ce = F.cross_entropy(logits.float(), wanted, reduction="none").view(a, b)
        hit = (logits.detach().argmax(dim=1) == wanted).view(a, b).float()
        return _mean(ce, others), _mean(hit, others), z.float().unflatten(0, (a, b))

    def _exchange(self, mask: Tensor, batch: Batch, draw: int) -> Callable[[Tensor], Tensor]:
        """What puts random images' features where the masks ``[A, ...]`` are not."""
        seed = derive_seed("references", self._loader.seed, batch.epoch, batch.step, draw)
        drawn = torch.randint(len(self.features), (len(batch),), generator=torch.Generator().manual_seed(seed))
        reference, weight = self.features[drawn.to(mask.device)], mask[:, None]

        def change(z: Tensor) -> Tensor:
            mine = z.unflatten(0, (len(mask), len(batch))).float()
            return (weight * mine + (1 - weight) * reference).flatten(0, 1)

        return change

    def _score(self, active: Tensor, terms: Tensor, warm: bool) -> dict[str, Any]:
        """Bookkeeping after a pass; its row."""
        settings = self._settings
        cosine, success, image, std, mask, _ = terms
        finite = terms.isfinite().all(dim=0)
        if not bool(finite.all()):
            bad = int(self._classes[active[~finite][0]])
            raise DivergedError(
                f"feature_re: what is optimised for class {bad} is not finite in epoch {self.epoch - 1}; lower "
                f"generator_lr (now {settings.generator_lr:g}) or mask_lr (now {settings.mask_lr:g})"
            )
        row: dict[str, Any] = {
            "epoch": self.epoch - 1,
            "phase": "warmup" if warm else "main",
            "classes": self._classes[active.to(self._classes.device)].tolist(),
            **{name: values.tolist() for name, values in zip(_TERMS, terms, strict=True)},
        }
        if warm:
            return row
        over = [_over(image, settings.image_bound), _over(std, settings.std_bound)]
        short = (settings.success_bound - success).clamp(min=0) / settings.success_bound
        score = cosine - success + over[0] + over[1] + _over(mask, self.mask_bound)
        index = active.to(self._classes.device)
        self._weights[:, index] = torch.stack([*over, short]).to(self._weights)
        better = score < self.best[active]
        self.last[active] = score
        improved = index[better.to(index.device)]
        self._best_raw[improved] = self._rows[-1][improved]
        self.best[active] = torch.minimum(score, self.best[active])
        self._stale[active] = torch.where(better, 0, self._stale[active] + 1)
        if settings.patience is not None:
            self.done[active] = self._stale[active] >= settings.patience
        return {**row, "score": score.tolist()}

    @torch.no_grad()
    def _read(self, images: ImageSet) -> Tensor:
        parts = []
        loader = BatchLoader(images, 256, augment=False, shuffle=False)
        for batch in loader.epoch(0):
            with self._numerics.autocast(images.device):
                parts.append(self._split.features(batch.x).float())
        return torch.cat(parts)

    def _groups(self) -> dict[str, list[Tensor]]:
        return {"value": self._rows, "first": self._first, "second": self._second}

    def _state(self) -> dict[str, Tensor]:
        state = {f"{name}.{i}": value for name, group in self._groups().items() for i, value in enumerate(group)}
        counts = {"best": self.best, "last": self.last, "stale": self._stale, "done": self.done}
        state |= {"weights": self._weights, "best_raw": self._best_raw}
        return state | counts | {"epoch": torch.tensor(self.epoch)}

    def _load(self, state: dict[str, Tensor]) -> None:
        for name, group in self._groups().items():
            for i, value in enumerate(group):
                value.copy_(state[f"{name}.{i}"])
        for target, name in ((self.best, "best"), (self.last, "last"), (self._stale, "stale"), (self.done, "done")):
            target.copy_(state[name])
        self._weights.copy_(state["weights"])
        self._best_raw.copy_(state["best_raw"])
        self.epoch = int(state["epoch"])


def _others(labels: Tensor, classes: Tensor) -> Tensor:
    """1 for images of other classes than each of ``classes``, float ``[A, B]``."""
    return (labels[None] != classes[:, None]).float()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Means of rows ``[A, B]``; 0 where nothing counts."""
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _over(value: Tensor, bound: float) -> Tensor:
    return (value - bound).clamp(min=0) / bound if bound > 0 else torch.where(value > 0, math.inf, 0.0)
