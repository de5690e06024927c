"""What a tool looks at: a model and the images of its attack, with nothing that it could spoil."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bbfast.analysis._named import find_layer
from bbfast.analysis.views import Pairs, Taken, View
from bbfast.data.loader import derive_seed
from bbfast.defenses.features import normalised
from bbfast.defenses.view import private_copy
from bbfast.errors import BBFastError, DataRequirementError, UnknownNameError

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["POISONED", "Pairs", "Subject", "View"]

POISONED = 0.1
"""Share of triggered images in the view ``mixed``."""


class Subject:
    """A model under analysis and its data.

    The model is a private copy in eval mode, frozen: hooks and gradients leave the result alone. Which samples a view
    has is a function of the data, the seed and the number asked for, never of the model.

    Args:
        attack: Result of the attack.
        defense: Result of a defense of it; its model is looked at instead of the attack's.
        device: Where to compute.
        seed: Of every choice of samples.

    Raises:
        DataRequirementError: if there is no model.
    """

    def __init__(
        self, attack: AttackResult, defense: DefenseResult | None, device: torch.device, seed: int = 0
    ) -> None:
        model = attack.model if defense is None else defense.model
        if not isinstance(model, nn.Module):
            what = "this defense gave none" if defense is not None else "the attack result holds none"
            raise DataRequirementError(f"analysis needs a model, and {what}")
        self.attack, self.defense, self.device, self.seed = attack, defense, device, seed
        self.model = private_copy(model, device).requires_grad_(False)
        self.taken = Taken()
        """What :meth:`pairs` and :meth:`view` handed out."""

    @property
    def attacked_model(self) -> nn.Module:
        """A copy of the attack's own model: what a defended one is compared with."""
        return private_copy(self.attack.model, self.device).requires_grad_(False)

    @property
    def num_classes(self) -> int:
        return self.attack.num_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; their numbers if the data set has none."""
        names = self.attack.config["data"].get("class_names") or []
        return (
            [str(name) for name in names] if len(names) == self.num_classes else list(map(str, range(self.num_classes)))
        )

    @property
    def image_size(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.attack.test.image_size

    def caption(self) -> str:
        """One line that says what is looked at: data set, model, attack, ratio, defense, seed."""
        config = self.attack.config
        parts = [str(config["data"]["name"]), str(config["model"]["name"]), str(config["attack"])]
        ratio = self.attack.metrics.get("poison_ratio")
        parts += [f"{100 * ratio:.3g} % poisoned"] if ratio is not None else []
        parts += [str(self.defense.config["defense"])] if self.defense is not None else []
        return ", ".join([*parts, f"seed {self.seed}"])

    def generator(self, tag: str) -> torch.Generator:
        """A CPU generator of its own for each ``tag``."""
        return torch.Generator().manual_seed(derive_seed("analysis", self.seed, tag))

    # Images -----------------------------------------------------------------------------------------------------------

    def pairs(self, n: int | None = None) -> Pairs:
        """Test images without and with the trigger, aligned; ``n`` of them at random, all in order if None.

        Raises:
            DataRequirementError: if the backdoor test set is empty.
        """
        bad, test = self.attack.backdoor_test, self.attack.test
        if not len(bad):
            raise DataRequirementError("analysis of triggered images needs a backdoor test set, and this one is empty")
        place = {number: i for i, number in enumerate(test.ids.tolist())}
        rows = torch.tensor([place[number] for number in bad.ids.tolist()])
        chosen = self._some(len(bad), n, "pairs")
        self.taken.add("pairs", bad.ids[chosen])
        return Pairs(
            test.images[rows[chosen]],
            bad.images[chosen],
            bad.original_labels[chosen],
            bad.labels[chosen],
            bad.ids[chosen],
        )

    def view(self, name: str, n: int | None = None) -> View:
        """Images by the name of a view.

        Args:
            name: ``clean_test``; ``bd_test``: all triggered test images; ``mixed``: the test set, a tenth of it
                triggered; ``clean_train``; ``bd_train``: the training set as the learner saw it.
            n: How many, as many of each class, with every poisoned one up to 200 at least; all if None.

        Raises:
            UnknownNameError: if there is no such view.
            DataRequirementError: if the result has no such images.
        """
        made = self._views().get(name)
        if made is None:
            raise UnknownNameError("view", name, list(self._views()))
        return self.some_of(made(), n, name)

    def some_of(self, whole: View, n: int | None, name: str) -> View:
        """``n`` samples of a view, as :meth:`view` chooses them; all if None."""
        found = whole if n is None or n >= len(whole) else whole.take(self._balanced(whole, n, name))
        self.taken.add(name, found.ids)
        return found

    def _views(self) -> Mapping[str, Callable[[], View]]:
        return {
            "clean_test": self._clean_test,
            "bd_test": self._bd_test,
            "mixed": self._mixed,
            "clean_train": self._clean_train,
            "bd_train": self._bd_train,
        }

    def _clean_test(self) -> View:
        test = self.attack.test
        return View(test.images, test.labels, test.labels, torch.zeros(len(test), dtype=torch.bool), test.ids)

    def _bd_test(self) -> View:
        bad = self.attack.backdoor_test
        if not len(bad):
            raise DataRequirementError("the view 'bd_test' is empty: the attack has no triggered test images")
        return View(bad.images, bad.original_labels, bad.labels, torch.ones(len(bad), dtype=torch.bool), bad.ids)

    def _mixed(self) -> View:
        clean, bad = self._clean_test(), self._bd_test()
        count = min(len(bad), max(1, round(POISONED * len(clean))))
        chosen = bad.take(self._some(len(bad), count, "mixed"))
        rest = clean.take((~torch.isin(clean.ids, chosen.ids)).nonzero().flatten())
        both = [torch.cat([getattr(rest, f.name), getattr(chosen, f.name)]) for f in dataclasses.fields(View)]
        return View(*both).take(torch.randperm(len(clean), generator=self.generator("mixed order")))

    def _clean_train(self) -> View:
        train = self._train().clean_train
        return View(train.images, train.labels, train.labels, torch.zeros(len(train), dtype=torch.bool), train.ids)

    def _bd_train(self) -> View:
        attack = self._train()
        return View(attack.train.images, attack.original_labels, attack.train.labels, attack.poisoned, attack.train.ids)

    def _train(self) -> AttackResult:
        if self.attack.train is None or not len(self.attack.train):
            raise DataRequirementError("this view needs the training set, and the attack's result has none")
        return self.attack

    def _some(self, total: int, n: int | None, tag: str) -> Tensor:
        if n is None or n >= total:
            return torch.arange(total)
        return torch.randperm(total, generator=self.generator(tag))[:n].sort().values

    def _balanced(self, view: View, n: int, tag: str) -> Tensor:
        """As many clean ones of each class, and the poisoned in proportion, but 200 of them if there are so many."""
        generator = self.generator(f"balanced {tag}")
        total, bad = len(view), int(view.poisoned.sum())
        share = min(bad, max(round(n * bad / total), min(bad, 200)), n)
        order = torch.randperm(total, generator=generator)
        poisoned = order[view.poisoned[order]][:share]
        clean = order[~view.poisoned[order]]
        # Round after round of one sample a class, until there are enough.
        rank = torch.zeros(len(clean), dtype=torch.int64)
        for label in view.labels[clean].unique():
            own = (view.labels[clean] == label).nonzero().flatten()
            rank[own] = torch.arange(len(own))
        clean = clean[rank.argsort(stable=True)][: n - share]
        return torch.cat([clean, poisoned]).sort().values

    # The model --------------------------------------------------------------------------------------------------------

    def batches(self, images: Tensor, size: int = 256) -> Iterator[Tensor]:
        """Images as the model wants them: float32, normalised, on the device, in order."""
        data = self.attack.config["data"]
        mean, std = (tuple(float(value) for value in data[key]) for key in ("mean", "std"))
        images = images.to(self.device)
        for start in range(0, len(images), size):
            yield normalised(images, start, size, mean, std)

    def pixels(self, images: Tensor) -> Tensor:
        """All of ``images`` in one normalised batch, for tools that take gradients of a few."""
        return torch.cat(list(self.batches(images)))

    @torch.no_grad()
    def logits(self, images: Tensor, size: int = 256) -> Tensor:
        """float32 ``[n, K]`` on the CPU.

        Raises:
            BBFastError: if one is NaN or infinite: the largest of such is any class, usually the first.
        """
        parts = [self.model(x).float().cpu() for x in self.batches(images, size)]
        found = torch.cat(parts) if parts else torch.zeros(0, self.num_classes)
        if bad := int((~found.isfinite()).any(1).sum()):
            raise BBFastError(f"the model's logits are not finite for {bad} of {len(found)} images: it says nothing")
        return found

    def layer(self, name: str) -> tuple[str, nn.Module]:
        """A layer by its dotted name or by a role (``stage3``, ``last_conv``), see
        :func:`bbfast.models.roles`; of a role with several, the last.

        Raises:
            UnknownNameError: if there is none; with the nearest names and the roles.
        """
        return find_layer(self.model, name)

    @contextlib.contextmanager
    def watching(self, callbacks: Mapping[str, Callable[[Tensor], Any]]) -> Iterator[None]:
        """While the block lasts, give what each named layer puts out to its callback, before anything changes it."""
        hooks = []
        for name, callback in callbacks.items():

            def hook(_: nn.Module, __: Any, out: Any, callback: Callable[[Tensor], Any] = callback) -> None:
                callback(out[0] if isinstance(out, tuple) else out)

            hooks.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
