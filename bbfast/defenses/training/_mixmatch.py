"""MixMatch with half of the labels dropped, and the loss by which DBD chooses them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.training._contrastive import classifier
from bbfast.errors import DivergedError
from bbfast.models import features
from bbfast.training import Batch, Program, Recipe, predict

__all__ = ["MixMatch", "clock", "cycled", "interleaved", "lowest", "sce", "sharpened"]


def sce(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Symmetric cross-entropy of each sample: ``alpha CE + beta RCE``, float ``[B]``.

    ``RCE = -sum_k p_k log q_k``, ``p`` the probabilities (at least 1e-7), ``q`` the label's one-hot (at least 1e-4).

    Source: Wang et al., ICCV 2019, eq. 5 to 7.
    """
    p = logits.softmax(dim=1).clamp(1e-7, 1.0)
    q = F.one_hot(labels, logits.shape[1]).to(p).clamp(1e-4, 1.0)
    return alpha * F.cross_entropy(logits, labels, reduction="none") - beta * (p * q.log()).sum(dim=1)


def lowest(losses: Tensor, share: float) -> Tensor:
    """bool ``[N]``: the ``int(share N)`` lowest, ties in the stored order."""
    chosen = torch.zeros(len(losses), dtype=torch.bool)
    chosen[losses.argsort(stable=True)[: int(share * len(losses))]] = True
    return chosen


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """``p^(1/T)``, normalised over the last dimension."""
    raised = p ** (1 / temperature)
    return raised / raised.sum(dim=-1, keepdim=True)


def cycled(members: Tensor, batch: int, steps: int) -> Tensor:
    """Which samples are in each step: int64 ``[steps, batch]`` of ``members``, shuffled anew whenever fewer than a
    batch are left; draws from torch's global CPU generator."""
    each = len(members) // batch
    passes = [torch.randperm(len(members))[: each * batch] for _ in range(math.ceil(steps / each))]
    return members[torch.cat(passes)[: steps * batch]].view(steps, batch)


