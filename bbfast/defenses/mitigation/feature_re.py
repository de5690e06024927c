"""FeatureRE: reverse-engineering of triggers in feature space."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bbfast import models
from bbfast.data.loader import BatchLoader
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._feature_inversion import FeatureInversion, FeatureSettings
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.mitigation._inversion import auto_chunk
from bbfast.defenses.mitigation._keep import Keeper
from bbfast.defenses.mitigation._split import Split, split_layer
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.models._unet import UNet, depth_for
from bbfast.training.device import choose_numerics, placed
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import deterministic, keep_freed_memory

__all__ = ["FeatureRE", "FeatureREConfig"]


class FeatureREConfig(DefenseConfig):
    """Settings of FeatureRE.

    Args:
        layer: Where images end and features begin: ``last_stage``, a stage or a dotted name (``stage3`` on the digits).
            In front of nothing but pooling and a linear layer, whatever is taken for a class must have features along
            its own, and the cosine cannot tell a trigger's from theirs.
        width: Channels of the generators' first block (4 on the digits).
        blocks: Blocks of the generators; fewer where images are too small to be halved as often.
        warmup_epochs: Passes in which the generators alone learn to reach their class (50 on the digits).
        epochs: Passes with the masks (100 on the digits).
        generator_lr: Adam's learning rate of the generators (0.005 on the digits).
        mask_lr: Adam's learning rate of the masks.
        image_bound: Mean squared change of normalised images that costs nothing.
        std_bound: Mean deviation of the masked features between images that costs nothing.
        success_bound: Success rate, in 0..1, that is enough.
        mask_share: Part of the features that a mask may cover.
        score_threshold: Score below which a class is a target.
        patience: Passes without a better score after which a class is finished and costs no more; None never ends one
            early, as in the paper.
        classes: Classes to invert; None is all.
        class_chunk: Classes in one forward pass; None is what fits.
        batch_size: Images a step.
        mitigate: Flip the neurons of the ``flagged`` target, of the lowest score whatever it is (``always``), or
            ``never``.
        amp: Precision of the networks: ``auto`` is bfloat16 where the device gains, ``off`` is float32.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours, for time: one step a pass as in the paper, but fewer and larger ones of smaller generators.
        "digits": {"layer": "stage3", "width": 4, "warmup_epochs": 50, "epochs": 100, "generator_lr": 5e-3},
    }

    layer: str = "last_stage"
    width: int = Field(32, ge=1)
    blocks: int = Field(4, ge=0)
    warmup_epochs: int = Field(100, ge=0)
    epochs: int = Field(400, ge=1)
    generator_lr: float = Field(1e-3, gt=0)
    mask_lr: float = Field(0.1, gt=0)
    image_bound: float = Field(0.15, gt=0)
    std_bound: float = Field(1.0, gt=0)
    success_bound: float = Field(0.9, gt=0, le=1)
    mask_share: float = Field(0.03, gt=0, le=1)
    score_threshold: float = -0.75
    patience: int | None = Field(None, ge=1)
    classes: tuple[int, ...] | None = None
    class_chunk: int | None = Field(None, ge=1)
    batch_size: int = Field(100, ge=2)
    mitigate: Literal["flagged", "always", "never"] = "flagged"
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    stratified: bool = False