def interleaved(groups: int, size: int) -> Tensor:
    """int64 ``[groups size]``: an order in which each of ``groups`` runs of ``size`` samples holds some of every run.

    It undoes itself: position i and the sample there change places.
    """
    at = torch.arange(groups * size).view(groups, size)
    bounds = [size * g // groups for g in range(groups + 1)]
    out = at.clone()
    for a in range(groups):
        for b in range(groups):
            # Part b of run a comes from part a of run b where the parts are equally long.
            part, other = slice(bounds[b], bounds[b + 1]), slice(bounds[a], bounds[a + 1])
            n = min(bounds[b + 1] - bounds[b], bounds[a + 1] - bounds[a])
            out[a, part][:n] = at[b, other][:n]
    return out.flatten()


def clock(steps: int, like: ImageSet) -> ImageSet:
    """A training set that only counts: in batches of two an epoch has ``steps`` of them."""
    blank = torch.zeros(2 * steps, like.images.shape[1], 1, 1, dtype=torch.uint8, device=like.device)
    return ImageSet(blank, torch.zeros(2 * steps, dtype=torch.int64, device=like.device), like.mean, like.std)


class MixMatch(Program):
    """Warm-up of the classifier, then MixMatch; one optimiser for both.

    It is trained on a :func:`clock` in batches of two: an epoch has as many steps as is asked for, not as the data have
    batches, and every step makes its batch here.

    Args:
        data: The training set, in an order that storage has no part in.
        config: Settings of DBD.
        lambda_u: Weight of the unlabelled term after the ramp.
        rampup: Epochs of the ramp, the warm-up's included.
        padding: Zero padding of the random crop, in pixels.
        flip: Whether to mirror half of the time.
    """

    augments_itself: ClassVar[bool] = True
    classifies: ClassVar[bool] = False

    def __init__(self, data: ImageSet, config: Any, lambda_u: float, rampup: int, padding: int, flip: bool) -> None:
        self._data, self._config, self._lambda_u, self._rampup = data, config, lambda_u, rampup
        self._padding, self._flip = padding, flip

    def describe(self) -> dict[str, Any]:
        held = content_hash({"images": self._data.images, "labels": self._data.labels})
        own = ("warmup_epochs", "warmup_batch", "label_fraction", "sce_alpha", "sce_beta", "semi_batch", "sharpen")
        settings = {name: getattr(self._config, name) for name in (*own, "mixup_alpha", "separate_norm")}
        rest = [self._lambda_u, self._rampup, self._padding, self._flip, self._data.mean, self._data.std]
        return {**super().describe(), "data": held, **settings, "rest": rest}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._data, self._model = self._data.to(device), model
        self._num_classes = classifier(model, "dbd").out_features

    def losses(self, model: nn.Module) -> Tensor:
        """:func:`sce` of every sample: eval mode, no augmentation; float64 ``[N]`` on the CPU."""
        logits = predict(model, self._data, device=self._data.device).double()
        return sce(logits, self._data.labels.cpu(), self._config.sce_alpha, self._config.sce_beta)

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        if epoch == 0:
            self._warm_up()
        cfg, model = self._config, self._model
        losses = self.losses(model)
        if not bool(losses.isfinite().all()):
            raise DivergedError(
                f"the losses of {int((~losses.isfinite()).sum())} samples are NaN or infinite before epoch {epoch}"
            )
        labelled = lowest(losses, cfg.label_fraction)
        self._row = {"labelled_loss": float(losses[labelled].mean())}
        self._steps = steps
        batch = cfg.semi_batch
        index = cycled(labelled.nonzero()[:, 0], batch, steps)
        if not bool(labelled.all()):
            rest = cycled((~labelled).nonzero()[:, 0], batch, steps)
            # Both augmentations of an unlabelled sample.
            index = torch.cat([index, rest, rest], dim=1)
        self._index = index.to(self.device)
        side = 2 * self._padding + 1
        self._offset = torch.randint(side, (*index.shape, 2)).to(self.device) if self._padding else None
        self._mirror = torch.rand(index.shape).lt(0.5).to(self.device) if self._flip else None

    def make_batch(self, batch: Batch) -> Batch:
        at, data = batch.step, self._data
        index = self._index[at]
        x = ops.gather_augment(
            data.images,
            index,
            offset=None if self._offset is None else self._offset[at],
            flip=None if self._mirror is None else self._mirror[at],
            padding=self._padding,
            mean=data.mean,
            std=data.std,
            dtype=torch.float32,
            channels_last=batch.x.is_contiguous(memory_format=torch.channels_last) and data.images.shape[1] > 1,
        )
        return batch.replace(x=x, y=data.labels[index], index=index)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        cfg, size = self._config, self._config.semi_batch
        with torch.no_grad():
            x, target = self._mixed(batch.x, self._targets(model, batch))
        logits = self._forward(model, x).float()
        labelled = -(target[:size] * logits[:size].log_softmax(dim=1)).sum(dim=1).mean()
        if len(x) == size:
            return labelled, None
        done = cfg.warmup_epochs + batch.epoch + batch.step / self._steps
        weight = self._lambda_u * min(done / self._rampup, 1.0)
        unlabelled = (logits[size:].softmax(dim=1) - target[size:]).square().mean()
        return labelled + weight * unlabelled, None

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        return self._row

    def _targets(self, model: nn.Module, batch: Batch) -> Tensor:
        """One-hot labels, and for the unlabelled the mean of both augmentations' probabilities, sharpened."""
        size = self._config.semi_batch
        known = F.one_hot(batch.y[:size], self._num_classes).float()
        if len(batch) == size:
            return known
        guess = model(batch.x[size:]).float().softmax(dim=1)
        guess = sharpened(guess.view(2, size, -1).mean(dim=0), self._config.sharpen)
        return torch.cat([known, guess, guess])

    def _mixed(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._config.mixup_alpha
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        share = max(share, 1 - share)
        other = torch.randperm(len(x)).to(x.device)
        return torch.lerp(x[other], x, share), torch.lerp(target[other], target, share)

    def _forward(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self._config.separate_norm:
            return torch.as_tensor(model(x))
        size = self._config.semi_batch
        order = interleaved(len(x) // size, size).to(x.device)
        logits = torch.cat([model(part) for part in x[order].split(size)])
        return logits[order.argsort()]

    def _warm_up(self) -> None:
        """The classifier alone learns the labels by :func:`sce`; the rest stays in eval mode."""
        cfg, model = self._config, self._model
        last = classifier(model, "dbd")
        loader = BatchLoader(
            self._data,
            cfg.warmup_batch,
            seed=self.seed,
            device=self.device,
            padding=self._padding,
            flip=self._flip,
        )
        model.eval()
        for epoch in range(cfg.warmup_epochs):
            for batch in loader.epoch(epoch):
                with torch.no_grad():
                    read = features(model, batch.x, "penultimate").flatten(1)
                self.optimizer.zero_grad(set_to_none=True)
                loss = sce(last(read).float(), batch.y, cfg.sce_alpha, cfg.sce_beta).mean()
                loss.backward()
                self.optimizer.step()
        model.train()