@register_defense("feature_re")
class FeatureRE(Defense):
    """Find for every class a change of images that moves all of them to one place of a feature subspace, and flip the
    neurons of the class that succeeds best.

    For class t, a U-Net G and a mask m of the features z at the end of the last stage. G first learns to turn images of
    other classes into t without changing them much. Then, in turns of one step each,

    - G descends ``5 cos(mean z(G(x)), mean z of class t)`` (if positive) plus what is violated of: a mean deviation of
      ``m z(G(x))`` below 1, a change of the image below 0.15, success above 0.9 where the features outside m are those
      of random images;
    - m descends the cross-entropy to t, and its own size while that is above 3 % of the features.

    The score is ``cos - success`` plus the relative violations, its lowest over the passes; a class below
    ``score_threshold`` is a target. All classes are optimised in one batch
    (:class:`bbfast.defenses.mitigation._feature_inversion.FeatureInversion`).

    Mitigation: the neurons in m of the lowest target, as m was after the pass that scored lowest, are flipped,
    ``z -> (1 - m) z - m z``. No weight changes: the model that comes back multiplies the layer's output by ``1 - 2 m``
    (``<layer>.feature_factor``) and is saved and loaded whole. Without a target the model comes back as it was.

    As a detector of models: ``info["statistic"]`` is minus the lowest score, ``info["threshold"]`` minus the threshold.

    Source: Wang, Mei, Ding, Zhai, Ma, NeurIPS 2022, arXiv 2210.15127, section 3; numbers as in the authors' code.
    Deviations: see the card.
    """

    card = DefenseCard(
        title="Rethinking the Reverse-engineering of Trojan Triggers",
        paper="Wang, Mei, Ding, Zhai, Ma, NeurIPS 2022",
        year=2022,
        arxiv="2210.15127",
        kinds=("mitigation", "model"),
        needs=frozenset({"model", "clean"}),
        summary="Reverse-engineers triggers in feature space for all classes and flips the neurons of the target.",
        deviations=(
            "All classes are scanned; the public mitigation scripts are told the true target.",
            "All classes are optimised in one batch on a common order of images, of which each leaves out its own; per "
            "class the steps are the same.",
            "The reference features of a step are of the same random images for all classes.",
            "Neurons are flipped only if a class is below the threshold (mitigate='always' flips those of the lowest).",
            "The flipped mask is of the pass that scored lowest, as the verdict is; the authors flip the last pass's.",
        ),
    )
    Config = FeatureREConfig
    version = 2  # 1 flipped the mask of the last pass

    def check(self, view: DefenderView) -> None:
        split_layer(view.model, "feature_re", self.config.layer)
        chosen = self.config.classes
        if chosen is not None and (
            not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < view.num_classes for c in chosen)
        ):
            raise ConfigError(
                f"defense feature_re: classes must be different numbers in 0..{view.num_classes - 1}, got {chosen}"
            )
        counts = torch.bincount(view.clean.labels.cpu(), minlength=view.num_classes)[: view.num_classes]
        missing = torch.nonzero(counts == 0).flatten().tolist()
        if missing:
            raise DataRequirementError(
                f"feature_re compares with the mean feature of every class, but the hold-out of {len(view.clean)} "
                f"images has none of class {missing[0]} ({len(missing)} classes are missing); raise clean_fraction or "
                "draw with stratified=True"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        config: FeatureREConfig = self.config
        model = view.model
        layer = split_layer(model, "feature_re", config.layer)
        started = time.perf_counter()
        found, history = self._invert(view, layer)
        scores = found.best.tolist()
        chosen = list(range(view.num_classes) if config.classes is None else config.classes)
        order = sorted(range(len(chosen)), key=lambda i: (scores[i], chosen[i]))
        targets = [chosen[i] for i in order if scores[i] < config.score_threshold]
        flips = config.mitigate == "always" or (config.mitigate == "flagged" and bool(targets))
        mask: Tensor = found.best_masks[order[0]].detach()
        if flips:
            models.add(model, "feature_factor", layer=layer, shape=tuple(mask.shape))
            model.get_submodule(layer).feature_factor.copy_(1 - 2 * mask)  # type: ignore[operator]
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            verdict={
                "backdoored": bool(targets),
                "targets": targets,
                "anomaly": {chosen[i]: -scores[i] for i in range(len(chosen))},
            },
            history=history,
            info={
                "layer": layer,
                "flipped_class": chosen[order[0]] if flips else None,
                "mask_l1": float(mask.sum()),
                "mask_bound": found.mask_bound,
                "class_stat": dict(zip(chosen, scores, strict=True)),
                "last_score": dict(zip(chosen, found.last.tolist(), strict=True)),
                "statistic": -scores[order[0]],
                "threshold": -config.score_threshold,
                "epochs": found.epoch,
                "seconds_inversion": time.perf_counter() - started,
            },
        )

    def _invert(self, view: DefenderView, layer: str) -> tuple[FeatureInversion, list[dict[str, Any]]]:
        config: FeatureREConfig = self.config
        model, clean = view.model, view.clean
        chosen = list(range(view.num_classes) if config.classes is None else config.classes)
        numerics = choose_numerics({"off": "fp32"}.get(config.amp, config.amp), "auto", model, view.device)
        settings = FeatureSettings(**{name: getattr(config, name) for name in FeatureSettings.__dataclass_fields__})
        seed = view.derive_seed("inversion")
        loader = BatchLoader(clean, config.batch_size, seed=seed, augment=False, channels_last=numerics.channels_last)
        folder = view.checkpoint / "inversion" if view.checkpoint is not None else None
        identity = {**config.model_dump(mode="json"), "seed": seed, "layer": layer, "version": self.version}
        kept = Keeper(folder, model, clean, identity)
        with (
            evaluating(model),
            trainable(model, False),
            placed(model, view.device, numerics.memory_format),
            deterministic(view.recipe is not None and view.recipe.deterministic),
            keep_freed_memory(view.device),
        ):
            generators = [self._fresh(view, c) for c in chosen]
            # A generator's activations are about as many as a large classifier's.
            chunk = config.class_chunk or min(
                auto_chunk(net, clean, config.batch_size, numerics) for net in (model, generators[0])
            )
            found = FeatureInversion(
                Split(model, layer),
                clean,
                torch.tensor(chosen, device=view.device),
                generators,
                settings,
                chunk=chunk,
                numerics=numerics,
                loader=loader,
            )
            history = found.run(kept, view.progress, f"{view.method}: inversion")
        return found, history

    def _fresh(self, view: DefenderView, target: int) -> UNet:
        config: FeatureREConfig = self.config
        channels, height, width = view.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(view.derive_seed(f"generator {target}"))
            made = UNet(channels, config.width, depth_for(height, width, config.blocks))
        return made.to(view.device)
